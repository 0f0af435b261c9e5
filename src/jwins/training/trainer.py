"""Local training and evaluation of the nodes that one process holds.

Training runs in either of two ways:

- ``loop``: node after node. Each worker thread has one module. Its parameters are views of the current node's
  row, so that nothing is copied.
- ``stacked``: chunks of nodes at once with ``torch.func.vmap``, for models so small that the calls of a step
  take longer than its arithmetic.

Results of both depend only on the seed, the node, its round and its parameters. They do not depend on the
number of threads, on other nodes that train at the same time, or on other nodes of the process.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from jwins.errors import ConfigError, UsageError
from jwins.tasks.base import Task
from jwins.training.batches import Indices, Shuffle, checked_partition
from jwins.training.evaluation import EvalRequest, Evaluation, MetricMeans
from jwins.training.layout import BufferPolicy, Layout
from jwins.training.loop import LoopTrainer
from jwins.training.model_traits import Batching, TraitProbe, is_slow_stacked
from jwins.training.node_store import LocalState, NodeStore
from jwins.training.optimizer import Optimizer
from jwins.training.privacy import Privacy, poisson_batches
from jwins.training.stacked import MIN_STACK, StackedModel, StackedTrainer, chunk_nodes
from jwins.training.training_context import Device, Precision, TrainingContext
from jwins.training.worker_module import WorkerModule

THREADS_MIN_PARAMETERS = 200_000
"""Smaller models without convolution or recurrence run on one thread, because a second one would wait for the
interpreter."""


class Trainer:
    """Trainer and evaluator of the nodes of one process, by their numbers.

    With ``batching="auto"`` the choice depends only on the model and the device: on CPU, ``loop`` if the
    model has convolution or recurrent layers (whose stacked kernels are slower) or more than
    :data:`~jwins.training.model_traits.STACKED_MAX_PARAMETERS` numbers, else ``stacked``; on CUDA ``stacked``.
    A model that torch.func cannot stack falls back to ``loop``, even if ``stacked`` was requested;
    ``reason`` has the cause.

    Models that draw from torch's global generator in training, such as those with dropout, are seeded per
    (node, round) and run on one thread; stacked, they are seeded per (chunk, round). One step of the
    model shows whether it draws. The global generator is preserved.

    The constructor sets the number of torch's intra-op threads to 1, for the rest of the process.

    Args:
        task: data, model, loss and metrics.
        partition: for each node, (n,) int64 indices of its training samples, n >= 1; by number, or a list for
            nodes 0, 1, 2 and so on.
        num_nodes: N, of the whole run; None for the nodes of ``partition``. Chunks are cut from it.
        local_steps: steps per round, at least 1; one number, or one per node of the whole run. If these differ,
            nodes train in a loop.
        optimizer: optimizer of every node.
        batching: ``loop``, ``stacked`` or ``auto``.
        device: device of parameters and data; ``auto`` is CUDA if available.
        threads: number of workers, each with one intra-op thread; CUDA uses one.
        chunk: largest number of nodes in one stack, see :func:`~jwins.training.stacked.chunk_nodes`.
        precision: precision of the model in training; see :data:`~jwins.training.training_context.Precision`.
        privacy: differential privacy of the nodes' samples; nodes then train in a loop. None trains without it.

    Attributes:
        batching: ``loop`` or ``stacked``, as chosen.
        reason: reason against ``stacked``; empty if it was chosen.
        chunk: number of nodes in a chunk, which must be in one process; 1 in a loop.
        nodes: numbers of the nodes of this process, increasing.
        steps: local steps per round of each node of this process.
        recorded: recorded step of a chunk for each worker; empty if recording was impossible.
        local_buffers: for each buffer that stays on its node, (n, *shape), in the order of ``nodes``.
        threads: number of workers for training and evaluation.
        frozen: for each parameter with ``requires_grad`` False, its value, (*shape), the same on all nodes.
        traits: generators of the task, and whether the model is stateful.

    Raises:
        ConfigError: a number is out of range, there is no CUDA device, or the model has no gradients of single
            samples for ``privacy``.
        UsageError: the model has no parameters that train, trains others than float32, or changes frozen
            ones; a node has no samples; a chunk is incomplete in this process.
        TrainingError: the model, the loss or the backward pass fails on the first batch of the first node.

    Example::

        sgd = Optimizer("sgd", {"lr": 0.05})
        trainer = Trainer(task, partition, seed=1, local_steps=3, batch_size=8, optimizer=sgd)
        losses = trainer.train({node: 0 for node in trainer.nodes})
    """

    def __init__(
        self,
        task: Task,
        partition: Sequence[Indices] | Mapping[int, Indices],
        *,
        num_nodes: int | None = None,
        seed: int,
        local_steps: int | Sequence[int],
        batch_size: int,
        optimizer: Optimizer,
        buffers: BufferPolicy = "local",
        batching: Batching = "auto",
        device: Device = "auto",
        threads: int = 1,
        chunk: int | None = None,
        precision: Precision = "float32",
        privacy: Privacy | None = None,
    ) -> None:
        every = [local_steps] if isinstance(local_steps, int) else list(local_steps)
        _check(every, batch_size, threads, chunk, batching)
        by_node = (
            dict(sorted(partition.items())) if isinstance(partition, Mapping) else dict(enumerate(partition))
        )
        if not by_node:
            raise UsageError("Trainer: no nodes; expected the training samples of at least one")
        self.task, self.optimizer, self.privacy = task, optimizer, privacy
        self.nodes = tuple(by_node)
        self.num_nodes = len(by_node) if num_nodes is None else num_nodes
        if self.nodes[0] < 0 or self.nodes[-1] >= self.num_nodes:
            raise UsageError(
                f"Trainer: nodes {self.nodes[0]} to {self.nodes[-1]}; expected 0 to {self.num_nodes - 1}"
            )
        self.steps = _steps_by_node(every, self.nodes, self.num_nodes)
        self._shuffles = {
            node: Shuffle(checked_partition(samples, node, len(task.train)), seed, node)
            for node, samples in by_node.items()
        }
        self._context = context = TrainingContext(
            task,
            seed=seed,
            local_steps=max(every),
            batch_size=batch_size,
            device=device,
            threads=threads,
            precision=precision,
        )
        self.device = context.device

        model = context.fresh_model()
        self.layout = Layout.of(model, buffers)
        parameters = dict(model.named_parameters())
        self.frozen = {name: parameters[name].detach().clone() for name in self.layout.frozen}
        self._initial = self.layout.flatten(model)
        local = set(self.layout.local)
        found = {name: buffer.detach() for name, buffer in model.named_buffers() if name in local}
        first = self._shuffles[self.nodes[0]]
        probe = TraitProbe(context, self.layout, self._initial, found, self.frozen, first, model)
        self.traits = probe.traits
        if privacy is None:
            self.batching, self.reason = _for_steps(every, batching, *probe.batching(batching, model))
        else:
            self.batching, self.reason = _for_privacy(batching, probe.why_not_private(model))
        stacked = self.batching == "stacked"
        self.chunk = chunk_nodes(self.num_nodes, self.layout.size, self.device, chunk) if stacked else 1

        # All tensors of a step, in the row or not.
        numbers = self.layout.size + sum(tensor.numel() for tensor in self.frozen.values())
        useful = is_slow_stacked(model) is not None or numbers >= THREADS_MIN_PARAMETERS
        self.threads = threads if useful and self.device.type == "cpu" else 1
        modules = [WorkerModule(context.fresh_model(), self.layout) for _ in range(self.threads)]
        rows = -(-len(self.nodes) // self.chunk) * self.chunk  # the last chunk is padded
        self._store = NodeStore(self.nodes, rows, self.layout, self._initial, found, optimizer)
        self.local_buffers = {name: rows[: len(self.nodes)] for name, rows in self._store.buffers.items()}
        seeds_global = self.traits.training
        self._loop: LoopTrainer | None = None
        self._stacked: StackedTrainer | None = None
        self.recorded: list[torch.fx.GraphModule] = []
        if stacked:
            flat = probe.flat_step(self.chunk)
            self.recorded = [] if flat is None else [flat, *(copy.deepcopy(flat) for _ in modules[1:])]
            self._stacked = StackedTrainer(
                context,
                self._store,
                self.layout,
                optimizer,
                chunk=self.chunk,
                num_nodes=self.num_nodes,
                modules=modules,
                recorded=self.recorded,
                seeds_global=seeds_global,
            )
        else:
            self._loop = LoopTrainer(
                context,
                self._store,
                modules,
                optimizer,
                seeds_global=seeds_global,
                model=None if privacy is None else StackedModel(context, self.layout),
                privacy=privacy,
            )
        self._evaluation = Evaluation(
            context,
            self.layout,
            modules,
            self.traits,
            chunk=self.chunk if stacked else 0,
            threads=self.threads,
        )

    # --- Parameters ---------------------------------------------------------------------------------------

    @property
    def params(self) -> Tensor:
        """Return the parameters of the nodes, (n, P) float32, in the order of ``nodes``."""
        return self._store.rows[: len(self.nodes)]

    def initial(self) -> Tensor:
        """Copy the common start of all nodes, (P,) float32, which depends only on the seed and the task."""
        return self._initial.clone()

    def row(self, node: int) -> Tensor:
        """Return a node's parameters, (P,) float32, which ``train`` changes in place.

        Raises:
            UsageError: the node is not here.
        """
        return self._store.rows[self._store.row(node)]

    def take_row(self, node: int) -> Tensor:
        """Return a node's parameters, (P,) float32, which the node and its algorithm may keep."""
        return self.row(node).clone()

    def load_row_(self, node: int, params: Tensor) -> None:
        """Set the parameters from which a node trains."""
        self.row(node).copy_(params)

    def buffers(self, node: int) -> dict[str, Tensor]:
        """Copy a node's local buffers."""
        return {name: tensor.clone() for name, tensor in self._store.buffers_of(node).items()}

    def state(self, node: int) -> LocalState:
        """Return a copy of a node's state besides its parameters, for a checkpoint."""
        return self._store.state(node)

    def load_state_(self, node: int, state: LocalState) -> None:
        """Restore a result of :meth:`state`, from here or from another process.

        Raises:
            UsageError: names or shapes differ; nothing has been changed then.
        """
        self._store.load_state_(node, state)

    # --- Training and evaluation --------------------------------------------------------------------------

    def train(
        self, rounds: Mapping[int, int], then: Callable[[int, float], None] | None = None
    ) -> dict[int, float]:
        """Run the local steps of one round of each of these nodes, on their rows, in place.

        Args:
            rounds: the round of each node that trains.
            then: called with each node and its loss as soon as its row is final, on the thread that trained it,
                while others may still train.

        Returns:
            Mean training loss over the local steps, by node.

        Raises:
            UsageError: no such node here, or a negative round.
            TrainingError: a step failed. Rows of other nodes may have been trained.
        """
        for node, at in rounds.items():
            if node not in self._shuffles or at < 0:
                raise UsageError(
                    f"Trainer.train: node {node}, round {at}: this trainer has {len(self.nodes)} nodes from "
                    f"{self.nodes[0]} to {self.nodes[-1]}, and a round is at least 0; use one of each"
                )
        losses: dict[int, float] = {}
        threads = 1 if self.traits.training else self.threads
        loop, stacked = self._loop, self._stacked
        with self._context.preserved_generators():
            if loop is not None:

                def train_node(worker: int, node: int) -> None:
                    losses[node] = loop.train(worker, node, rounds[node], self.indices(node, rounds[node]))
                    if then is not None:
                        then(node, losses[node])

                self._context.pool.run(sorted(rounds), train_node, threads)
            elif stacked is not None:

                def train_chunk(worker: int, groups: list[list[int]]) -> None:
                    for nodes in groups:
                        own = {node: rounds[node] for node in nodes}
                        indices = {node: self.indices(node, at) for node, at in own.items()}
                        losses.update(stacked.train(worker, stacked.number_of(nodes[0]), own, indices))
                    if then is not None:
                        for node in itertools.chain(*groups):
                            then(node, losses[node])

                self._context.pool.run(self._chunk_jobs(stacked, rounds), train_chunk, threads)
        return {node: losses[node] for node in rounds}

    def _chunk_jobs(self, trainer: StackedTrainer, rounds: Mapping[int, int]) -> list[list[list[int]]]:
        """Return the nodes that train together, by chunk.

        Draws are seeded per (chunk, round), so nodes of different rounds must not be mixed if the task draws.
        Groups of the same chunk run one after another on one thread, because they use the same rows.
        """
        apart = self.traits.training or self.traits.loss_generator
        groups: dict[tuple[int, int], list[int]] = {}
        for node in sorted(rounds):
            groups.setdefault((trainer.number_of(node), rounds[node] if apart else 0), []).append(node)
        by_chunk: dict[int, list[list[int]]] = {}
        for number, at in sorted(groups):
            by_chunk.setdefault(number, []).append(groups[number, at])
        return list(by_chunk.values())

    def train_batch_of(self, node: int) -> int:
        """Return the index of the batch a node trains in; its nodes train together at no extra cost.

        If one thread trains stacks, a batch is a chunk, because one node takes the same time as all of them.
        Otherwise it is all nodes.
        """
        return 0 if self._stacked is None or self.threads > 1 else self._stacked.number_of(node)

    def indices(self, node: int, round: int) -> list[Indices]:
        """Return the samples that a node trains on in a round, int64, ``batch_size`` for each of its steps.

        With ``privacy``, ``batch_size`` is the mean number per step.
        """
        steps, size = self.steps[node], self._context.batch_size
        if self.privacy is not None:
            own, seed = self._shuffles[node].partition, self._context.seed
            return poisson_batches(own, seed=seed, node=node, round=round, local_steps=steps, batch_size=size)
        return list(self._shuffles[node].take(round * steps * size, steps * size).reshape(steps, -1))

    def evaluate_all(self, requests: Sequence[EvalRequest]) -> list[MetricMeans]:
        """Evaluate several requests at once, so that all their models share the threads.

        Raises:
            UsageError: shapes do not fit, or a request without samples.
            TrainingError: the model or a metric failed.
        """
        return self._evaluation.run([self._checked(request) for request in requests])

    def _checked(self, request: EvalRequest) -> EvalRequest:
        rows, count = request.rows, len(request.nodes)
        if rows.dim() != 2 or rows.shape[1] != self.layout.size or count != len(rows):
            raise UsageError(
                f"Trainer.evaluate: rows of shape {tuple(rows.shape)} for {count} nodes; "
                f"expected ({count}, {self.layout.size})"
            )
        if not (self._context.num_test if request.samples is None else len(request.samples)):
            raise UsageError("Trainer.evaluate: no test samples; give the task's test set at least one")
        rows = rows.detach().to(self.device, torch.float32)
        return EvalRequest(
            rows if rows.stride(1) == 1 else rows.contiguous(),
            request.nodes,
            request.buffers,
            None if request.samples is None else request.samples.to(self.device, torch.int64),
            request.some,
            request.stacked and self._stacked is not None and self.num_nodes >= MIN_STACK,
        )

    def close(self) -> None:
        """Stop the worker threads. The trainer can still be used and then starts new ones."""
        self._context.pool.close()


def _steps_by_node(every: Sequence[int], nodes: Sequence[int], num_nodes: int) -> dict[int, int]:
    """Return the local steps of these nodes; ``every`` has one number for all, or one per node of the run."""
    if len(every) not in (1, num_nodes):
        raise UsageError(f"Trainer: {len(every)} numbers of local steps for {num_nodes} nodes")
    return {node: every[node % len(every)] for node in nodes}


def _for_steps(
    every: Sequence[int], requested: Batching, found: Literal["loop", "stacked"], reason: str
) -> tuple[Literal["loop", "stacked"], str]:
    """Return the batching for these numbers of steps, and the reason if it cannot be ``stacked``."""
    if len(set(every)) == 1:
        return found, reason
    if requested == "stacked":
        problem = "nodes with different numbers of local steps train one by one; write loop or auto"
        raise ConfigError("train.batching", requested, problem)
    return "loop", reason or ("nodes take different numbers of local steps" if found == "stacked" else "")


def _for_privacy(requested: Batching, problem: str) -> tuple[Literal["loop"], str]:
    """Return the batching for gradients that are clipped per sample, and the reason why not ``stacked``."""
    if requested == "stacked":
        remedy = "train.privacy takes the gradients of single samples, node by node; write loop or auto"
        raise ConfigError("train.batching", requested, remedy)
    if problem:
        raise ConfigError("train.privacy", True, problem)
    return "loop", "gradients are clipped for each sample"


def _check(local_steps: Sequence[int], batch_size: int, threads: int, chunk: int | None, batching: str) -> None:
    for path, value in (
        *(("train.local_steps", steps) for steps in local_steps),
        ("train.batch_size", batch_size),
        ("run.threads", threads),
        ("train.chunk", 1 if chunk is None else chunk),
    ):
        if type(value) is not int or value < 1:
            raise ConfigError(path, value, "expected an integer of at least 1")
    if batching not in ("loop", "stacked", "auto"):
        raise ConfigError("train.batching", batching, "expected loop, stacked or auto")
