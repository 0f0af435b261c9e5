"""When exchanges happen, and what is refused, without anybody's trainer."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any, cast

import pytest
from torch import nn

from jwins.errors import UsageError
from jwins.integrations.exchange_times import ExchangeTimes


class Noted:
    """Stands for a peer; says what was asked of it."""

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)
        self.calls: list[Any] = []

    def exchange(self, *, wait: bool) -> Any:
        self.calls.append(wait)
        return len(self.calls)

    def close(self) -> None:
        self.calls.append("close")


def exchange_times(every_steps: int | None = None, wait: bool = True) -> tuple[Noted, ExchangeTimes]:
    peer = Noted()
    return peer, ExchangeTimes(cast("Any", peer), every_steps, wait)


@pytest.mark.parametrize(
    ("every_steps", "wait", "calls"),
    [
        (None, True, [True, True, "close"]),
        (None, False, [False, False, True, "close"]),
        (2, True, [True, True, True, "close"]),
        (2, False, [False, False, False, True, "close"]),
        (4, True, [True, True, "close"]),
        (4, False, [False, True, "close"]),
        (100, False, [True, "close"]),
    ],
)
def test_exchanges_are_when_they_are_due(every_steps: int | None, wait: bool, calls: list[Any]) -> None:
    peer, due = exchange_times(every_steps, wait)
    due.begin(10, peer.model, 1)
    for step in range(11, 17):
        due.after(step, epoch_ended=False)
        due.after(step, epoch_ended=step in (13, 16))
    due.end(16)
    assert peer.calls == calls


def test_nothing_was_trained_and_nothing_is_exchanged() -> None:
    peer, due = exchange_times()
    due.begin(5, peer.model, 1)
    due.after(5, epoch_ended=True)
    due.end(5)
    assert peer.calls == ["close"]


def test_what_cannot_be_exchanged_is_refused() -> None:
    with pytest.raises(UsageError, match="every_steps = 0: expected at least 1"):
        exchange_times(0)
    peer, due = exchange_times()
    with pytest.raises(UsageError, match="have different models; pass the same model to both"):
        due.begin(0, nn.Linear(1, 1), 1)
    with pytest.raises(UsageError, match="2 processes train together"):
        due.begin(0, peer.model, 2)
    due.begin(0, nn.Sequential(peer.model, nn.Linear(1, 1)), 1)


WITHOUT = """
import importlib, sys
for library, name in (("transformers", "transformers"), ("lightning.pytorch", "lightning")):
    sys.modules[library] = None
    try:
        importlib.import_module(f"jwins.integrations.{name}")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_without_the_library_the_extra_is_named() -> None:
    said = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    lines = said.stdout.splitlines()
    for line, name in zip(lines, ("transformers", "lightning"), strict=True):
        assert f"UsageError: jwins.integrations.{name} needs an extra: pip install 'jwins[{name}]'" in line


@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_a_callback_is_short(name: str) -> None:
    pytest.importorskip(name)
    module = __import__(f"jwins.integrations.{name}", fromlist=["PeerCallback"])
    assert len(inspect.getsource(module.PeerCallback).splitlines()) < 40
