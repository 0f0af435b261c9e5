"""The state machine, cell by cell, driven by hand: every event in every phase, and what is commanded."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from frames import unpack
from jwins.errors import UsageError
from jwins.node import (
    MAX_ROUNDS_AHEAD,
    STATE_TYPES,
    Checkpoint,
    Evaluate,
    Finished,
    FrameReceived,
    FrameRefused,
    KeyframeRequested,
    Node,
    PeerLost,
    PeerUp,
    Phase,
    Rejoin,
    RequestKeyframe,
    RosterChanged,
    Rules,
    Send,
    Stop,
    Tick,
    TimedOut,
    Train,
    Trained,
    WakeAt,
)
from jwins.rng import RoundContext, stream
from jwins.run_folder import checkpoint
from jwins.sharing import Full, choco, closed_loop, full, jwins, random_k, stateless, top_k
from jwins.sharing.update import Quantized, Update
from jwins.topology import FullyConnected, Graph, OnePeerExponential, Ring
from jwins.wire import Frame, Packed, codec
from jwins.wire.frame import Wire

DIGEST = b"node-run"
P = 6
START = torch.arange(1.0, P + 1)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """A topology from lists of edges; the last one stays."""

    num_nodes: int
    edges: tuple[tuple[tuple[int, int], ...], ...]

    def at(self, round: int) -> Graph:
        return Graph.metropolis_hastings(self.num_nodes, self.edges[min(round, len(self.edges) - 1)])


def make(sharing: Any = None, topology: Any = None, *, id: int = 0, rounds: int = 5, **more: Any) -> Node:
    params, sharing = more.pop("params", START), sharing or full()
    wire = Wire(codec("raw"), DIGEST, sharing.update_dim(len(params)))
    more["evaluate_at"] = frozenset(more.get("evaluate_at", ()))
    return Node(id, params, Rules(sharing, wire, topology or Ring(3), rounds=rounds, seed=1, **more))


def received(sender: int, round: int, value: float = 0.0, **more: Any) -> FrameReceived:
    """A frame of full sharing in which all parameters are ``value``."""
    return FrameReceived(Frame(sender, round, Update(P, None, torch.full((P,), value)), **more))


def trained(node: Node, params: torch.Tensor | None = None) -> Trained:
    return Trained(node.round, node.params + 1.0 if params is None else params)


def kinds(commands: list[Any]) -> list[str]:
    return [type(command).__name__ for command in commands]


def only(commands: list[Any], kind: type) -> Any:
    (found,) = [command for command in commands if isinstance(command, kind)]
    return found


def in_phase(phase: Phase, **more: Any) -> Node:
    node = make(**more)
    if phase is Phase.NEW:
        return node
    node.start(0.0)
    if phase is Phase.FAILED:
        node.handle(trained(node, torch.full((P,), float("nan"))), 1.0)
    elif phase is Phase.DONE:
        node.handle(Stop(), 1.0)
    elif phase is Phase.WAITING:
        node.handle(trained(node), 1.0)
    assert node.phase is phase
    return node


EVENTS = {
    "trained": Trained(0, START),
    "frame": received(1, 0),
    "up": PeerUp(1),
    "lost": PeerLost(1),
    "keyframe": KeyframeRequested(1),
    "roster": RosterChanged(frozenset({1, 2})),
    "rejoin": Rejoin(0),
    "tick": Tick(),
    "timed_out": TimedOut(0),
    "stop": Stop(),
}
MISUSED = {
    *((phase, "trained") for phase in (Phase.NEW, Phase.WAITING)),
    *((phase, "rejoin") for phase in (Phase.NEW, Phase.DONE, Phase.FAILED)),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("phase", Phase)
def test_every_cell_of_the_table(phase: Phase, event: str) -> None:
    node = in_phase(phase)
    if (phase, event) in MISUSED:
        with pytest.raises(UsageError, match=rf"node 0, round 0: {event.title()} while {phase.value}"):
            node.handle(EVENTS[event], 2.0)
        assert node.phase is phase
        return
    commands = node.handle(EVENTS[event], 2.0)
    if phase in (Phase.DONE, Phase.FAILED):
        assert commands == []
        assert node.phase is phase


def test_unknown_events_are_misuse() -> None:
    for phase in Phase:
        with pytest.raises(UsageError, match="str while"):
            in_phase(phase).handle("hello", 0.0)  # type: ignore[arg-type]


def test_training_of_another_round_is_misuse() -> None:
    node = in_phase(Phase.TRAINING)
    with pytest.raises(UsageError, match="trained round 1 in round 0"):
        node.handle(Trained(1, START), 0.0)


def test_a_node_outside_the_topology_is_misuse() -> None:
    with pytest.raises(UsageError, match="nodes 0 to 2"):
        make(id=3)
    with pytest.raises(UsageError, match="8"):
        Wire(codec("raw"), b"x", P).pack(Frame(0, 0, Update(P, None, START)))
    wire = Wire(codec("raw"), DIGEST, P + 1)
    with pytest.raises(UsageError, match=f"dimension {P}, those of the wire {P + 1}"):
        Node(0, START, Rules(full(), wire, Ring(3), rounds=1, seed=0))


# --- A scripted run -----------------------------------------------------------------------------------------


def test_two_rounds_of_full_sharing() -> None:
    node = make(rounds=2, evaluate_at=(0, 2), checkpoint_every=1)
    commands = node.start(0.0)
    assert kinds(commands) == ["Evaluate", "Train"]
    assert (commands[0].round, commands[1].round) == (0, 0)
    assert torch.equal(node.params, START)

    commands = node.handle(Trained(0, START + 1), 1.0)
    assert kinds(commands) == ["Send"], "no deadline, so nothing to wake up for"
    assert (commands[0].to, commands[0].round, commands[0].keyframe) == ((1, 2), 0, False)
    message = unpack(commands[0].packed.data, codec("raw"), DIGEST, dim=P)
    assert isinstance(message, Frame)
    assert (message.sender, message.round, message.keyframe) == (0, 0, False)
    assert torch.equal(message.update.dense_values(), START + 1)
    assert node.waiting_for == (1, 2)

    assert node.handle(received(2, 0, 3.0), 1.0) == []
    assert node.waiting_for == (1,)
    commands = node.handle(received(1, 0, 6.0), 1.0)
    assert kinds(commands) == ["Checkpoint", "Train"]
    assert commands == [Checkpoint(1), commands[1]]
    torch.testing.assert_close(node.params, (START + 1 + 6.0 + 3.0) / 3)

    node.handle(trained(node), 2.0)
    node.handle(received(1, 1), 2.0)
    commands = node.handle(received(2, 1), 2.0)
    assert kinds(commands) == ["Evaluate", "Checkpoint", "Finished"]
    evaluate, _, finished = commands
    assert (evaluate.round, finished.round, finished.status, finished.reason) == (2, 2, "finished", "")
    assert node.phase is Phase.DONE


def test_no_rounds_are_done_at_once() -> None:
    assert kinds(make(rounds=0, evaluate_at=(0,)).start(0.0)) == ["Evaluate", "Finished"]


def test_a_node_alone_trains_on() -> None:
    node = make(topology=Ring(1), rounds=3)
    node.start(0.0)
    for _ in range(2):
        assert kinds(node.handle(trained(node), 0.0)) == ["Train"]
    assert kinds(node.handle(trained(node), 0.0)) == ["Finished"]
    assert torch.equal(node.params, START + 3)


def test_starting_again_repeats_the_outstanding_command() -> None:
    node = make(deadline_s=3.0)
    assert kinds(node.start(0.0)) == ["Train"]
    assert kinds(node.start(0.0)) == ["Train"]
    node.handle(trained(node), 1.0)
    assert node.start(2.0) == [WakeAt(4.0)]


def test_parameters_are_projected_in_place_after_a_merge() -> None:
    node = make(topology=Ring(1), project=lambda vector: vector.clamp_(max=2.0))
    node.start(0.0)
    given = START.clone()
    node.handle(Trained(0, given), 0.0)
    assert torch.equal(node.params, START.clamp(max=2.0))
    assert torch.equal(given, START), "the driver's tensor was changed"


# --- Frames: late, early, twice, refused --------------------------------------------------------------------


def test_frames_ahead_wait_for_their_round() -> None:
    node = make(rounds=100)
    node.start(0.0)
    for r in (1, 0, MAX_ROUNDS_AHEAD):
        assert node.handle(received(1, r, float(r)), 0.0) == []
    node.handle(trained(node), 1.0)
    assert kinds(node.handle(received(2, 0), 1.0)) == ["Train"]
    node.handle(trained(node), 2.0)
    assert node.waiting_for == (2,)
    assert kinds(node.handle(received(2, 1), 2.0)) == ["Train"]
    assert list(node.snapshot().inbox) == [(1, MAX_ROUNDS_AHEAD)]


def test_a_frame_that_comes_twice_counts_once() -> None:
    once, twice = make(), make()
    for node in (once, twice):
        node.start(0.0)
        node.handle(received(1, 0, 5.0), 0.0)
        if node is twice:
            node.handle(received(1, 0, 7.0), 0.0)
        node.handle(trained(node), 0.0)
        node.handle(received(2, 0, 5.0), 0.0)
    assert torch.equal(once.params, twice.params)


def test_late_frames_have_no_weight() -> None:
    node = make(deadline_s=1.0, topology=Ring(2))
    node.start(0.0)
    node.handle(trained(node), 0.0)
    assert kinds(node.handle(Tick(), 1.0)) == ["Train"]
    assert torch.equal(node.params, START + 1)
    assert node.handle(received(1, 0, 100.0), 1.5) == []
    node.handle(trained(node), 2.0)
    node.handle(received(1, 1, 2.0), 2.0)
    torch.testing.assert_close(node.params, (START + 2 + 2.0) / 2)
    assert not node.snapshot().inbox


@dataclasses.dataclass(frozen=True)
class Renewed:
    """A ring of three whose members are of another roster version from some round on."""

    from_round: int
    num_nodes: int = 3

    def at(self, round: int) -> Graph:
        return dataclasses.replace(Ring(3).at(round), roster_version=1 if round >= self.from_round else 0)


def test_nodes_of_different_roster_versions_do_not_mix_and_do_not_wait_for_each_other() -> None:
    node, behind = make(topology=Renewed(0)), make(topology=Renewed(9), id=1)
    sends = {}
    for each in (node, behind):
        each.start(0.0)
        sends[each.id] = only(each.handle(trained(each), 0.0), Send)
    frames = {i: unpack(send.packed.data, codec("raw"), DIGEST, dim=P) for i, send in sends.items()}
    assert [frames[i].roster_version for i in (0, 1)] == [1, 0]
    node.handle(received(2, 0, 5.0, roster_version=1), 0.0)
    assert kinds(node.handle(FrameReceived(frames[1]), 0.0)) == ["Train"]
    torch.testing.assert_close(node.params, (2 * (START + 1) + 5.0) / 3)
    behind.handle(received(2, 0, 5.0), 0.0)
    assert kinds(behind.handle(FrameReceived(frames[0]), 0.0)) == ["Train"]
    torch.testing.assert_close(behind.params, (2 * (START + 1) + 5.0) / 3)


def test_a_frame_of_a_roster_version_that_is_not_known_yet_is_kept() -> None:
    node = in_phase(Phase.TRAINING, topology=Ring(5))
    assert node.handle(received(2, 0, roster_version=1), 0.0) == []
    assert kinds(node.handle(received(2, 1), 0.0)) == ["FrameRefused"]


OVERFLOWING = Quantized(torch.tensor([9], dtype=torch.int32), torch.tensor([3e38]), (1,))
REFUSED = {
    "not another node": received(3, 0),
    "not another node ": received(0, 0),
    "not another node  ": received(-1, 0),
    "the run has 80 rounds": received(1, 80),
    "the run has 80 rounds ": received(1, -1),
    "65 rounds ahead": received(1, MAX_ROUNDS_AHEAD + 1),
    "dimension 5, not 6": FrameReceived(Frame(1, 0, Update(5, None, torch.zeros(5)))),
    "not finite": FrameReceived(Frame(1, 0, Update(P, torch.tensor([2]), torch.tensor([float("nan")])))),
    "not finite ": FrameReceived(Frame(1, 0, Update(P, None, torch.full((P,), -torch.inf).bfloat16()))),
    "not finite  ": FrameReceived(Frame(1, 0, Update(P, torch.tensor([0]), OVERFLOWING))),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("phase", [Phase.NEW, Phase.TRAINING, Phase.WAITING])
def test_refused_frames_change_nothing(phase: Phase, reason: str) -> None:
    node = in_phase(phase, rounds=80)
    before = checkpoint.dump(node.snapshot())
    (refused,) = node.handle(REFUSED[reason], 2.0)
    frame = REFUSED[reason].frame
    assert (refused.sender, refused.round) == (frame.sender, frame.round)
    assert reason.strip() in refused.reason
    assert checkpoint.dump(node.snapshot()) == before


@pytest.mark.parametrize(("own", "value", "taken"), [(0.5, 10.0, True), (0.5, -11.0, False), (3.0, 30.0, True)])
def test_values_far_beyond_the_own_parameters_are_refused_where_that_is_asked(
    own: float, value: float, taken: bool
) -> None:
    for most, refused in ((10.0, not taken), (math.inf, False)):
        node = make(params=torch.full((P,), own), max_magnitude_ratio=most)
        node.start(0.0)
        assert kinds(node.handle(received(1, 0, value), 0.0)) == (["FrameRefused"] if refused else [])


def test_frames_of_strangers_are_refused() -> None:
    node = in_phase(Phase.TRAINING, topology=Ring(5))
    (refused,) = node.handle(received(2, 0), 0.0)
    assert refused.reason == "the sender is not a neighbour in that round"
    assert node.handle(received(4, 0), 0.0) == []


def test_neighbours_are_those_of_the_frames_round() -> None:
    node = in_phase(Phase.TRAINING, topology=Scripted(3, (((0, 1),), ((0, 2),))))
    assert node.handle(received(2, 1), 0.0) == []
    assert kinds(node.handle(received(1, 1), 0.0)) == ["FrameRefused"]
    assert node.handle(received(1, 0), 0.0) == []


def test_one_way_links() -> None:
    topology = OnePeerExponential(4)
    graph = topology.at(0)
    (sender,) = graph.senders[0]
    assert graph.recipients[0] != (sender,)
    node = in_phase(Phase.TRAINING, topology=topology)
    assert only(node.handle(trained(node), 0.0), Send).to == graph.recipients[0]
    assert node.waiting_for == (sender,)
    assert kinds(node.handle(received(sender, 0), 0.0)) == ["Train"]


# --- The deadline -------------------------------------------------------------------------------------------


def test_the_deadline_counts_from_the_own_frame() -> None:
    node = make(deadline_s=2.0)
    node.start(0.0)
    assert node.handle(Tick(), 10.0) == [], "training has no deadline"
    assert kinds(node.handle(trained(node), 10.0)) == ["Send", "WakeAt"]
    assert node.start(10.0) == [WakeAt(12.0)]
    assert node.handle(Tick(), 11.999) == []
    assert kinds(node.handle(Tick(), 12.0)) == ["Train"]
    assert node.handle(Tick(), 12.0) == [], "a second tick finds nothing to do"


def test_the_weight_of_a_missing_neighbour_stays_with_the_node() -> None:
    node = make(deadline_s=2.0)
    node.start(0.0)
    node.handle(trained(node), 0.0)
    node.handle(received(2, 0, 0.0), 1.0)
    node.handle(Tick(), 2.0)
    torch.testing.assert_close(node.params, (START + 1) * 2 / 3)


def test_a_tick_of_the_round_before_does_not_end_this_one() -> None:
    node = make(deadline_s=2.0, topology=Ring(2))
    node.start(0.0)
    node.handle(trained(node), 0.0)
    node.handle(received(1, 0), 1.0)
    node.handle(trained(node), 1.5)
    assert node.handle(Tick(), 2.0) == []
    assert kinds(node.handle(Tick(), 3.5)) == ["Train"]


def test_any_event_after_the_deadline_ends_the_wait() -> None:
    node = make(deadline_s=2.0)
    node.start(0.0)
    node.handle(trained(node), 0.0)
    assert kinds(node.handle(received(1, 0), 2.5)) == ["Train"]


def test_a_driver_may_end_the_wait_of_a_round() -> None:
    node = make(topology=Ring(2))
    node.start(0.0)
    assert node.handle(TimedOut(0), 0.0) == [], "training ends by itself"
    node.handle(trained(node), 0.0)
    assert kinds(node.handle(TimedOut(0), 1.0)) == ["Train"]
    torch.testing.assert_close(node.params, START + 1)
    node.handle(trained(node), 2.0)
    assert node.handle(TimedOut(0), 3.0) == [], "of the round before"
    assert node.phase is Phase.WAITING


# --- Peers that go and come ---------------------------------------------------------------------------------


def test_lost_peers_are_not_waited_for_in_any_phase() -> None:
    for phase in (Phase.NEW, Phase.TRAINING):
        node = in_phase(phase)
        assert node.handle(PeerLost(1), 0.0) == []
        if phase is Phase.NEW:
            node.start(0.0)
        assert only(node.handle(trained(node), 0.0), Send).to == (2,)
        assert node.waiting_for == (2,)
    node = in_phase(Phase.WAITING)
    assert node.handle(PeerLost(1), 1.0) == []
    assert kinds(node.handle(PeerLost(2), 1.0)) == ["Train"]
    assert torch.equal(node.params, START + 1)


def test_what_a_lost_peer_had_sent_counts() -> None:
    node = in_phase(Phase.WAITING, topology=Ring(2))
    node.handle(PeerLost(1), 0.0)
    node = in_phase(Phase.TRAINING, topology=Ring(2))
    node.handle(received(1, 0, 0.0), 0.0)
    node.handle(PeerLost(1), 0.0)
    node.handle(trained(node), 0.0)
    torch.testing.assert_close(node.params, (START + 1) / 2)


def test_a_peer_takes_part_from_the_round_it_comes_back_in() -> None:
    node = make(topology=Ring(2))
    node.start(0.0)
    node.handle(PeerLost(1), 0.0)
    assert node.handle(PeerUp(1, round=2), 0.0) == []
    assert kinds(node.handle(trained(node), 0.0)) == ["Train"], "round 0 without the peer"
    assert kinds(node.handle(trained(node), 0.0)) == ["Train"], "round 1 without the peer"
    assert kinds(node.handle(trained(node), 0.0)) == ["Send"]
    assert node.waiting_for == (1,)


def test_a_peer_that_comes_while_others_wait_for_it_gets_this_rounds_frame() -> None:
    node = in_phase(Phase.TRAINING)
    node.handle(PeerLost(1), 0.0)
    first = only(node.handle(trained(node), 0.0), Send)
    again = only(node.handle(PeerUp(1), 0.0), Send)
    assert (again.to, again.round, again.packed.data, again.keyframe) == ((1,), 0, first.packed.data, False)
    assert node.handle(PeerUp(1), 0.0) == [], "once is enough"
    assert node.waiting_for == (1, 2)


def test_a_peer_that_restarts_unnoticed_is_not_waited_for_before_its_round() -> None:
    node = in_phase(Phase.WAITING, topology=Ring(2))
    assert kinds(node.handle(PeerUp(1, round=2), 1.0)) == ["Train"], "it will send nothing of round 0"


def test_a_stranger_that_comes_up_gets_nothing() -> None:
    node = in_phase(Phase.WAITING, topology=Ring(5))
    node.handle(PeerLost(2), 0.0)
    assert node.handle(PeerUp(2), 0.0) == []


def test_a_roster_says_who_is_there() -> None:
    node = in_phase(Phase.WAITING, topology=FullyConnected(4))
    assert node.handle(RosterChanged(frozenset({0, 2, 3})), 0.0) == []
    assert node.waiting_for == (2, 3)
    assert kinds(node.handle(RosterChanged(frozenset({1, 2, 3})), 0.0)) == ["Send"]
    assert node.waiting_for == (1, 2, 3)
    assert node.handle(RosterChanged(frozenset({1, 2, 3})), 0.0) == []
    assert kinds(node.handle(RosterChanged(frozenset()), 0.0)) == ["Train"]
    assert node.snapshot().down == {1, 2, 3}


def test_one_roster_may_take_and_give() -> None:
    node = in_phase(Phase.TRAINING, topology=Ring(3))
    node.handle(PeerLost(2), 0.0)
    node.handle(trained(node), 0.0)
    assert node.waiting_for == (1,)
    commands = node.handle(RosterChanged(frozenset({2})), 0.0)
    assert node.snapshot().down == {1}
    assert (node.round, node.waiting_for, kinds(commands)) == (0, (2,), ["Send"]), "2 is there in this round"


# --- The end ------------------------------------------------------------------------------------------------


def test_stop_while_training_ends_at_once() -> None:
    for phase in (Phase.NEW, Phase.TRAINING):
        node = in_phase(phase)
        (finished,) = node.handle(Stop(), 1.0)
        assert (finished.status, finished.round) == ("stopped", 0)
        assert torch.equal(node.params, START)
        assert node.phase is Phase.DONE
        assert node.start(2.0) == []


def test_stop_while_waiting_ends_after_the_merge() -> None:
    node = in_phase(Phase.WAITING, topology=Ring(2))
    assert node.handle(Stop(), 1.0) == []
    (finished,) = node.handle(received(1, 0, 0.0), 1.0)
    assert (finished.status, finished.round, finished.reason) == ("stopped", 1, "asked to stop")
    torch.testing.assert_close(node.params, (START + 1) / 2)


def test_stop_in_the_last_round_is_no_different_from_the_end() -> None:
    node = in_phase(Phase.WAITING, topology=Ring(2), rounds=1)
    node.handle(Stop(), 1.0)
    assert only(node.handle(received(1, 0), 1.0), object).status == "finished"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e35, -1e35])
@pytest.mark.parametrize(
    "sharing",
    [full(), full(values="bfloat16"), random_k(0.5), top_k(0.5), choco(0.5, 1.0), jwins()],
    ids=lambda sharing: type(sharing).__name__,
)
def test_parameters_that_diverge_end_the_run(sharing: Any, value: float) -> None:
    """Beyond a bound as well: differences and transforms of numbers near the largest float overflow."""
    node = make(sharing)
    node.start(0.0)
    params = START.clone()
    params[3] = value
    (finished,) = node.handle(Trained(0, params), 1.0)
    assert (finished.status, finished.round, node.phase) == ("diverged", 0, Phase.FAILED)
    assert finished.reason.startswith("node 0, round 0: ")
    assert torch.equal(node.params, params) or value != value


@pytest.mark.parametrize("sharing", [full(values="bfloat16"), top_k(0.5), choco(0.5, 1.0), jwins()], ids=repr)
def test_what_does_not_count_as_diverged_can_be_shared(sharing: Any) -> None:
    params = torch.tensor([1.0, -1.0] * (P // 2)) * 9e29
    node = make(sharing, params=-params)
    node.start(0.0)
    send = only(node.handle(Trained(0, params), 0.0), Send)
    other = make(sharing, params=params, id=1)
    other.start(0.0)
    message = unpack(send.packed.data, codec("raw"), DIGEST, dim=node.update_dim)
    assert isinstance(message, Frame)
    assert other.handle(FrameReceived(message), 0.0) == []
    other.handle(Trained(0, -params), 0.0)
    assert kinds(other.handle(PeerLost(2), 0.0)) == ["Train"]


def test_merging_that_diverges_ends_the_run() -> None:
    node = in_phase(Phase.WAITING, topology=Ring(2))
    (finished,) = node.handle(received(1, 0, 3e38), 0.0)
    assert (finished.status, finished.round) == ("diverged", 0)
    assert "merging" in finished.reason


# --- Coming back --------------------------------------------------------------------------------------------


def test_rejoin_goes_on_at_the_round_of_the_others() -> None:
    node = make(choco(0.5, 0.5), topology=Ring(2))
    node.start(0.0)
    node.handle(trained(node), 0.0)
    node.handle(FrameReceived(Frame(1, 0, Update(P, None, START))), 0.0)
    node.handle(FrameReceived(Frame(1, 1, Update(P, torch.tensor([0]), torch.tensor([1.0]), base=0))), 0.0)
    params = node.params
    (train,) = node.handle(Rejoin(3), 5.0)
    assert (train.round, node.phase) == (3, Phase.TRAINING)
    assert torch.equal(node.params, params)
    assert not node.snapshot().inbox
    sent = only(node.handle(trained(node), 6.0), Send)
    assert (sent.keyframe, sent.round, sent.to) == (True, 3, (1,)), "the neighbour's replica counts as lost"


@pytest.mark.parametrize("round", [0, 5, 6])
def test_rejoin_goes_neither_back_nor_past_the_end(round: int) -> None:
    node = make(topology=Ring(1))
    node.start(0.0)
    node.handle(trained(node), 0.0)
    with pytest.raises(UsageError, match="cannot rejoin"):
        node.handle(Rejoin(round), 0.0)
    for phase in (Phase.NEW, Phase.DONE, Phase.FAILED):
        with pytest.raises(UsageError, match=f"Rejoin while {phase.value}"):
            in_phase(phase).handle(Rejoin(1), 0.0)


@pytest.mark.parametrize("score", ["since_sent", "reference", "training_only"])
def test_rejoin_while_waiting_ends_the_round_with_nothing_received(score: Any) -> None:
    """Or else the algorithm would share twice without a merge, and count the same training twice."""
    sharing = jwins(lambda ctx: 0.3, "haar", 1, score=score)
    back, alone = make(sharing, Ring(2), deadline_s=1.0), make(sharing, Ring(2), deadline_s=1.0)
    for node in (back, alone):
        node.start(0.0)
        node.handle(trained(node), 0.0)
    back.handle(Rejoin(1), 5.0)
    alone.handle(Tick(), 1.0)
    assert torch.equal(back.params, alone.params)
    frames = []
    for node in (back, alone):
        send = only(
            node.handle(trained(node, node.params + torch.tensor([-1.1, -1.1, 1.5, 1.5, 0.0, 0.0])), 6.0), Send
        )
        frames.append(send.packed.data)
    assert frames[0] == frames[1]


# --- Snapshots ----------------------------------------------------------------------------------------------


def fingerprint(commands: list[Any]) -> list[Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.numpy().tobytes()
        if isinstance(value, Packed):
            return value.data, value.positions_bytes, value.values_bytes
        return value

    return [
        (type(command).__name__, *(plain(getattr(command, f.name)) for f in dataclasses.fields(command)))
        for command in commands
    ]


def play(sharing: Any, restart_at: int | None) -> tuple[list[Any], bytes, int]:
    """Node 0 among peers that behave badly; at one point it is replaced by its restored snapshot."""
    topology = Scripted(4, (((0, 1), (0, 2)), ((0, 2), (0, 3)), ((0, 1), (0, 2), (0, 3))))
    rounds = 6

    def build(id: int) -> Node:
        return make(
            sharing, topology, id=id, rounds=rounds, deadline_s=3.0, evaluate_at=(0, 2, 6), checkpoint_every=2
        )

    node, log, step = build(0), [], 0
    peers = {i: sharing.init(START) for i in (1, 2, 3)}

    def do(event: Any, at: float) -> None:
        nonlocal node, step
        log.append(fingerprint(node.start(at) if event is None else node.handle(event, at)))
        step += 1
        if step == restart_at:
            data = checkpoint.dump(node.snapshot())
            node = build(0)
            node.restore(checkpoint.load(data, (*STATE_TYPES, *sharing.state_types)))
            assert checkpoint.dump(node.snapshot()) == data

    do(None, 0.0)
    for r in range(rounds):
        now = 10.0 * r
        frames = {}
        for i in peers:
            ctx = RoundContext(1, i, r, topology.at(r).senders[i])
            noise = torch.from_numpy(stream(2, "training", node=i, round=r).normal(size=P)).float()
            update, peers[i] = sharing.share(peers[i], START + noise, ctx)
            frames[i] = Frame(i, r, update)
            _, peers[i] = sharing.merge(peers[i], START + noise, [], ctx)
        if r == 1:
            do(KeyframeRequested(2), now)
        if r == 4:
            do(PeerUp(3, 4), now)
        if r != 3:
            do(FrameReceived(frames[2]), now)
        change = torch.from_numpy(stream(2, "training", node=0, round=r).normal(size=P)).float()
        do(Trained(node.round, node.params + change), now)
        if r == 2:
            do(PeerLost(3), now)
        for i in (1, 3):
            if i in topology.at(r).senders[0] and (i != 3 or r not in (2, 3)):
                do(FrameReceived(frames[i]), now + 1)
        do(Tick(), now + 3)
        if r == 3:
            do(FrameReceived(frames[2]), now + 4)
    return log, checkpoint.dump(node.snapshot()), step


@pytest.mark.parametrize(
    "sharing",
    [
        full(),
        random_k(0.5),
        jwins(wavelet="haar", levels=2),
        choco(0.4, 0.5),
        closed_loop(),
        stateless(levels=2),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_restored_node_commands_the_same(sharing: Any) -> None:
    expected, end, steps = play(sharing, None)
    assert expected[-1] == []
    assert any(command[0] == "Finished" for commands in expected for command in commands)
    for restart_at in range(1, steps + 1):
        log, final, _ = play(sharing, restart_at)
        assert log == expected, f"restored after step {restart_at}"
        assert final == end


def test_a_snapshot_does_not_change_with_the_node() -> None:
    node = in_phase(Phase.TRAINING)
    node.handle(received(1, 0), 0.0)
    state = node.snapshot()
    before = checkpoint.dump(state)
    node.handle(received(2, 0), 0.0)
    node.handle(PeerLost(1), 0.0)
    node.handle(trained(node), 0.0)
    assert checkpoint.dump(state) == before


def test_commands_are_plain_data() -> None:
    """They cross to other processes: numbers, texts and encoded bytes, and the model stays with the node."""
    seen = set()
    node = make(choco(0.5, 0.5), Ring(3), evaluate_at=(0, 1), checkpoint_every=1, deadline_s=1.0, rounds=2)
    commands = node.start(0.0) + node.handle(trained(node), 0.0) + node.handle(received(1, 0), 0.5)
    stray = FrameReceived(Frame(2, 0, Update(P, torch.tensor([0]), torch.tensor([1.0]), base=7)))
    commands += node.handle(received(1, 99), 0.5) + node.handle(stray, 0.6) + node.handle(Stop(), 0.7)
    commands += node.handle(trained(node), 1.0) + node.handle(Tick(), 9.0)
    for command in commands:
        seen.add(type(command))
        for field in dataclasses.fields(command):
            value = getattr(command, field.name)
            assert isinstance(value, int | float | str | tuple | Packed), f"{command}: {field.name}"
    assert {Evaluate, Train, Send, Checkpoint, WakeAt, FrameRefused, RequestKeyframe, Finished} <= seen


def test_variances_that_are_clamped_reach_the_algorithm() -> None:
    """State that depends on the merged parameters would be stale otherwise."""
    projected: list[torch.Tensor] = []

    class Watching(Full):
        def projected(self, state: Any, params: torch.Tensor) -> Any:
            projected.append(params)
            return state

    node = make(Watching(), topology=Ring(1), project=lambda vector: vector.clamp_(max=2.0))
    node.start(0.0)
    node.handle(Trained(0, START.clone()), 0.0)
    assert torch.equal(projected[0], START.clamp(max=2.0))
    node.handle(Trained(1, torch.ones(P)), 0.0)
    assert len(projected) == 1, "nothing was changed, so the algorithm is not called"
