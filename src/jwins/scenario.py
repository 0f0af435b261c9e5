"""Scenario of a simulation: duration of sending and training, and scripted faults.

The simulated driver applies these plain data. Settings and engines use the same checks of single values;
:func:`check_scenario` checks how the values fit together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

from jwins.errors import ConfigError
from jwins.validation import MISSING, Within

if TYPE_CHECKING:
    import numpy as np

Sending = Literal["together", "in_turn"]
"""Treatment of several frames on a node's uplink."""

UPLINK_MBPS = Within("a rate in Mbit/s", 0, open_low=True)
LATENCY_MS = Within("a time", 0)
STEP_MS = Within("a time in ms", 0, open_low=True)
SPREAD = Within("a standard deviation", 0, 2)
DELAY_S = Within("a time", 0, open_low=True)
DEADLINE_S = Within("a time", 0, open_low=True)


@dataclass(frozen=True, slots=True)
class Links:
    """A node's uplink, which its frames share; its downlink is unlimited.

    Attributes:
        uplink_mbps: Mbit/s, one number for all nodes or one per node.
        latency_ms: time from the last bit sent to the frame's arrival.
        sending: "together": simultaneous frames share the uplink evenly; or "in_turn": one after another, as
            :mod:`jwins.net` sends them. A round's frames then go to the neighbours with a higher number first,
            and after the highest to the lowest.
    """

    uplink_mbps: float | tuple[float, ...] = 100.0
    latency_ms: float = 20.0
    sending: Sending = "together"

    def __post_init__(self) -> None:
        UPLINK_MBPS.check_each("links.uplink_mbps", self.uplink_mbps)
        LATENCY_MS.check("links.latency_ms", self.latency_ms)
        if self.sending not in get_args(Sending):
            raise ConfigError("links.sending", self.sending, f"expected {' or '.join(get_args(Sending))}")

    def bits_per_s(self, node: int) -> float:
        """Return the uplink rate of a node."""
        rate = self.uplink_mbps[node] if isinstance(self.uplink_mbps, tuple) else self.uplink_mbps
        return rate * 1e6


@dataclass(frozen=True, slots=True)
class Compute:
    """Duration of local training on the virtual clock.

    Attributes:
        step_ms: milliseconds per local step, one number for all nodes or one per node.
        spread: standard deviation over nodes of the logarithm of their slowness; 0 makes them equal.
        jitter: the same standard deviation over the rounds of a node.

    Both factors are cut off at 1/8 and 8.
    """

    step_ms: float | tuple[float, ...] = 10.0
    spread: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        STEP_MS.check_each("compute.step_ms", self.step_ms)
        SPREAD.check("compute.spread", self.spread)
        SPREAD.check("compute.jitter", self.jitter)

    def seconds(self, seed: int, node: int, round: int, local_steps: int) -> float:
        """Return the duration of one round's local training, in seconds.

        Args:
            seed: seed of the experiment.
            node: the node that trains.
            round: counted from 0.
            local_steps: number of local steps in the round.
        """
        step_ms = self.step_ms[node] if isinstance(self.step_ms, tuple) else self.step_ms
        slowness = 1.0
        if self.spread:
            slowness *= _slowness(seed, node, self.spread)
        if self.jitter:
            slowness *= _lognormal(_stream(seed, node=node, round=round), self.jitter)
        return step_ms * 1e-3 * local_steps * slowness

    def min_seconds(self, local_steps: int) -> float:
        """Return a lower bound of :meth:`seconds` for all nodes and rounds."""
        least = min(self.step_ms) if isinstance(self.step_ms, tuple) else self.step_ms
        return least * 1e-3 * local_steps / (8 if self.spread else 1) / (8 if self.jitter else 1)


@lru_cache(maxsize=2**17)
def _slowness(seed: int, node: int, sd: float) -> float:
    """Return a node's slowness in all rounds; cached, because making a generator takes long."""
    return _lognormal(_stream(seed, node=node), sd)


def _stream(seed: int, **where: int) -> np.random.Generator:
    from jwins.rng import stream  # which loads torch, for other generators

    return stream(seed, "compute", **where)


def _lognormal(rng: np.random.Generator, sd: float) -> float:
    return min(8.0, max(1 / 8, math.exp(sd * rng.standard_normal())))


@dataclass(frozen=True, slots=True)
class Fault:
    """A scripted fault, or the end of one.

    Attributes:
        kind: ``crash`` and ``rejoin`` of ``node`` at the start of ``round``; ``drop`` and ``delay`` of the
            frame that ``node`` sends in ``round``.
        node: the node that crashes or rejoins, or the sender of the frame.
        round: round of the fault.
        receiver: receiver of the frame; None for all receivers.
        seconds: length of a delay.
    """

    kind: Literal["crash", "rejoin", "drop", "delay"]
    node: int
    round: int
    receiver: int | None = None
    seconds: float = 0.0

    def check(self, path: str, num_nodes: int, rounds: int) -> None:
        """Raise a ConfigError, with a key of the ``[[faults]]`` table at ``path``, for an impossible fault."""
        who = "node" if self.kind in ("crash", "rejoin") else "sender"
        for key, node in ((who, self.node), ("receiver", self.receiver)):
            if node is not None and not 0 <= node < num_nodes:
                raise ConfigError(f"{path}.{key}", node, f"there are nodes 0 to {num_nodes - 1}")
        if self.receiver == self.node:
            problem = "is the sender itself, which sends itself nothing; name another node"
            raise ConfigError(f"{path}.receiver", self.receiver, problem)
        if not 0 <= self.round < rounds:
            raise ConfigError(f"{path}.round", self.round, f"expected a round, 0 to {rounds - 1}")
        if self.kind == "delay":
            DELAY_S.check(f"{path}.seconds", self.seconds)


@dataclass(frozen=True, slots=True)
class Attack:
    """A node's attack on its neighbours.

    Attributes:
        kind: ``sign_flip``, ``gaussian`` and ``little`` change the model that is shared, see
            :func:`jwins.sharing.attacks.attacked`; ``label_flip`` the labels of the node's training samples.
        round: first round of the attack.
        scale: strength of attacks on the model, above 0.
    """

    kind: AttackKind
    round: int = 0
    scale: float = 1.0


AttackKind = Literal["sign_flip", "gaussian", "little", "label_flip"]


@dataclass(frozen=True, slots=True)
class Faults:
    """A script of faults.

    >>> Faults().crash(node=1, round=4).rejoin(node=1, round=8).drop(sender=2, round=3).kinds()
    ['crash', 'rejoin', 'drop']
    """

    script: tuple[Fault, ...] = ()

    def crash(self, node: int, round: int) -> Faults:
        """Add a crash of the node just before it trains in ``round``; frames that it has sent arrive."""
        return self._and(Fault("crash", node, round))

    def rejoin(self, node: int, round: int) -> Faults:
        """Add a return of the node, with its state of the crash, when the first other node begins ``round``."""
        return self._and(Fault("rejoin", node, round))

    def drop(self, sender: int, round: int, receiver: int | None = None) -> Faults:
        """Add the loss of a frame; its bytes count as sent."""
        return self._and(Fault("drop", sender, round, receiver))

    def delay(self, sender: int, round: int, seconds: float, receiver: int | None = None) -> Faults:
        """Add a delay of a frame by ``seconds``."""
        return self._and(Fault("delay", sender, round, receiver, seconds))

    def kinds(self) -> list[str]:
        """Return the kinds of the faults, in order."""
        return [fault.kind for fault in self.script]

    def check(self, num_nodes: int, rounds: int, deadline_s: float | None, *, waits: bool = True) -> None:
        """Raise a ConfigError for an impossible script; ``waits`` as in :func:`check_scenario`."""
        for index, fault in enumerate(self.script):
            fault.check(f"faults[{index}]", num_nodes, rounds)
            if fault.kind == "drop" and deadline_s is None and waits:
                problem = (
                    f"required when frames are dropped (faults[{index}].kind = 'drop'), because a node would "
                    f"wait for them forever; set for example run.deadline_s = 1.0"
                )
                raise ConfigError("run.deadline_s", MISSING, problem)
        down: dict[int, int] = {}
        for index, fault in sorted(enumerate(self.script), key=lambda one: one[1].round):
            place = f"faults[{index}].node"
            if fault.kind == "crash":
                if fault.node in down:
                    raise ConfigError(place, fault.node, "the node crashes twice without a rejoin between")
                down[fault.node] = fault.round
            if fault.kind == "rejoin" and not down.pop(fault.node, rounds) < fault.round:
                raise ConfigError(place, fault.node, "the node rejoins without a crash in an earlier round")

    def _and(self, fault: Fault) -> Faults:
        return Faults((*self.script, fault))


def check_scenario(
    *,
    num_nodes: int,
    rounds: int,
    links: Links,
    compute: Compute,
    faults: Faults,
    deadline_s: float | None,
    waits: bool = True,
) -> None:
    """Check the settings that depend on the numbers of nodes and of rounds.

    Args:
        num_nodes: N.
        rounds: number of rounds.
        links: one uplink rate, or N.
        compute: one time per step, or N.
        faults: scripted faults.
        deadline_s: virtual seconds for which a node waits for its neighbours' frames; None for no limit.
        waits: whether nodes wait for each other at all.

    Raises:
        ConfigError: names the TOML path, the value and the remedy.
    """
    for path, value in (("links.uplink_mbps", links.uplink_mbps), ("compute.step_ms", compute.step_ms)):
        if isinstance(value, tuple) and len(value) != num_nodes:
            problem = f"{len(value)} numbers for {num_nodes} nodes; write one per node, or one"
            raise ConfigError(path, list(value), problem)
    if deadline_s is not None:
        DEADLINE_S.check("run.deadline_s", deadline_s)
    faults.check(num_nodes, rounds, deadline_s, waits=waits)
