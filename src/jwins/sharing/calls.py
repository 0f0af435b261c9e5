"""Call an algorithm's methods; errors name class and method, and node and round if there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jwins.errors import JwinsError, UsageError
from jwins.rng import RoundContext
from jwins.sharing.base import Sharing
from jwins.sharing.update import Received, Update


def call_init(sharing: Sharing[Any], params: Tensor) -> Any:
    """Call ``init``, and return the state before the first round.

    Raises:
        UsageError: ``init`` fails.
    """
    return call(method_name(sharing, "init"), sharing.init, params)


def call_share(
    sharing: Sharing[Any], state: Any, params: Tensor, ctx: RoundContext, dim: int
) -> tuple[Update, Any]:
    """Call ``share``, and return the update of a vector of ``dim`` and the state.

    Raises:
        UsageError: it fails, or returns a wrong type or length.
    """
    where = _place(sharing, "share", ctx)
    update, after = _pair(call(where, sharing.share, state, params, ctx), where, "an update and a state")
    if not isinstance(update, Update):
        raise UsageError(
            f"{where} returned {_described(update)} as its update: expected a jwins.sharing.update.Update"
        )
    if update.dim != dim:
        raise UsageError(
            f"{where} returned an update with dim = {update.dim}: expected {dim}, as update_dim returns"
        )
    return update, after


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
        raise UsageError(f"{where} failed: {type(error).__name__}: {error}") from error


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
