"""Mistakes in an algorithm of one's own are named by class and method, before round 0 where possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jwins.engines.sharing_check import check_sharing
from jwins.errors import UsageError
from jwins.experiment import Experiment, NodesConfig, RunConfig
from jwins.experiment.plugins import JwinsConfig
from jwins.experiment.sections import TrainConfig
from jwins.ops.select import largest_k
from jwins.run.assembly import build
from jwins.run.run import simulate
from jwins.sharing import Full, jwins, mix
from jwins.sharing.sparse import OwnState
from jwins.sharing.update import Update
from jwins.topology import Graph, Ring
from jwins.topology.graph import CheckedTopology


def experiment(sharing: Any, tmp_path: Path) -> Experiment:
    run = RunConfig(rounds=3, eval_samples=20, folder=tmp_path / "run")
    train = TrainConfig(batching="loop")
    return Experiment(name="own", nodes=NodesConfig(count=6), train=train, run=run, sharing=sharing)


@dataclasses.dataclass(frozen=True)
class Mine:
    last: Any


class Own(Full):
    """Full sharing with something in place of one of its methods."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        super().__init__()
        for name, method in methods.items():
            object.__setattr__(self, name, method)

    def __repr__(self) -> str:
        return "Own()"

    def __deepcopy__(self, memo: Any) -> Own:
        return self


def share(state: Any, params: Any, ctx: Any) -> Any:
    return Full().share(state, params, ctx)


def fails(*args: Any) -> Any:
    raise KeyError("gamma")


def in_place_share(state: Any, params: Any, ctx: Any) -> Any:
    params.mul_(2)
    return share(state, params, ctx)


def in_place_merge(state: Any, params: Any, received: Any, ctx: Any) -> Any:
    params.mul_(2)
    return params, state


def in_place_received(state: Any, params: Any, received: Any, ctx: Any) -> Any:
    received[0].update.values.mul_(2)
    return params, state


def in_place_state_share(state: Any, params: Any, ctx: Any) -> Any:
    state.mul_(2)
    return Full().share(OwnState(), params, ctx)[0], state.clone()


def in_place_state_merge(state: Any, params: Any, received: Any, ctx: Any) -> Any:
    state.mul_(2)
    return params.clone(), state


def disordered(state: Any, params: Any, ctx: Any) -> Any:
    return Update(len(params), torch.tensor([1, 0]), params[:2]), state


def with_state(**methods: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return methods of an algorithm whose state is a tensor."""
    return {
        "init": lambda params: params.clone(),
        "share": lambda state, params, ctx: (Full().share(OwnState(), params, ctx)[0], params.clone()),
        **methods,
    }


def in_place_init(params: Any) -> Any:
    return params.zero_()


SIZE = 12010
"""Parameters of the model of the digits."""

MISTAKES = {
    "init fails": ({"init": fails}, r"^Own\.init failed: KeyError: 'gamma'"),
    "share fails": ({"share": fails}, r"node 0, round 0: Own\.share failed: KeyError: 'gamma'"),
    "merge fails": ({"merge": fails}, r"node 0, round 0: Own\.merge failed: KeyError: 'gamma'"),
    "share gives no pair": (
        {"share": lambda state, params, ctx: share(state, params, ctx)[0]},
        r"Own\.share returned a Update: expected two things",
    ),
    "share gives nothing": ({"share": lambda *args: None}, r"Own\.share returned None: expected two things"),
    "share gives a tensor": (
        {"share": lambda state, params, ctx: (params, state)},
        r"Own\.share returned a float32 tensor of shape \(\d+,\) as its update",
    ),
    "share gives another length": (
        {"share": lambda state, params, ctx: (Update(3, None, params[:3]), state)},
        r"Own\.share returned an update with dim = 3: expected \d+",
    ),
    "share gives NaN": (
        {"share": lambda state, params, ctx: share(state, params * float("nan"), ctx)},
        r"Own\.share returned an update with a value that is not finite",
    ),
    "merge gives another length": (
        {"merge": lambda state, params, received, ctx: (params[:3], state)},
        r"Own\.merge returned a float32 tensor of shape \(3,\) as its parameters: expected",
    ),
    "merge gives another type": (
        {"merge": lambda state, params, received, ctx: (params.double(), state)},
        r"Own\.merge returned a float64 tensor",
    ),
    "merge gives a list": (
        {"merge": lambda state, params, received, ctx: ([1.0], state)},
        r"Own\.merge returned a list as its parameters",
    ),
    "init in place": ({"init": in_place_init}, r"Own\.init changed params in place"),
    "share in place": ({"share": in_place_share}, r"Own\.share changed params in place"),
    "merge in place": ({"merge": in_place_merge}, r"Own\.merge changed params in place"),
    "merge adds in place": (
        {"merge": lambda state, params, received, ctx: (params.add_(mix(params, received)), state)},
        r"Own\.merge changed params in place",
    ),
    "share changes its state": (
        with_state(share=in_place_state_share),
        r"^Own\.share changed its state in place: return a new one",
    ),
    "merge changes its state": (
        with_state(merge=in_place_state_merge),
        r"^Own\.merge changed its state in place: return a new one",
    ),
    "merge gives NaN": (
        {"merge": lambda state, params, received, ctx: (params * float("nan"), state)},
        r"^Own\.merge returned parameters with a value that is not finite",
    ),
    "share gives positions out of order": (
        {"share": disordered},
        r"^Own\.share: positions: expected strictly increasing ones",
    ),
    "share gives no update": (
        {"share": lambda state, params, ctx: (Update(len(params), None, params[:2]), state)},
        r"^node 0, round 0: Own\.share: Update: 2 values for \d+ positions",
    ),
    "too many are chosen": (
        {"share": lambda state, params, ctx: (largest_k(params, 10**9), state)},
        r"^node 0, round 0: Own\.share: k = 1000000000: expected 0 <= k <=",
    ),
    "merge keeps a gradient": (
        {"merge": lambda state, params, received, ctx: (params.clone().requires_grad_() * 1, state)},
        r"Own\.merge returned parameters with a gradient: use \.detach",
    ),
    "share draws from a global generator": (
        {"share": lambda state, params, ctx: share(state, params + torch.randn(len(params)), ctx)},
        r"Own\.share returned two updates for the same arguments; draw from ctx\.rng",
    ),
    "merge draws from a global generator": (
        {"merge": lambda state, params, received, ctx: (params + torch.randn(len(params)), state)},
        r"Own\.merge returned two models for the same arguments; draw from ctx\.rng",
    ),
    "stale_peers names a stranger": (
        {"stale_peers": lambda state: frozenset([99])},
        r"Own\.stale_peers names 99: expected neighbours of the node",
    ),
    "no keyframe": (
        {"remembers_peers": True},
        r"Own\.keyframe failed: TypeError: Own has no keyframe, .*define one",
    ),
    "keyframe gives a tensor": (
        {"remembers_peers": True, "keyframe": lambda state, ctx: torch.zeros(3)},
        r"Own\.keyframe returned a float32 tensor of shape \(3,\) as its update",
    ),
    "no for_peer": ({"per_peer": True}, r"Own\.for_peer failed: TypeError: Own has one update for all"),
    "for_peer gives nothing": (
        {"per_peer": True, "for_peer": lambda state, peer: None},
        r"node 0, round 0: Own\.for_peer returned None as its update",
    ),
    "for_peer gives another length": (
        {"per_peer": True, "for_peer": lambda state, peer: Update(3, None, torch.zeros(3))},
        r"Own\.for_peer returned an update with dim = 3: expected \d+",
    ),
    "for_peer gives NaN": (
        {"per_peer": True, "for_peer": lambda state, peer: Update(SIZE, None, torch.full((SIZE,), torch.nan))},
        r"Own\.for_peer returned a value that is not finite",
    ),
    "for_model fails": ({"for_model": fails}, r"^Own\.for_model failed: KeyError: 'gamma'"),
    "for_model gives nothing": (
        {"for_model": lambda shapes: None},
        r"Own\.for_model returned None: expected an algo",
    ),
    "stale_peers fails": ({"stale_peers": fails}, r"Own\.stale_peers failed: KeyError: 'gamma'"),
    "stale_peers gives a list": (
        {"stale_peers": lambda state: [1]},
        r"Own\.stale_peers returned a list: expected a frozenset of nodes",
    ),
    "one type for state_types": ({"state_types": Mine}, r"Own\.state_types is not a tuple"),
    "received in place": (
        {"merge": in_place_received},
        r"Own\.merge changed the update of a neighbour in place",
    ),
    "state of an unknown type": ({"init": Mine}, r"Own\.init .* with a Mine, .* set state_types = \(Mine,\)"),
    "unknown type in a dict": (
        {"share": lambda state, params, ctx: (share(None, params, ctx)[0], {"a": [Mine(1)]})},
        r"Own\.share .* with a Mine",
    ),
    "state of no type for a checkpoint": (
        {"init": lambda params: {"a": object()}},
        r"Own\.init returned a state that a checkpoint cannot hold: state\['a'\]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_before_the_run_has_a_folder(name: str, tmp_path: Path) -> None:
    methods, message = MISTAKES[name]
    with pytest.raises(UsageError, match=message):
        simulate(experiment(Own(**methods), tmp_path))
    assert not (tmp_path / "run").exists()


def test_the_state_may_keep_the_vector_that_merge_returns(tmp_path: Path) -> None:
    def compared(state: Any, params: Any, ctx: Any) -> Any:
        assert torch.equal(state["kept"], state["copy"])
        return share(None, params, ctx)[0], state

    def kept(state: Any, params: Any, received: Any, ctx: Any) -> Any:
        merged = params + mix(params, received)
        return merged, {"kept": merged, "copy": merged.clone()}

    own = Own(init=lambda params: {"kept": params, "copy": params.clone()}, share=compared, merge=kept)
    assert simulate(experiment(own, tmp_path)).status == "finished"


def test_a_start_that_is_not_finite_is_no_mistake_of_the_algorithm() -> None:
    check_sharing(Full(), torch.tensor([1.0, float("nan")]), Ring(num_nodes=3), 0)


@dataclasses.dataclass(frozen=True)
class Weighted(Full):
    scale: Any = None


def test_an_algorithm_that_cannot_be_copied_is_tried_as_it_is() -> None:
    made_by_autograd = 2.0 * torch.ones(1, requires_grad=True)
    check_sharing(Weighted(scale=made_by_autograd), torch.ones(4), Ring(num_nodes=3), 0)


@pytest.mark.parametrize("value", [2.0, 0.0, -0.5, float("nan"), None, "all"])
def test_a_cutoff_out_of_range_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    def my_cutoff(ctx: Any) -> Any:
        return value

    for sharing in (JwinsConfig(cutoff=my_cutoff), jwins(cutoff=my_cutoff)):
        with pytest.raises(UsageError, match=r"cut-off .*my_cutoff returned .*expected a fraction in \(0, 1\]"):
            simulate(experiment(sharing, tmp_path))


def test_nan_from_share_in_a_later_round_ends_the_run_and_says_where(tmp_path: Path) -> None:
    def late(state: Any, params: Any, ctx: Any) -> Any:
        return share(state, params * (float("nan") if (ctx.node, ctx.round) == (2, 1) else 1.0), ctx)

    result = simulate(experiment(Own(share=late), tmp_path))
    assert result.status == "diverged"
    assert result.record.end is not None
    assert result.record.end.reason == "node 2, round 1: Own.share returned a value that is not finite"


def test_a_mistake_in_a_later_round_names_node_and_round(tmp_path: Path) -> None:
    def late(state: Any, params: Any, received: Any, ctx: Any) -> Any:
        return (params, state) if ctx.round < 2 else fails()

    with pytest.raises(UsageError, match=r"^node \d, round 2: Own\.merge failed: KeyError: 'gamma'"):
        simulate(experiment(Own(merge=late), tmp_path))


def test_a_type_that_appears_in_a_later_round_is_named_at_the_next_checkpoint(tmp_path: Path) -> None:
    def late(state: Any, params: Any, received: Any, ctx: Any) -> Any:
        return params, {"a": Mine(1)} if ctx.round == 1 else state

    own = experiment(Own(merge=late), tmp_path).changed({"run": {"checkpoint_every": 1}})
    with pytest.raises(UsageError, match=r"^node 0, round 2: Own\.merge .* with a Mine, .*set state_types"):
        simulate(own)


@pytest.mark.parametrize("found", [None, [1.0], "numpy"])
def test_a_quantizer_that_returns_no_tensor_is_named(found: Any, tmp_path: Path) -> None:
    class Mute:
        def __call__(self, values: Any, subbands: Any, ctx: Any) -> Any:
            return values.numpy() if found == "numpy" else found

    with pytest.raises(UsageError, match=r"the quantizer Mute returned a .*: expected a tensor or Quantized"):
        simulate(experiment(Full(values=Mute()), tmp_path))


@pytest.mark.parametrize("merge", [lambda own, *_: own[1:], lambda *_: None, lambda own, *_: own.zero_()])
def test_a_robust_merge_that_breaks_the_protocol_is_named(merge: Any, tmp_path: Path) -> None:
    class Odd:
        def __call__(self, *arguments: Any) -> Any:
            return merge(*arguments)

    with pytest.raises(UsageError, match=r"the robust merge Odd changed its .* or returned no tensor of shape"):
        simulate(experiment(Full(robust=Odd()), tmp_path))


def test_the_check_leaves_algorithm_and_generators_as_they_were(tmp_path: Path) -> None:
    calls = []

    def counting(state: Any, params: Any, ctx: Any) -> Any:
        calls.append(torch.rand(1).item())
        return share(state, params, ctx)

    before = torch.get_rng_state()
    build(experiment(Own(share=counting), tmp_path))
    assert len(calls) == 2  # with the same arguments
    assert torch.equal(torch.get_rng_state(), before)


def changed(**rows: Any) -> Callable[[int], Graph]:
    return lambda at: dataclasses.replace(Ring(num_nodes=6, seed=1).at(at), **rows)


ROWS = Ring(num_nodes=6, seed=1).at(0).senders
GRAPHS = {
    "fails": (fails, r"^Mesh\.at\(0\) failed: KeyError: 'gamma'"),
    "none": (lambda at: None, r"Mesh\.at\(0\) returned a NoneType: expected a jwins\.topology\.Graph"),
    "none later": (
        lambda at: Ring(num_nodes=6, seed=1).at(at) if at < 2 else None,
        r"Mesh\.at\(2\) returned a NoneType",
    ),
    "of three nodes": (Ring(num_nodes=3, seed=1).at, r"Mesh\.at\(0\)\.senders has 3 rows: expected 6"),
    "heavy": (
        changed(senders=tuple(dict.fromkeys(row, 0.6) for row in ROWS)),
        r"senders\[0\] has weights of 1.2 in all: expected at most 1; the rest stays on the node",
    ),
    "negative": (
        changed(senders=tuple(dict.fromkeys(row, -0.1) for row in ROWS)),
        r"senders\[0\]\[\d\] = -0.1: expected a weight in \(0, 1\]",
    ),
    "NaN": (
        changed(senders=tuple(dict.fromkeys(row, float("nan")) for row in ROWS)),
        "= nan: expected a weight",
    ),
    "itself": (changed(senders=({0: 0.1}, *ROWS[1:])), r"senders\[0\] names node 0: expected another node"),
    "beyond": (changed(senders=({9: 0.1}, *ROWS[1:])), r"senders\[0\] names node 9: expected another node"),
    "one way": (changed(senders=({}, *ROWS[1:])), r"recipients\[1\] names node 0: expected nodes that have"),
}


@pytest.mark.parametrize("name", ["fails", "none", "NaN"])
def test_a_graph_of_a_later_round_is_named_too(name: str) -> None:
    at, message = GRAPHS[name]

    class Mesh:
        num_nodes = 6

        def at(self, round: int) -> Any:
            return Ring(num_nodes=6, seed=1).at(0) if round < 50 else at(round)

    checked = CheckedTopology(Mesh(), 100)
    assert [len(checked.at(at).senders) for at in range(50)] == [6] * 50
    with pytest.raises(UsageError, match=message.replace("0", "50", 1) if "at" in message else message):
        checked.at(50)


def test_a_topology_with_two_graphs_for_a_round_is_named() -> None:
    class Wavering:
        num_nodes = 6
        calls = 0

        def at(self, round: int) -> Any:
            self.calls += 1
            return Ring(num_nodes=6, seed=1).at(0) if self.calls % 2 else Graph.metropolis_hastings(6, [(0, 1)])

    with pytest.raises(
        UsageError, match=r"Wavering\.at\(0\) returned two graphs; draw from jwins\.rng\.stream"
    ):
        CheckedTopology(Wavering(), 3)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_topology_without_a_graph_to_mix_over_is_named(name: str, tmp_path: Path) -> None:
    at, message = GRAPHS[name]

    class Mesh:
        num_nodes = 6

        def at(self, round: int) -> Any:
            return at(round)

    with pytest.raises(UsageError, match=message):
        simulate(experiment(Full(), tmp_path).changed({"topology": Mesh()}))
    assert not (tmp_path / "run").exists()
