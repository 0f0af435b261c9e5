"""Call an algorithm's methods; errors name class and method, and node and round if there are any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jwins.errors import JwinsError, UsageError, error_text
from jwins.rng import RoundContext
from jwins.sharing.base import Sharing
from jwins.sharing.update import Received, Update


def call_init(sharing: Sharing[Any], params: Tensor) -> Any:
    """Call ``init``, and return the state before the first round.

    Raises:
        UsageError: ``init`` fails.
    """
    return call(method_name(sharing, "init"), sharing.init, params)


def call_for_model(sharing: Sharing[Any], shapes: tuple[tuple[int, ...], ...]) -> Sharing[Any]:
    """Call ``for_model``, and return the algorithm for tensors of these shapes.

    Raises:
        UsageError: it fails, or returns no algorithm.
    """
    where = method_name(sharing, "for_model")
    found: Sharing[Any] = call(where, sharing.for_model, shapes)
    if not callable(getattr(found, "share", None)):
        raise UsageError(f"{where} returned {_described(found)}: expected an algorithm")
    return found


def call_share(
    sharing: Sharing[Any], state: Any, params: Tensor, ctx: RoundContext, dim: int
) -> tuple[Update, Any]:
    """Call ``share``, and return the update of a vector of ``dim`` and the state.

    Raises:
        UsageError: it fails, or returns a wrong type or length.
    """
    where = _place(sharing, "share", ctx)
    update, after = _pair(call(where, sharing.share, state, params, ctx), where, "an update and a state")
    return _checked(update, where, dim), after


def call_for_peer(sharing: Sharing[Any], state: Any, peer: int, ctx: RoundContext, dim: int) -> Update:
    """Call ``for_peer``, and return the update of a vector of ``dim`` for a neighbour.

    Raises:
        UsageError: it fails, or returns a wrong type or length.
    """
    where = _place(sharing, "for_peer", ctx)
    return _checked(call(where, sharing.for_peer, state, peer), where, dim)


def call_keyframe(sharing: Sharing[Any], state: Any, ctx: RoundContext, dim: int) -> Update:
    """Call ``keyframe``, and return the update of a vector of ``dim`` that stands alone.

    Raises:
        UsageError: it fails, or returns a wrong type or length.
    """
    where = _place(sharing, "keyframe", ctx)
    return _checked(call(where, sharing.keyframe, state, ctx), where, dim)


def _checked(update: Any, where: str, dim: int) -> Update:
    if not isinstance(update, Update):
        raise UsageError(
            f"{where} returned {_described(update)} as its update: expected a jwins.sharing.update.Update"
        )
    if update.dim != dim:
        raise UsageError(
            f"{where} returned an update with dim = {update.dim}: expected {dim}, as update_dim returns"
        )
    return update


def call_merge(
    sharing: Sharing[Any], state: Any, params: Tensor, received: Sequence[Received], ctx: RoundContext
) -> tuple[Tensor, Any]:
    """Call ``merge``, and return the parameters of the next round and the state.

    Raises:
        UsageError: it fails, or returns a wrong type or length.
    """
    where = _place(sharing, "merge", ctx)
    merged, after = _pair(
        call(where, sharing.merge, state, params, received, ctx), where, "parameters and a state"
    )
    if not isinstance(merged, Tensor) or merged.shape != params.shape or merged.dtype != torch.float32:
        raise UsageError(
            f"{where} returned {_described(merged)} as its parameters: "
            f"expected a float32 tensor of shape {tuple(params.shape)}"
        )
    return merged, after


def check_state_types(sharing: Sharing[Any], where: str, state: object, known: Collection[type]) -> None:
    """Refuse a state with a dataclass that is neither known nor in ``state_types`` of the algorithm.

    Raises:
        UsageError: a checkpoint could not be restored; names ``where``.
    """
    types = {*known, *sharing.state_types}
    if strange := next((cls for cls in _dataclasses_in(state) if cls not in types), None):
        raise UsageError(
            f"{where} returned a state with a {strange.__name__}, which a checkpoint cannot restore: "
            f"set state_types = ({strange.__name__},) in {type(sharing).__name__}"
        )


def _dataclasses_in(value: object) -> Iterator[type]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for field in dataclasses.fields(value):
            yield from _dataclasses_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for inner in (*value, *value.values()):
            yield from _dataclasses_in(inner)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _dataclasses_in(inner)


def method_name(sharing: object, method: str) -> str:
    """Return class and method, as errors name them."""
    return f"{type(sharing).__name__}.{method}"


def _place(sharing: object, method: str, ctx: RoundContext) -> str:
    return f"node {ctx.node}, round {ctx.round}: {method_name(sharing, method)}"


def call(where: str, method: Callable[..., Any], *arguments: object) -> Any:
    """Call a method of an algorithm; its errors name ``where``."""
    try:
        return method(*arguments)
    except JwinsError as error:
        if type(error) is UsageError:  # such as that of an update's constructor
            raise UsageError(f"{where}: {error}") from error
        error.add_note(f"in {where}")
        raise
    except Exception as error:
        raise UsageError(f"{where} failed: {error_text(error)}") from error


def _pair(found: object, where: str, expected: str) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise UsageError(f"{where} returned {_described(found)}: expected two things, {expected}")
    return found


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"{value!r}" if value is None else f"a {type(value).__name__}"
