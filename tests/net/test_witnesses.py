"""Signed rounds: members that fell behind together, and a hostile member that signs, forges and floods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from members import roster_of
from test_hostile import Scene
from test_peer import Peers, model
from wires import Wires
from world import Fault, Schedule, ToySignatures, World, play, signed_round

from jwins.net import events as ev
from jwins.net.bootstrap import pack_state, state_wire
from jwins.net.certificate import is_signature, new_identity, sign
from jwins.net.journal import Journal
from jwins.net.membership import Membership
from jwins.net.peer_session import State
from jwins.net.witnesses import MAX_SIGNED, SKEW
from jwins.node import Staleness
from jwins.topology import Ring
from jwins.wire.frame import MAX_SIGNATURE_BYTES, RoundRequest, SignedRound

AHEAD, COMPANION, FAR = 1, 5, 50
"""Neighbours of node 0 on a ring of six: one is ahead, in a round that is far away, and one keeps pace."""


class RingScene(Scene):
    """Node 0 of a ring, with keys for signed rounds."""

    def __init__(self, ring: int = 6) -> None:
        self.members, self.verified = set(range(ring)), 0

        def members() -> set[int]:
            self.verified += 1
            return self.members

        signatures = ToySignatures(0, 7, members)
        self.nonce = signatures.nonce
        super().__init__(ring=ring, signatures=signatures)

    def pass_s(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.feed(ev.TimePassed())

    def train_and_wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.pass_s(1)
            if self.session.training:
                self.feed(ev.TrainingDone(self.node.round))

    def messages(self, kind: type[Any]) -> list[tuple[int, Any]]:
        found = [(sent.peer, self.wire.unpack(sent.data)) for sent in self.sent if sent.label == "control"]
        return [(peer, message) for peer, message in found if isinstance(message, kind)]

    def signed(self, at: int = FAR, member: int = 2, **other: Any) -> SignedRound:
        key = ToySignatures(other.pop("key", member), 0, tuple)
        given = {"asker": 0, "nonce": self.nonce} | other
        return replace(signed_round(key, AHEAD, at, member, **given), asker=0)


class Behind(RingScene):
    """Node 0 of a ring, which has asked the neighbour that is ahead for signed rounds."""

    def __init__(self, ring: int = 6) -> None:
        super().__init__(ring)
        companion = ring - 1
        self.connect(AHEAD)
        self.connect(companion)
        for _ in range(3):
            self.pass_s(1)
            self.end_round(AHEAD, companion)
        self.connect(AHEAD, FAR)
        for _ in range(5):
            self.pass_s(1)
            self.end_round(companion)
        self.pass_s(2)
        self.feed(ev.TrainingDone(self.node.round))
        assert self.messages(RoundRequest) == [(AHEAD, RoundRequest(0, 8, 0, self.nonce))]


def test_a_neighbour_ahead_and_the_signed_round_of_another_member_make_a_node_follow() -> None:
    scene = Behind()
    scene.say(AHEAD, scene.signed())
    assert scene.node.round == FAR
    assert scene.session.skipped_rounds == FAR - 8


def test_the_signed_round_limits_how_far_a_neighbour_makes_a_node_skip() -> None:
    scene = Behind()
    scene.say(AHEAD, scene.signed(at=20))
    assert scene.node.round == 20 + SKEW


BAD: dict[str, dict[str, Any]] = {
    "forged by the neighbour": {"key": AHEAD},
    "of another experiment": {"digest": b"another!"},
    "of another version of the roster": {"roster_version": 1},
    "of an earlier process": {"nonce": bytes(16)},
    "for another asker": {"asker": 4},
    "of the neighbour itself": {"member": AHEAD},
    "of this node itself": {"member": 0},
    "of no member": {"member": 99},
    "of a removed member": {"member": 3},
    "of a round that nobody can have reached": {"at": 2**32 - 1},
    "of a round that all may have reached": {"at": 8 + SKEW},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_signed_round_counts_for_nothing(kind: str) -> None:
    scene = Behind()
    scene.members.discard(3)
    before = scene.session.peers[AHEAD].refused
    scene.say(AHEAD, scene.signed(**BAD[kind]))
    assert scene.node.round == 8
    if kind != "of a round that all may have reached":
        assert scene.session.peers[AHEAD].refused == before + 1
        assert not scene.session.witnesses.rounds
    scene.say(AHEAD, scene.signed())
    assert scene.node.round == FAR, "and does not keep a good one away"


def test_a_member_that_is_cut_off_or_removed_is_no_witness_any_more() -> None:
    for state in ("cut", "removed"):
        scene = Behind()
        scene.session.witnesses.rounds[3] = FAR
        assert scene.session.witnesses.ahead() == {3: FAR + SKEW}
        if state == "cut":
            scene.session.peers[3].cut = "inflated values"
        else:
            scene.session.peers[3].state = State.REMOVED
        assert not scene.session.witnesses.ahead()


@pytest.mark.parametrize("length", [MAX_SIGNATURE_BYTES, MAX_SIGNATURE_BYTES + 1])
def test_a_signature_longer_than_a_message_holds_is_not_sent(length: int) -> None:
    """An RSA key of 4096 bits signs with as many bytes as a message holds."""
    scene = Behind()
    scene.session.witnesses._signatures = Long(length)
    scene.say(COMPANION, RoundRequest(COMPANION, 0, 4, bytes(16)))
    assert len(scene.messages(SignedRound)) == (length == MAX_SIGNATURE_BYTES)


@dataclass
class Long:
    """Signatures of this length."""

    length: int
    nonce = bytes(16)

    def sign(self, data: bytes) -> bytes:
        return bytes(self.length)

    def verify(self, node: int, data: bytes, signature: bytes) -> bool:
        return False


def test_a_flood_of_signed_rounds_is_refused_unread_and_keeps_little() -> None:
    scene = Behind()
    for at in range(1000):
        scene.say(AHEAD, scene.signed(key=AHEAD, at=FAR + at % 9))
    assert scene.session.peers[AHEAD].refused >= 1000
    assert scene.verified == MAX_SIGNED
    scene.say(AHEAD, scene.signed())
    assert scene.node.round == 8, f"it may answer {MAX_SIGNED} times, and has"
    scene.say(COMPANION, replace(scene.signed(), sender=COMPANION))
    assert scene.node.round == 8, "nobody else was asked"


def test_a_flood_of_requests_is_answered_once_in_a_second() -> None:
    scene = Behind()
    scene.sent.clear()
    for _ in range(500):
        scene.say(COMPANION, RoundRequest(COMPANION, 0, COMPANION, bytes(16)))
        scene.say(COMPANION, RoundRequest(COMPANION, 0, 4, bytes(16)))
    passed = [RoundRequest(0, 8, COMPANION, bytes(16))]
    assert [message for _, message in scene.messages(RoundRequest)] == passed
    assert len(scene.messages(SignedRound)) == 1
    assert len(scene.sent) == 3, "and a Hello with this node's round"
    scene.pass_s(2)
    scene.say(COMPANION, RoundRequest(COMPANION, 0, 4, bytes(16)))
    assert len(scene.messages(SignedRound)) == 2


def test_a_flood_of_askers_is_answered_for_a_few() -> None:
    scene = Behind(ring=40)
    for asker in range(1, 39):
        scene.say(39, RoundRequest(39, 0, asker, bytes(16)))
    assert len(scene.messages(SignedRound)) == MAX_SIGNED


@pytest.mark.parametrize(
    ("peer", "asker"), [(2, 2), (2, 3), (COMPANION, 0), (COMPANION, 99), (COMPANION, 2**32 - 1)]
)
def test_only_neighbours_ask_and_only_for_members(peer: int, asker: int) -> None:
    scene = Behind()
    scene.connect(2)
    scene.sent.clear()
    scene.say(peer, RoundRequest(peer, 0, asker, bytes(16)))
    assert not scene.sent
    assert scene.session.peers[peer].refused == 1


def test_a_node_that_has_just_skipped_rounds_signs_none_until_it_has_merged() -> None:
    scene = Behind()
    scene.say(AHEAD, scene.signed())
    scene.sent.clear()
    scene.say(COMPANION, RoundRequest(COMPANION, 8, 4, bytes(16)))
    assert not scene.messages(SignedRound)
    scene.frame(AHEAD, FAR)
    scene.feed(ev.TrainingDone(FAR))
    scene.pass_s(6)
    assert scene.node.round == FAR + 1
    scene.say(COMPANION, RoundRequest(COMPANION, 8, 4, bytes(16)))
    ((to, signed),) = scene.messages(SignedRound)
    key = ToySignatures(0, 0, tuple)
    assert (to, signed) == (COMPANION, signed_round(key, 0, FAR + 1, 0, 4, bytes(16)))


def test_a_neighbour_passes_on_only_first_hand_and_valid_rounds() -> None:
    scene = Behind()
    scene.connect(AHEAD, FAR)
    ask = RoundRequest(COMPANION, 8, COMPANION, b"nonce of node 5.")

    def say(member: int, key: int) -> None:
        made = signed_round(ToySignatures(key, 0, tuple), AHEAD, FAR, member, COMPANION, ask.nonce)
        scene.say(AHEAD, made)

    say(AHEAD, AHEAD)
    assert not scene.messages(SignedRound), "nobody has requested it"
    scene.say(COMPANION, ask)
    say(AHEAD, 2)
    say(2, 2)
    assert not scene.messages(SignedRound)
    scene.pass_s(2)
    scene.say(COMPANION, ask)
    say(AHEAD, AHEAD)
    ((to, signed),) = scene.messages(SignedRound)
    assert (to, signed.member, signed.sender, signed.round) == (COMPANION, AHEAD, 0, FAR)


def test_asynchronous_nodes_ask_nobody_and_answer_nobody() -> None:
    scene = Scene(ring=6, staleness=Staleness(16), signatures=ToySignatures(0, 7, lambda: range(6)))
    scene.connect(AHEAD, FAR)
    scene.connect(COMPANION)
    for at in range(5):
        scene.now += 5.0
        scene.feed(ev.TrainingDone(at))
    sent = {type(scene.wire.unpack(message.data)) for message in scene.sent}
    assert RoundRequest not in sent
    scene.sent.clear()
    scene.say(AHEAD, RoundRequest(AHEAD, FAR, AHEAD, bytes(16)))
    scene.say(AHEAD, RoundRequest(AHEAD, FAR, 2, bytes(16)))
    assert not scene.sent
    assert scene.session.peers[AHEAD].refused == 2


def test_a_chain_of_false_rounds_leads_no_further_than_one() -> None:
    """Two colluding members state rounds that are just possible, and later ones when the node has followed."""
    scene, skipped = Behind(), []
    for _ in range(10):
        possible = scene.session.rounds.times.possible_rounds(scene.now - scene.session.peers[AHEAD].merged_at)
        at = scene.node.round + int(possible) - 1
        scene.connect(AHEAD, at)
        scene.train_and_wait(8)
        scene.say(AHEAD, scene.signed(at=at))
        skipped.append(scene.session.skipped_rounds)
    assert skipped[0] > FAR, "the first one is believed"
    assert skipped[-1] == skipped[0]


@pytest.mark.parametrize("at", [FAR + 1, 900])
def test_a_node_that_has_merged_with_nobody_takes_no_model_beyond_the_rounds_it_was_shown(at: int) -> None:
    scene = RingScene()
    scene.connect(COMPANION)
    scene.now += 1.0
    scene.feed(ev.TrainingDone(0))
    scene.connect(AHEAD, FAR)
    scene.train_and_wait(10)
    scene.say(AHEAD, scene.signed())
    assert scene.session.joiner is not None
    wire = state_wire(b"testtest", scene.dim)
    scene.say(AHEAD, pack_state(wire, AHEAD, at, torch.ones(scene.dim)).data)
    assert (scene.node.round == at) == (at < 900)


@pytest.mark.parametrize("hostile", [AHEAD, COMPANION])
def test_a_member_that_understates_its_round_and_sends_no_model_ends_no_node(hostile: int) -> None:
    """The other neighbour's model is of a round that two do not show; signed rounds show it afterwards."""
    scene, at = RingScene(), 50_000
    honest = AHEAD + COMPANION - hostile
    scene.connect(hostile, 10)
    scene.connect(honest, at)
    scene.pass_s(1)
    scene.feed(ev.TrainingDone(0))
    provided = pack_state(state_wire(b"testtest", scene.dim), honest, at, torch.ones(scene.dim)).data

    def pass_on(seconds: int) -> None:
        for _ in range(seconds):
            if scene.session.joiner is not None and scene.session.joiner._current == honest:
                scene.say(honest, provided)
            scene.train_and_wait(1)

    pass_on(200)
    assert not scene.session.leaving
    assert scene.messages(RoundRequest)[-1][0] == honest
    signed = replace(scene.signed(at=at, member=(2, 4)[honest == COMPANION]), sender=honest)
    scene.say(honest, signed)
    pass_on(20)
    assert scene.node.round >= at


@pytest.mark.parametrize("staleness", [None, Staleness(4)])
def test_a_neighbour_far_beyond_the_shown_round_is_asked_for_its_model_last(
    staleness: Staleness | None,
) -> None:
    scene = Scene(ring=6, staleness=staleness)
    scene.connect(AHEAD, 5000)
    scene.connect(COMPANION, 300)
    scene.now += 1.0
    scene.feed(ev.TrainingDone(0))
    assert [asked["peer"] for asked in scene.told("requesting state")] == [COMPANION]


# --- In the simulated world -------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [2, 3, 4])
def test_members_side_by_side_on_a_ring_that_fell_behind_together_return(behind: int) -> None:
    faults = (Fault(10.0, "cut", 0, 5, 60.0), Fault(10.0, "cut", behind - 1, behind, 60.0))
    train_s = (2.0,) * behind + (1.0,) * (6 - behind)
    world = play(Schedule(1, 6, ring=True, train_s=train_s, faults=faults))
    skipped = [process.session.skipped_rounds for process in world.processes if process is not None]
    assert all(rounds > 15 for rounds in skipped[:behind])
    assert not any(skipped[behind:])


@pytest.mark.parametrize("ring", [True, False])
def test_one_member_alone_ahead_of_a_ring_is_caught_up_with(ring: bool) -> None:
    others = (0, 3) if ring else (0, 1, 2, 3)
    faults = tuple(Fault(10.0, "cut", 4, other, 60.0) for other in others)
    world = play(Schedule(1, 5, ring=ring, train_s=(1.3,) * 4 + (1.0,), faults=faults))
    assert not any(event == "rejoining" for node in range(4) for _, event, _ in world.reports[node])


def test_two_members_of_a_ring_that_start_late_and_cut_off_return() -> None:
    faults = (
        Fault(0.0, "late_start", 1, other=0, seconds=190.2),
        Fault(0.3, "join", 4, other=1, seconds=2.46, how="bootstraps"),
        Fault(1.54, "silence", 0, other=3, seconds=35.49),
        Fault(5.19, "full_disk", 1, other=2, seconds=0.1),
    )
    play(Schedule(20459, 5, ring=True, train_s=(2.6, 6.0, 2.6, 2.0, 2.0), faults=faults))


@pytest.mark.parametrize("how", ["signs rounds", "far ahead", "no frames"])
def test_a_hostile_member_alone_speeds_up_no_neighbour(how: str) -> None:
    schedule = Schedule(5, 6, ring=True, train_s=(0.5,) * 6, faults=(Fault(0.0, "hostile", 0, how=how),))
    world = World(schedule)
    world.run(19.0)
    for process in world.processes[1:]:
        assert process is not None
        assert process.session.skipped_rounds == 0
        assert process.toy.round > 5
        assert not process.session.witnesses.rounds


# --- With the keys of certificates ------------------------------------------------------------------------


def test_the_key_of_a_certificate_signs_and_no_other(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 3)
    sides = [
        Membership(
            None,
            roster,
            member.id,
            tmp_path / f"{member.name}.key",
            num_nodes=3,
            build=lambda count: Ring(num_nodes=count, seed=1),
            folder=None,
            journal=Journal("test"),
        )
        for member in roster.members
    ]
    signature = sides[1].sign(b"text")
    assert sides[0].verify(1, b"text", signature)
    assert not sides[0].verify(1, b"other", signature)
    assert not sides[0].verify(2, b"text", signature)
    assert not sides[0].verify(1, b"text", b"")
    assert not sides[0].verify(3, b"text", signature)
    assert len({side.nonce for side in sides}) == 3
    (tmp_path / "bob.key").unlink()
    assert sides[1].sign(b"text") == b""


def test_peers_sign_with_the_keys_of_their_certificates(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    with peers.peer(0, model()) as alice, peers.peer(1, model()) as bob:
        first, second = (peer._driver.session.settings.signatures for peer in (alice, bob))
        assert first is not None
        assert second is not None
        assert second.verify(0, b"text", first.sign(b"text"))
        assert not second.verify(1, b"text", first.sign(b"text"))


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_other_kinds_of_keys_sign_too(kind: str, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    key: Any = (
        ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else rsa.generate_private_key(65537, 2048)
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    file = tmp_path / "own.key"
    file.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    file.chmod(0o600)
    der = serialization.Encoding.DER
    public = key.public_key().public_bytes(der, serialization.PublicFormat.SubjectPublicKeyInfo)
    _, _, other = new_identity("other", tmp_path)
    assert is_signature(sign(file, b"text"), b"text", public)
    assert not is_signature(sign(file, b"text"), b"other", public)
    assert not is_signature(sign(file, b"text"), b"text", other.public_key)


@pytest.mark.parametrize("kind", ["x25519", "dsa"])
def test_a_member_whose_key_cannot_sign_ends_no_node(kind: str) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import dsa, x25519

    key: Any = x25519.X25519PrivateKey.generate() if kind == "x25519" else dsa.generate_private_key(1024)
    der, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    assert not is_signature(bytes(64), b"text", key.public_key().public_bytes(der, form))
