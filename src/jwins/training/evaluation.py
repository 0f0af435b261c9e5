"""Evaluation of models, one by one or in stacks, whose batches are divided among threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jwins.errors import UsageError
from jwins.rng import EVERY_ROUND
from jwins.training.layout import Layout
from jwins.training.model_traits import ModelTraits
from jwins.training.stacked import MIN_STACK, StackedModel
from jwins.training.training_context import TrainingContext, wrap_errors
from jwins.training.worker_module import WorkerModule

_MIN_JOBS_PER_THREAD = 16
"""Minimum number of jobs for each thread, so that no thread is idle for long at the end."""

Sums = dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False)
class EvalRequest:
    """Models and their common test samples.

    Attributes:
        rows: (n, P) float32, models.
        nodes: node of each row; -1 for the average of all.
        buffers: local buffers of each row, by name.
        samples: (m,) int64 positions in the test set; None for all.
        some: (m,) bool, the samples of a second mean; None for no second mean.
        stacked: whether models of the same chunk are tested as a stack.
    """

    rows: Tensor
    nodes: Sequence[int]
    buffers: Sequence[Mapping[str, Tensor]]
    samples: Tensor | None = None
    some: Tensor | None = None
    stacked: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class MetricMeans:
    """Result of a request: means over samples, by metric, (n,) float64 on the CPU.

    Attributes:
        all: over all samples.
        some: over those of ``EvalRequest.some``; empty if there are none.
    """

    all: dict[str, Tensor]
    some: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Job:
    """Some rows and some batches of a request; batches are numbered within the request."""

    request: int
    rows: tuple[int, ...]
    first: int
    last: int


class Evaluation:
    """Evaluator of requests. The models are in evaluation mode and are not changed.

    Args:
        modules: a module for each worker.
        chunk: number of nodes in a chunk; 0 for no stacks.
    """

    def __init__(
        self,
        context: TrainingContext,
        layout: Layout,
        modules: Sequence[WorkerModule],
        traits: ModelTraits,
        *,
        chunk: int,
        threads: int,
    ) -> None:
        self._context, self._layout, self._modules, self._traits = context, layout, modules, traits
        self._chunk = chunk
        self._threads = 1 if traits.evaluation else threads
        self._divisible = not (traits.evaluation or traits.stateful)
        self._model = StackedModel(context, layout)

    def run(self, requests: Sequence[EvalRequest]) -> list[MetricMeans]:
        """Test all models of all requests.

        Sums follow the order of the batches, so that a result does not depend on the number of threads or on
        other requests.

        Raises:
            TrainingError: the model or a metric failed.
        """
        slices = [self._context.test_slices(self._count(request)) for request in requests]
        jobs = self._jobs(requests, [len(batches) for batches in slices])
        found: dict[int, list[list[Sums]]] = {}

        def work(worker: int, number: int) -> None:
            job = jobs[number]
            batches = slices[job.request][job.first : job.last]
            test = self._test_stack if len(job.rows) > 1 or requests[job.request].stacked else self._test_row
            found[number] = test(worker, requests[job.request], job.rows, batches)

        with self._context.preserved_generators():
            self._context.pool.run(range(len(jobs)), work, self._threads)
        totals: list[list[Sums]] = [[{} for _ in request.nodes] for request in requests]
        for number, job in enumerate(jobs):  # in the order of the batches
            for row, batches in zip(job.rows, found[number], strict=True):
                for batch in batches:
                    _add(totals[job.request][row], batch)
        return [self._means(request, sums) for request, sums in zip(requests, totals, strict=True)]

    def _count(self, request: EvalRequest) -> int:
        return self._context.num_test if request.samples is None else len(request.samples)

    def _jobs(self, requests: Sequence[EvalRequest], batches: Sequence[int]) -> list[_Job]:
        """Divide requests into jobs of about equal size, each of a row or a stack."""
        pieces = [(number, rows) for number, request in enumerate(requests) for rows in self._pieces(request)]
        per_piece = -(-_MIN_JOBS_PER_THREAD * self._threads // max(1, len(pieces))) if self._threads > 1 else 1
        jobs = []
        for number, rows in pieces:
            count = batches[number]
            length = max(1, -(-count // per_piece)) if self._divisible else max(1, count)
            jobs += [_Job(number, rows, at, min(at + length, count)) for at in range(0, count, length)]
        return jobs

    def _pieces(self, request: EvalRequest) -> list[tuple[int, ...]]:
        """Return the rows that are tested together: those of a chunk, or single rows."""
        if not request.stacked:
            return [(row,) for row in range(len(request.nodes))]
        pieces: dict[int, list[int]] = {}
        for row, node in enumerate(request.nodes):
            pieces.setdefault(node // self._chunk, []).append(row)
        return [tuple(rows) for rows in pieces.values()]

    def _test_row(
        self, worker: int, request: EvalRequest, rows: tuple[int, ...], batches: Sequence[slice]
    ) -> list[list[Sums]]:
        (index,) = rows
        module, context, node = self._modules[worker], self._context, request.nodes[index]
        # Copies: a model may change its buffers in evaluation mode too, and that must not last.
        row = request.rows[index].clone() if module.shared else request.rows[index]
        module.model.eval()
        copies = {name: tensor.to(context.device, copy=True) for name, tensor in request.buffers[index].items()}
        module.bind(row, copies)
        if self._traits.evaluation:
            context.seed_global("evaluation", node, EVERY_ROUND)
        found = []
        with wrap_errors(node, None, "evaluation"), torch.no_grad():
            for batch in batches:
                inputs, targets = context.test_batch(request.samples, batch)
                outputs = module.model(context.task.prepare(inputs))
                found.append(self._sums(outputs, targets, request, batch))
        return [found]

    def _test_stack(
        self, worker: int, request: EvalRequest, rows: tuple[int, ...], batches: Sequence[slice]
    ) -> list[list[Sums]]:
        module, context = self._modules[worker], self._context
        nodes = [request.nodes[row] for row in rows]
        padded = [*rows, *rows[:1] * (MIN_STACK - len(rows))]
        module.model.eval()
        index = torch.tensor(padded, device=request.rows.device)
        whole = padded == list(range(padded[0], padded[-1] + 1))
        stack = request.rows[padded[0] : padded[-1] + 1] if whole else request.rows[index]
        buffers = {
            name: torch.stack([request.buffers[row][name].to(context.device) for row in padded])
            for name in self._layout.local
        }
        own = stack.clone() if module.shared else stack
        if self._traits.evaluation:
            context.seed_global("evaluation of stack", nodes[0], EVERY_ROUND)
        found: list[list[Sums]] = [[] for _ in rows]
        with wrap_errors(f"{nodes[0]} to {nodes[-1]}", None, "evaluation"), torch.no_grad():
            values = [*self._layout.views(own).values(), *buffers.values()]
            for batch in batches:
                inputs, targets = context.test_batch(request.samples, batch)
                outputs = self._model.outputs(module, values, inputs)
                for i, sums in enumerate(found):
                    single = pytree.tree_map(lambda tensor, i=i: tensor[i], outputs)
                    sums.append(self._sums(single, targets, request, batch))
        return found

    def _sums(self, outputs: Any, targets: Tensor, request: EvalRequest, batch: slice) -> Sums:
        some = None if request.some is None else request.some[batch]
        return {
            name: (
                float(values.double().sum()),
                0.0 if some is None else float(values[some.to(values.device)].double().sum()),
            )
            for name, values in self._context.metrics_of(outputs, targets).items()
        }

    def _means(self, request: EvalRequest, sums: Sequence[Sums]) -> MetricMeans:
        def means(which: int, count: int) -> dict[str, Tensor]:
            found = {
                name: torch.tensor([row[name][which] for row in sums], dtype=torch.float64) / count
                for name in (sums[0] if sums else ())
            }
            if not found:
                return found
            with wrap_errors(request.nodes[0], None, "evaluation"):
                return self._context.transformed(found)

        return MetricMeans(
            means(0, self._count(request)), {} if request.some is None else means(1, int(request.some.sum()))
        )


def _add(total: Sums, batch: Sums) -> None:
    if total and total.keys() != batch.keys():
        names = " and ".join(", ".join(sums) for sums in (total, batch))
        raise UsageError(f"task.metrics returned other metrics for some batches than for others: {names}")
    for name, (everything, some) in batch.items():
        before = total.get(name, (0.0, 0.0))
        total[name] = before[0] + everything, before[1] + some
