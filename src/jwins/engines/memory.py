"""Memory of a node's exchange, known before it is taken, and the memory that is free."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jwins.errors import ConfigError
from jwins.sharing.base import Sharing, Vectors
from jwins.sharing.calls import call, method_name

KEPT_FRAMES = 2
"""Frames of earlier rounds that a node between machines keeps, to send them again."""


@dataclass(frozen=True, slots=True)
class ExchangeMemory:
    """Memory of one node's exchange, beside the model that is trained, its gradient and its optimizer.

    Attributes:
        model_bytes: 4 bytes per parameter.
        steady_bytes: between rounds.
        peak_bytes: further ones during an exchange.
    """

    model_bytes: float
    steady_bytes: float
    peak_bytes: float

    @staticmethod
    def of(sharing: Sharing[Any], dim: int, neighbours: int) -> ExchangeMemory:
        """Return the memory of a node with a number of neighbours.

        Beside the algorithm's vectors there are the node's copy of the model, and a second one from the end of
        training to the merge; frames to send again, the new one, and one of each neighbour.
        """
        vectors = call(method_name(sharing, "vectors"), lambda: Vectors(*sharing.vectors(neighbours)))
        vector_bytes = 4.0 * sharing.update_dim(dim)
        steady = 1 + vectors.state + KEPT_FRAMES * vectors.frame
        peak = 1 + vectors.exchange + (1 + neighbours) * vectors.frame
        return ExchangeMemory(4.0 * dim, steady * vector_bytes, peak * vector_bytes)

    @property
    def multiples(self) -> str:
        """Return both in multiples of the model."""
        return " + ".join(f"{size / self.model_bytes:.1f}" for size in (self.steady_bytes, self.peak_bytes))

    def __str__(self) -> str:
        return (
            f"{self._text(self.steady_bytes)} between rounds, {self._text(self.peak_bytes)} more in an exchange"
        )

    def _text(self, size_bytes: float) -> str:
        return f"{size_bytes / 1e6:,.1f} MB ({size_bytes / self.model_bytes:.1f} x the model)"

    def check(self, path: str) -> None:
        """Refuse a model for whose exchange the free memory is too small.

        Raises:
            ConfigError: for ``path``, if not even the vectors between rounds fit.
        """
        free = memory_free()
        if free is not None and free < self.steady_bytes:
            problem = f"the exchange takes {self}, and {free / 1e6:,.1f} MB are free; exchange fewer parameters"
            raise ConfigError(path, f"{self.model_bytes / 4:,.0f} parameters", problem)


def memory_free() -> float | None:
    """Return the free bytes of the machine, or up to this process's limit; None if unknown."""
    free: list[float] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        free.append(float(words[words.index("MemAvailable:") + 1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = float((group / "memory.max").read_text(encoding="ascii"))  # "max" is not a number
        used = float((group / "memory.current").read_text(encoding="ascii"))
        counted = (group / "memory.stat").read_text(encoding="ascii").split()
        cache = float(counted[counted.index("inactive_file") + 1]) if "inactive_file" in counted else 0.0
        free.append(limit - used + cache)
    return min(free) if free else None
