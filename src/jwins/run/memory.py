"""Memory: the need of a run, the free amount, and the peak of this process."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jwins.experiment.experiment import Experiment
from jwins.run.builders import build_sharing, build_task, build_topology

__all__ = ["memory_free", "memory_needed", "peak_bytes"]

_PROCESS_BYTES = 700e6
"""Python, torch and the working memory of training and evaluation; 350 to 600 MB measured."""


_VECTORS = 20
"""Vectors of float32 per node: parameters before and after training, the trainer's row, its gradient, an
algorithm's state, sent and decoded updates, evaluated models; and all of it again for a checkpoint."""


def memory_needed(experiments: Sequence[Experiment], actors: int = 1) -> float:
    """Return the bytes that the largest of some runs may take, estimated rather too high.

    It counts the data once, and N x C numbers for each of about 20 vectors, more with momenta (two per
    parameter for all optimizers but plain SGD) and with replicas of neighbours.

    Args:
        experiments: experiments of the runs.
        actors: processes that share the nodes of a run; the result is for each of them.

    Raises:
        DataError: a task's data are missing.
    """
    import torch

    tasks: dict[str, tuple[float, int]] = {}
    largest = 0.0
    for experiment in experiments:
        config = experiment.task
        key = json.dumps(config.model_dump(mode="json", exclude={"partition"})) + repr(config.own)
        if key not in tasks:
            task = build_task(experiment)
            with torch.random.fork_rng(devices=[]):
                parameters = list(task.model().parameters())
            dim = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            frozen = [parameter for parameter in parameters if not parameter.requires_grad]
            tensors = [task.train.inputs, task.train.targets, task.test.inputs, task.test.targets, *frozen]
            tasks[key] = (float(sum(t.numel() * t.element_size() for t in tensors)), dim)
        data_bytes, dim = tasks[key]
        optimizer = experiment.train.optimizer
        plain = optimizer.kind == "sgd" and not optimizer.options.get("momentum")
        vectors = _VECTORS + (0 if plain else 4) + (0 if experiment.train.outer is None else 4)
        sharing = build_sharing(experiment)
        if sharing.remembers_peers:
            recipients = build_topology(experiment, of_all=True).at(0).recipients
            vectors += 2 * (1 + max(map(len, recipients)))
        nodes = -(-experiment.nodes.count // actors)
        size_bytes = 4.0 * nodes * sharing.update_dim(dim) * vectors
        largest = max(largest, _PROCESS_BYTES + 2.0 * data_bytes + size_bytes)
    return largest


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


def peak_bytes() -> int:
    """Return the peak of resident memory of this process.

    On Linux it is not ``ru_maxrss``, which also counts the parent's memory at the start of the process.
    """
    import resource

    with contextlib.suppress(OSError):
        for row in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if row.startswith("VmHWM:"):
                return 1024 * int(row.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
