"""Bits per position of each codec against the entropy bound, for positions drawn at random.

    python benchmarks/positions.py

The bound for k of n positions, each choice equally likely, is log2(C(n, k)) / k bits: no code does better on
average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from jwins.sharing.update import Update
from jwins.wire import codec
from jwins.wire.elias import encode_positions

UNIVERSES = (1_700_000, 89_834, 5_000)
DENSITIES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
SEED = 1
TARGETS = {1_700_000: 0.01, 89_834: 0.025}  # how far `pco` may be above the bound


@dataclass(frozen=True)
class Row:
    """One universe and density.

    Attributes:
        dim: how many positions there are.
        density: the fraction of them that is chosen.
        bound: entropy, bits per position.
        bits: bits per position by codec; ``elias`` is the Elias gamma code of the gaps, as in ``paper``.
    """

    dim: int
    density: float
    bound: float
    bits: dict[str, float]

    def excess(self, name: str) -> float:
        """Return how far a codec is above the bound, as a fraction of the bound."""
        return self.bits[name] / self.bound - 1

    @property
    def within_target(self) -> bool | None:
        """Return whether ``pco`` is close enough to the bound; None without a goal."""
        return self.excess("pco") <= TARGETS[self.dim] if self.dim in TARGETS else None


def entropy_bits(dim: int, count: int) -> float:
    """log2(C(dim, count)) / count."""
    choices = math.lgamma(dim + 1) - math.lgamma(count + 1) - math.lgamma(dim - count + 1)
    return choices / math.log(2) / count


def rows(
    universes: Sequence[int] = UNIVERSES, densities: Sequence[float] = DENSITIES, seed: int = SEED
) -> list[Row]:
    """Encodes positions of every universe and density once."""
    found = []
    for dim in universes:
        for density in densities:
            rng = np.random.default_rng([seed, dim, round(1000 * density)])
            count = round(density * dim)
            chosen = np.sort(rng.choice(dim, count, replace=False))
            update = Update(dim, torch.from_numpy(chosen), torch.zeros(count))
            sizes = {name: codec(name).encode(update).positions_bytes for name in ("raw", "pco")}
            sizes["elias"] = len(encode_positions(chosen))
            bits = {name: 8 * size / count for name, size in sizes.items()}
            found.append(Row(dim, density, entropy_bits(dim, count), bits))
    return found


def table(found: Sequence[Row]) -> Table:
    """The rows as a table."""
    shown = Table(title="bits per position and excess over the entropy bound (raw: 32 bits)", box=box.SIMPLE)
    for name in ("universe", "density", "bound", "elias", "excess", "pco", "excess", "pco target"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found:
        target = "" if row.within_target is None else f"{TARGETS[row.dim]:.1%} "
        verdict = target + {None: "reported", True: "met", False: "MISSED"}[row.within_target]
        shown.add_row(
            f"{row.dim:,}",
            f"{row.density:g}",
            f"{row.bound:.3f}",
            f"{row.bits['elias']:.3f}",
            f"{row.excess('elias'):+.1%}",
            f"{row.bits['pco']:.3f}",
            f"{row.excess('pco'):+.2%}",
            verdict,
        )
    return shown


if __name__ == "__main__":
    Console().print(table(rows()))
