"""Nodes that remember their peers, driven by hand through loss, delay, restarts and drift.

Every scenario ends with the same check: what each node holds of a neighbour is, bit for bit, what that
neighbour holds of itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frames import unpack
from jwins.node import (
    Command,
    Event,
    FrameReceived,
    FrameRefused,
    KeyframeRequested,
    Node,
    PeerLost,
    PeerUp,
    Phase,
    Rejoin,
    RequestKeyframe,
    Rules,
    Send,
    Tick,
    Train,
    Trained,
    WakeAt,
)
from jwins.rng import stream
from jwins.sharing import Choco, ClosedLoop, choco, closed_loop, full, jwins
from jwins.topology import FullyConnected, OnePeerExponential, Regular, Ring
from jwins.wire import Frame, KeyframeRequest, codec
from jwins.wire.frame import Wire

DIGEST = b"recovery"
P = 40
ROUNDS = 15
QUIET = 8
"""Rounds at the end without faults: late keyframes may each build upon what the one before replaced."""


@dataclass
class Network:
    """Messages in order of sending, and a clock that only moves when nothing else can.

    Attributes:
        lost: which frames never arrive.
        slow_keyframes: keyframes arrive when nothing else is under way, as large messages on a shared uplink
            may.
        kept_back: events that the test delivers itself.
    """

    nodes: dict[int, Node]
    lost: Callable[[int, int, Frame], bool] = lambda sender, receiver, frame: False
    slow_keyframes: bool = False
    now: float = 0.0
    events: deque[tuple[int, Event]] = field(default_factory=deque)
    slow: deque[tuple[int, Event]] = field(default_factory=deque)
    wake: list[float] = field(default_factory=list)
    sent: list[tuple[int, int, int, bool]] = field(default_factory=list)
    requests: list[tuple[int, int, int]] = field(default_factory=list)
    down: set[int] = field(default_factory=set)

    def start(self) -> Network:
        for i, node in self.nodes.items():
            self.carry_out(i, node.start(self.now))
        return self

    def carry_out(self, id: int, commands: list[Command]) -> None:
        node = self.nodes[id]
        for command in commands:
            match command:
                case Train(round):
                    noise = stream(3, "training", node=id, round=round).normal(size=P, scale=0.1)
                    self.events.append((id, Trained(round, node.params + torch.from_numpy(noise).float())))
                case Send(to, _, packed, keyframe):
                    frame = unpack(packed.data, codec("raw"), DIGEST, dim=node.update_dim)
                    assert isinstance(frame, Frame)
                    for receiver in to:
                        self.sent.append((id, receiver, frame.round, keyframe))
                        if not self.lost(id, receiver, frame) and receiver not in self.down:
                            queue = self.slow if keyframe and self.slow_keyframes else self.events
                            queue.append((receiver, FrameReceived(frame)))
                case RequestKeyframe(to, packed):
                    message = unpack(packed.data, codec("raw"), DIGEST, dim=node.update_dim)
                    assert isinstance(message, KeyframeRequest)
                    assert message.sender == id
                    self.requests.append((id, to, message.round))
                    self.events.append((to, KeyframeRequested(id, message.round, message.replica_round)))
                case WakeAt(time):
                    self.wake.append(time)
                case FrameRefused(sender, round, reason):
                    raise AssertionError(f"{sender} to {id}, round {round}: {reason}")

    def step(self) -> bool:
        if self.events or self.slow:
            i, event = (self.events or self.slow).popleft()
            if i not in self.down:
                self.carry_out(i, self.nodes[i].handle(event, self.now))
            return True
        if self.wake:
            self.now = min(self.wake)
            self.wake.remove(self.now)
            self.events += [(i, Tick()) for i in self.nodes]
            return True
        return False

    def run(self, until: Callable[[], bool] = lambda: False) -> Network:
        while not until() and self.step():
            pass
        return self

    def reached(self, round: int) -> Callable[[], bool]:
        return lambda: min(node.round for i, node in self.nodes.items() if i not in self.down) >= round

    def crash(self, id: int) -> None:
        self.down.add(id)
        self.events = deque(event for event in self.events if event[0] != id)
        for i, node in self.nodes.items():
            if i not in self.down:
                self.carry_out(i, node.handle(PeerLost(id), self.now))

    def rejoin(self, id: int) -> None:
        self.down.discard(id)
        now_in = min(max(node.round for node in self.nodes.values()), ROUNDS - 1)
        for i, node in self.nodes.items():
            if i != id:
                self.carry_out(i, node.handle(PeerUp(id, now_in), self.now))
        self.carry_out(id, self.nodes[id].handle(Rejoin(now_in), self.now))

    def keyframes(self) -> list[tuple[int, int, int]]:
        return [(sender, receiver, r) for sender, receiver, r, keyframe in self.sent if keyframe]

    def assert_recovered(self) -> None:
        assert all(node.phase is Phase.DONE and node.round == ROUNDS for node in self.nodes.values())
        for i, node in self.nodes.items():
            neighbours = node.rules.topology.at(ROUNDS - 1).senders[i]
            state = node.snapshot().sharing
            assert state.stale_peers == frozenset(), f"node {i} lacks {state.stale_peers}"
            assert state.replicas.keys() == neighbours.keys()
            for j, replica in state.replicas.items():
                own = self.nodes[j].snapshot().sharing
                assert replica.round == own.shared == ROUNDS - 1
                assert torch.equal(replica.x_hat.view(torch.int32), own.x_hat.view(torch.int32)), f"{j} at {i}"


def network(sharing: Any = None, topology: Any = None, deadline_s: float | None = 5.0, **more: Any) -> Network:
    topology = topology or Ring(2)
    start, sharing = torch.linspace(-1, 1, P), sharing or choco(0.2, 0.4)
    wire = Wire(codec("raw"), DIGEST, sharing.update_dim(P))
    rules = Rules(sharing, wire, topology, rounds=ROUNDS, seed=1, deadline_s=deadline_s)
    return Network({i: Node(i, start, rules) for i in range(topology.num_nodes)}, **more)


def dropping(*lost: tuple[int, int, int]) -> Callable[[int, int, Frame], bool]:
    """(sender, receiver, round) of updates that are lost; keyframes are not."""
    return lambda sender, receiver, frame: not frame.keyframe and (sender, receiver, frame.round) in lost


SHARINGS = [
    choco(0.2, 0.4),
    choco(0.2, 0.4, values="bfloat16"),
    choco(1.0, 1.0),
    choco(0.01, 0.4),
    closed_loop(),
    closed_loop(0.03, wavelet=None, history=0),
    closed_loop(wavelet=None, gamma=0.3, residual_rate=1.0, rank=2),
]


@pytest.mark.parametrize("sharing", SHARINGS, ids=repr)
def test_without_faults_no_key_is_sent(sharing: Choco | ClosedLoop) -> None:
    run = network(sharing, FullyConnected(4)).start().run()
    run.assert_recovered()
    assert run.keyframes() == run.requests == []


@pytest.mark.parametrize("slow_keyframes", [False, True])
@pytest.mark.parametrize("round", [0, 1, 5, ROUNDS - 4])
@pytest.mark.parametrize("sharing", SHARINGS, ids=repr)
def test_a_dropped_frame(sharing: Choco | ClosedLoop, round: int, slow_keyframes: bool) -> None:
    run = network(sharing, lost=dropping((0, 1, round)), slow_keyframes=slow_keyframes).start().run()
    run.assert_recovered()
    assert run.requests[0] == (1, 0, round + 1), "noticed by the next update, which builds on the lost one"
    assert {(sender, receiver) for sender, receiver, _ in run.keyframes()} == {(0, 1)}
    assert len(run.requests) <= 2
    assert len(run.keyframes()) <= 2
    assert 1 not in run.nodes[0].snapshot().sharing.stale_peers


@pytest.mark.parametrize("sharing", [choco(0.2, 0.4), closed_loop(), closed_loop(0.05, history=1)], ids=repr)
@pytest.mark.parametrize("slow_keyframes", [False, True])
def test_many_dropped_frames(sharing: Choco | ClosedLoop, slow_keyframes: bool) -> None:
    rng = stream(5, "losses")
    lost = [
        (i, j, r)
        for i in range(4)
        for j in range(4)
        for r in range(ROUNDS - 4)
        if i != j and rng.random() < 0.25
    ]
    run = network(sharing, FullyConnected(4), lost=dropping(*lost), slow_keyframes=slow_keyframes).start().run()
    run.assert_recovered()


@pytest.mark.parametrize("history", [0, 1, 2, 8])
def test_what_was_missed_is_sent_again_while_it_is_remembered(history: int) -> None:
    """A lost update is noticed by the next, asked for after it and answered with the one after that."""
    bases: list[int | None] = []

    def lost(sender: int, receiver: int, frame: Frame) -> bool:
        if frame.keyframe:
            bases.append(frame.update.base)
        return not frame.keyframe and (sender, receiver, frame.round) == (0, 1, 4)

    run = network(closed_loop(0.02, history=history), Ring(3), lost=lost).start().run()
    run.assert_recovered()
    ((_, _, answered),) = set(run.keyframes())
    assert bases == [3 if answered - 3 <= history else None]


@given(
    sharing=st.sampled_from([choco(0.2, 0.4), closed_loop(), closed_loop(0.05, history=1, residual_rate=1.0)]),
    lost=st.sets(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, ROUNDS - QUIET), st.booleans()),
        max_size=20,
    ),
    crashes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=2),
    slow_keyframes=st.booleans(),
)
@example(sharing=closed_loop(), lost={(2, 0, 6, False)}, crashes=[(1, 1), (3, 2)], slow_keyframes=True)
@settings(max_examples=25, deadline=None)
def test_whatever_is_lost_and_whoever_restarts(
    sharing: Choco | ClosedLoop,
    lost: set[tuple[int, int, int, bool]],
    crashes: list[tuple[int, int]],
    slow_keyframes: bool,
) -> None:
    """Updates and keyframes are lost, a node goes and comes back: in the end all hold what the senders hold."""

    def is_lost(sender: int, receiver: int, frame: Frame) -> bool:
        return (sender, receiver, frame.round, frame.keyframe) in lost

    run = network(sharing, Ring(3), lost=is_lost, slow_keyframes=slow_keyframes).start()
    for after, away in crashes:
        now_in = min(node.round for node in run.nodes.values())
        run.run(run.reached(min(now_in + after, ROUNDS - QUIET - 1)))
        run.crash(1)
        run.run(run.reached(min(now_in + after + away, ROUNDS - QUIET)))
        run.rejoin(1)
    run.run()
    run.assert_recovered()


def test_a_key_may_be_lost_too() -> None:
    def lost(sender: int, receiver: int, frame: Frame) -> bool:
        return sender == 0 and (frame.round == 2 or (frame.keyframe and frame.round <= 5))

    run = network(lost=lost).start().run()
    run.assert_recovered()
    assert len(run.requests) > 2


def test_a_key_is_the_frame_of_its_round() -> None:
    """It replaces the update to that neighbour, counts with the neighbour's weight, and costs no round."""
    run = network(topology=Ring(3), lost=dropping((0, 1, 3))).start().run()
    run.assert_recovered()
    ((sender, receiver, when),) = set(run.keyframes())
    assert (sender, receiver) == (0, 1)
    to_1 = [keyframe for s, t, r, keyframe in run.sent if (s, t, r) == (0, 1, when)]
    to_2 = [keyframe for s, t, r, keyframe in run.sent if (s, t, r) == (0, 2, when)]
    assert (to_1, to_2) == ([True], [False])


def test_a_key_that_is_asked_for_goes_out_with_the_next_share() -> None:
    node = network().nodes[0]
    node.start(0.0)
    assert node.handle(KeyframeRequested(1), 0.0) == []
    (first, _) = node.handle(Trained(0, node.params), 0.0)
    assert isinstance(first, Send)
    assert not first.keyframe, "the first update stands alone anyway"
    assert node.handle(KeyframeRequested(1), 0.0) == []
    node.handle(Tick(), 5.0)
    (second, _) = node.handle(Trained(1, node.params + 1), 5.0)
    assert isinstance(second, Send)
    assert (second.keyframe, second.to, second.round) == (True, (1,), 1)
    node.handle(Tick(), 10.0)
    (third, _) = node.handle(Trained(2, node.params + 1), 10.0)
    assert isinstance(third, Send)
    assert not third.keyframe


@pytest.mark.parametrize("algorithm", [full(), jwins(wavelet="haar")], ids=lambda s: type(s).__name__)
def test_algorithms_without_memory_of_peers_never_send_keys(algorithm: Any) -> None:
    run = network(algorithm, lost=dropping((0, 1, 3))).start()
    run.run(run.reached(4))
    run.carry_out(0, run.nodes[0].handle(KeyframeRequested(1), run.now))
    run.run()
    assert run.keyframes() == run.requests == []


# --- Late frames --------------------------------------------------------------------------------------------


def test_a_late_frame_spares_the_keyframe() -> None:
    run = network().start()
    late = []

    def lost(sender: int, receiver: int, frame: Frame) -> bool:
        if (sender, frame.round) == (0, 4):
            late.append(frame)
            return True
        return False

    run.lost = lost
    run.run(run.reached(5))
    run.events.appendleft((1, FrameReceived(late[0])))
    run.run()
    run.assert_recovered()
    assert run.keyframes() == run.requests == []


def test_frames_that_come_after_the_key_are_known() -> None:
    run = network().start()
    late = []

    def lost(sender: int, receiver: int, frame: Frame) -> bool:
        if sender == 0 and frame.round == 4 and not frame.keyframe:
            late.append(frame)
            return True
        return False

    run.lost = lost
    run.run(lambda: bool(run.keyframes()) and run.nodes[1].round > run.keyframes()[0][2])
    run.events.append((1, FrameReceived(late[0])))
    keyframes = len(run.keyframes())
    run.run()
    run.assert_recovered()
    assert len(run.keyframes()) <= keyframes + 1


# --- Crashes and drift --------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", [Ring(2), Ring(5), FullyConnected(4)], ids=repr)
@pytest.mark.parametrize("away", [0, 1, 3])
def test_crash_and_rejoin(topology: Any, away: int) -> None:
    run = network(topology=topology).start()
    run.run(run.reached(3))
    run.crash(1)
    run.run(run.reached(3 + away))
    run.rejoin(1)
    run.run()
    run.assert_recovered()
    neighbours = set(topology.at(0).recipients[1])
    assert neighbours <= {receiver for sender, receiver, _ in run.keyframes() if sender == 1}
    assert neighbours <= {sender for sender, receiver, _ in run.keyframes() if receiver == 1}


def test_a_restart_that_nobody_noticed() -> None:
    run = network(topology=Ring(3)).start()
    run.run(lambda: run.nodes[1].round == 4 and run.nodes[1].phase is Phase.TRAINING)
    run.events = deque(event for event in run.events if event[0] != 1)
    run.rejoin(1)
    run.run()
    run.assert_recovered()


def test_a_link_that_breaks_on_one_side_for_a_moment() -> None:
    run = network(topology=Ring(3)).start()
    run.run(run.reached(4))
    for event in (PeerLost(1), PeerUp(1)):
        run.carry_out(0, run.nodes[0].handle(event, run.now))
    run.run()
    run.assert_recovered()
    assert {(sender, receiver) for sender, receiver, _ in run.keyframes()} == {(0, 1)}


def corrupt(node: Node, peer: int) -> None:
    state = node.snapshot()
    replica = state.sharing.replicas[peer]
    x_hat = replica.x_hat.clone()
    x_hat[0] += 1e-3
    replicas = {**state.sharing.replicas, peer: replace(replica, x_hat=x_hat)}
    node.restore(replace(state, sharing=replace(state.sharing, replicas=replicas)))


def test_drift_is_detected_and_repaired() -> None:
    run = network(topology=Ring(3)).start()
    run.run(run.reached(4))
    corrupt(run.nodes[2], 0)
    run.run()
    run.assert_recovered()
    assert run.requests[0][:2] == (2, 0)
    assert {(sender, receiver) for sender, receiver, _ in run.keyframes()} == {(0, 2)}


def test_a_neighbour_out_of_step_is_left_out_of_the_mixing() -> None:
    run = network(topology=Ring(2)).start()
    run.run(run.reached(4))
    corrupt(run.nodes[1], 0)
    node = run.nodes[1]
    run.run(lambda: node.round == 4 and node.phase is Phase.WAITING)
    trained = node.params.clone()
    run.run(lambda: node.round == 5)
    assert torch.equal(node.params, trained)
    run.run(lambda: node.round == 7)
    assert not torch.equal(node.params, trained)


# --- Graphs that change -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow_keyframes", [False, True])
@pytest.mark.parametrize(
    "topology",
    [Regular(6, 3, dynamic=True, seed=1), Regular(4, 1, dynamic=True), OnePeerExponential(4)],
    ids=repr,
)
def test_new_neighbours_get_a_keyframe_unasked(topology: Any, slow_keyframes: bool) -> None:
    run = network(topology=topology, deadline_s=None, slow_keyframes=slow_keyframes).start().run()
    run.assert_recovered()
    assert run.requests == []
    for sender, receiver, r, keyframe in run.sent:
        new = r > 0 and receiver not in topology.at(r - 1).recipients[sender]
        assert keyframe == new, f"{sender} to {receiver} in round {r}"


def test_changing_graphs_and_losses() -> None:
    topology = Regular(6, 3, dynamic=True, seed=1)
    rng = stream(6, "losses")
    lost = [(i, j, r) for i in range(6) for j in range(6) for r in range(ROUNDS - 4) if rng.random() < 0.2]
    run = network(topology=topology, lost=dropping(*lost)).start().run()
    run.assert_recovered()
