"""Training and evaluating nodes as stacks, with ``torch.func.vmap``.

Nodes 0 to N - 1 are divided into chunks of equal size in the order of their numbers, the last one padded. A
chunk always trains as one whole stack. So no result depends on which other nodes train, or on which process
holds other chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jwins.errors import UsageError
from jwins.tasks.base import Batch
from jwins.training.batches import Indices
from jwins.training.flat_graph import StackedKernels
from jwins.training.layout import Layout
from jwins.training.node_store import NodeStore
from jwins.training.optimizer import Optimizer, clipped, optimizer_step
from jwins.training.training_context import TrainingContext, training_error
from jwins.training.worker_module import WorkerModule

Step = Callable[..., tuple[Any, ...]]

CHUNK_NUMBERS = {"cpu": 3 * 2**18, "cuda": 2**23}
"""Maximum number of parameters of all nodes of one stack. On the CPU these are 3 MB, and the same for
gradients, which stay in the cache from step to step; on CUDA 32 MB, which keep the device busy."""
CHUNK_NODES = 128
"""Maximum number of nodes in one stack. More would save few calls, and a late node takes as long as a stack."""
MIN_STACK = 3
"""Minimum number of rows: with one or two, the matrix product takes other paths and changes the last bits."""


def chunk_nodes(num_nodes: int, size: int, device: torch.device, max_nodes: int | None = None) -> int:
    """Return the number of nodes in each chunk, which the bits of a stacked result depend on.

    Args:
        num_nodes: N, of the whole run.
        size: P, parameters per node.
        device: device of the training.
        max_nodes: largest number of nodes in a chunk; None for :data:`CHUNK_NODES`, or fewer by
            :data:`CHUNK_NUMBERS`.

    >>> chunk_nodes(200, 50_000, torch.device("cpu"))
    15
    """
    if max_nodes is None:
        max_nodes = max(MIN_STACK, min(CHUNK_NODES, CHUNK_NUMBERS[device.type] // size))
    return max(MIN_STACK, -(-num_nodes // -(-num_nodes // max_nodes)))


def values_of(layout: Layout, tensors: Mapping[str, Tensor], buffers: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of some rows in the order of a step's arguments.

    Buffers are contiguous: vmap copies others, and the model's changes would be lost.
    """
    slots = [
        tensors[slot.name].contiguous() if slot.kind == "buffer" else tensors[slot.name]
        for slot in layout.slots
    ]
    return slots + list(buffers)


class StackedModel:
    """Steps and outputs of one model with many sets of parameters at once."""

    def __init__(self, context: TrainingContext, layout: Layout) -> None:
        self._context, self._layout = context, layout
        self._names = (*(slot.name for slot in layout.slots), *layout.local)
        self.trained = [slot.name for slot in layout.slots if slot.kind == "parameter"]
        self._changing = [slot.name for slot in layout.slots if slot.kind == "buffer"] + list(layout.local)

    def step(self, module: WorkerModule, generator: torch.Generator) -> Step:
        """Return a function from a batch and the rows' tensors to losses (rows,), gradients and buffers."""
        module.model.train()
        context, names, changing = self._context, self._names, self._changing

        def one(inputs: Tensor, targets: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            with module.swapped(names, tensors):
                loss = context.loss(module.model, Batch(inputs, targets), generator)
                return loss, *(module.get(name) for name in changing)

        def step(inputs: Tensor, targets: Tensor, *values: Tensor) -> tuple[Tensor | None, ...]:
            given = dict(zip(names, values, strict=True))
            for name in self.trained:
                given[name] = given[name].detach().requires_grad_()
            with torch.enable_grad(), StackedKernels():
                run = torch.func.vmap(one, randomness="different")
                losses, *left = run(inputs, targets, *given.values())
                leaves = [given[name] for name in self.trained]
                gradients = torch.autograd.grad(losses, leaves, torch.ones_like(losses), allow_unused=True)
            return losses.detach(), *gradients, *(tensor.detach() for tensor in left)

        return step

    def outcome(self, result: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
        """Return a step's losses, gradients and buffers by name."""
        losses, *rest = result
        count = len(self.trained)
        return (
            losses,
            dict(zip(self.trained, rest[:count], strict=True)),
            dict(zip(self._changing, rest[count:], strict=True)),
        )

    def of_samples(
        self,
        module: WorkerModule,
        vector: Tensor,
        buffers: Mapping[str, Tensor],
        batch: Batch,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the loss (B,) and the gradients (B, *shape) of each sample, by a stack of equal models."""
        size = len(batch.inputs)
        same = [tensor.expand(size, *tensor.shape) for tensor in buffers.values()]
        values = values_of(self._layout, self._layout.views(vector.expand(size, -1)), same)
        step = self.step(module, generator)
        losses, gradients, _ = self.outcome(step(batch.inputs[:, None], batch.targets[:, None], *values))
        return losses, gradients

    def outputs(self, module: WorkerModule, values: Sequence[Tensor], inputs: Tensor) -> Any:
        """Return the outputs of all rows' models, in evaluation mode, for the same test samples."""
        prepared = self._context.task.prepare(inputs)

        def one(*tensors: Tensor) -> Any:
            with module.swapped(self._names, tensors):
                return module.model(prepared)

        return torch.func.vmap(one, randomness="different")(*values)


class Chunk:
    """A fixed range of rows as leaf tensors of one optimizer.

    Every computation runs over all rows in the same layout, so that no node's result depends on the others.
    Rows that do not take part are restored afterwards.
    """

    def __init__(self, store: NodeStore, chunk_rows: slice, layout: Layout, optimizer: Optimizer) -> None:
        rows = store.rows[chunk_rows]
        self.size = chunk_rows.stop - chunk_rows.start
        self.buffers = {name: tensor[chunk_rows].data for name, tensor in store.buffers.items()}
        # .data gives each view a version counter of its own. Otherwise all chunks would count their changes
        # as those of the one matrix, and autograd of one thread would take another's for its own.
        self.tensors = {name: view.data for name, view in layout.views(rows).items()}
        self._layout, self._chunk_rows, self._rows = layout, chunk_rows, rows
        self._trained = [slot.name for slot in layout.slots if slot.kind == "parameter"]
        self._leaves = [self.tensors[name] for name in self._trained]
        self._dims = [len(slot.shape) for slot in layout.slots if slot.kind == "parameter"]
        self._optimizer = optimizer.build(self._leaves, self._dims)
        state = store.optimizer
        self._quasi_global = state.quasi_global
        moments = {name: tensor[chunk_rows, : layout.size] for name, tensor in state.moments.items()}
        self._scalars = {name: tensor[chunk_rows] for name, tensor in state.scalars.items()}
        self._kept = self._by_leaf(moments)
        self._updated = [rows, *moments.values()]
        kept = [*state.all_moments().values(), *state.all_counters().values()]
        self._all = [rows, *(tensor[chunk_rows] for tensor in kept), *self.buffers.values()]

    def _by_leaf(self, moments: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        views = {name: self._layout.views(tensor) for name, tensor in moments.items()}
        return [{name: found[leaf] for name, found in views.items()} for leaf in self._trained]

    @contextmanager
    def only(self, chosen: Sequence[int]) -> Iterator[None]:
        """Within the block, preserve all rows except the chosen ones."""
        with self._putting_back(chosen, self._all):
            yield

    @contextmanager
    def _putting_back(self, chosen: Sequence[int], tensors: Sequence[Tensor]) -> Iterator[None]:
        others = sorted(set(range(self.size)) - set(chosen))
        if not others:
            yield
            return
        index = torch.tensor(others)
        saved = [tensor[index.to(tensor.device)] for tensor in tensors]
        try:
            yield
        finally:
            for tensor, values in zip(tensors, saved, strict=True):
                tensor[index.to(tensor.device)] = values

    def begin(self, reset_to: Optimizer | None, rounds: Mapping[int, int], local_steps: int) -> None:
        """Prepare the steps of a round.

        Args:
            reset_to: settings from which a new optimizer, with an empty state, is made; None keeps the present
                one.
            rounds: the round of each row that trains.
            local_steps: steps of the round.
        """
        if reset_to is not None:
            self._optimizer = reset_to.build(self._leaves, self._dims)
        self._forget_gradients()
        kept = self._kept
        if self._quasi_global is not None:
            begun = [rounds.get(row, 0) for row in range(self.size)]
            momentum = self._quasi_global.begin_(self._chunk_rows, self._rows, begun, local_steps)
            kept = self._by_leaf({"momentum_buffer": momentum})
        for leaf, moments in zip(self._leaves, kept, strict=True):
            if moments:
                self._optimizer.state[leaf] = dict(moments)

    def values(self) -> list[Tensor]:
        """Return all tensors of the rows in the order of a step's arguments."""
        return values_of(self._layout, self.tensors, list(self.buffers.values()))

    def step(self, gradients: Mapping[str, Tensor | None], lrs: Mapping[int, float | None]) -> None:
        """Make one step of the optimizer.

        Its counters and its learning rate are the same for a whole stack. So nodes that are behind, after a
        fault, take their step separately.

        Args:
            gradients: by parameter, of all rows.
            lrs: by row that trains, its learning rate; None for that of the options.
        """
        for leaf, gradient in zip(self._leaves, gradients.values(), strict=True):
            leaf.grad = gradient
        groups: dict[tuple[float | None, *tuple[bytes, ...]], list[int]] = {}
        for row, lr in lrs.items():
            counts = (counters[row].numpy().tobytes() for counters in self._scalars.values())
            groups.setdefault((lr, *counts), []).append(row)
        for (lr, *_), group in groups.items():
            if len(groups) == 1:
                self._step_together(group, lr)
                continue
            with self._putting_back(group, self._updated):
                self._step_together(group, lr)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    def _step_together(self, group: Sequence[int], lr: float | None) -> None:
        first = False
        for name, counters in self._scalars.items():
            if name == "started":
                first = not bool(counters[group[0], 0])
                continue
            for j, leaf in enumerate(self._leaves):
                self._optimizer.state[leaf][name] = counters[group[0], j].clone()
        optimizer_step(self._optimizer, first, lr)
        index = torch.tensor(group)
        for name, counters in self._scalars.items():
            if name == "started":
                counters[index] = 1
                continue
            after = torch.stack([self._optimizer.state[leaf][name] for leaf in self._leaves])
            counters[index] = after

    def collect(self, buffers: Mapping[str, Tensor]) -> None:
        """Copy back buffers that the model replaced instead of changing them in place."""
        for name, found in buffers.items():
            own = self.buffers[name] if name in self.buffers else self.tensors[name]
            if found.data_ptr() != own.data_ptr():
                own.copy_(found.detach())


class StackedTrainer:
    """Trainer of chunks of a process's nodes.

    Args:
        store: the nodes; whole chunks only.
        num_nodes: N, of the whole run.
        modules: a module for each worker.
        recorded: the recorded step of a chunk for each worker; empty for none.
        seeds_global: whether the task draws from torch's own generator in training.

    Raises:
        UsageError: a chunk is incomplete in this process.
    """

    def __init__(
        self,
        context: TrainingContext,
        store: NodeStore,
        layout: Layout,
        optimizer: Optimizer,
        *,
        chunk: int,
        num_nodes: int,
        modules: Sequence[WorkerModule],
        recorded: Sequence[Step],
        seeds_global: bool,
    ) -> None:
        self._context, self._store, self._layout = context, store, layout
        self._optimizer, self._chunk, self._modules = optimizer, chunk, modules
        self._rebuild = optimizer.state == "reset" and optimizer.has_state()
        self._recorded, self._seeds_global = recorded, seeds_global
        self._model = StackedModel(context, layout)
        self._chunks: dict[int, Chunk] = {}
        here = set(store.nodes)
        for number in {node // chunk for node in store.nodes}:
            whole = range(number * chunk, min((number + 1) * chunk, num_nodes))
            if not here.issuperset(whole):
                raise UsageError(
                    f"nodes {whole[0]} to {whole[-1]} train as one stack, and only some of them are here: "
                    f'keep chunks of {chunk} nodes together, or set train.batching = "loop"'
                )

    def number_of(self, node: int) -> int:
        """Return the index of a node's chunk."""
        return node // self._chunk

    def train(
        self, worker: int, number: int, rounds: Mapping[int, int], indices: Mapping[int, Sequence[Indices]]
    ) -> dict[int, float]:
        """Train some nodes of a chunk. The others take the same steps on some data and are restored.

        Args:
            worker: worker whose module is used.
            number: index of the chunk.
            rounds: rounds of the nodes that train; the same for all if the task draws.
            indices: for each of them, by step, (batch_size,) int64.

        Returns:
            Mean loss over the steps, by node.

        Raises:
            TrainingError: a step failed.
        """
        chunk = self._chunk_of(number)
        first, at = next(iter(rounds.items()))
        if self._seeds_global:
            self._context.seed_global("draws of chunk", number, at)
        take = self._step(worker, number, at)
        chosen = [node - number * self._chunk for node in rounds]
        shape = (self._context.local_steps, self._chunk, self._context.batch_size)
        index = np.zeros(shape, dtype=np.int64)
        for node, row in zip(rounds, chosen, strict=True):
            index[:, row] = indices[node]
        on_device = torch.from_numpy(index).to(self._context.device)
        losses = []
        stage = "loss"
        try:
            with chunk.only(chosen), torch.no_grad():
                at_row = dict(zip(chosen, rounds.values(), strict=True))
                reset_to = self._optimizer if self._rebuild else None
                chunk.begin(reset_to, at_row, self._context.local_steps)
                for step in range(self._context.local_steps):
                    stage = "loss"
                    result = take(*self._context.gather(on_device[step]), *chunk.values())
                    loss, gradients, buffers = self._model.outcome(result)
                    stage = "optimizer"
                    if self._optimizer.clip_norm is not None:
                        gradients = clipped(gradients, self._optimizer.clip_norm)
                    chunk.step(gradients, self._lrs(at_row, step))
                    chunk.collect(buffers)
                    losses.append(loss)
        except Exception as error:
            where = f"{first} to {max(rounds)}" if len(rounds) > 1 else str(first)
            raise training_error(where, at, stage, error) from error
        means = torch.stack(losses).double().mean(dim=0).tolist()
        return {node: means[row] for node, row in zip(rounds, chosen, strict=True)}

    def _lrs(self, rounds: Mapping[int, int], step: int) -> dict[int, float | None]:
        return {row: self._optimizer.lr_at(at * self._context.local_steps + step) for row, at in rounds.items()}

    def _chunk_of(self, number: int) -> Chunk:
        chunk = self._chunks.get(number)
        if chunk is None:
            start = self._store.row(number * self._chunk)
            chunk_rows = slice(start, start + self._chunk)
            chunk = self._chunks[number] = Chunk(self._store, chunk_rows, self._layout, self._optimizer)
        return chunk

    def _step(self, worker: int, number: int, round: int) -> Step:
        if self._recorded:
            return self._recorded[worker]
        generator = self._context.generator("loss of chunk", number, round)
        return self._model.step(self._modules[worker], generator)
