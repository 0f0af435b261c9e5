"""A hostile member with a valid key: one test for each thing it can try, against a session with a real node.

The same kinds are played in the simulated world (``world.py``), and over real TLS in ``test_attacks.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from wires import Wires
from wires import World as RunWorld
from world import DIM, ENDLESS, TIMEOUT_S, Fault, Schedule, ToyNode, World, play

from jwins.errors import ConfigError
from jwins.net import events as ev
from jwins.net.bootstrap import PROVIDE_EVERY, pack_state, state_wire
from jwins.net.handshake import Handshake
from jwins.net.peer_session import State
from jwins.net.session import Session, SessionSettings
from jwins.node import FREE_FRAMES, MAX_ROUNDS_AHEAD, Node, Rules, Staleness
from jwins.sharing import full
from jwins.sharing.own_scale import OwnScale
from jwins.sharing.update import Sampled, Update
from jwins.topology import FullyConnected, Ring
from jwins.wire.codec import codec
from jwins.wire.frame import Bye, Frame, Hello, Message, StateRequest, Wire

HOSTILE, HONEST = 2, 1


class Scene:
    """Node 0 with its session; the others are whatever a test says."""

    def __init__(
        self,
        *,
        dim: int = DIM,
        ring: int = 0,
        rounds: int = ENDLESS,
        staleness: Staleness | None = None,
        begins: bool = True,
        **settings: Any,
    ) -> None:
        self.dim, self.now = dim, 0.0
        self.wire = Wire(codec("raw"), b"testtest", dim)
        topology = Ring(num_nodes=ring, seed=1) if ring else FullyConnected(num_nodes=3, seed=1)
        rules = Rules(full(), self.wire, topology, rounds, 1, checkpoint_every=1, staleness=staleness)
        self.node = Node(0, torch.zeros(dim), rules.among_strangers(1e6, changing=False))
        handshake = Handshake(dim, "raw", b"x0")
        self.session = Session(
            ToyNode(self.node, {}), SessionSettings(TIMEOUT_S, handshake, **settings), self.now
        )
        self.sent: list[ev.Transmit] = []
        self.reports: list[ev.LogLine] = []
        if begins:
            self.take(self.session.start(self.now))

    def take(self, commands: list[ev.Command]) -> None:
        for command in commands:
            if isinstance(command, ev.Transmit):
                self.sent.append(command)
            elif isinstance(command, ev.LogLine):
                self.reports.append(command)

    def feed(self, event: ev.Event) -> None:
        self.now += 1e-4
        self.take(self.session.handle(event, self.now))

    def connect(self, peer: int, round: int = 0, *, hello: bool = True) -> None:
        self.feed(ev.Connected(peer, b""))
        if hello:
            self.say(peer, Hello(peer, round, self.dim, "raw", {}, b"x0", round))

    def say(self, peer: int, message: Message | bytes) -> None:
        data = message if isinstance(message, bytes) else self.wire.pack(message).data
        self.feed(ev.MessageReceived(peer, data))

    def frame(self, peer: int, round: int, value: float = 0.0, **more: Any) -> None:
        update = Update(self.dim, None, torch.full((self.dim,), value))
        self.say(peer, Frame(peer, round, update, **more))

    def end_round(self, *senders: int, value: float = 0.0) -> None:
        """Train, and complete the round with frames of these."""
        at = self.node.round
        self.feed(ev.TrainingDone(at))
        for sender in senders:
            self.frame(sender, at, value)
        assert self.node.round == at + 1

    def told(self, event: str) -> list[dict[str, Any]]:
        return [dict(report.fields) for report in self.reports if report.event == event]


def sampled(round: int, dim: int) -> Frame:
    """A frame of few bytes that decodes to as many values as there are: its positions are a seed."""
    values = torch.zeros(dim - 1, dtype=torch.bfloat16)
    return Frame(HOSTILE, round, Update(dim, Sampled(1, dim - 1), values))


# --- Frames -----------------------------------------------------------------------------------------------


def test_early_frames_stay_packed_until_their_round_and_few_may_wait() -> None:
    scene = Scene()
    scene.connect(HOSTILE)
    for at in range(1, 66):
        scene.frame(HOSTILE, at)
    known = scene.session.peers[HOSTILE]
    ahead = scene.node.rules.rounds_ahead
    assert not scene.node.inbox, "a frame was decoded before its round"
    assert len(known.early) == ahead < 5
    assert known.early.size_bytes < 5 * (DIM * 4 + 60)
    assert known.refused == 65 - ahead
    scene.connect(HONEST)
    scene.end_round(HONEST)
    assert list(scene.node.inbox) == [(HOSTILE, 1)], "that of the round that began, and no other"
    assert len(known.early) == ahead - 1


def test_a_checkpoint_has_no_early_frames() -> None:
    scene = Scene()
    scene.connect(HOSTILE)
    for at in range(1, 4):
        scene.frame(HOSTILE, at)
    assert not scene.node.snapshot().inbox


def test_early_frames_count_with_what_they_decode_to() -> None:
    scene = Scene(dim=10_000)
    object.__setattr__(scene.node.rules, "inbox_bytes", 3.5 * 16 * 10_000)
    object.__setattr__(scene.node.rules, "rounds_ahead", 60)
    object.__setattr__(scene.node.rules, "inbox_frames", 60)
    scene.connect(HOSTILE)
    for at in range(1, 11):
        scene.say(HOSTILE, sampled(at, 10_000))
    assert len(scene.session.peers[HOSTILE].early) == FREE_FRAMES
    assert (
        "take 639936 bytes" in scene.told("refused")[-1]["reason"] or scene.session.peers[HOSTILE].refused == 7
    )


def test_frames_and_keyframes_of_members_that_are_not_neighbours_are_refused() -> None:
    scene = Scene(ring=5)
    scene.connect(HOSTILE)
    for at in range(3):
        scene.frame(HOSTILE, at)
        scene.frame(HOSTILE, at, keyframe=True)
    assert scene.session.peers[HOSTILE].refused == 6
    for at in range(3):
        scene.frame(HOSTILE, at, roster_version=7)  # by a newer roster it may be one
    assert len(scene.session.peers[HOSTILE].early) + len(scene.node.inbox) <= 3


def test_in_one_round_few_frames_of_a_sender_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.connect(HOSTILE)
    decoded = 0
    read = scene.session.node.read

    def counting(peer: int, data: bytes) -> Any:
        nonlocal decoded
        decoded += 1
        return read(peer, data)

    monkeypatch.setattr(scene.session.node, "read", counting)
    for _ in range(200):
        scene.frame(HOSTILE, 0, float("nan"))
    assert decoded == scene.node.rules.inbox_frames + FREE_FRAMES < 10
    assert scene.session.peers[HOSTILE].refused == 200


def test_a_node_that_does_not_wait_keeps_little_of_a_member_that_sends_any_rounds() -> None:
    scene = Scene(staleness=Staleness(16))
    scene.connect(HOSTILE)
    scene.connect(HONEST)
    for at in (ENDLESS - 1, *range(1000, 0, -1)):
        scene.frame(HOSTILE, at)
        if at % 50 == 0:
            scene.feed(ev.TrainingDone(scene.node.round))
    assert scene.node.round == 20
    assert len(scene.node.inbox) <= 1, "its frames are joined"
    assert len(scene.session.peers[HOSTILE].seen) <= MAX_ROUNDS_AHEAD + 2
    assert scene.session.joiner is None, "one of two neighbours made the node ask for a model"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: 4 GB")]
)
def test_a_failed_allocation_is_a_refusal(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.connect(HOSTILE)

    def fails(peer: int, data: bytes) -> Any:
        raise error

    monkeypatch.setattr(scene.session.node, "read", fails)
    scene.frame(HOSTILE, 0)
    assert scene.session.peers[HOSTILE].refused == 1
    assert "no memory" in scene.told("refused")[0]["reason"]


def test_an_error_of_ones_own_is_not_taken_for_a_failed_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.connect(HOSTILE)

    def fails(peer: int, data: bytes) -> Any:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(scene.session.node, "read", fails)
    with pytest.raises(RuntimeError, match="size mismatch"):
        scene.frame(HOSTILE, 0)


def test_a_header_says_the_same_as_the_frame() -> None:
    wire = Wire(codec("raw"), b"testtest", 100)
    data = wire.pack(Frame(3, 7, Update(100, Sampled(1, 5), torch.zeros(5)), True, 9)).data
    header, frame = wire.peek(data), wire.unpack(data)
    assert header is not None
    assert isinstance(frame, Frame)
    assert (header.sender, header.round, header.keyframe, header.roster_version, header.count) == (
        *(frame.sender, frame.round, frame.keyframe, frame.roster_version),
        frame.update.count,
    )
    assert wire.peek(wire.pack(Bye(3, 7, "")).data) is None


# --- Rounds and values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["far ahead", "early frames"])
def test_a_member_that_names_the_last_round_makes_no_node_jump(how: str) -> None:
    faults = (Fault(0.0, "hostile", 2, how=how), Fault(0.0, "late_start", 1, seconds=1.5))
    world = play(Schedule(1, faults=faults))
    for node in (0, 1):
        process = world.processes[node]
        assert process is not None
        assert process.session.skipped_rounds == 0


def test_a_member_that_inflates_its_values_is_named_and_cut() -> None:
    scene = Scene()
    scene.connect(HONEST)
    scene.connect(HOSTILE)
    value = 1.0
    for _ in range(12):
        at = scene.node.round
        scene.feed(ev.TrainingDone(at))
        scene.frame(HOSTILE, at, value)
        scene.frame(HONEST, at, 0.5)
        if scene.node.round == at:  # its frame was refused, and it is waited for
            scene.now += 25 * TIMEOUT_S
            for _ in range(50):
                scene.now += 1.0
                scene.feed(ev.TimePassed())
        value *= 10.0
    (cut,) = scene.told("cut")
    assert cut["peer"] == HOSTILE
    assert "inflates its values" in cut["reason"]
    assert scene.session.peers[HOSTILE].state is State.INCOMPATIBLE
    assert float(scene.node.params.abs().max()) < 1e3
    assert scene.node.round >= 10, "nobody waits for it"
    scene.feed(ev.Disconnected(HOSTILE, "reset"))
    scene.connect(HOSTILE, 10)
    assert scene.session.peers[HOSTILE].state is State.INCOMPATIBLE, "a new connection changes nothing"


def test_a_cut_holds_after_a_restart_until_an_operator_lifts_it(tmp_path: Path, wires: Wires) -> None:
    def restarted() -> Session:
        session = RunWorld(2).driver(0, wires, tmp_path).session
        session.start(0.0)
        session.handle(ev.Connected(1, session.handshake.greeting), 0.0)
        hello = session.handshake.hello(1, 0, 0, settled=True)
        session.handle(ev.MessageReceived(1, session.node.rules.wire.pack(hello).data), 0.0)
        return session

    first = RunWorld(2).driver(0, wires, tmp_path)
    first.session.start(0.0)
    first.session.cut(1, "inflates its values")
    first._carry_out(first.session.out)
    file = tmp_path / "cut.json"
    assert json.loads(file.read_text()) == {"node-1": "inflates its values"}
    assert file.stat().st_mode & 0o077 == 0
    assert restarted().peers[1].state is State.INCOMPATIBLE
    assert restarted().peers[1].cut == "inflates its values"
    file.write_text("[]")
    with pytest.raises(ConfigError, match=r"cut\.json.*remove it to lift all cuts"):
        restarted()
    file.unlink()
    assert restarted().peers[1].state is State.ACTIVE


def test_one_damaged_number_cuts_nobody() -> None:
    scene = Scene()
    scene.connect(HONEST)
    scene.connect(HOSTILE)
    scene.frame(HOSTILE, 0, 1e20)
    assert scene.session.peers[HOSTILE].refused == 1
    assert not scene.told("cut")
    scene.end_round(HONEST, HOSTILE)


def test_values_that_grow_with_ones_own_training_are_no_inflation() -> None:
    scale = OwnScale(torch.ones(2))
    for power in range(40):
        scale.trained(torch.tensor([2.0**power]), torch.tensor([2.0 ** (power + 1)]))
    assert scale.own == 2.0**40


def test_in_the_world_inflated_values_end_no_honest_node() -> None:
    world = World(Schedule(3, faults=(Fault(0.0, "hostile", 2, how="inflates"),)))
    world.run(60.0)
    for node in (0, 1):
        assert [fields["peer"] for _, event, fields in world.reports[node] if event == "cut"] == [2]
        process = world.processes[node]
        assert process is not None
        assert not process.failed
        assert float(process.toy.params.abs().max()) < 1e3


# --- Models -----------------------------------------------------------------------------------------------


def models_sent(scene: Scene, peer: int) -> int:
    return sum(command.label == "state" and command.peer == peer for command in scene.sent)


def test_a_model_is_sent_once_in_some_rounds_over_all_connections() -> None:
    scene = Scene()
    scene.connect(HONEST)
    for _ in range(2 * PROVIDE_EVERY - 1):
        scene.connect(HOSTILE, scene.node.round)
        for _ in range(5):
            scene.say(HOSTILE, StateRequest(HOSTILE, 0))
        scene.end_round(HONEST, HOSTILE)
        scene.feed(ev.Disconnected(HOSTILE, "reset"))
    assert models_sent(scene, HOSTILE) == 2


def test_only_neighbours_and_joiners_are_sent_a_model() -> None:
    scene = Scene(ring=5)
    scene.connect(HOSTILE)
    scene.say(HOSTILE, StateRequest(HOSTILE, 0))
    assert models_sent(scene, HOSTILE) == 0
    assert "may not have" in scene.told("refused")[0]["reason"]


def model(scene: Scene, peer: int, round: int, value: float = 1.0) -> bytes:
    wire = state_wire(scene.wire.digest, scene.dim)
    return pack_state(wire, peer, round, torch.full((scene.dim,), value)).data


@pytest.mark.parametrize(
    ("round", "value", "words"),
    [
        (2**32 - 1, 1.0, "round 4294967295"),
        (999, 1.0, "no other member is known to be beyond round 20"),
        (20, 1e38, "a value of 1e+38"),
        (20, float("nan"), "a value of nan"),
    ],
)
def test_a_bad_model_is_refused_and_the_next_provider_asked(round: int, value: float, words: str) -> None:
    scene = Scene(rounds=1000, bootstrap_from=(HOSTILE, HONEST), joins_at=5, from_round=5)
    for peer in (HOSTILE, HONEST):
        scene.connect(peer, 20)
    scene.feed(ev.TimePassed())
    scene.say(HOSTILE, model(scene, HOSTILE, round, value))
    assert words in scene.told("no model")[0]["reason"]
    scene.say(HONEST, model(scene, HONEST, 20))
    assert scene.told("bootstrapped") == [{"peer": HONEST, "round": 20}]
    assert scene.node.round == 20


def test_a_round_that_two_providers_name_is_believed() -> None:
    """A round that a neighbour named in its Hello may be outdated."""
    scene = Scene(rounds=1000, bootstrap_from=(HOSTILE, HONEST), joins_at=5, from_round=5)
    for peer in (HOSTILE, HONEST):
        scene.connect(peer, 20)
    scene.feed(ev.TimePassed())
    scene.say(HOSTILE, model(scene, HOSTILE, 500))
    scene.say(HONEST, model(scene, HONEST, 503))
    assert scene.node.round == 503


# --- The log and the clock --------------------------------------------------------------------------------


def test_a_flood_of_byes_is_one_line_for_each_connection_and_few_in_all() -> None:
    scene = Scene()
    scene.connect(HOSTILE)
    for _ in range(1000):
        scene.say(HOSTILE, Bye(HOSTILE, 0, "x" * 500))
    (line,) = scene.told("bye")
    assert len(line["reason"]) == 200
    for _ in range(100):
        scene.feed(ev.Disconnected(HOSTILE, "reset"))
        scene.connect(HOSTILE)
        scene.say(HOSTILE, Bye(HOSTILE, 0, "again"))
    assert len(scene.told("bye")) <= 11
    assert len(scene.reports) < 60, "every kind of line has its limit"


def test_repeated_mismatches_fill_no_log() -> None:
    scene = Scene()
    for _ in range(100):
        scene.connect(HOSTILE, hello=False)
        scene.say(HOSTILE, Hello(HOSTILE, 0, 99, "raw", {}, b"x0", 0))
        scene.feed(ev.Disconnected(HOSTILE, "reset"))
    assert len(scene.told("incompatible peer")) <= 10


def test_a_member_that_answers_just_in_time_slows_its_neighbours_by_a_bounded_factor() -> None:
    world = World(Schedule(5, 4, train_s=(0.2, 0.2, 0.2, 0.9 * TIMEOUT_S)))
    world.run(120.0)
    for node in range(3):
        process = world.processes[node]
        assert process is not None
        limits = [process.session.waiting.limit_s(peer) for peer in range(4) if peer != node]
        assert max(limits) <= 1.1 * TIMEOUT_S, (
            "the timeout of the others did not grow, nor much that of the slow one"
        )
        assert process.toy.round > 120.0 / (1.2 * TIMEOUT_S)


def test_a_restart_keeps_the_time_since_the_last_merge() -> None:
    """The others' round is possible for a node that stood still for hours, and was then started again."""
    before = Scene()
    for peer in (HOSTILE, HONEST):
        before.connect(peer)
    for _ in range(5):
        before.now += 1.0
        before.end_round(HOSTILE, HONEST)
    before.now += 3600.0
    before.feed(ev.TimePassed())
    after = Scene(begins=False)
    after.node.restore(before.node.snapshot())
    after.session.restore(before.session.snapshot(before.now))
    after.take(after.session.start(after.now, resumed=True))
    for peer in (HOSTILE, HONEST):
        after.connect(peer, 3600)
    after.now += 1.0
    after.feed(ev.TrainingDone(5))
    assert after.node.round == 3600
