"""How long sending and computing take on the virtual clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jwins.errors import ConfigError
from jwins.rng import stream

__all__ = ["Compute", "Links"]


@dataclass(frozen=True, slots=True)
class Links:
    """A node's uplink is shared fairly by its simultaneous sends; its downlink is unlimited.

    Attributes:
        uplink_mbps: Mbit/s, one number for all nodes or one per node.
        latency_ms: from the last bit sent to the frame's arrival.
    """

    uplink_mbps: float | tuple[float, ...] = 100.0
    latency_ms: float = 20.0

    def __post_init__(self) -> None:
        rates = self.uplink_mbps if isinstance(self.uplink_mbps, tuple) else (self.uplink_mbps,)
        for rate in rates:
            if not (rate > 0 and math.isfinite(rate)):
                raise ConfigError("links.uplink_mbps", rate, "expected Mbit/s above 0")
        if not (self.latency_ms >= 0 and math.isfinite(self.latency_ms)):
            raise ConfigError("links.latency_ms", self.latency_ms, "expected milliseconds, at least 0")

    def bits_per_s(self, node: int) -> float:
        """Uplink rate of a node."""
        rate = self.uplink_mbps[node] if isinstance(self.uplink_mbps, tuple) else self.uplink_mbps
        return rate * 1e6


@dataclass(frozen=True, slots=True)
class Compute:
    """How long local training takes on the virtual clock.

    Attributes:
        step_ms: milliseconds per local step, one number for all nodes or one per node.
        spread: standard deviation over nodes of the logarithm of their slowness; 0 makes them equal.
        jitter: the same over the rounds of a node.

    Both factors are cut off at 1/8 and 8.
    """

    step_ms: float | tuple[float, ...] = 10.0
    spread: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        steps = self.step_ms if isinstance(self.step_ms, tuple) else (self.step_ms,)
        for step in steps:
            if not (step > 0 and math.isfinite(step)):
                raise ConfigError("compute.step_ms", step, "expected milliseconds above 0")
        for name, value in (("spread", self.spread), ("jitter", self.jitter)):
            if not 0.0 <= value <= 2.0:
                raise ConfigError(f"compute.{name}", value, "expected a standard deviation of 0 to 2")

    def seconds(self, seed: int, node: int, round: int, local_steps: int) -> float:
        """Duration of one round's local training."""
        step_ms = self.step_ms[node] if isinstance(self.step_ms, tuple) else self.step_ms
        slowness = 1.0
        if self.spread:
            slowness *= _lognormal(stream(seed, "compute", node=node), self.spread)
        if self.jitter:
            slowness *= _lognormal(stream(seed, "compute", node=node, round=round), self.jitter)
        return step_ms * 1e-3 * local_steps * slowness

    def least_seconds(self, local_steps: int) -> float:
        """No round's training is shorter than this."""
        least = min(self.step_ms) if isinstance(self.step_ms, tuple) else self.step_ms
        return least * 1e-3 * local_steps / (8 if self.spread else 1) / (8 if self.jitter else 1)


def _lognormal(rng: np.random.Generator, sd: float) -> float:
    return min(8.0, max(1 / 8, math.exp(sd * rng.standard_normal())))
