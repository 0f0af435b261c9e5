"""Long messages leave one after another, and nobody waits for who is slow by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from jwins.net import uplink_scheduler as module
from jwins.net.uplink_scheduler import UplinkScheduler


@dataclass
class Way:
    """Something to send to, which says how much has arrived."""

    arrived_bytes: int = 0


SHORT_S, NEVER_S = 0.02, 1000.0
"""Windows: rates are judged often, or not at all, which does not depend on how busy the machine is."""


def played(
    play: Callable[[UplinkScheduler], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
    window_s: float = SHORT_S,
) -> None:
    monkeypatch.setattr(module, "WINDOW_S", window_s)

    async def whole() -> None:
        uplink = UplinkScheduler()
        async with asyncio.timeout(20):
            await play(uplink)
        uplink.close()

    asyncio.run(whole())


class Senders:
    """Messages of so many bytes, which leave at so many bytes a millisecond; who began and ended, in order."""

    def __init__(self, uplink: UplinkScheduler) -> None:
        self.uplink = uplink
        self.seen: list[str] = []

    async def send(self, name: str, size: int, rate: int) -> None:
        way = Way()
        async with self.uplink.turn(way):
            self.seen.append(f"{name} begins")
            while way.arrived_bytes < size:
                await asyncio.sleep(0.001)
                way.arrived_bytes += rate
            self.seen.append(f"{name} ends")


def test_one_after_another_in_the_order_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(uplink: UplinkScheduler) -> None:
        senders = Senders(uplink)
        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(senders.send(name, 200, 1))
        assert senders.seen == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]

    played(play, monkeypatch, NEVER_S)


def test_nobody_waits_for_one_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(uplink: UplinkScheduler) -> None:
        senders = Senders(uplink)
        stuck = asyncio.create_task(senders.send("stuck", 1, 0))
        await asyncio.sleep(0)
        for name in "ab":
            await senders.send(name, 50, 1)
        assert senders.seen == ["stuck begins", "a begins", "a ends", "b begins", "b ends"]
        stuck.cancel()

    played(play, monkeypatch)


def test_one_with_a_slow_way_in_has_company(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(uplink: UplinkScheduler) -> None:
        senders = Senders(uplink)
        await senders.send("before", 20_000, 200)  # what this node can do
        slow = asyncio.create_task(senders.send("slow", 1_000_000, 1))
        await asyncio.sleep(0)
        await senders.send("other", 2000, 200)
        assert senders.seen[2:] == ["slow begins", "other begins", "other ends"]
        slow.cancel()

    played(play, monkeypatch)


def test_none_waits_for_ever_and_whoever_gives_up_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_S", 0.1)

    async def play(uplink: UplinkScheduler) -> None:
        senders = Senders(uplink)
        endless = asyncio.create_task(senders.send("endless", 1_000_000, 1))
        await asyncio.sleep(0)
        gone = asyncio.create_task(senders.send("gone", 10, 1))
        last = asyncio.create_task(senders.send("last", 10, 1))
        await asyncio.sleep(0)
        gone.cancel()
        await last
        assert senders.seen == ["endless begins", "last begins", "last ends"]
        endless.cancel()

    played(play, monkeypatch)


def test_an_error_while_sending_ends_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(uplink: UplinkScheduler) -> None:
        senders = Senders(uplink)
        with pytest.raises(ConnectionResetError):
            async with uplink.turn(Way()):
                raise ConnectionResetError
        await senders.send("next", 5, 1)
        assert senders.seen == ["next begins", "next ends"]

    played(play, monkeypatch, NEVER_S)
