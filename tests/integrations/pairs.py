"""Two members of a roster that train at the same time, and what they train."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from members import roster_of
from torch import nn

import jwins

DEADLINE_S = 120.0


class Adapted(nn.Module):
    """A layer that stays as it is, and beside it one of low rank that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.lora_a = nn.Linear(4, 2, bias=False)
        self.lora_b = nn.Linear(2, 3, bias=False)
        self.own = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.base(x) + self.lora_b(self.lora_a(x)) + self.own
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def models() -> list[Adapted]:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(Adapted())
    return found


def samples(rank: int, count: int) -> list[dict[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(rank)
    return [
        {"x": torch.randn(4, generator=draws), "labels": torch.tensor(number % 3)} for number in range(count)
    ]


def is_shared(name: str) -> bool:
    return "lora" in name


def peers_of(folder: Path, modules: list[Any]) -> list[jwins.Peer]:
    roster = roster_of(folder, 2)
    return [
        jwins.Peer(
            module,
            roster=roster,
            key=folder / f"{member.name}.key",
            sharing=jwins.sharing.full(),
            params=is_shared,
        )
        for member, module in zip(roster.members, modules, strict=True)
    ]


def both(work: Callable[[int], None]) -> None:
    """Run each member on a thread; whatever one raises is raised here."""
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    for failure in failures:
        raise failure
    assert not any(thread.is_alive() for thread in threads), "a member hangs"


def check_shared(first: nn.Module, second: nn.Module) -> None:
    """After an exchange of two with full sharing, what is shared is the same on both, and nothing else."""
    there = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        if is_shared(name):
            torch.testing.assert_close(parameter, there[name])
        elif parameter.requires_grad:
            assert not torch.equal(parameter, there[name]), f"{name} was trained on other samples"
