"""Times at which a library's training loop exchanges its model."""

from __future__ import annotations

from torch import nn

from jwins.errors import UsageError
from jwins.net.peer import Exchanged, Peer


class ExchangeTimes:
    """Exchange of the model every few optimizer steps or after each epoch, and once more at the end.

    Args:
        peer: the peer, made with the trainer's model; :meth:`end` closes it.
        every_steps: number of optimizer steps between exchanges; None for one after each epoch.
        wait: as of :meth:`~jwins.net.peer.Peer.exchange`. The last exchange always waits.

    Attributes:
        report: report of the newest exchange; None before the first.

    Raises:
        UsageError: ``every_steps`` is less than 1.
    """

    def __init__(self, peer: Peer, every_steps: int | None, wait: bool) -> None:
        if every_steps is not None and every_steps < 1:
            raise UsageError(f"every_steps = {every_steps}: expected at least 1, or None for each epoch")
        self.report: Exchanged | None = None
        self._peer, self._every_steps, self._wait = peer, every_steps, wait
        self._exchanged_at = 0

    def begin(self, step: int, model: nn.Module, processes: int) -> None:
        """Check the trainer's model, and count steps from here.

        Args:
            step: optimizer steps so far; above 0 in a resumed run.
            model: the trainer's model.
            processes: number of processes that train it together.

        Raises:
            UsageError: the peer has another model, or several processes train this one.
        """
        trained = set(map(id, model.parameters()))
        if not trained.issuperset(map(id, self._peer.model.parameters())):
            raise UsageError("the peer and the trainer have different models; pass the same model to both")
        if processes > 1:
            problem = "a peer exchanges the model of one process; train in one, with as many GPUs as it can use"
            raise UsageError(f"{processes} processes train together: {problem}")
        self._exchanged_at = step

    def after(self, step: int, *, epoch_ended: bool) -> None:
        """Exchange if an exchange is due.

        Args:
            step: optimizer steps so far.
            epoch_ended: whether an epoch has just ended.

        Raises:
            PeerError: no neighbour can take part.
            UsageError: the peer is closed, or parameters are not finite.
        """
        since = step - self._exchanged_at
        if since and (epoch_ended if self._every_steps is None else since >= self._every_steps):
            self._exchange(step, self._wait)

    def end(self, step: int) -> None:
        """Exchange the last steps, wait for a merge that is under way, and close the peer.

        Raises:
            PeerError, UsageError: as of :meth:`after`.
        """
        if step > self._exchanged_at or (self.report is not None and not self._wait):
            self._exchange(step, True)
        self._peer.close()

    def _exchange(self, step: int, wait: bool) -> None:
        self.report, self._exchanged_at = self._peer.exchange(wait=wait), step
