"""Nothing that is measured depends on how the nodes are spread over node groups."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from test_resume import CASES, QUASI_GLOBAL, KilledError
from worlds import Lines, end, evals, simulator

from jwins.engines.evaluation_results import (
    EvaluationPlan,
    EvaluationSamples,
    PartialSum,
    tree_sums,
    tree_total,
)
from jwins.engines.node_group import Envelope, MessageArrived, NodeGroup, ScheduledEvent, TrainingDone
from jwins.engines.simulator import Faults, Outcome, Progress, SimulatedDriver
from jwins.errors import ConfigError, UsageError
from jwins.node import PeerLost, PeerUp, Rejoin, RosterChanged, Tick
from jwins.run.placement import spread
from jwins.run_folder.rows import read_rows
from jwins.sharing import jwins
from jwins.topology import Regular
from jwins.topology.participation import Participation
from jwins.training.optimizer import Optimizer

NODES = 10
GRAPH = Regular(num_nodes=NODES, seed=1, degree=3)


def _of_ten(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case of four nodes with a graph of ten."""
    match case.get("topology"):
        case None:
            return case
        case Participation(graph, share, seed):
            return case | {"topology": Participation(dataclasses.replace(graph, num_nodes=NODES), share, seed)}
        case graph:
            return case | {"topology": dataclasses.replace(graph, num_nodes=NODES)}


SPREADS: dict[str, dict[str, Any]] = {
    **{name: _of_ten(case) for name, case in CASES.items() if name not in ("codec-paper", "jwins-stacked")},
    "choco-dynamic": CASES["choco-dynamic"] | {"topology": dataclasses.replace(GRAPH, dynamic=True)},
    "stateless-dynamic": CASES["stateless-dynamic"] | {"topology": dataclasses.replace(GRAPH, dynamic=True)},
    "stacked": {"sharing": jwins(), "train": {"batching": "stacked", "chunk": 4}},
    "stacked-adam": {
        "sharing": jwins(),
        "train": {"batching": "stacked", "chunk": 3, "optimizer": Optimizer("adam", {"lr": 0.01})},
    },
    "uneven-steps": {
        "sharing": jwins(),
        "train": {"local_steps": [1, 4, 2, 3, 1, 2, 5, 1, 3, 2], "optimizer": QUASI_GLOBAL},
    },
    "schedule-stacked": CASES["schedule-stacked"]
    | {"topology": GRAPH, "train": CASES["schedule-stacked"]["train"] | {"chunk": 4}},
    "quasi-global-stacked": {
        "sharing": jwins(),
        "train": {"batching": "stacked", "chunk": 4, "optimizer": QUASI_GLOBAL},
    },
    "early": {
        "sharing": jwins(),
        "tests": EvaluationPlan(
            EvaluationSamples(torch.arange(20), [torch.arange(i, 32, 3) for i in range(NODES)]),
            EvaluationSamples(torch.arange(8), [torch.arange(i, 20, 3) for i in range(NODES)]),
            early_before=6,
        ),
    },
}
QUICK = ("choco-faults", "stateless-dynamic", "stacked-adam", "quasi-global-faults", "early")
"""Of each kind of state one, for the tests that are not slow."""
ROUNDS_OF_ALL_KINDS = (*QUICK, "uneven-steps", "participation", "consensus", "schedule-stacked", "outer-faults")
"""Of each kind of round one."""


def build(case: str, groups: int, folder: Path | None = None, **options: Any) -> SimulatedDriver:
    options = {"codec": "pco", "rounds": 10, "checkpoint_every": 2, **SPREADS[case], **options}
    return simulator(NODES, groups=groups, folder=folder, **options)


def measured(outcome: Outcome) -> tuple[Any, ...]:
    """All but the seconds of the process."""
    final = msgspec.structs.replace(end(outcome), wall_s={})
    return (outcome.status, outcome.rows[:-1], final, outcome.traffic, outcome.refused)


@pytest.fixture(scope="module")
def of_one_group(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[tuple[Any, ...], Path]]:
    """Return the measurements of one node group in a case, and the folder of the run."""

    @functools.cache
    def run(case: str) -> tuple[tuple[Any, ...], Path]:
        folder = tmp_path_factory.mktemp("whole")
        return measured(build(case, 1, folder).run()), folder

    return run


@pytest.mark.parametrize(
    ("case", "groups"),
    [
        pytest.param(
            case, groups, marks=() if case in ROUNDS_OF_ALL_KINDS and groups == 3 else pytest.mark.slow
        )
        for case in SPREADS
        for groups in (2, 3)
    ],
)
def test_two_and_three_node_groups_measure_the_same_as_one(case: str, groups: int, of_one_group: Any) -> None:
    assert measured(build(case, groups).run()) == of_one_group(case)[0]


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in SPREADS]
)
def test_a_resume_may_change_the_number_of_node_groups(case: str, of_one_group: Any, tmp_path: Path) -> None:
    reference, whole = of_one_group(case)
    folder = tmp_path / "spread"
    for groups, last in ((1, 3), (3, 5), (2, 8)):

        def kill(progress: Progress, last: int = last) -> None:
            if progress.round == last:
                raise KilledError

        with pytest.raises(KilledError):
            build(case, groups, folder, on_progress=kill).run(resume=groups > 1)
        assert any((folder / "checkpoints").glob("round-*")), "there is a checkpoint to go on from"
    assert measured(build(case, 2, folder).run(resume=True)) == reference
    assert list(read_rows(folder / "metrics.jsonl"))[:-1] == list(reference[1])
    for node in range(NODES):
        name = f"final/node-{node}.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_codec_that_decodes_only_its_own_process_needs_one_node_group() -> None:
    with pytest.raises(ConfigError, match=r"wire\.codec = 'paper': decodes only .* or one node group"):
        simulator(4, groups=2, codec="paper")


def test_every_node_is_held_once() -> None:
    whole = simulator(4, groups=2)
    with pytest.raises(UsageError, match=r"hold nodes \[0, 1\]|hold nodes \[0, 0, 1, 1\]"):
        SimulatedDriver([whole.groups[0], whole.groups[0]], start=whole.recorder.rows or None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="node 3 is not among the 2 nodes"):
        whole.groups[0].handle([ScheduledEvent(3, 0.0, Tick())])


def test_nodes_are_spread_in_whole_chunks() -> None:
    assert spread(10, 3, 1) == [range(4), range(4, 7), range(7, 10)]
    assert spread(10, 2, 4) == [range(8), range(8, 10)]
    assert spread(7, 1, 3) == [range(7)]
    with pytest.raises(ConfigError, match=r"actors = 4: expected at most 3 for 10 nodes, in stacks of 4"):
        spread(10, 4, 4)


# --- What crosses this interface ------------------------------------------------------------------------------

PLAIN = (
    int,
    float,
    str,
    bytes,
    bool,
    type(None),
    TrainingDone,
    MessageArrived,
    Envelope,
    PeerLost,
    PeerUp,
    Tick,
)


def test_only_plain_data_goes_in_and_out() -> None:
    """Arguments and results of a node group's methods contain no tensor, so they could go to another
    process.
    """
    seen: set[str] = set()

    def look(value: Any, where: str) -> None:
        assert not isinstance(value, torch.Tensor), where
        if dataclasses.is_dataclass(value):
            seen.add(type(value).__name__)
            for field in dataclasses.fields(value):
                look(getattr(value, field.name), f"{where}.{field.name}")
        elif isinstance(value, (tuple, list, frozenset)):
            for entry in value:
                look(entry, where)
        else:
            assert isinstance(value, PLAIN), f"{where}: {type(value)}"

    class Watched(NodeGroup):
        def handle(self, due: Sequence[ScheduledEvent], train: Mapping[int, int] | None = None) -> Any:
            commands = super().handle(due, train)
            look(list(due), "due")
            look(commands, "commands")
            return commands

    sim = build("choco-faults", 2)
    for group in sim.groups:
        group.__class__ = Watched
    assert sim.run().status == "finished"
    assert {"TrainingDone", "MessageArrived", "PeerUp", "PeerLost", "RosterChanged", "Rejoin", "Tick"} <= seen
    assert {"Train", "Send", "RequestKeyframe", "Evaluate", "Checkpoint", "WakeAt", "Finished"} <= seen
    assert {RosterChanged.__name__, Rejoin.__name__} <= seen


def test_a_node_group_decodes_a_frame_once_for_all_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for groups in (1, 2):
        sim = build("jwins-loop", groups, topology=GRAPH, rounds=2)
        wire, decoded = type(sim.rules.wire), 0
        real = wire.unpack

        def counting(self: Any, data: bytes, real: Any = real) -> Any:
            nonlocal decoded
            decoded += 1
            return real(self, data)

        monkeypatch.setattr(wire, "unpack", counting)
        sim.run()
        monkeypatch.setattr(wire, "unpack", real)
        counts.append(decoded)
    assert counts[0] == 2 * NODES, "one frame per node and round, whoever hears it"
    assert 2 * NODES < counts[1] <= 4 * NODES


# --- Sums over nodes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 7, 8, 13])
def test_sums_along_the_tree_do_not_depend_on_the_cuts(num_nodes: int) -> None:
    generator = torch.Generator().manual_seed(num_nodes)
    vectors = torch.randn(num_nodes, 5, generator=generator) * 10.0 ** torch.arange(-6, 4, 2)
    missing = {num_nodes // 2} if num_nodes > 3 else set()
    leaves = [(i, None if i in missing else vectors[i]) for i in range(num_nodes)]
    whole = tree_total(tree_sums(leaves))
    assert whole is not None
    kept = [i for i in range(num_nodes) if i not in missing]
    torch.testing.assert_close(whole, vectors[kept].double().sum(dim=0), rtol=1e-12, atol=0)
    for cut in range(num_nodes + 1):
        for other in range(cut, num_nodes + 1):
            groups = [tree_sums(part) for part in (leaves[:cut], leaves[cut:other], leaves[other:])]
            partials = [partial for group in groups for partial in group]
            total = tree_total(partials)
            assert total is not None
            assert torch.equal(total, whole), (cut, other)
            assert len(partials) <= 6 * num_nodes.bit_length()


def test_a_sum_keeps_few_vectors() -> None:
    partials = tree_sums((i, torch.ones(3)) for i in range(1000))
    assert [(p.level, p.index) for p in partials] == [
        (9, 0), (8, 2), (7, 6), (6, 14), (5, 30), (3, 124),
    ]  # fmt: skip
    assert all(isinstance(p, PartialSum) and p.total is not None for p in partials)


def test_early_samples_are_some_of_the_later_ones() -> None:
    tests = EvaluationPlan(
        EvaluationSamples(torch.arange(5)), EvaluationSamples(torch.tensor([4, 5])), early_before=2
    )
    with pytest.raises(UsageError, match="common samples must be a subset of those of later evaluations"):
        simulator(4, tests=tests).run()


def test_early_samples_are_not_tested_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = 0

    class Counting(Lines):
        def metrics(self, outputs: Any, targets: Any) -> Any:
            nonlocal tested
            tested += len(targets)
            return super().metrics(outputs, targets)

    tests = EvaluationPlan(
        EvaluationSamples(torch.arange(24)), EvaluationSamples(torch.arange(3, 9)), early_before=4
    )
    sim = simulator(4, train={"task": Counting()}, tests=tests, eval_at=(2, 5))
    tested = 0
    rows = {row.round: row for row in evals(sim.run())}
    assert tested == 5 * 6 + 5 * 24, "four nodes and the average, on 6 samples and then on 24"
    few = EvaluationPlan(EvaluationSamples(torch.arange(3, 9)))
    expected = {row.round: row for row in evals(simulator(4, tests=few, eval_at=(2, 5)).run())}
    assert rows[2].early == {}
    means = {name: spread.mean for name, spread in expected[5].metrics.items()}
    assert rows[5].early == pytest.approx(means, rel=1e-6), "other batches may change the last bits"
    assert rows[5].samples == 24


def test_faults_reach_nodes_on_other_node_groups() -> None:
    faults = Faults().crash(node=1, round=3).rejoin(node=1, round=6).drop(sender=8, round=4)
    outcomes = [build("jwins-loop", h, faults=faults, deadline_s=0.2, topology=GRAPH).run() for h in (1, 3)]
    assert measured(outcomes[0]) == measured(outcomes[1])
