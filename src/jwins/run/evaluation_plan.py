"""Rounds and test samples of a run's evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jwins.errors import ConfigError
from jwins.experiment.experiment import Experiment
from jwins.experiment.sections import RunConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from jwins.engines.evaluation_results import EvaluationPlan
    from jwins.tasks import Task


def evaluation_rounds(experiment: Experiment) -> frozenset[int]:
    """Return the numbers of completed rounds with an evaluation, always including 0 and the last one.

    If rounds of consensus follow, the last round of training is included, too.
    """
    run = experiment.run
    last = run.rounds + run.consensus_rounds
    return frozenset({*range(0, run.rounds, run.eval_every), run.rounds, *run.eval_at, last})


def first_of_last(experiment: Experiment) -> int:
    """Return the completed rounds at the first of the last ``run.eval_last`` evaluations before consensus."""
    trained = [at for at in evaluation_rounds(experiment) if at <= experiment.run.rounds]
    return sorted(trained)[-experiment.run.eval_last :][0]


def evaluation_samples(experiment: Experiment, task: Task) -> tuple[Tensor | None, Tensor | None]:
    """Return the test samples of the last evaluations, and of earlier ones; None for all.

    Returns:
        Two vectors of increasing int64; the second is a subset of the first, or the same.

    Raises:
        ConfigError: more samples than the test set has.
    """
    from jwins.rng import stream

    run = experiment.run
    if run.eval_samples == "all" and run.eval_samples_early is None:
        return None, None
    wanted = len(task.test) if run.eval_samples == "all" else run.eval_samples
    if wanted > len(task.test):
        problem = f'the test set has {len(task.test)} samples; write at most as many, or "all"'
        raise ConfigError("run.eval_samples", run.eval_samples, problem)
    drawn = stream(run.seed, "evaluation").choice(len(task.test), wanted, replace=False)
    last, early = _last_and_early(drawn, run)
    return None if run.eval_samples == "all" else last, early


def _last_and_early(drawn: npt.NDArray[np.int64], run: RunConfig) -> tuple[Tensor, Tensor]:
    """Return all of these shuffled test samples, and the first few for early evaluations; both increasing."""
    import torch

    samples = torch.from_numpy(drawn)
    return samples.sort().values, samples[: run.eval_samples_early].sort().values


def own_test_samples(
    task: Task, partition: Sequence[npt.NDArray[np.int64]], seed: int = 0
) -> list[npt.NDArray[np.int64]]:
    """Return, for each node, the test samples that are like its training samples, increasing.

    Where samples have natural owners, these are all test samples of the owners of its training samples.
    Elsewhere they are drawn from the seed in the proportions of the node's labels, as many as there are.

    Raises:
        ConfigError: the task's samples have neither owners nor labels.
    """
    import numpy as np

    from jwins.rng import stream
    from jwins.tasks.base import labels_of, partition_labels_of

    train, test = task.train.keys, task.test.keys
    if train is not None and test is not None:
        return [np.flatnonzero(np.isin(test, np.unique(train[own]))) for own in partition]
    labels, of_test, targets = partition_labels_of(task), labels_of(task.test), labels_of(task.train)
    if labels is None or of_test is None or targets is None or not np.array_equal(labels, targets):
        problem = (
            "the task's samples have no natural owner, and their targets are not labels; remove it, or set "
            "keys in task.train and task.test"
        )
        raise ConfigError("run.eval_own", True, problem)
    by_label = {label: np.flatnonzero(of_test == label) for label in np.unique(of_test).tolist()}
    return [
        _like(labels[own], by_label, stream(seed, "own test samples", node=node))
        for node, own in enumerate(partition)
    ]


def _like(
    labels: npt.NDArray[np.int64], by_label: Mapping[int, npt.NDArray[np.int64]], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return as many test samples as possible in the proportions of these labels.

    Labels without a test sample do not count.
    """
    import numpy as np

    found, counts = np.unique(labels, return_counts=True)
    shares = dict(zip(found.tolist(), counts.tolist(), strict=True))
    shares = {label: count for label, count in shares.items() if label in by_label}
    if not shares:
        return np.zeros(0, dtype=np.int64)
    size = min(len(by_label[label]) / count for label, count in shares.items())
    drawn = [
        rng.choice(by_label[label], max(1, int(size * count + 1e-9)), replace=False)
        for label, count in shares.items()
    ]
    return np.sort(np.concatenate(drawn))


def own_evaluation_samples(
    experiment: Experiment, task: Task, partition: Sequence[npt.NDArray[np.int64]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each node's own test samples at the last evaluations, and at earlier ones; see ``run.eval_own``.

    Raises:
        ConfigError: the task's samples have neither owners nor labels.
    """
    from jwins.rng import stream

    run = experiment.run
    most = None if run.eval_samples == "all" else run.eval_samples
    pairs = [
        _last_and_early(stream(run.seed, "own evaluation", node=node).permutation(own)[:most], run)
        for node, own in enumerate(own_test_samples(task, partition, run.seed))
    ]
    return [last for last, _ in pairs], [early for _, early in pairs]


def evaluation_plan(
    experiment: Experiment, task: Task, partition: Sequence[npt.NDArray[np.int64]]
) -> EvaluationPlan:
    """Return the test samples of early and of the last evaluations, and the round that separates them.

    Raises:
        ConfigError: as :func:`evaluation_samples` and :func:`own_evaluation_samples`.
    """
    from jwins.engines.evaluation_results import EvaluationPlan, EvaluationSamples

    common, early = evaluation_samples(experiment, task)
    own, own_early = (
        own_evaluation_samples(experiment, task, partition) if experiment.run.eval_own else (None, None)
    )
    few = experiment.run.eval_samples_early is not None
    return EvaluationPlan(
        EvaluationSamples(common, own),
        EvaluationSamples(early, own_early) if few else None,
        first_of_last(experiment),
    )
