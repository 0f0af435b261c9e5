"""Keys, certificates and the roster, as files and at the command line."""

from __future__ import annotations

import contextlib
import datetime
import os
import stat
import subprocess
from pathlib import Path

import pytest
from attackers import DAY, forge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from members import member, roster_of
from typer.testing import CliRunner, Result

from jwins.cli.app import app
from jwins.errors import ConfigError, UsageError
from jwins.net.certificate import certificate_in, new_identity, read_certificate, read_key, renewed
from jwins.net.roster import Member, Roster, read_roster, split_address, write_roster
from jwins.net.tls import Contexts


def jwins(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- Keys -------------------------------------------------------------------------------------------------


def test_a_new_key_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        key, file, certificate = new_identity("alice", tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert read_key(key) == certificate.public_key
    assert certificate_in(file) == certificate
    assert certificate.name == "alice"
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.problem(now) is None
    assert datetime.timedelta(days=364) < certificate.not_after - now < datetime.timedelta(days=366)
    assert certificate.problem(now + datetime.timedelta(days=366)) is not None


def test_openssl_reads_them(tmp_path: Path) -> None:
    """The fingerprint is the one that other tools show."""
    try:
        _, file, certificate = new_identity("alice", tmp_path)
        said = subprocess.run(
            ["openssl", "x509", "-in", file, "-noout", "-fingerprint", "-sha256", "-text"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert ":".join(certificate.fingerprint[i : i + 2] for i in range(0, 64, 2)).upper() in said
    assert "prime256v1" in said
    assert "CA:FALSE" in said


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    for name in ("alice.key", "alice.crt"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(ConfigError, match="not overwritten"):
            new_identity("alice", tmp_path)
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()
    (tmp_path / "alice.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not overwritten"):
        new_identity("alice", tmp_path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 64, "ä"])
def test_what_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected up to 63 letters"):
        new_identity(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_renewed_certificate_has_the_same_key(tmp_path: Path) -> None:
    key, _, old = new_identity("alice", tmp_path)
    new = renewed("alice", key, days=30)
    assert new.public_key == old.public_key
    assert new.fingerprint != old.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 PEM blocks"),
        ("-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n", "a private key"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot|can be read"),
        ("-----BEGIN CERTIFICATE-----\n\xff\n", "can be read"),
    ],
)
def test_what_is_no_certificate(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_certificate(text, "here")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a private key"),
        (None, "jwins keys new"),
    ],
)
def test_what_is_no_key(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "x.key"
    if data is not None:
        path.touch(0o600)
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_key(path)


# --- The roster -------------------------------------------------------------------------------------------


def test_a_roster_is_read_as_it_was_written(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 3).with_member(member(tmp_path, 9, "hidden", reachable=False), from_round=4)
    write_roster(roster, tmp_path / "roster.toml")
    assert read_roster(tmp_path / "roster.toml") == roster
    assert roster.roster_version == 1
    assert roster.from_round == 4
    assert roster.ids == (0, 1, 2, 9)


def test_the_digest_is_of_everything_but_addresses(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    moved = roster[1].model_copy(update={"address": "10.0.0.1:1"})
    assert Roster(members=(moved, roster[0])).digest == roster.digest
    other = roster[1].model_copy(update={"id": 5})
    assert Roster(members=(roster[0], other)).digest != roster.digest
    assert roster.model_copy(update={"seed": 2}).digest != roster.digest
    assert roster.model_copy(update={"roster_version": 2}).digest != roster.digest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id = 1", "id = 0", r"members\[1\].id = 0: members\[0\] has the same"),
        ("id = 1", "id = -1", "expected a node's id"),
        ("id = 1", 'id = "1"', "write 1 without quotes"),
        ('name = "bob"', 'name = "alice"', r"members\[1\].name = 'alice': members\[0\] has the same"),
        ('name = "bob"', 'name = "../bob"', "expected up to 63 letters"),
        ('name = "bob"\n', "", r"members\[1\].name = <missing>"),
        ("reachable = true", "reachable = 1", "expected true or false"),
        ('address = "127.0.0.1:', 'address = "127.0.0.1;', r"expected host:port, such as"),
        ('fingerprint = "', 'fingerprint = "0', "the certificate beside it has"),
        ("-----BEGIN CERTIFICATE-----", "-----BEGIN PRIVATE KEY-----", "expected one certificate"),
        ("roster_version = 0", "roster_version = -1", "roster_version = -1"),
        ("seed = 1", "sed = 1", 'did you mean "seed"'),
        ('kind = "fully_connected"', 'kind = "rign"', 'did you mean "ring"'),
        ("[topology]", "[topology", "not TOML"),
    ],
)
def test_a_damaged_roster_says_where_and_what(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "roster.toml"
    write_roster(roster_of(tmp_path, 2), path)
    text = path.read_text()
    assert old in text
    head, _, tail = text.rpartition(old)
    path.write_text(head + new + tail)
    with pytest.raises(ConfigError, match=message) as caught:
        read_roster(path)
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "roster.toml" in said


@given(garbage=st.binary(max_size=200))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_garbage_is_refused(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "roster.toml"
    path.write_bytes(garbage)
    with contextlib.suppress(ConfigError):
        assert read_roster(path).members == ()


def test_fingerprints_are_taken_as_other_tools_write_them(tmp_path: Path) -> None:
    alice = roster_of(tmp_path, 1)[0]
    digits = alice.fingerprint
    spaced = ":".join(digits[i : i + 2] for i in range(0, 64, 2)).upper()
    for written in (digits.upper(), spaced, f"sha256:{digits}", f"SHA256={spaced}"):
        fields = {**alice.model_dump(), "fingerprint": written}
        assert Member(**fields).x509.fingerprint == digits


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.7:7420", ("10.0.0.7", 7420)),
        ("node-7.example.org:1", ("node-7.example.org", 1)),
        ("[fd00::7]:65535", ("fd00::7", 65535)),
    ],
)
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    assert split_address("address", address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        ":7420",
        "host:",
        "host:0",
        "host:65536",
        "host:7 420",
        "fd00::7:1",
        "a@b:1",
        "https://a:1",
        "[x]:1",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="expected host:port"):
        split_address("address", address)


def test_neighbours_are_of_the_topology(tmp_path: Path) -> None:
    members = tuple(m.model_copy(update={"id": 10 * m.id}) for m in roster_of(tmp_path, 4).members)
    ring = Roster(members=members, topology={"kind": "ring"})  # type: ignore[arg-type]
    assert ring.neighbours(0) == (10, 30)
    assert ring.neighbours(20) == (10, 30)
    assert Roster(members=members).neighbours(20) == (0, 10, 30)
    with pytest.raises(UsageError, match="ids are 0, 10, 20, 30"):
        ring.neighbours(7)


@pytest.mark.parametrize("kind", ["one_peer_exponential", "finite_time"])
def test_where_the_graph_changes_all_are_neighbours(tmp_path: Path, kind: str) -> None:
    roster = Roster(members=roster_of(tmp_path, 4).members, topology={"kind": kind})  # type: ignore[arg-type]
    assert roster.neighbours(1) == (0, 2, 3)


def test_two_that_cannot_be_dialled_are_never_joined(tmp_path: Path) -> None:
    members = list(roster_of(tmp_path, 4).members)
    for place in (0, 2):
        members[place] = members[place].model_copy(update={"reachable": False})
    ring = Roster(members=tuple(members), topology={"kind": "ring"})  # type: ignore[arg-type]
    assert ring.neighbours(0) == (1, 3)
    full = Roster(members=tuple(members))
    with pytest.raises(ConfigError, match="makes alice and carol neighbours"):
        full.build_topology()
    assert any("makes alice and carol neighbours" in problem for problem in full.problems())
    drawn = Roster(
        members=tuple(members),
        topology={"kind": "regular", "degree": 2, "dynamic": True},  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError, match="makes alice and carol neighbours"):
        drawn.build_topology()


def test_a_list_of_edges_lies_beside_the_roster(tmp_path: Path) -> None:
    write_roster(roster_of(tmp_path, 3), tmp_path / "roster.toml")
    (tmp_path / "graph.txt").write_text("0 1\n1 2\n")
    text = (tmp_path / "roster.toml").read_text()
    changed = text.replace('kind = "fully_connected"', 'kind = "edge_list"\npath = "graph.txt"')
    (tmp_path / "roster.toml").write_text(changed)
    assert read_roster(tmp_path / "roster.toml").neighbours(0) == (1,)


def test_problems_and_warnings(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    assert list(roster.problems()) == []
    assert list(roster.warnings()) == []
    now = datetime.datetime.now(datetime.UTC)
    assert len(list(roster.warnings(now + 350 * DAY))) == 2
    assert len(list(roster.problems(now + 400 * DAY))) == 2
    same = roster[1].model_copy(update={"address": roster[0].address})
    assert "the same address" in next(Roster(members=(roster[0], same)).problems())
    other = roster[1].model_copy(update={"name": "robert"})
    assert "its certificate names 'bob'" in next(Roster(members=(roster[0], other)).problems())


def test_changes_count_versions(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 3)
    assert roster.without("bob").roster_version == 0
    once = roster.without("bob", from_round=10)
    assert (once.roster_version, once.from_round, once.ids) == (1, 10, (0, 2))
    with pytest.raises(ConfigError, match="the last change is of round 10; name a later round"):
        once.without("carol", from_round=10)
    with pytest.raises(ConfigError, match="use --replace"):
        roster.with_member(roster[1])
    assert roster.with_member(roster[1], replace=True) == roster


def test_members_of_an_authority_are_trusted_by_themselves(tmp_path: Path) -> None:
    """A certificate that an authority issued need not come with the authority's."""
    authority = forge(tmp_path, "authority", "authority", ca=True)
    _, key, seen = forge(tmp_path, "alice", "alice", signed_by=authority[:2])
    alice = Member(
        id=0, name="alice", address="127.0.0.1:7420", fingerprint=seen.fingerprint, certificate=seen.pem
    )
    roster = Roster(members=(alice,))
    assert Contexts.of(roster, alice, key).server.cert_store_stats()["x509"] == 1


# --- At the command line ----------------------------------------------------------------------------------


def test_from_keys_to_a_roster(tmp_path: Path) -> None:
    roster = tmp_path / "roster.toml"
    for name in ("alice", "bob"):
        made = jwins("keys", "new", name, "--folder", tmp_path, "--days", 100)
        assert made.exit_code == 0, made.output
        added = jwins(
            "roster", "add", roster, tmp_path / f"{name}.crt", "--address", f"{name}.example.org:7420"
        )
        assert added.exit_code == 0, added.output
        assert ("give this file to every member" in added.stdout) == (name == "bob")
        shown = jwins("keys", "show", tmp_path / f"{name}.crt").stdout
        fingerprint = certificate_in(tmp_path / f"{name}.crt").fingerprint
        assert fingerprint in made.stdout
        assert fingerprint in added.stdout
        assert fingerprint in shown
    listed = jwins("roster", "list", roster).stdout
    assert "alice.example.org:7420" in listed
    assert certificate_in(tmp_path / "bob.crt").fingerprint in listed
    checked = jwins("roster", "check", roster)
    assert checked.exit_code == 0, checked.output
    assert read_roster(roster).digest in checked.stdout

    assert jwins("keys", "new", "carol", "--folder", tmp_path).exit_code == 0
    joins = ("roster", "add", roster, tmp_path / "carol.crt", "--address", "c:1", "--from-round", 5)
    text = roster.read_text()
    full = jwins(*joins)
    assert full.exit_code == 2
    assert "places = 2: a run has no place for another member; set places" in full.stderr
    roster.write_text(f"places = 3\n{text}")
    assert jwins(*joins).exit_code == 0
    roster.write_text(text)

    again = jwins("roster", "add", roster, tmp_path / "bob.crt", "--address", "b:1")
    assert again.exit_code == 2
    assert "--replace" in again.stderr
    assert jwins("keys", "renew", "bob", "--folder", tmp_path, "--days", 10).exit_code == 0
    replaced = jwins(
        *("roster", "add", roster, tmp_path / "bob.crt", "--address", "b:1", "--replace", "--from-round", 7)
    )
    assert replaced.exit_code == 0, replaced.output
    assert (read_roster(roster).roster_version, read_roster(roster).named("bob").id) == (1, 1)
    warned = jwins("roster", "check", roster)
    assert warned.exit_code == 0
    assert "warning: bob (id 1): its certificate expires on" in warned.stdout
    assert jwins("roster", "remove", roster, "alice", "--from-round", 9).exit_code == 0
    assert read_roster(roster).ids == (1,)
    assert jwins("roster", "remove", roster, "alice").exit_code == 2


def test_errors_at_the_command_line(tmp_path: Path) -> None:
    assert "there is no such folder" in jwins("keys", "new", "alice", "--folder", tmp_path / "none").stderr
    assert (
        "expected a number of days" in jwins("keys", "new", "alice", "--folder", tmp_path, "--days", 0).stderr
    )
    assert "jwins roster add" in jwins("roster", "list", tmp_path / "none.toml").stderr
    jwins("keys", "new", "alice", "--folder", tmp_path)
    wrong = jwins("roster", "add", tmp_path / "r.toml", tmp_path / "alice.key", "--address", "a:1")
    assert wrong.exit_code == 2
    assert "expected one certificate" in wrong.stderr
    assert not (tmp_path / "r.toml").exists()
    wrong = jwins("roster", "add", tmp_path / "r.toml", tmp_path / "alice.crt", "--address", "a")
    assert "expected host:port" in wrong.stderr
