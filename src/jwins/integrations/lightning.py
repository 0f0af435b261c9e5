"""A peer in the ``Trainer`` of Lightning."""

from __future__ import annotations

from typing import Any

from jwins.errors import UsageError
from jwins.integrations.exchange_times import ExchangeTimes
from jwins.net.peer import Peer

try:
    from lightning.pytorch import Callback
except ImportError:
    raise UsageError("jwins.integrations.lightning needs an extra: pip install 'jwins[lightning]'") from None


class PeerCallback(Callback):  # type: ignore[misc]
    """Exchanges a ``Trainer``'s model, before it is validated, and closes the peer at the end.

    Args, attributes and errors are those of :class:`~jwins.integrations.exchange_times.ExchangeTimes`.

    Example::

        peer = jwins.Peer(module, roster="roster.toml", key="alice.key")
        Trainer(callbacks=[PeerCallback(peer, every_steps=50)], ...).fit(module, loader)
    """

    def __init__(self, peer: Peer, *, every_steps: int | None = None, wait: bool = True) -> None:
        self.peer, self.exchange_times = peer, ExchangeTimes(peer, every_steps, wait)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: D102
        self.exchange_times.begin(trainer.global_step, pl_module, trainer.world_size)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:  # noqa: D102
        self.exchange_times.after(trainer.global_step, epoch_ended=trainer.is_last_batch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: D102
        self.exchange_times.end(trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: D102
        self.peer.close()
