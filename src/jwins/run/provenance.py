"""Provenance of a run: versions, machine, and hashes that make two runs comparable."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jwins.experiment.experiment import Experiment
from jwins.run.builders import local_steps

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from jwins.tasks import Dataset, Task

_LIBRARIES = ("jwins", "torch", "numpy", "PyWavelets", "pcodec", "networkx", "opacus")


def fingerprints(
    experiment: Experiment,
    task: Task,
    partition: Sequence[npt.NDArray[np.int64]],
    model: Sequence[Tensor],
    samples: Tensor | None,
) -> dict[str, str]:
    """Return hashes that must be equal in comparable runs.

    Returns:
        ``model``, ``partition``, ``batches``, ``evaluation``, ``codec``, ``data`` (of every k-th sample of
        very large data) and, if the task's class is in a file, ``task``: that file without comments.
    """
    from jwins.training.batches import batch_indices

    train, steps = experiment.train, local_steps(experiment, partition)
    counts = steps if train.uneven else train.local_steps
    first_batches = [
        batch_indices(
            own,
            seed=experiment.run.seed,
            node=node,
            round=0,
            local_steps=steps[node],
            batch_size=train.batch_size,
        ).tobytes()
        for node, own in enumerate(partition)
    ]
    targets = task.test.targets if samples is None else samples
    return {
        "model": _hash(*(tensor.float().cpu().numpy().astype("<f4", copy=False).tobytes() for tensor in model)),
        "partition": _hash(*(own.astype("<i8", copy=False).tobytes() for own in partition)),
        "batches": _hash(f"{counts} x {train.batch_size}".encode(), *first_batches),
        "evaluation": _hash(f"{len(targets)}".encode(), targets.contiguous().numpy().tobytes()),
        "codec": experiment.wire.codec,
        "data": _hash(*_pieces(task.train), *_pieces(task.test)),
        **_code(task),
    }


_HASHED_BYTES = 2**26
"""Approximate number of bytes of a tensor that are hashed, in a twentieth of a second."""


def _pieces(data: Dataset) -> Iterator[bytes]:
    import torch

    for tensor in (data.inputs, data.targets):
        step = -(-tensor.numel() * tensor.element_size() // _HASHED_BYTES) or 1
        yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor[::step].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _code(task: Task) -> dict[str, str]:
    with contextlib.suppress(OSError, TypeError, SyntaxError, ValueError):
        text = Path(inspect.getfile(type(task))).read_text(encoding="utf-8")
        return {"task": _hash(ast.dump(ast.parse(text)).encode())}
    return {}


def _hash(*pieces: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()


def cores() -> int:
    """Return the number of cores that this process may use."""
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that compute results."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def machine(device: Any) -> dict[str, str]:
    """Return processor, cores and platform, and the accelerator if ``device`` is one."""
    import torch

    machine = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        machine["accelerator"] = torch.cuda.get_device_name(device)
    return machine


def _processor() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
