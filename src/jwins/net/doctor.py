"""Find out why two nodes do not connect, and name a remedy for each problem."""

from __future__ import annotations

import asyncio
import datetime
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jwins.engines.memory import ExchangeMemory, memory_free
from jwins.errors import ConfigError, PeerError, UsageError
from jwins.net.certificate import read_key
from jwins.net.channel import VERSION, Begin, Channel, ChannelHello, Ping, Pong, Sunk
from jwins.net.dial import dial
from jwins.net.handshake import greeting_mismatch
from jwins.net.limits import CHUNK_BYTES
from jwins.net.roster import Member, Roster
from jwins.net.sockets import listening_sockets
from jwins.net.tls import Contexts, in_words, presented_fingerprint
from jwins.sharing import Sharing, closed_loop, jwins

TIMEOUT_S = 5.0
MEASURE_S = 20.0
CLOCK_S = 60.0
"""If clocks differ by more than this, certificates may soon be refused."""

PINGS = 3
SMALL_BYTES, LARGE_BYTES = 1 << 18, 1 << 23
LARGE_BELOW_S = 0.5


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check.

    Attributes:
        about: the check, or the member's name.
        good: None if there was nothing to check.
        detail: the observation.
        remedy: the remedy; "" if none is needed.
    """

    about: str
    good: bool | None
    detail: str
    remedy: str = ""


Judge = Callable[[bytes], str | None]


def examine(
    roster: Roster,
    name: str,
    key_file: Path,
    *,
    judge: Judge | None = None,
    exchange: ExchangeMemory | None = None,
) -> Iterator[Finding]:
    """Check a member's key, certificate, clock, port and memory, then each neighbour.

    Args:
        roster: the members.
        name: name of the member whose machine this is.
        key_file: file of its private key.
        judge: returns a problem of a neighbour's greeting as text, or None; for example another experiment.
            Without it, greetings are compared with that of the node on this machine, in `jwins node` or in a
            user's loop.
        exchange: memory that the exchange of the model takes; None if the model is not known.

    Yields:
        Findings, one after the other.

    Raises:
        ConfigError: there is no such member.
    """
    me = roster.named(name)
    yield from (Finding("roster", False, problem) for problem in roster.problems())
    yield from (Finding("roster", None, warning) for warning in roster.warnings())
    own = list(_own(me, key_file))
    yield from own
    fits = all(finding.good for finding in own)
    yield _clock(roster)
    yield _port(roster, me, key_file if fits else None)
    yield _memory(exchange, len(_neighbours(roster, me)))
    if not fits:
        yield Finding("neighbours", None, "not checked: no peer answers without a valid key and certificate")
        return
    contexts = Contexts.of(roster, me, key_file)
    if judge is None and (own_greeting := asyncio.run(_own_greeting(me, contexts))):
        yield Finding("settings", True, "compared with those of the node that runs here")
        judge = _like(own_greeting)
    elif judge is None:
        yield Finding("settings", None, "not compared: start the node or loop here, or name an --experiment")
    for id in _neighbours(roster, me):  # noqa: A001
        yield from asyncio.run(_collect(_neighbour(roster[id], me, contexts, judge)))


def _like(own: bytes) -> Judge:
    return lambda greeting: greeting_mismatch(greeting, own) or None


def _neighbours(roster: Roster, me: Member) -> tuple[int, ...]:
    try:
        return roster.neighbours(me.id)
    except ConfigError:  # reported with the roster's problems
        return tuple(id for id in roster.ids if id != me.id)  # noqa: A001


async def _collect(findings: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in findings]


# --- This machine -----------------------------------------------------------------------------------------


def _own(me: Member, key_file: Path) -> Iterator[Finding]:
    certificate = me.x509
    try:
        public = read_key(key_file)
    except ConfigError as error:
        yield Finding("key", False, f"{key_file} {error.problem}")
        return
    if public != certificate.public_key:
        detail = f"{key_file} is not the key of the certificate that the roster has for {me.name}"
        remedy = f"pass the right key with --key, or send {me.name}.crt to the keeper of the roster"
        yield Finding("key", False, detail, remedy)
        return
    yield Finding("key", True, f"{key_file} matches the certificate in the roster; only its owner can read it")
    if (problem := certificate.problem()) is not None:
        yield Finding("certificate", False, problem, _renew(me))
        return
    detail = f"{certificate.fingerprint}, until {certificate.not_after:%Y-%m-%d %H:%M} UTC"
    yield Finding("certificate", True, detail)


def _renew(member: Member) -> str:
    return (
        f"make a new one with `jwins keys renew {member.name}`, and put it in every roster with `add --replace`"
    )


def _clock(roster: Roster) -> Finding:
    now = datetime.datetime.now(datetime.UTC)
    newest = max((member.x509.not_before for member in roster.members), default=now)
    if now < newest:
        detail = (
            f"{now:%Y-%m-%d %H:%M} UTC, before a certificate of the roster was made ({newest:%Y-%m-%d %H:%M})"
        )
        return Finding("clock", False, detail, "set the clock of this machine, for example by NTP")
    return Finding("clock", True, f"{now:%Y-%m-%d %H:%M:%S} UTC")


def _port(roster: Roster, me: Member, key_file: Path | None) -> Finding:
    if not me.reachable:
        return Finding("port", None, "this node only dials (reachable = false)")
    try:
        for sock in listening_sockets(me.address, None):
            sock.close()
    except UsageError:
        if key_file is not None and asyncio.run(_is_me(me, Contexts.of(roster, me, key_file))):
            return Finding("port", True, f"{me.address}: this node is running")
        remedy = "stop the program that uses it, or choose another port and change the roster on every machine"
        return Finding("port", False, f"{me.address}: another program uses the port", remedy)
    return Finding("port", True, f"{me.address}: free; nothing is running yet")


def _memory(exchange: ExchangeMemory | None, neighbours: int) -> Finding:
    """Compare the memory of the exchange with that which is free, or state it in multiples of the model."""
    free = memory_free()
    available = "" if free is None else f"; {free / 1e6:,.0f} MB are free"
    if exchange is not None:
        fits = free is None or exchange.steady_bytes + exchange.peak_bytes <= free
        remedy = "" if fits else "end other programs, exchange fewer parameters, or choose another sharing"
        return Finding("memory", fits, f"the exchange takes {exchange}{available}", remedy)
    names: dict[str, Sharing[Any]] = {"JWINS": jwins(), "closed_loop": closed_loop()}
    stated = (f"{name} {ExchangeMemory.of(names[name], 10**6, neighbours).multiples}" for name in names)
    detail = f"multiples of the model, between rounds + more in an exchange: {', '.join(stated)}{available}"
    return Finding("memory", True, detail)


async def _is_me(me: Member, contexts: Contexts) -> bool:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            host, port = me.host_and_port
            _, writer = await asyncio.open_connection(host, port, ssl=contexts.client, server_hostname="")
            writer.transport.abort()
            return presented_fingerprint(writer.get_extra_info("ssl_object")) == me.x509.fingerprint
    except (OSError, PeerError):
        return False


async def _own_greeting(me: Member, contexts: Contexts) -> bytes:
    """Return the greeting of the node that runs on this machine; b"" if none does, or an older one."""
    if not me.reachable:
        return b""
    channel: Channel | None = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            channel, _ = await dial(me, contexts, TIMEOUT_S)
            return (await _hello_of(channel, me, me)).greeting
    except (OSError, PeerError):
        return b""
    finally:
        if channel is not None:
            channel.close("measured")
            channel.abort()


async def _hello_of(channel: Channel, member: Member, me: Member) -> ChannelHello:
    channel.write(ChannelHello(VERSION, me.id, member.id, secrets.token_hex(16), True, b"", time.time()))
    return await channel.control(ChannelHello)


# --- A neighbour ------------------------------------------------------------------------------------------


async def _neighbour(
    member: Member, me: Member, contexts: Contexts, judge: Judge | None
) -> AsyncIterator[Finding]:
    name = member.name
    if not member.reachable:
        yield Finding(name, None, "only dials (reachable = false); run `jwins doctor` there")
        return
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, plain = await asyncio.open_connection(*member.host_and_port)
            plain.close()
        yield Finding(name, True, f"{member.address} answers")
        async with asyncio.timeout(TIMEOUT_S):
            channel, _ = await dial(member, contexts, TIMEOUT_S)
    except (OSError, PeerError) as error:
        yield Finding(name, False, f"{member.address}: {in_words(error)}", _remedy(error, member, me))
        return
    try:
        async with asyncio.timeout(TIMEOUT_S):
            hello = await _hello_of(channel, member, me)
        yield Finding(name, True, "its certificate matches the roster, and it accepts ours")
        ahead_s = hello.clock - time.time()
        if abs(ahead_s) > CLOCK_S:
            detail = f"its clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this one"
            yield Finding(name, False, detail, "set the wrong clock, for example by NTP")
        if judge is not None and (problem := judge(hello.greeting)) is not None:
            remedy = (
                "start both with the same experiment file, or the same settings of a loop, and the same version"
            )
            yield Finding(name, False, problem, remedy)
        async with asyncio.timeout(MEASURE_S):
            yield Finding(name, True, await _measure(channel))
    except (OSError, PeerError) as error:
        yield Finding(name, False, f"{member.address}: {in_words(error)}", _remedy(error, member, me))
    finally:
        channel.close("measured")
        channel.abort()


async def _measure(channel: Channel) -> str:
    trips = []
    for token in range(PINGS):
        begun = time.perf_counter()
        channel.write(Ping(token))
        await _expect(channel, Pong(token))
        trips.append(time.perf_counter() - begun)
    trip_s = min(trips)
    for size in (SMALL_BYTES, LARGE_BYTES):
        begun = time.perf_counter()
        channel.write(Begin(size))
        for _ in range(0, size, CHUNK_BYTES):
            await channel.write_piece(memoryview(bytes(min(size, CHUNK_BYTES))))
        await _expect(channel, Sunk(size))
        taken_s = time.perf_counter() - begun
        if taken_s > LARGE_BELOW_S:
            break
    rate = 8e-6 * size / max(taken_s - trip_s, 1e-6)
    return f"round trip {1e3 * trip_s:.1f} ms, throughput to it {rate:.3g} Mbit/s ({size >> 10} KiB)"


async def _expect(channel: Channel, answer: Pong | Sunk) -> None:
    found = await channel.receive()
    if found != answer:
        raise PeerError(f"expected {answer} and got {found!r:.100}")


def _remedy(error: Exception, member: Member, me: Member) -> str:
    _, port = member.host_and_port
    if isinstance(error, ConnectionRefusedError):
        return f"start the node there; if it runs, correct its address, or forward TCP port {port} to it"
    if isinstance(error, TimeoutError):
        return f"open TCP port {port} in the firewall of {member.name}, or correct the address"
    if isinstance(error, socket.gaierror):
        return f"correct the address of {member.name} in the roster, or the name service"
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == 10:
        return _renew(member)
    if isinstance(error, ssl.SSLCertVerificationError) or "fingerprint" in str(error):
        return (
            f"ask {member.name} to read out `jwins keys show {member.name}.crt`; if the roster differs, "
            "add the new certificate with `jwins roster add --replace`; "
            "if not, another machine answers at this address"
        )
    if "certificate" in in_words(error):
        return (
            f"compare `jwins roster check` at both; {me.name}'s certificate must be in {member.name}'s roster"
        )
    return f"read the log of the node of {member.name}"
