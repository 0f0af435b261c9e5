"""How large values become by a node's own training, whatever others make of its model by merging."""

from __future__ import annotations

from torch import Tensor

from jwins.sharing.update import largest_magnitude

__all__ = ["OwnScale"]


class OwnScale:
    """A running scale of a node's own: its largest value, raised by its own training and not by merging.

    A sender that inflates its values raises the models of all who merge with it, and so whatever a receiver
    compares its next values with, if that is the receiver's model.

    Args:
        params: (P,) at the start.

    >>> import torch
    >>> scale = OwnScale(torch.tensor([2.0, -4.0]))
    >>> scale.trained(torch.tensor([100.0]), torch.tensor([150.0]))  # merging made it 100, training half more
    >>> scale.own
    6.0
    >>> scale.shared(torch.tensor([100.0]), 200.0)  # what is sent is a transform, of twice the size
    >>> scale.own
    12.0
    """

    def __init__(self, params: Tensor) -> None:
        self._params = max(1.0, largest_magnitude(params))
        self._gain = 1.0

    @property
    def own(self) -> float:
        """How large values of updates may be by this node's own doing, at least 1."""
        return self._params * self._gain

    def trained(self, before: Tensor, after: Tensor) -> None:
        """Training made ``after`` of ``before``, (P,) each."""
        growth = max(1.0, largest_magnitude(after)) / max(1.0, largest_magnitude(before))
        self._params *= max(1.0, growth)  # a shrinking model leaves it as it is; NaN compares as False

    def shared(self, params: Tensor, largest: float) -> None:
        """An update with this largest magnitude was made of ``params``, (P,)."""
        self._gain = max(self._gain, largest / max(1.0, largest_magnitude(params)))
