"""Training node after node: a worker's module takes the place of each node in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from jwins.tasks.base import Batch
from jwins.training.batches import Indices
from jwins.training.node_store import NodeStore
from jwins.training.optimizer import Optimizer, optimizer_step, zero_grad_
from jwins.training.privacy import Privacy
from jwins.training.stacked import StackedModel
from jwins.training.training_context import TrainingContext, training_error
from jwins.training.worker_module import WorkerModule


class LoopTrainer:
    """Trains one node at a time on each worker, in place in the node's row.

    Args:
        modules: a module for each worker.
        seeds_global: whether the task draws from torch's own generator in training.
        model: returns the gradients of single samples, as a stack of models with one sample each; None without
            ``privacy``.
        privacy: differential privacy of the nodes' samples, or None.
    """

    def __init__(
        self,
        context: TrainingContext,
        store: NodeStore,
        modules: Sequence[WorkerModule],
        optimizer: Optimizer,
        *,
        seeds_global: bool,
        model: StackedModel | None = None,
        privacy: Privacy | None = None,
    ) -> None:
        self._context, self._store, self._modules = context, store, modules
        self._optimizer, self._seeds_global = optimizer, seeds_global
        self._model, self._privacy = model, privacy
        self._rebuild = optimizer.state == "reset" and optimizer.has_state()
        self._built = [self._of(module) for module in modules]

    def train(self, worker: int, node: int, round: int, indices: Sequence[Indices]) -> float:
        """Train one node for one round.

        Args:
            worker: number of the worker whose module is used.
            node: number of the node.
            round: the round, for generators and errors.
            indices: for each step, (n,) int64 samples; n varies from step to step only with ``privacy``.

        Returns:
            Mean loss over the steps; NaN if no step has samples.

        Raises:
            TrainingError: a step failed.
        """
        module, context, store = self._modules[worker], self._context, self._store
        optimizer = self._of(module) if self._rebuild else self._built[worker]
        row = store.row(node)
        vector, buffers = store.rows[row], store.buffers_of(node)
        module.model.train()
        module.bind(vector, buffers)
        self._bind_state(optimizer, module, row, round, len(indices))
        if self._seeds_global:
            context.seed_global("draws", node, round)
        generator = context.generator("loss", node, round)
        private = None
        if self._privacy is not None:
            private = self._privacy, context.generator("privacy noise", node, round)
        index = torch.from_numpy(np.concatenate(indices)).to(context.device)
        started = store.optimizer.scalars.get("started")
        losses: list[Tensor] = []
        stage = "batch"
        try:
            for step, drawn in enumerate(torch.split(index, [len(drawn) for drawn in indices])):
                stage = "batch"
                batch = context.gather(drawn)
                stage = "loss"
                if private is None:
                    loss = context.loss(module.model, batch, generator)
                    stage = "backward"
                    loss.backward()  # type: ignore[no-untyped-call]
                    losses.append(loss.detach())
                else:
                    losses += self._private_gradient(*private, module, node, batch, generator)
                stage = "optimizer"
                if self._optimizer.clip_norm is not None:
                    parameters = [parameter for parameter, _ in module.trained]
                    torch.nn.utils.clip_grad_norm_(parameters, self._optimizer.clip_norm)
                first = started is not None and not bool(started[row, 0])
                lr = self._optimizer.lr_at(round * context.local_steps + step)
                optimizer_step(optimizer, first, lr)
                if started is not None:
                    started[row] = 1
                zero_grad_(optimizer)
            module.collect(vector, buffers)
        except Exception as error:
            raise training_error(node, round, stage, error) from error
        return float(torch.stack(losses).double().mean()) if losses else math.nan

    def _private_gradient(
        self,
        privacy: Privacy,
        noise: torch.Generator,
        module: WorkerModule,
        node: int,
        batch: Batch,
        generator: torch.Generator,
    ) -> list[Tensor]:
        """Set the gradient of a step from those of its samples, and return their mean loss, or nothing."""
        assert self._model is not None
        size, losses = len(batch.inputs), list[Tensor]()
        of_samples: dict[str, Tensor | None] = {}
        if size:
            vector, buffers = self._store.rows[self._store.row(node)], self._store.buffers_of(node)
            each, of_samples = self._model.of_samples(module, vector, buffers, batch, generator)
            losses.append(each.mean())
        gradients = {}
        for parameter, slot in module.trained:
            found = of_samples.get(slot.name)
            gradients[slot.name] = parameter.new_zeros(size, *slot.shape) if found is None else found
        noisy = privacy.noisy_mean(node, gradients, noise)
        for parameter, slot in module.trained:
            parameter.grad = noisy[slot.name]
        return losses

    def _of(self, module: WorkerModule) -> torch.optim.Optimizer:
        dims = [len(slot.shape) for _, slot in module.trained]
        return self._optimizer.build([parameter for parameter, _ in module.trained], dims)

    def _bind_state(
        self, optimizer: torch.optim.Optimizer, module: WorkerModule, row: int, round: int, steps: int
    ) -> None:
        zero_grad_(optimizer)
        state = self._store.optimizer
        if state.quasi_global is not None:
            own = slice(row, row + 1)
            begun = state.quasi_global.begin_(own, self._store.rows[own], [round], steps)
            moments = {"momentum_buffer": begun[0]}
        else:
            moments = {key: tensor[row] for key, tensor in state.moments.items()}
        if not moments:
            return
        scalars: Mapping[str, Tensor] = {
            key: tensor[row] for key, tensor in state.scalars.items() if key != "started"
        }
        for j, (parameter, slot) in enumerate(module.trained):
            optimizer.state[parameter] = {key: counters[j] for key, counters in scalars.items()} | {
                key: vector[slot.offset : slot.offset + slot.size].view(slot.shape)
                for key, vector in moments.items()
            }
