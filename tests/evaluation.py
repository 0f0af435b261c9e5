"""Evaluation of some models of a trainer, without a node group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from jwins.training.evaluation import EvalRequest
from jwins.training.stacked import MIN_STACK
from jwins.training.trainer import Trainer


def evaluate(
    trainer: Trainer,
    rows: Tensor,
    nodes: Sequence[int],
    samples: Tensor | None = None,
    *,
    buffers: Sequence[Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the mean of each metric over ``samples`` of the test set, by metric, (n,) float64.

    Row i is the model of ``nodes[i]``, whose local buffers are used unless ``buffers`` has others.
    """
    if not len(rows) and not len(nodes):
        return {}
    found = [trainer.buffers(node) for node in nodes] if buffers is None else buffers
    stacked = len(rows) >= MIN_STACK
    return trainer.evaluate_all([EvalRequest(rows, list(nodes), found, samples, stacked=stacked)])[0].all
