"""Trial of a user's algorithm for one round on copies, to find mistakes before the first round."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from jwins.engines.node_group import STATE_TYPES
from jwins.errors import UsageError
from jwins.ops.mixing import check_positions
from jwins.rng import RoundContext
from jwins.run_folder.checkpoint import dump
from jwins.sharing import Sharing
from jwins.sharing.calls import (
    call,
    call_for_peer,
    call_init,
    call_keyframe,
    call_merge,
    call_share,
    check_state_types,
    method_name,
)
from jwins.sharing.update import Received
from jwins.topology.graph import Topology


def is_own(sharing: Sharing[Any]) -> bool:
    """Return whether the class of the algorithm or of a component is from outside this package."""
    components: list[object] = [sharing]
    if dataclasses.is_dataclass(sharing):
        components += [getattr(sharing, field.name) for field in dataclasses.fields(sharing)]
    modules = [str(getattr(one, "__module__", type(one).__module__)) for one in components]
    return any(not module.startswith(("jwins.", "builtins")) for module in modules)


def check_sharing(sharing: Sharing[Any], initial: Tensor, topology: Topology, seed: int) -> None:
    """Run one round of node 0, whose neighbours send the same update.

    Args:
        sharing: the algorithm; the check runs a copy.
        initial: (P,) float32, the common initial parameters; not changed.
        topology: topology whose first graph is used.
        seed: seed of the experiment.

    Raises:
        UsageError: the algorithm fails, changes its arguments, returns a wrong value, or has a
            state that a checkpoint cannot restore.
    """
    if not torch.isfinite(initial).all():
        return  # the first round ends such a run, and says so
    with contextlib.suppress(Exception):  # some contain objects that cannot be copied, with any exception
        sharing = copy.deepcopy(sharing)
    with torch.random.fork_rng(devices=[]):
        _check(sharing, initial, RoundContext(seed, 0, 0, topology.at(0).senders[0]))


def _check(sharing: Sharing[Any], initial: Tensor, ctx: RoundContext) -> None:
    start = initial.clone()
    state = call_init(sharing, start)
    _check_same(sharing, "init", "params", start, initial)
    stored = _check_state(sharing, "init", state)
    noise = torch.randn(len(initial), generator=torch.Generator().manual_seed(0)).to(initial.device)
    trained = initial + 0.01 * noise  # a step of training; without it all scores would be 0
    params = trained.clone()
    dim = sharing.update_dim(len(initial))
    again, _ = call_share(sharing, state, trained.clone(), ctx, dim)
    update, shared = call_share(sharing, state, params, ctx, dim)
    _check_same(sharing, "share", "params", params, trained)
    _check_kept(sharing, "share", state, stored)
    stored = _check_state(sharing, "share", shared)
    if isinstance(update.positions, Tensor):
        call(method_name(sharing, "share"), check_positions, update.positions, dim)
    if not update.is_finite():
        raise UsageError(f"{method_name(sharing, 'share')} returned an update with a value that is not finite")
    if not torch.equal(again.dense_values(), update.dense_values()):
        problem = "returned two updates for the same arguments; draw from ctx.rng(purpose), and change nothing"
        raise UsageError(f"{method_name(sharing, 'share')} {problem}")
    if isinstance(update.values, Tensor):  # as a received update: with its own memory
        update = dataclasses.replace(update, values=update.values.clone())
    sent = update.dense_values().clone()
    received = [Received(sender, 0, weight, update) for sender, weight in sorted(ctx.weights.items())]
    _check_for_some(sharing, shared, ctx, dim)
    apart = trained + 0.01 * noise.flip(0)  # not what was sent, so that a merge changes it
    params = apart.clone()
    first, _ = call_merge(sharing, shared, apart.clone(), received, ctx)
    first = first.clone()
    merged, state = call_merge(sharing, shared, params, received, ctx)
    _check_same(sharing, "merge", "params", params, apart)
    if merged.requires_grad:
        raise UsageError(f"{method_name(sharing, 'merge')} returned parameters with a gradient: use .detach()")
    if not torch.isfinite(merged).all():
        name = method_name(sharing, "merge")
        raise UsageError(f"{name} returned parameters with a value that is not finite")
    _check_same(sharing, "merge", "the update of a neighbour", update.dense_values(), sent)
    _check_kept(sharing, "merge", shared, stored)
    if not torch.equal(first, merged):
        problem = "returned two models for the same arguments; draw from ctx.rng(purpose), and change nothing"
        raise UsageError(f"{method_name(sharing, 'merge')} {problem}")
    _check_state(sharing, "merge", state)
    name = method_name(sharing, "stale_peers")
    stale = call(name, sharing.stale_peers, state)
    if not isinstance(stale, frozenset | set):
        raise UsageError(f"{name} returned a {type(stale).__name__}: expected a frozenset of nodes")
    if strange := [peer for peer in stale if peer not in ctx.weights]:
        raise UsageError(f"{name} names {strange[0]!r}: expected neighbours of the node")


def _check_for_some(sharing: Sharing[Any], state: Any, ctx: RoundContext, dim: int) -> None:
    own = [call_for_peer(sharing, state, peer, ctx, dim) for peer in ctx.weights if sharing.per_peer]
    if not all(update.is_finite() for update in own):
        raise UsageError(f"{method_name(sharing, 'for_peer')} returned a value that is not finite")
    if sharing.remembers_peers:
        call_keyframe(sharing, state, ctx, dim)


def _check_same(sharing: Sharing[Any], method: str, what: str, found: Tensor, before: Tensor) -> None:
    if not torch.equal(found, before):
        raise UsageError(
            f"{method_name(sharing, method)} changed {what} in place: work on a copy, with .clone()"
        )


def _check_kept(sharing: Sharing[Any], method: str, state: object, stored: bytes) -> None:
    if dump(state) != stored:
        raise UsageError(f"{method_name(sharing, method)} changed its state in place: return a new one")


def _check_state(sharing: Sharing[Any], method: str, state: object) -> bytes:
    name = method_name(sharing, method)
    if not isinstance(sharing.state_types, tuple):
        cls = type(sharing).__name__
        raise UsageError(f"{cls}.state_types is not a tuple; write state_types = ({cls}State,), with a comma")
    check_state_types(sharing, name, state, STATE_TYPES)
    try:
        return dump(state)
    except UsageError as error:
        raise UsageError(f"{name} returned a state that a checkpoint cannot hold: {error}") from None
