"""Which engine runs an experiment."""

from __future__ import annotations

from dataclasses import dataclass

from jwins.errors import UsageError

__all__ = ["Ray"]


@dataclass(frozen=True, slots=True)
class Ray:
    """Machines of a Ray cluster (extra ``ray``). Nothing that is measured depends on them.

    In a program that has called ``ray.init``, the cluster that it is connected to is used.

    Attributes:
        actors: actors that share the nodes of a simulation, each with ``run.threads`` cores (1 if left out).
        address: of a cluster that is there, ``auto`` for the one on this machine; None for ``$RAY_ADDRESS`` or,
            without that, one of this machine alone.
        restarts: how often a simulation goes on from its last checkpoint after it has lost an actor, and each
            run of a comparison after it has lost its machine.

    Raises:
        UsageError: a number out of range.

    Example::

        result = jwins.simulate(experiment, engine=jwins.Ray(actors=4, address="auto"))
    """

    actors: int = 1
    address: str | None = None
    restarts: int = 3

    def __post_init__(self) -> None:
        for name, value, least in (("actors", self.actors, 1), ("restarts", self.restarts, 0)):
            if value < least:
                raise UsageError(f"{name} = {value}: expected at least {least}")
