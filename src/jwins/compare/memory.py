"""How many runs fit into memory."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jwins.experiment.experiment import Experiment
from jwins.report.words import size
from jwins.run.parts import build_sharing, build_task, build_topology

__all__ = ["memory_needed", "that_fit"]

_PROCESS_BYTES = 700e6
"""Python, torch and the working memory of training and evaluation; 350 to 600 MB measured."""


_VECTORS = 20
"""Vectors of float32 per node: parameters before and after training, the trainer's row, its gradient, an
algorithm's state, what was sent and decoded, what is evaluated; and all of it again for a checkpoint."""


def memory_needed(experiments: Sequence[Experiment]) -> float:
    """Bytes that the largest of some runs may take: an estimate that is rather too high.

    Data once, and N x C numbers for each of about 20 vectors, more with momenta (two per parameter are assumed
    for anything but plain SGD) and with replicas of neighbours.

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
        vectors = _VECTORS + (0 if plain else 4)
        sharing = build_sharing(experiment)
        if sharing.remembers_peers:
            recipients = build_topology(experiment).at(0).recipients
            vectors += 2 * (1 + max(map(len, recipients)))
        size_bytes = 4.0 * experiment.nodes.count * sharing.update_dim(dim) * vectors
        largest = max(largest, _PROCESS_BYTES + 2.0 * data_bytes + size_bytes)
    return largest


def that_fit(wanted: int, needed: float, free: float | None) -> tuple[int, str]:
    """How many of the wanted runs fit side by side, at least one, and what to say if that is fewer.

    >>> that_fit(8, 4e9, 10e9)
    (2, '2 runs side by side instead of 8: each may need 4 GB of memory, and 10 GB are free')
    """
    if free is None or wanted * needed <= free:
        return wanted, ""
    fit = max(1, int(free // needed))
    if fit == wanted:  # not even one fits, and one is what was wanted
        return fit, f"a run may need {size(needed)} of memory, and {size(free)} are free"
    return fit, (
        f"{fit} run{'s' if fit != 1 else ''} side by side instead of {wanted}: each may need {size(needed)} of "
        f"memory, and {size(free)} are free"
    )
