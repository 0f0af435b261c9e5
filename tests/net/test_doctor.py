"""The doctor finds what is wrong, and says what to do about it."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from attackers import DAY, forge
from members import Node, member, roster_of
from typer.testing import CliRunner, Result

from jwins.cli.app import app
from jwins.engines.memory import ExchangeMemory
from jwins.experiment import load
from jwins.net import doctor
from jwins.net.certificate import Certificate
from jwins.net.doctor import Finding, examine
from jwins.net.handshake import pack_greeting
from jwins.net.limits import Limits
from jwins.net.roster import Member, Roster, write_roster
from jwins.sharing import full

GREETING = b"the experiment's digest"


def entry(folder: Path, id: int, name: str, **times: datetime.timedelta) -> Member:
    """A member whose certificate has these times."""
    seen: Certificate = forge(folder, name, name, **times)[2]  # type: ignore[arg-type]
    return member(folder, id, f"{name}-made").model_copy(
        update={"name": name, "fingerprint": seen.fingerprint, "certificate": seen.pem}
    )


@contextlib.contextmanager
def running(roster: Roster, id: int, folder: Path, greeting: bytes = GREETING) -> Iterator[Node]:
    node = Node(
        roster, id, folder, greeting=greeting, dial=(), limits=Limits(connections_per_s=100.0)
    ).started()
    try:
        yield node
    finally:
        node.transport.close()


def found(roster: Roster, folder: Path, about: str, **more: object) -> list[Finding]:
    findings = list(examine(roster, "alice", folder / "alice.key", **more))  # type: ignore[arg-type]
    return [finding for finding in findings if finding.about == about]


def bad(findings: list[Finding]) -> Finding:
    """The one finding that is bad."""
    (finding,) = [finding for finding in findings if finding.good is False]
    return finding


def test_all_is_well(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    with running(roster, 1, tmp_path) as bob:
        findings = list(examine(roster, "alice", tmp_path / "alice.key", judge=lambda greeting: None))
        assert [finding for finding in findings if not finding.good] == []
        assert "round trip" in findings[-1].detail
        assert "Mbit/s" in findings[-1].detail
        assert "free" in next(f for f in findings if f.about == "port").detail
        assert bob.transport.poll(0.0) is None, "a measurement is no connection"


def test_a_node_that_runs_already_is_no_problem(tmp_path: Path) -> None:
    """Neither its port nor its connection is disturbed."""
    roster = roster_of(tmp_path, 2)
    with running(roster, 1, tmp_path) as bob:
        alice = Node(roster, 0, tmp_path).started()
        try:
            bob.until_connected(0)
            assert [f for f in examine(roster, "alice", tmp_path / "alice.key") if f.good is False] == []
            assert "this node is running" in found(roster, tmp_path, "port")[0].detail
            assert bob.transport.report()[0].connections == 1
            assert bob.transport.report()[0].connected
        finally:
            alice.transport.close()


def test_memory_is_stated_and_compared_if_the_model_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roster = roster_of(tmp_path, 2)
    (stated,) = found(roster, tmp_path, "memory")
    assert stated.good
    assert "JWINS 5.0 + 9.5, closed_loop 6.2 + 9.2" in stated.detail
    monkeypatch.setattr(doctor, "memory_free", lambda: 30e6)
    fits, exceeds = (
        found(roster, tmp_path, "memory", exchange=ExchangeMemory.of(full(), dim, 1))[0]
        for dim in (800_000, 900_000)
    )
    assert (fits.good, fits.remedy) == (True, "")
    assert exceeds.good is False
    assert "10.8 MB (3.0 x the model) between rounds, 21.6 MB (6.0 x the model) more" in exceeds.detail
    assert "30 MB are free" in exceeds.detail


def test_a_closed_port(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    finding = bad(found(roster, tmp_path, "bob"))
    assert "nothing listens there" in finding.detail
    assert roster[1].address in finding.detail
    assert "start the node there" in finding.remedy


def test_a_port_that_drops_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full backlog of a socket that accepts nothing is as silent as a firewall."""
    monkeypatch.setattr(doctor, "TIMEOUT_S", 1.0)
    roster = roster_of(tmp_path, 2)
    with socket.create_server(roster[1].host_and_port, backlog=0), contextlib.ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(roster[1].host_and_port)
        finding = bad(found(roster, tmp_path, "bob"))
    assert "no answer in time" in finding.detail
    assert f"open TCP port {roster[1].host_and_port[1]}" in finding.remedy


def test_a_name_without_an_address(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 1)
    bob = member(tmp_path, 1, "bob").model_copy(update={"address": "bob.invalid:7420"})
    finding = bad(found(Roster(members=(*roster.members, bob)), tmp_path, "bob"))
    assert "has no address" in finding.detail
    assert "correct the address" in finding.remedy


def test_a_wrong_fingerprint_in_our_roster(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    _, _, other = forge(tmp_path, "bob", "other")
    entry = roster[1].model_copy(update={"fingerprint": other.fingerprint, "certificate": other.pem})
    ours = Roster(members=(roster[0], entry))
    with running(roster, 1, tmp_path):
        finding = bad(found(ours, tmp_path, "bob"))
    assert "certificate is not" in finding.detail
    assert "jwins keys show bob.crt" in finding.remedy


def test_a_wrong_fingerprint_in_the_others_roster(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    _, _, other = forge(tmp_path, "alice", "other")
    entry = roster[0].model_copy(update={"fingerprint": other.fingerprint, "certificate": other.pem})
    theirs = Roster(members=(entry, roster[1]))
    with running(theirs, 1, tmp_path):
        finding = bad(found(roster, tmp_path, "bob"))
    assert "our certificate" in finding.detail
    assert "alice's certificate must be in bob's roster" in finding.remedy


def test_an_expired_certificate_of_ones_own(tmp_path: Path) -> None:
    alice = entry(tmp_path, 0, "alice", begins=-9 * DAY, ends=-DAY)
    roster = Roster(members=(alice, member(tmp_path, 1, "bob")))
    finding = bad(found(roster, tmp_path, "certificate"))
    assert "expired on" in finding.detail
    assert "jwins keys renew alice" in finding.remedy
    assert found(roster, tmp_path, "neighbours")[0].good is None


def test_an_expired_certificate_of_a_neighbour(tmp_path: Path) -> None:
    roster = Roster(
        members=(member(tmp_path, 0, "alice"), entry(tmp_path, 1, "bob", begins=-9 * DAY, ends=-DAY))
    )
    assert "bob (id 1): its certificate is expired" in bad(found(roster, tmp_path, "roster")).detail


def test_an_experiment_that_differs(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    said = []

    def judge(greeting: bytes) -> str:
        said.append(greeting)
        return "runs another experiment (train.lr = 0.1 there, 0.05 here)"

    with running(roster, 1, tmp_path):
        finding = bad(found(roster, tmp_path, "bob", judge=judge))
    assert said == [GREETING]
    assert "another experiment" in finding.detail
    assert "same experiment file" in finding.remedy


@pytest.mark.parametrize(
    ("codec", "words"), [("pco", "its codec is pco, here it is raw"), ("raw", "")], ids=["other", "same"]
)
def test_settings_of_loops_of_ones_own_are_compared(codec: str, words: str, tmp_path: Path) -> None:
    """With no experiment file, with those of the loop that runs here."""
    roster = roster_of(tmp_path, 2)
    own = pack_greeting(b"8 bytes.", {"codec": "raw", "sharing": "full"})
    other = pack_greeting(b"8 bytes." if codec == "raw" else b"others..", {"codec": codec, "sharing": "full"})
    with running(roster, 1, tmp_path, other), running(roster, 0, tmp_path, own) as alice:
        findings = list(examine(roster, "alice", tmp_path / "alice.key"))
        assert alice.transport.poll(0.0) is None, "to ask oneself is no connection"
    assert "compared" in next(f for f in findings if f.about == "settings").detail
    assert [f.detail for f in findings if f.good is False] == ([words] if words else [])
    (not_compared,) = found(roster, tmp_path, "settings")
    assert not_compared.good is None
    assert "start the node or loop here" in not_compared.detail


def test_a_clock_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roster = roster_of(tmp_path, 2)
    with running(roster, 1, tmp_path):
        monkeypatch.setattr(doctor, "CLOCK_S", -1.0)
        finding = bad(found(roster, tmp_path, "bob"))
    assert "its clock is" in finding.detail
    assert "NTP" in finding.remedy


def test_a_clock_before_the_certificates(tmp_path: Path) -> None:
    roster = Roster(
        members=(*roster_of(tmp_path, 1).members, entry(tmp_path, 1, "bob", begins=DAY, ends=2 * DAY))
    )
    assert "before a certificate" in bad(found(roster, tmp_path, "clock")).detail


def test_a_port_that_another_program_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jwins.net.doctor.TIMEOUT_S", 0.5)  # for the greeting that the program does not send
    roster = roster_of(tmp_path, 2)
    with socket.create_server(roster[0].host_and_port) as listening:
        answering = threading.Thread(target=lambda: listening.accept()[0].close())
        answering.start()
        finding = bad(found(roster, tmp_path, "port"))
        answering.join(10)
    assert "another program uses the port" in finding.detail


def test_a_key_that_others_may_read(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    (tmp_path / "alice.key").chmod(0o640)
    assert "chmod 600" in bad(found(roster, tmp_path, "key")).detail


def test_the_wrong_key(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    (tmp_path / "alice.key").write_bytes((tmp_path / "bob.key").read_bytes())
    assert "is not the key of the certificate" in bad(found(roster, tmp_path, "key")).detail


def test_who_only_dials_is_not_asked(tmp_path: Path) -> None:
    roster = Roster(members=(member(tmp_path, 0, "alice"), member(tmp_path, 1, "bob", reachable=False)))
    (finding,) = found(roster, tmp_path, "bob")
    assert finding.good is None


def jwins(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    write_roster(roster, tmp_path / "roster.toml")
    with running(roster, 1, tmp_path):
        result = jwins("doctor", tmp_path / "roster.toml", "--as", "alice")
        assert result.exit_code == 0, result.output
        assert "ok    key: " in result.stdout
        assert "ok    bob: round trip" in result.stdout
    result = jwins("doctor", tmp_path / "roster.toml", "--as", "alice")
    assert result.exit_code == 2
    assert "FAIL  bob: " in result.stdout
    assert "remedy: start the node there" in result.stdout
    assert "1 problem" in result.stderr
    result = jwins("doctor", tmp_path / "roster.toml", "--as", "alcie")
    assert result.exit_code == 2
    assert 'did you mean "alice"?' in result.stderr


def test_the_command_compares_experiments(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    write_roster(roster, tmp_path / "roster.toml")
    digest = load("digits", ["run.rounds=7"]).changed({"train": {"batching": "loop"}}).digest()
    command = ("doctor", tmp_path / "roster.toml", "--as", "alice", "--experiment", "digits", "--set")
    with running(roster, 1, tmp_path, digest):
        same = jwins(*command, "run.rounds=7", "--set", "run.folder=elsewhere")
        assert same.exit_code == 0, same.output
        assert "ok    memory: the exchange takes 0.2 MB (5.0 x the model) between rounds" in same.stdout
        other = jwins(*command, "train.local_steps=7")
    assert other.exit_code == 2
    assert f"FAIL  bob: it runs another experiment (digest {digest.hex()} there" in other.stdout
    assert "start both with the same experiment file" in other.stdout
