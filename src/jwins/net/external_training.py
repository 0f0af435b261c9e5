"""Local training in the user's own loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jwins.errors import JwinsError
from jwins.training.node_store import LocalState

if TYPE_CHECKING:
    from jwins.training.layout import Layout


class WithdrawnError(JwinsError):
    """The peer was closed, so this training has no result."""


class ExternalTraining:
    """Trainer of one node whose parameters the user trains.

    The driver's training thread waits in :meth:`train` for :meth:`hand_over`. The user's thread waits in
    :meth:`take_merged` until the round is merged and the driver calls :meth:`train` for the next one.

    Neither side writes into a vector of the other, so none is copied.

    Args:
        node: number of the node.
        layout: layout of the exchanged vector.
        initial: (P,) float32, on the CPU.

    Attributes:
        nodes, steps, threads, device, frozen: as of a :class:`~jwins.training.trainer.Trainer`.
        layout: as given.
    """

    def __init__(self, node: int, layout: Layout, initial: Tensor) -> None:
        self.nodes, self.steps, self.threads = (node,), {node: 1}, 1
        self.device, self.frozen = torch.device("cpu"), dict[str, Tensor]()
        self.layout = layout
        self._row = initial
        self._changed = threading.Condition()
        self._given: Tensor | None = None
        self._merged: tuple[int, Tensor] | None = None
        self._failure: BaseException | None = None

    # --- For the node group -----------------------------------------------------------------------------------

    def initial(self) -> Tensor:
        """Return the node's start, (P,) float32."""
        return self._row

    def take_row(self, node: int) -> Tensor:
        """Return the result of the newest training, (P,) float32."""
        return self._row

    def load_row_(self, node: int, params: Tensor) -> None:
        """Take over the parameters to begin with, (P,) float32, without a copy."""
        self._row = params

    def buffers(self, node: int) -> dict[str, Tensor]:
        """Return no buffers: those that are not exchanged stay in the user's model."""
        return {}

    def state(self, node: int) -> LocalState:
        """Return an empty state, because the user has the optimizer."""
        return LocalState({}, {}, {})

    def train_batch_of(self, node: int) -> int:
        """Return 0: the only node is a batch."""
        return 0

    def load_state_(self, node: int, state: LocalState) -> None:
        """Do nothing: the state is empty."""

    def train(
        self, rounds: Mapping[int, int], then: Callable[[int, float], None] | None = None
    ) -> dict[int, float]:
        """Publish the merged parameters, and wait for the user's result.

        Raises:
            WithdrawnError: the peer was closed, so there is no result.
        """
        ((node, number),) = rounds.items()
        with self._changed:
            self._merged = (number, self._row)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._given is not None or self._failure is not None)
            if self._given is None:
                raise WithdrawnError("the peer was closed")
            self._row, self._given = self._given, None
        if then is not None:
            then(node, 0.0)
        return {node: 0.0}

    # --- For the user's loop ------------------------------------------------------------------------------

    def hand_over(self, params: Tensor) -> None:
        """Pass the result of the current round, (P,) float32, to the driver.

        Raises:
            JwinsError: the driver has ended.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._merged = None
            self._given = params
            self._changed.notify_all()

    def take_merged(self) -> tuple[int, Tensor]:
        """Wait for the next round, and return it with its initial parameters.

        Raises:
            JwinsError: the driver has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._merged is not None or self._failure is not None)
            if self._merged is None:
                assert self._failure is not None
                raise self._failure
            return self._merged

    def withdraw(self, failure: BaseException) -> None:
        """End all waiting: training raises WithdrawnError, and ``take_merged`` raises the failure."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()
