"""Quasi-global momentum: a momentum of the merged models, which costs no message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_NOT_TRAINED = -1  # round of a node that has not trained yet


class QuasiGlobal:
    """Momentum of each node's *merged* model. The local steps of every round start with it.

    With x_t the model at the start of round t, after merging, eta the learning rate, H the local steps and mu
    the factor, at the start of round t::

        d_t = (x_(t-1) - x_t) / (eta H)
        m_t = mu m_(t-1) + (1 - mu) d_t,    m_0 = 0

    and the heavy ball (or Nesterov's) of that round begins with m_t as its momentum. Its final momentum is
    discarded at the round's end. d_t has the scale of one step's direction, so that under a constant
    gradient g both momenta have the fixed point g / (1 - momentum). With H = 1, a merge after every step, this
    is QG-DSGDm and QG-DSGDm-N of Lin, Karimireddy, Stich and Jaggi, "Quasi-Global Momentum", ICML 2021.

    If the node missed the previous round, for example after a crash, d is not known, and m does not change.

    Args:
        factor: mu, in [0, 1).
        lr: eta, above 0.
        stride: length of a row, at least P.

    Attributes:
        moments: momentum m, and model at the start of the last round, by name; (rows, stride) float32.
        counters: round after the last one, -1 before the first, by name; (rows, 1) int64 on the CPU.
    """

    def __init__(self, factor: float, lr: float, rows: int, stride: int, device: torch.device) -> None:
        self._factor, self._lr = factor, lr
        self._momentum = torch.zeros(rows, stride, device=device)
        self._start = torch.zeros(rows, stride, device=device)
        self._next_round = torch.full((rows, 1), _NOT_TRAINED)
        self.moments: Mapping[str, Tensor] = {"quasi_global": self._momentum, "round_start": self._start}
        self.counters: Mapping[str, Tensor] = {"next_round": self._next_round}

    def begin_(self, rows: slice, params: Tensor, rounds: Sequence[int], local_steps: int) -> Tensor:
        """Add the last round's change to the momentum. Call it before the first local step.

        Beginning a round a second time from the same state gives the same momentum.

        Args:
            rows: indices of n rows.
            params: (n, P) float32, their models; not changed.
            rounds: the round that each of them begins.
            local_steps: H.

        Returns:
            (n, P) float32: a copy of m, which local steps may change.
        """
        size = params.shape[1]
        momentum, start = self._momentum[rows, :size], self._start[rows, :size]
        begun = torch.tensor(rounds).unsqueeze(1)
        follows = (self._next_round[rows] == begun).to(params.device)
        direction = (start - params) / (self._lr * local_steps)
        updated = (self._factor * momentum).add_(direction, alpha=1 - self._factor)
        momentum.copy_(torch.where(follows, updated, momentum))
        start.copy_(params)
        self._next_round[rows] = begun + 1
        return self._momentum[rows].clone()[:, :size]
