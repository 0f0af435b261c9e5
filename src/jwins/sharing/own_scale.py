"""The magnitude that a node's values reach by its own training, without the effect of merging."""

from __future__ import annotations

from torch import Tensor

from jwins.sharing.update import largest_magnitude


def scale_of(params: Tensor) -> float:
    """Return the largest magnitude of (P,) parameters, at least 1; NaN counts as 1."""
    return max(1.0, largest_magnitude(params))


class OwnScale:
    """Running bound on a node's values, which its own training raises and merging does not.

    A sender that inflates its values inflates the models of its neighbours. If these compared its next values
    with their models, it could raise the limit from round to round.

    Args:
        params: (P,) at the start.

    >>> import torch
    >>> scale = OwnScale(torch.tensor([2.0, -4.0]))
    >>> scale.trained(torch.tensor([100.0]), torch.tensor([150.0]))  # merging made it 100, training half more
    >>> scale.own
    6.0
    >>> scale.shared(torch.tensor([100.0]), 200.0)  # the update is a transform, twice as large
    >>> scale.own
    12.0
    """

    def __init__(self, params: Tensor) -> None:
        self._params = scale_of(params)
        self._gain = 1.0

    @property
    def own(self) -> float:
        """Return the largest magnitude of an update's values that the node's training explains; at least 1."""
        return self._params * self._gain

    def trained(self, before: Tensor, after: Tensor) -> None:
        """Record a training from ``before`` to ``after``, (P,) each."""
        growth = scale_of(after) / scale_of(before)
        self._params *= max(1.0, growth)  # a shrinking model leaves it as it is; NaN compares as False

    def shared(self, params: Tensor, largest: float) -> None:
        """Record the largest magnitude of an update that was made of ``params``, (P,)."""
        self._gain = max(self._gain, largest / scale_of(params))
