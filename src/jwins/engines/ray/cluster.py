"""Connect to a Ray cluster, and check that it suffices before anything starts."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from jwins.errors import UsageError

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise UsageError(
        "the engine ray needs an extra: pip install 'jwins[ray]', on this machine and on those of the cluster"
    ) from None

_COMPARED_LIBRARIES = ("jwins", "torch", "numpy", "PyWavelets", "pcodec")
"""Libraries whose version may change the last bits of a result, or the bytes of frames."""

_PROBE_S = 60.0
"""Time limit for the answer of a machine."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Within the block, connect to a Ray cluster. An existing connection of the program is used and left open.

    Args:
        address: address of a running cluster; ``auto`` for the one on this machine. None for ``$RAY_ADDRESS``
            or, without it, for a cluster of this machine alone that ends with the block.

    Raises:
        UsageError: no such cluster runs, or it has other versions of Python or Ray.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    wanted = address or os.environ.get("RAY_ADDRESS")
    own = {} if wanted else {"include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
    except (ConnectionError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip()
        if not wanted:
            raise UsageError(f"cannot start a Ray cluster on this machine: {reason}") from None
        given = f"--address {address}" if address else f"RAY_ADDRESS={wanted}"
        raise UsageError(
            f"{given}: no suitable Ray cluster ({reason}); run `ray status` there to see whether one runs. "
            f"All machines need the same versions of Python and Ray"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine of the cluster."""

    id: str
    name: str
    cores: float
    memory_bytes: float
    gpus: float


def machines() -> list[Machine]:
    """Return the machines that are up."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            cores, memory, gpus = (float(has.get(key, 0.0)) for key in ("CPU", "memory", "GPU"))
            found.append(Machine(node["NodeID"], name, cores, memory, gpus))
    return found


@dataclass(frozen=True, slots=True)
class Demand:
    """Resources that one actor or one run needs.

    Attributes:
        cores: one for each thread.
        gpus: 1, or 0.
    """

    cores: int
    memory_bytes: float
    gpus: int = 0

    @property
    def resources(self) -> dict[str, Any]:
        """Return the demand as options of a Ray task or actor."""
        return {"num_cpus": self.cores, "memory": int(self.memory_bytes), "num_gpus": self.gpus}

    def times(self, machine: Machine) -> int:
        """Return how often the demand fits on an idle machine."""
        fit = min(machine.cores // self.cores, machine.memory_bytes // max(1.0, self.memory_bytes))
        return int(min(fit, machine.gpus // self.gpus) if self.gpus else fit)

    def __str__(self) -> str:
        gpu = ", a GPU" if self.gpus else ""
        return (
            f"{self.cores} core{'s' if self.cores > 1 else ''}, {_gigabytes(self.memory_bytes)} of memory{gpu}"
        )


def check_capacity(demand: Demand, count: int, what: str) -> None:
    """Refuse ``count`` equal demands that do not fit on the idle cluster together.

    Raises:
        UsageError: the cluster is too small.
    """
    there = machines()
    fit = sum(demand.times(machine) for machine in there)
    if fit < count:
        listed = "; ".join(
            f"{m.name}: {m.cores:g} cores, {_gigabytes(m.memory_bytes)}"
            + (f", {m.gpus:g} GPUs" if m.gpus else "")
            for m in there
        )
        raise UsageError(
            f"the cluster is too small: {count} {what} of {demand} each do not fit, {fit} would; "
            f"it has {listed}. Add machines, or request less"
        )


def check_versions() -> None:
    """Refuse machines with other versions of libraries: results would depend on the machine.

    Raises:
        UsageError: a machine has other versions, or does not answer.
    """
    versions = {name: metadata.version(name) for name in _COMPARED_LIBRARIES}
    here = {"python": platform.python_version(), **versions}

    # not part of a module, so that it runs on machines without jwins
    def probe(names: Sequence[str]) -> dict[str, str]:
        import platform
        from importlib import metadata

        found = {"python": platform.python_version()}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "missing"
        return found

    there = machines()
    task = ray.remote(num_cpus=0, max_retries=0)(probe)
    probes = {
        task.options(
            name="jwins: versions", scheduling_strategy=NodeAffinitySchedulingStrategy(m.id, soft=False)
        ).remote(_COMPARED_LIBRARIES): m
        for m in there
    }
    for reference, machine in probes.items():
        try:
            found = ray.get(reference, timeout=_PROBE_S)
        except ray.exceptions.RayError as error:
            raise UsageError(f"{machine.name} does not answer: {str(error).strip().splitlines()[0]}") from None
        differ = [
            f"{name} is {found[name]} there, {here[name]} here" for name in here if found[name] != here[name]
        ]
        if differ:
            raise UsageError(
                f"{machine.name}: {', '.join(differ)}; install the same versions on all machines, for example "
                f"with one constraints file; other versions may change results"
            )


def _gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.3g} GB"
