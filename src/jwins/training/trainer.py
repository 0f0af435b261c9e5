"""Local training and evaluation of all nodes of a process.

The parameters of all nodes are rows of one matrix. Training runs on either of two engines:

- ``loop``: node after node. Each worker thread has one module whose parameters are made views into the row
  of the node at hand, so that nothing is copied.
- ``stacked``: chunks of nodes at once with ``torch.func.vmap``, for models so small that a step costs more
  in calls than in arithmetic.

Both give results that depend on nothing but the seed, the node, its round and its row: not on the number of
threads, nor on which other nodes train at the same time.
"""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jwins.errors import ConfigError, JwinsError, UsageError
from jwins.rng import EVERY_NODE, EVERY_ROUND, torch_generator
from jwins.tasks.base import Batch, Task
from jwins.training.batches import Indices, Shuffle, checked_part
from jwins.training.kernels import StackedKernels, flattened
from jwins.training.layout import BufferPolicy, Layout
from jwins.training.optimizer import Optimizer, OptimizerState, optimizer_step
from jwins.training.replica import Replica
from jwins.training.stacked import MIN_STACK, Chunk, pieces_of, values_of

__all__ = ["Batching", "Device", "Trainer", "TrainingError", "resolve_device"]

Batching = Literal["loop", "stacked", "auto"]


Device = Literal["cpu", "cuda", "auto"]


J = TypeVar("J")


_Step = Callable[..., tuple[Any, ...]]


CHUNK_NUMBERS = {"cpu": 3 * 2**18, "cuda": 2**23}
"""Most parameters of all nodes of one stack together. On CPU these are 3 MB, and as much for gradients, which
stay in the cache from step to step; on CUDA 32 MB, which keep the device busy."""


CHUNK_NODES = 128
"""Most nodes in one stack, however small: the calls cost little then, and a straggler's step costs a stack."""


STACKED_MAX_PARAMETERS = 100_000
"""``auto`` on CPU: larger models gain little from stacking, if anything."""


THREADS_MIN_PARAMETERS = 200_000
"""Smaller models without convolution or recurrence run on one thread: a second one would only wait for the
interpreter."""


EVALUATION_BATCH = 256
"""Most test samples per forward pass, which bounds the memory of evaluation."""


EVALUATION_BATCH_CPU = 2**17
"""On CPU, numbers that the test samples of a forward pass have together: then activations stay in the cache."""


# A stack of one or two rows takes other paths in the matrix product and changes the last bits.
_ALIGN = 16


# Rows start at multiples of 64 bytes, as torch's own tensors do: kernels may round differently elsewhere, and
# a node must get the same bits whether it is the only one of its process or one of many.
_SLOW_STACKED = (nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)


class TrainingError(JwinsError):
    """Training or evaluating a node failed; the message names the node, the round and the stage."""


@dataclass(frozen=True, slots=True)
class _Draws:
    """Which generators a task draws from: torch's global one, or the one handed to the loss."""

    training: bool
    evaluation: bool
    handed: bool


class Trainer:
    """Trains and evaluates the nodes of one process.

    ``train`` changes rows of ``params`` in place; whoever shares and merges writes into the same rows.

    With ``batching="auto"`` the engine follows from the model and the device only: on CPU, ``loop`` if the
    model has convolution or recurrent layers (whose stacked kernels are slower) or more than
    :data:`STACKED_MAX_PARAMETERS` numbers, else ``stacked``; on CUDA ``stacked``. A model that torch.func
    cannot stack falls back to ``loop``, also where ``stacked`` was asked for; ``reason`` says why.

    Models that draw from torch's global generator in training, such as those with dropout, are seeded per
    (node, round) and run on one thread; stacked, they are seeded per (chunk, round). Whether a model draws is
    found by running one step of it. The global generator is left as it was found.

    Sets the number of torch's intra-op threads to 1, and leaves it there.

    Args:
        task: data, model, loss and metrics.
        parts: for each node, (n,) int64 indices of its training samples, n >= 1.
        seed: of the experiment.
        local_steps: steps per round, at least 1.
        batch_size: samples per step, at least 1.
        optimizer: of every node.
        buffers: see :data:`jwins.training.layout.BufferPolicy`.
        batching: the engine, or ``auto``.
        device: where parameters and data live; ``auto`` is CUDA where there is one.
        threads: workers, each with one intra-op thread; CUDA uses one.
        chunk: most nodes in one stack; None for :data:`CHUNK_NODES`, or fewer where :data:`CHUNK_NUMBERS`
            asks for it. The nodes are divided into chunks of equal size in the order of their numbers, which
            is part of what determines the bits of a stacked result.

    Attributes:
        batching: ``loop`` or ``stacked``, as resolved.
        reason: why not ``stacked``; empty if it is.
        device: as resolved.
        layout: of the parameter vector.
        num_nodes: N.
        local_steps: per round.
        params: (N, P) float32; rows are contiguous, the matrix need not be.
        local_buffers: for each buffer that stays on its node, (N, *shape).
        frozen: for each parameter with ``requires_grad`` False, its value, (*shape), the same on all nodes.

    Raises:
        ConfigError: a number out of range, no CUDA device.
        UsageError: the model has no parameters that train, trains others than float32, or changes frozen
            ones; a node has no samples.
        TrainingError: the model, the loss or the backward pass fails on the first batch of node 0.

    Example::

        sgd = Optimizer("sgd", {"lr": 0.05})
        trainer = Trainer(task, parts, seed=1, local_steps=3, batch_size=8, optimizer=sgd)
        losses = trainer.train({node: 0 for node in range(trainer.num_nodes)})
        scores = trainer.evaluate(trainer.params, range(trainer.num_nodes), samples=None)
    """

    batching: Literal["loop", "stacked"]
    reason: str

    def __init__(
        self,
        task: Task,
        parts: Sequence[Indices],
        *,
        seed: int,
        local_steps: int,
        batch_size: int,
        optimizer: Optimizer,
        buffers: BufferPolicy = "local",
        batching: Batching = "auto",
        device: Device = "auto",
        threads: int = 1,
        chunk: int | None = None,
    ) -> None:
        for path, value in (
            ("train.local_steps", local_steps),
            ("train.batch_size", batch_size),
            ("run.threads", threads),
            ("train.chunk", 1 if chunk is None else chunk),
        ):
            if type(value) is not int or value < 1:
                raise ConfigError(path, value, "expected an integer of at least 1")
        if batching not in ("loop", "stacked", "auto"):
            raise ConfigError("train.batching", batching, "expected loop, stacked or auto")
        torch.set_num_threads(1)
        self.task = task
        self.device = resolve_device(device)
        self.num_nodes = len(parts)
        self.local_steps = local_steps
        self._seed, self._batch_size = seed, batch_size
        self._optimizer = optimizer
        self._shuffles = [
            Shuffle(checked_part(part, node, len(task.train)), seed, node) for node, part in enumerate(parts)
        ]
        if not self._shuffles:
            raise UsageError("Trainer: no nodes; expected at least one part of the training samples")
        self._train_data = Batch(task.train.inputs.to(self.device), task.train.targets.to(self.device))
        self._test_data = Batch(task.test.inputs.to(self.device), task.test.targets.to(self.device))

        model = self._fresh_model()
        self.layout = Layout.of(model, buffers)
        parameters = dict(model.named_parameters())
        self.frozen = {name: parameters[name].detach().clone() for name in self.layout.frozen}
        # What a step computes with, be it part of the row or not.
        self._numbers = self.layout.size + sum(tensor.numel() for tensor in self.frozen.values())
        self._initial = self.layout.flatten(model)

        found = {name: buffer.detach() for name, buffer in model.named_buffers() if name in self.layout.local}
        self._draws = self._probe_draws()
        self._names = (*(slot.name for slot in self.layout.slots), *self.layout.local)
        self._trained = [slot.name for _, slot in Replica(model, self.layout).trained]
        self._changing = [slot.name for slot in self.layout.slots if slot.kind == "buffer"] + list(
            self.layout.local
        )
        self.batching, self.reason = self._resolve_batching(batching, model, found)

        rows = self.num_nodes
        if self.batching == "stacked":
            most = chunk or max(
                MIN_STACK, min(CHUNK_NODES, CHUNK_NUMBERS[self.device.type] // self.layout.size)
            )
            self._chunk = max(MIN_STACK, -(-rows // -(-rows // most)))
            rows = self._chunk * -(-rows // self._chunk)  # the last chunk is padded
        self._rows = self._matrix(rows)
        self.params = self._rows[: self.num_nodes]
        self._buffers = {
            name: found[name].expand(rows, *found[name].shape).clone() for name in self.layout.local
        }
        self.local_buffers = {name: tensor[: self.num_nodes] for name, tensor in self._buffers.items()}
        self._state = OptimizerState(optimizer, rows, self._rows.stride(0), len(self._trained), self.device)
        slow = any(isinstance(module, _SLOW_STACKED) for module in model.modules())
        useful = slow or self._numbers >= THREADS_MIN_PARAMETERS
        self._threads = threads if useful and self.device.type == "cpu" else 1
        self._replicas = [Replica(self._fresh_model(), self.layout) for _ in range(self._threads)]
        self._loop_optimizers = [optimizer.build([p for p, _ in r.trained]) for r in self._replicas]
        self._rebuild = optimizer.state == "reset" and optimizer.has_state()
        self._chunks: dict[int, Chunk] = {}
        flat = self._flatten_step(found)
        self._flat_steps = [] if flat is None else [flat, *(copy.deepcopy(flat) for _ in self._replicas[1:])]
        self._pool: ThreadPoolExecutor | None = None

    def initial(self) -> Tensor:
        """The common start of all nodes: a copy of (P,) float32 that depends on the seed and the task only."""
        return self._initial.clone()

    def train(self, rounds: Mapping[int, int]) -> dict[int, float]:
        """Run the local steps of one round of each of these nodes, on their rows of ``params``, in place.

        Args:
            rounds: the round of each node that trains.

        Returns:
            Mean training loss over the local steps, by node.

        Raises:
            UsageError: no such node, or a negative round.
            TrainingError: a step failed. Rows of other nodes may have been trained.
        """
        for node, at in rounds.items():
            if not 0 <= node < self.num_nodes or at < 0:
                raise UsageError(
                    f"Trainer.train: node {node}, round {at}: expected a node of 0 to {self.num_nodes - 1} "
                    f"and a round of at least 0"
                )
        losses: dict[int, float] = {}
        nodes = sorted(rounds)
        threads = 1 if self._draws.training else self._threads
        with self._kept_generators():
            if self.batching == "loop":

                def train_one(worker: int, node: int) -> None:
                    losses[node] = self._train_node(worker, node, rounds[node])

                self._run(nodes, train_one, threads)
            else:
                jobs: dict[tuple[int, int], list[int]] = {}
                for node in nodes:
                    # Draws are seeded per (chunk, round), so nodes of different rounds must not be mixed.
                    apart = rounds[node] if self._draws.training or self._draws.handed else 0
                    jobs.setdefault((node // self._chunk, apart), []).append(node)

                def train_chunk(worker: int, job: tuple[int, int]) -> None:
                    losses.update(self._train_chunk(worker, job[0], {n: rounds[n] for n in jobs[job]}))

                self._run_by_chunk(sorted(jobs), train_chunk, threads)
        return {node: losses[node] for node in rounds}

    def evaluate(
        self,
        rows: Tensor,
        nodes: Sequence[int],
        samples: Tensor | None = None,
        *,
        buffers: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Mean of each of the task's metrics over the test set.

        The models are in evaluation mode; nothing is changed.

        Args:
            rows: (n, P) float32, models.
            nodes: for each row, the node whose local buffers to use; -1 for the average of all nodes' float
                buffers (and node 0's integer ones).
            samples: (m,) int64 positions in the test set, m >= 1; None for all.
            buffers: for each row, the local buffers to use instead of those that ``nodes`` names, as
                :meth:`buffers` returned them earlier.

        Returns:
            By metric, (n,) float64 on the CPU.

        Raises:
            UsageError: shapes do not fit, or no such node.
            TrainingError: the model or a metric failed.
        """
        if rows.dim() != 2 or rows.shape[1] != self.layout.size or len(nodes) != len(rows):
            raise UsageError(
                f"Trainer.evaluate: rows of shape {tuple(rows.shape)} for {len(nodes)} nodes; "
                f"expected ({len(nodes)}, {self.layout.size})"
            )
        if any(not -1 <= node < self.num_nodes for node in nodes):
            raise UsageError(
                f"Trainer.evaluate: expected nodes of -1 to {self.num_nodes - 1}, got {list(nodes)}"
            )
        count = len(self._test_data.inputs) if samples is None else len(samples)
        if count == 0:
            raise UsageError("Trainer.evaluate: no test samples; give the task's test set at least one")
        if not len(rows):
            return {}
        rows = rows.detach().to(self.device, torch.float32)
        if samples is not None:
            samples = samples.to(self.device, torch.int64)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        sums: list[dict[str, float]] = [{} for _ in nodes]
        found = [self.buffers(node) for node in nodes] if buffers is None else buffers
        threads = 1 if self._draws.evaluation else self._threads
        with self._kept_generators():
            if self.batching == "loop" or len(rows) < MIN_STACK:

                def evaluate_one(worker: int, i: int) -> None:
                    sums[i] = self._evaluate_row(worker, rows[i], nodes[i], found[i], samples)

                self._run(range(len(rows)), evaluate_one, threads)
            else:
                pieces = pieces_of(len(rows), self._chunk)

                def evaluate_some(worker: int, piece: slice) -> None:
                    sums[piece] = self._evaluate_stack(worker, rows[piece], nodes[piece], found[piece], samples)

                self._run(pieces, evaluate_some, threads)
        return {
            name: torch.tensor([total[name] for total in sums], dtype=torch.float64) / count for name in sums[0]
        }

    def buffers(self, node: int) -> dict[str, Tensor]:
        """Copies of a node's local buffers; of -1, the average over the nodes (of integer ones, node 0's)."""
        if node >= 0:
            return {name: tensor[node].clone() for name, tensor in self.local_buffers.items()}
        return {
            name: tensor.mean(dim=0) if tensor.is_floating_point() else tensor[0].clone()
            for name, tensor in self.local_buffers.items()
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must hold besides ``params``.

        Returns:
            Optimizer moments (N, P), optimizer counters (N, tensors) and local buffers (N, *shape), by name.
            They share memory with the trainer: write or copy them before the next ``train``.
        """
        n, size = self.num_nodes, self.layout.size
        return {
            "moments": {name: tensor[:n, :size] for name, tensor in self._state.moments.items()},
            "scalars": {name: tensor[:n] for name, tensor in self._state.scalars.items()},
            "buffers": dict(self.local_buffers),
        }

    def load_state_(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from what :meth:`state` returned in an earlier process.

        Args:
            state: of a trainer with the same task, number of nodes and optimizer.

        Raises:
            UsageError: names or shapes differ; nothing has been changed then.
        """
        own = self.state()
        pairs = []
        for group, tensors in own.items():
            given = state.get(group, {})
            if set(given) != set(tensors):
                raise UsageError(
                    f"Trainer.load_state_: {group}: got {sorted(given)}, expected {sorted(tensors)}"
                )
            for name, tensor in tensors.items():
                if given[name].shape != tensor.shape or given[name].dtype != tensor.dtype:
                    raise UsageError(
                        f"Trainer.load_state_: {group}.{name}: got {tuple(given[name].shape)} "
                        f"{given[name].dtype}, expected {tuple(tensor.shape)} {tensor.dtype}"
                    )
                pairs.append((tensor, given[name]))
        for tensor, source in pairs:
            tensor.copy_(source)

    def reset_node_(self, node: int) -> None:
        """Give a node the optimizer state and the local buffers of a fresh start; its row stays as it is."""
        fresh = Replica(self._fresh_model(), self.layout)
        single = OptimizerState(self._optimizer, 1, 1, len(fresh.trained), torch.device("cpu"))
        for name, tensor in self._state.moments.items():
            tensor[node] = single.moments[name][0, 0].to(tensor.device)
        for name, tensor in self._state.scalars.items():
            tensor[node] = single.scalars[name][0]
        for name, tensor in self._buffers.items():
            tensor[node] = fresh.places[name].get()

    def close(self) -> None:
        """End the worker threads. The trainer can be used again; it starts new ones."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    # Setting up

    def _matrix(self, rows: int) -> Tensor:
        """The initial model in each of so many aligned rows, (rows, P)."""
        stride = -(-self.layout.size // _ALIGN) * _ALIGN
        matrix = torch.zeros(rows, stride, device=self.device)[:, : self.layout.size]
        return matrix.copy_(self._initial)

    def _flatten_step(self, single: Mapping[str, Tensor]) -> torch.fx.GraphModule | None:
        """The step of a whole chunk as its tensor operations only; None where that does not work."""
        if self.batching == "loop" or self._draws.handed:  # a generator is no tensor: it would be fixed
            return None
        replica = Replica(self._fresh_model(), self.layout)
        generator = torch_generator(self._seed, "loss", node=0, round=0, device=self.device)
        step = self._stacked_step(replica, generator)
        example = [*self._probe_batch(0, self._chunk), *self._scratch(self._chunk, single)]
        with self._kept_generators(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                flat = flattened(step, example)
                # On another batch, so that nothing of the first can have become a part of the step.
                return None if self._differs_from_loop(flat, self._chunk, single, 1) else flat
            except Exception:  # not everything can be recorded; steps are then taken with all their calls
                return None

    def _fresh_model(self) -> nn.Module:
        with self._kept_generators():
            self._seed_global("model", EVERY_NODE, EVERY_ROUND)
            model = self.task.model()
        if not isinstance(model, nn.Module):
            raise UsageError(f"task.model() returned {type(model).__name__}: expected a torch.nn.Module")
        return model.to(self.device)

    @contextmanager
    def _kept_generators(self) -> Iterator[None]:
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield

    def _global_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _seed_global(self, purpose: str, node: int, round: int) -> None:
        """Seed torch's own generators; only within ``_kept_generators`` and on one thread."""
        value = torch_generator(self._seed, purpose, node=node, round=round).initial_seed()
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    def _probe_draws(self) -> _Draws:
        """Run one step and a small evaluation of a fresh model, and look which generators they move."""
        model = self._fresh_model().train()
        self._check_frozen(model, "differs between two calls of model(); draw it from torch's own generator")
        batch = self._gather(torch.from_numpy(self._indices(0, 0)[0]).to(self.device))
        generator = torch_generator(self._seed, "loss", node=0, round=0, device=self.device)
        handed = generator.get_state()
        with self._kept_generators():
            before = self._global_state()
            with _named(0, 0, "loss"):
                loss = self.task.loss(model, batch, generator)
                _check_scalar(loss)
            with _named(0, 0, "backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            between = self._global_state()
            inputs, targets = self._test_data
            model.eval()
            if len(inputs):
                with _named(0, 0, "evaluation"), torch.no_grad():
                    self._add_metrics({}, model(self.task.prepare(inputs[:2])), targets[:2])
            after = self._global_state()
        self._check_frozen(model, "changes in a step; register it as a buffer in model()")
        return _Draws(
            training=_differ(before, between),
            evaluation=_differ(between, after),
            handed=not torch.equal(handed, generator.get_state()),
        )

    def _check_frozen(self, model: nn.Module, problem: str) -> None:
        """Frozen parameters are the same in every replica and at any time; a model may break that."""
        parameters = dict(model.named_parameters())
        for name, before in self.frozen.items():
            if not torch.allclose(parameters[name], before, rtol=0, atol=0, equal_nan=True):
                raise UsageError(f"parameter {name!r}, whose requires_grad is False, {problem}")

    def _resolve_batching(
        self, asked: Batching, model: nn.Module, buffers: Mapping[str, Tensor]
    ) -> tuple[Literal["loop", "stacked"], str]:
        if asked == "loop":
            return "loop", "loop was asked for"
        if asked == "auto" and self.device.type == "cpu":
            for module in model.modules():
                if isinstance(module, _SLOW_STACKED):
                    return "loop", f"{type(module).__name__} is faster in a loop on CPU"
            if self._numbers > STACKED_MAX_PARAMETERS:
                return "loop", f"models of more than {STACKED_MAX_PARAMETERS} parameters gain nothing on CPU"
        problem = self._probe_stack(buffers)
        return ("loop", f"torch.func cannot stack this model: {problem}") if problem else ("stacked", "")

    def _probe_stack(self, single: Mapping[str, Tensor]) -> str:
        """Why a stack of three nodes does not train and evaluate as one node does; empty if it does."""
        replica = Replica(self._fresh_model(), self.layout)

        with self._kept_generators(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                generator = torch_generator(self._seed, "loss", node=0, round=0, device=self.device)
                step = self._stacked_step(replica, generator)
                differing = self._differs_from_loop(step, MIN_STACK, single, 0)
                if differing:
                    return f"{differing} of a step is not what it is in a loop"
                replica.model.eval()
                with torch.no_grad():
                    self._stacked_outputs(replica, self._scratch(MIN_STACK, single), self._test_data.inputs[:2])
            except Exception as error:
                return f"{type(error).__name__}: {_first_line(error)}"
        for warning in caught:
            if "performance drop" in str(warning.message):
                return _first_line(warning.message)
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return ""

    def _scratch(self, rows: int, single: Mapping[str, Tensor]) -> list[Tensor]:
        """Tensors of so many rows at the start of the run, which lie in memory as the real ones do."""
        buffers = [tensor.expand(rows, *tensor.shape).clone() for tensor in single.values()]
        return values_of(self.layout, self.layout.views(self._matrix(rows)), buffers)

    def _probe_batch(self, step: int, rows: int) -> Batch:
        index = torch.from_numpy(self._shuffles[0].take(step * self._batch_size, self._batch_size))
        return self._gather(index.expand(rows, -1).to(self.device))

    def _differs_from_loop(self, step: _Step, rows: int, single: Mapping[str, Tensor], number: int) -> str:
        """What of a stack's step one node in a loop does not confirm; always empty for random models."""
        with torch.no_grad():
            losses, gradients, buffers = self._outcome(
                step(*self._probe_batch(number, rows), *self._scratch(rows, single))
            )
        if self._draws.training or self._draws.handed:
            return ""
        model = self._fresh_model().train()
        inputs, targets = self._probe_batch(number, 1)
        generator = torch_generator(self._seed, "loss", node=0, round=0, device=self.device)
        loss = self.task.loss(model, Batch(inputs[0], targets[0]), generator)
        loss.backward()  # type: ignore[no-untyped-call]
        named = dict(model.named_buffers())
        pairs = [("the loss", losses[0], loss.detach())]
        pairs += [(name, tensor[0], named[name]) for name, tensor in buffers.items()]
        own = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, gradient in gradients.items():
            expected = own[name]
            if (gradient is None) != (expected is None):
                return f"the gradient of {name}"
            if gradient is not None and expected is not None:
                pairs.append((f"the gradient of {name}", gradient[0], expected))
        for name, got, wanted in pairs:
            scale = float(wanted.abs().max()) if wanted.numel() else 0.0
            if not torch.allclose(got, wanted, rtol=0, atol=1e-3 * scale + 1e-6, equal_nan=True):
                return name
        return ""

    # Running jobs on threads

    def _run(self, jobs: Sequence[J], work: Callable[[int, J], None], threads: int) -> None:
        """Do every job, in any order; of several failures, the one of the first job is raised."""
        torch.set_num_threads(1)
        threads = min(threads, len(jobs))
        if threads <= 1:
            for job in jobs:
                work(0, job)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="jwins-train")
        counter = itertools.count()
        stop = threading.Event()
        failures: dict[int, BaseException] = {}

        def drain(worker: int) -> None:
            torch.set_num_threads(1)
            while not stop.is_set() and (i := next(counter)) < len(jobs):
                try:
                    work(worker, jobs[i])
                except BaseException as error:
                    failures[i] = error
                    stop.set()

        futures: list[Future[None]] = [self._pool.submit(drain, worker) for worker in range(threads)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # only matters after Ctrl-C: the workers end after the node at hand
            wait(futures)
        if failures:
            raise failures[min(failures)]

    def _run_by_chunk(
        self, jobs: Sequence[tuple[int, int]], work: Callable[[int, tuple[int, int]], None], threads: int
    ) -> None:
        """As ``_run``, but jobs of the same chunk follow each other on one thread: they use the same rows."""
        by_chunk = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job[0])]

        def work_all(worker: int, group: list[tuple[int, int]]) -> None:
            for job in group:
                work(worker, job)

        self._run(by_chunk, work_all, threads)

    # Data

    def _indices(self, node: int, round: int) -> Indices:
        count = self.local_steps * self._batch_size
        return self._shuffles[node].take(round * count, count).reshape(self.local_steps, self._batch_size)

    def _gather(self, index: Tensor) -> Batch:
        """Samples at positions of any shape, (..., B) int64. Five times as fast as indexing with a tensor."""
        flat = index.reshape(-1)
        inputs, targets = (data.index_select(0, flat) for data in self._train_data)
        return Batch(
            inputs.view(*index.shape, *inputs.shape[1:]), targets.view(*index.shape, *targets.shape[1:])
        )

    def _test_batches(self, samples: Tensor | None) -> Iterator[Batch]:
        inputs, targets = self._test_data
        size = EVALUATION_BATCH
        if self.device.type == "cpu":
            size = min(size, max(16, EVALUATION_BATCH_CPU // max(1, inputs[:1].numel())))
        for start in range(0, len(inputs) if samples is None else len(samples), size):
            part: Any = slice(start, start + size)
            if samples is not None:
                part = samples[part]
            yield Batch(inputs[part], targets[part])

    # The loop

    def _train_node(self, worker: int, node: int, round: int) -> float:
        replica, optimizer = self._replicas[worker], self._loop_optimizers[worker]
        if self._rebuild:
            optimizer = self._optimizer.build([parameter for parameter, _ in replica.trained])
        row = self._rows[node]
        buffers = {name: tensor[node] for name, tensor in self._buffers.items()}
        replica.model.train()
        replica.bind(row, buffers)
        self._bind_state(optimizer, replica, node)
        if self._draws.training:
            self._seed_global("draws", node, round)
        generator = torch_generator(self._seed, "loss", node=node, round=round, device=self.device)
        index = torch.from_numpy(self._indices(node, round)).to(self.device)
        started = self._state.scalars.get("started")
        losses = []
        stage = "batch"
        try:
            for step in range(self.local_steps):
                stage = "batch"
                batch = self._gather(index[step])
                stage = "loss"
                loss = self.task.loss(replica.model, batch, generator)
                _check_scalar(loss)
                stage = "backward"
                loss.backward()  # type: ignore[no-untyped-call]
                stage = "optimizer"
                optimizer_step(optimizer, started is not None and not bool(started[node, 0]))
                if started is not None:
                    started[node] = 1
                optimizer.zero_grad()
                losses.append(loss.detach())
            replica.collect(row, buffers)
        except Exception as error:
            raise _training_error(node, round, stage, error) from error
        return float(torch.stack(losses).double().mean())

    def _bind_state(self, optimizer: torch.optim.Optimizer, replica: Replica, node: int) -> None:
        optimizer.zero_grad()
        if not self._state.moments:
            return
        moments = [(key, tensor[node]) for key, tensor in self._state.moments.items()]
        scalars = [(key, tensor[node]) for key, tensor in self._state.scalars.items() if key != "started"]
        for j, (parameter, slot) in enumerate(replica.trained):
            optimizer.state[parameter] = {key: counters[j] for key, counters in scalars} | {
                key: row[slot.offset : slot.offset + slot.size].view(slot.shape) for key, row in moments
            }

    def _evaluate_row(
        self, worker: int, row: Tensor, node: int, buffers: Mapping[str, Tensor], samples: Tensor | None
    ) -> dict[str, float]:
        replica = self._replicas[worker]
        # Copies: a model may change its buffers in evaluation mode too, and that must not last.
        own = row.clone() if replica.shared else row
        replica.model.eval()
        replica.bind(own, {name: tensor.to(self.device, copy=True) for name, tensor in buffers.items()})
        sums: dict[str, float] = {}
        if self._draws.evaluation:
            self._seed_global("evaluation", node, EVERY_ROUND)
        with _named(node, None, "evaluation"), torch.no_grad():
            for inputs, targets in self._test_batches(samples):
                outputs = replica.model(self.task.prepare(inputs))
                self._add_metrics(sums, outputs, targets)
        return sums

    def _add_metrics(self, sums: dict[str, float], outputs: Any, targets: Tensor) -> None:
        for name, values in self.task.metrics(outputs, targets).items():
            if values.shape != (len(targets),):
                raise UsageError(
                    f"metric {name!r} has shape {tuple(values.shape)}: "
                    f"expected one number per sample, ({len(targets)},)"
                )
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())

    # Stacks

    def _stacked_step(self, replica: Replica, generator: torch.Generator) -> _Step:
        """Losses (rows,), gradients and changed buffers, from a batch and all tensors of the rows."""
        replica.model.train()
        names = self._names

        def one(inputs: Tensor, targets: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            with replica.swapped(names, tensors):
                loss = self.task.loss(replica.model, Batch(inputs, targets), generator)
                _check_scalar(loss)
                return loss, *(replica.places[name].get() for name in self._changing)

        def step(inputs: Tensor, targets: Tensor, *values: Tensor) -> tuple[Tensor | None, ...]:
            given = dict(zip(names, values, strict=True))
            for name in self._trained:
                given[name] = given[name].detach().requires_grad_()
            with torch.enable_grad(), StackedKernels():
                run = torch.func.vmap(one, randomness="different")
                losses, *left = run(inputs, targets, *given.values())
                leaves = [given[name] for name in self._trained]
                gradients = torch.autograd.grad(losses, leaves, torch.ones_like(losses), allow_unused=True)
            return losses.detach(), *gradients, *(tensor.detach() for tensor in left)

        return step

    def _outcome(self, result: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
        """A step's result by name."""
        losses, *rest = result
        count = len(self._trained)
        return (
            losses,
            dict(zip(self._trained, rest[:count], strict=True)),
            dict(zip(self._changing, rest[count:], strict=True)),
        )

    def _stacked_outputs(self, replica: Replica, values: Sequence[Tensor], inputs: Tensor) -> Any:
        prepared = self.task.prepare(inputs)

        def one(*tensors: Tensor) -> Any:
            with replica.swapped(self._names, tensors):
                return replica.model(prepared)

        return torch.func.vmap(one, randomness="different")(*values)

    def _train_chunk(self, worker: int, number: int, rounds: Mapping[int, int]) -> dict[int, float]:
        """Train some nodes of a chunk; the others take the same steps on some data, and are put back."""
        chunk = self._chunks.get(number)
        if chunk is None:
            chunk = self._chunks[number] = Chunk(self, number)
        first, at = next(iter(rounds.items()))
        if self._draws.training:
            self._seed_global("draws of chunk", number, at)
        if self._flat_steps:
            take: _Step = self._flat_steps[worker]
        else:
            generator = torch_generator(self._seed, "loss of chunk", node=number, round=at, device=self.device)
            take = self._stacked_step(self._replicas[worker], generator)
        chosen = [node - number * self._chunk for node in rounds]
        index = np.zeros((self.local_steps, self._chunk, self._batch_size), dtype=np.int64)
        for node, row in zip(rounds, chosen, strict=True):
            index[:, row] = self._indices(node, rounds[node])
        on_device = torch.from_numpy(index).to(self.device)
        losses = []
        stage = "loss"
        try:
            with chunk.only(chosen), torch.no_grad():
                chunk.begin(self._optimizer if self._rebuild else None)
                for step in range(self.local_steps):
                    stage = "loss"
                    result = take(*self._gather(on_device[step]), *chunk.values())
                    loss, gradients, buffers = self._outcome(result)
                    stage = "optimizer"
                    chunk.step(gradients, chosen)
                    chunk.collect(buffers)
                    losses.append(loss)
        except Exception as error:
            where = f"{first} to {max(rounds)}" if len(rounds) > 1 else str(first)
            raise _training_error(where, at, stage, error) from error
        means = torch.stack(losses).double().mean(dim=0).tolist()
        return {node: means[row] for node, row in zip(rounds, chosen, strict=True)}

    def _evaluate_stack(
        self,
        worker: int,
        rows: Tensor,
        nodes: Sequence[int],
        found: Sequence[Mapping[str, Tensor]],
        samples: Tensor | None,
    ) -> list[dict[str, float]]:
        replica = self._replicas[worker]
        replica.model.eval()
        own = rows.clone() if replica.shared else rows
        buffers = {name: torch.stack([of[name].to(self.device) for of in found]) for name in self._buffers}
        sums: list[dict[str, float]] = [{} for _ in nodes]
        if self._draws.evaluation:
            self._seed_global("evaluation of stack", nodes[0], EVERY_ROUND)
        with _named(f"{nodes[0]} to {nodes[-1]}", None, "evaluation"), torch.no_grad():
            values = [*self.layout.views(own).values(), *buffers.values()]
            for inputs, targets in self._test_batches(samples):
                outputs = self._stacked_outputs(replica, values, inputs)
                for i, total in enumerate(sums):
                    self._add_metrics(total, pytree.tree_map(lambda tensor, i=i: tensor[i], outputs), targets)
        return sums


def resolve_device(device: Device) -> torch.device:
    """Where training happens.

    Raises:
        ConfigError: there is no such device here.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise ConfigError("run.device", device, "expected cpu, cuda or auto")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device", device, "torch sees no CUDA device here; use cpu or auto")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _differ(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _check_scalar(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise UsageError(f"task.loss returned {type(loss).__name__}: expected a tensor that holds one number")
    if loss.dim() != 0:
        raise UsageError(f"task.loss has shape {tuple(loss.shape)}: expected a scalar, e.g. its mean")


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _training_error(node: object, round: int | None, stage: str, error: Exception) -> TrainingError:
    at = "" if round is None else f", round {round}"
    what = str(error) if isinstance(error, JwinsError) else f"{type(error).__name__}: {error}"
    return TrainingError(f"node {node}{at}, {stage}: {what}")


@contextmanager
def _named(node: object, round: int | None, stage: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _training_error(node, round, stage, error) from error
