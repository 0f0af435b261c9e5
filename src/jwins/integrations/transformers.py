"""A peer in the ``Trainer`` of Hugging Face's transformers."""

from __future__ import annotations

from typing import Any

from jwins.errors import UsageError
from jwins.integrations.exchange_times import ExchangeTimes
from jwins.net.peer import Peer

try:
    from transformers import TrainerCallback
except ImportError:
    raise UsageError(
        "jwins.integrations.transformers needs an extra: pip install 'jwins[transformers]'"
    ) from None


class PeerCallback(TrainerCallback):  # type: ignore[misc]
    """Exchanges a ``Trainer``'s model, before it is evaluated or saved, and closes the peer at the end.

    Args, attributes and errors are those of :class:`~jwins.integrations.exchange_times.ExchangeTimes`.

    Example::

        peer = jwins.Peer(model, roster="roster.toml", key="alice.key", params=lambda name: "lora" in name)
        Trainer(model=model, callbacks=[PeerCallback(peer, every_steps=50)], ...).train()
    """

    def __init__(self, peer: Peer, *, every_steps: int | None = None, wait: bool = True) -> None:
        self.exchange_times = ExchangeTimes(peer, every_steps, wait)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.exchange_times.begin(state.global_step, kwargs["model"], args.world_size)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.exchange_times.after(state.global_step, epoch_ended=False)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.exchange_times.after(state.global_step, epoch_ended=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.exchange_times.end(state.global_step)
