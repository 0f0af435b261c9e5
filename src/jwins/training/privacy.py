"""Differentially private SGD: random batches, gradients clipped for each sample, noise, and the budget spent.

After Abadi et al., "Deep Learning with Differential Privacy" (2016), Algorithm 1. The privacy of a node's
samples holds against anyone who sees all that the node ever sends, but does not know the seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.rng import stream
from jwins.training.batches import Indices
from jwins.training.optimizer import clipped


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of each node's training.

    Attributes:
        noise_multiplier: standard deviation of the noise over ``clip_norm``, by node.
        samples: number of training samples, by node.
        batch_size: mean number of samples of a local step, if a node has that many.
    """

    clip_norm: float
    noise_multiplier: Mapping[int, float]
    samples: Mapping[int, int]
    batch_size: int
    delta: float

    def epsilon(self, node: int, steps: int) -> float:
        """Return the budget that a node has spent after this number of its local steps."""
        rate = sampling_rate(self.samples[node], self.batch_size)
        return spent(self.noise_multiplier[node], rate, steps, self.delta)

    def noisy_mean(
        self, node: int, gradients: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return a noisy gradient of a node's batch, which reveals little about any one sample.

        The samples' gradients are clipped to ``clip_norm`` and summed. Gaussian noise of standard deviation
        ``noise_multiplier * clip_norm`` is added. The sum is divided by the mean size of a batch, because the
        true size would reveal something about the samples in it.

        Args:
            node: the node.
            gradients: by parameter, (samples of the batch, *shape).
            generator: of the noise.
        """
        sd, expected = self.noise_multiplier[node] * self.clip_norm, min(self.batch_size, self.samples[node])
        found = {}
        for name, each in clipped(gradients, self.clip_norm).items():
            assert each is not None
            noise = torch.randn(each.shape[1:], generator=generator, device=each.device)
            found[name] = (each.sum(dim=0) + sd * noise) / expected
        return found


def sampling_rate(num_samples: int, batch_size: int) -> float:
    """Return the probability with which a sample is in a batch; 1 if a batch takes all samples."""
    return min(1.0, batch_size / num_samples)


def poisson_batches(
    partition: Indices, *, seed: int, node: int, round: int, local_steps: int, batch_size: int
) -> list[Indices]:
    """Return the samples of each local step of a round, drawn as the accountant assumes.

    Each step takes each sample of the node independently, with the probability of :func:`sampling_rate`. So
    batches differ in size and may be empty.

    >>> import numpy as np
    >>> drawn = poisson_batches(np.arange(40), seed=1, node=0, round=0, local_steps=4, batch_size=8)
    >>> [len(batch) for batch in drawn]
    [14, 9, 10, 13]
    """
    drawn = stream(seed, "private batches", node=node, round=round).random((local_steps, len(partition)))
    return [partition[row] for row in drawn < sampling_rate(len(partition), batch_size)]


def spent(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """Return the epsilon of this number of steps, as opacus' accountant of Renyi differential privacy counts.

    Raises:
        ConfigError: opacus is not installed.
    """
    if steps == 0:
        return 0.0
    orders, of_a_step = _renyi(noise_multiplier, rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other orders could bound few steps more tightly
        return float(
            opacus().analysis.rdp.get_privacy_spent(orders=orders, rdp=of_a_step * steps, delta=delta)[0]
        )


@lru_cache(maxsize=1024)
def _renyi(noise_multiplier: float, rate: float) -> tuple[Sequence[float], Any]:
    """Return the orders and the Renyi divergence of one step at each; divergences of steps add up."""
    accountants = opacus()
    orders = accountants.RDPAccountant.DEFAULT_ALPHAS
    found = accountants.analysis.rdp.compute_rdp(
        q=rate, noise_multiplier=noise_multiplier, steps=1, orders=orders
    )
    return orders, found


@lru_cache(maxsize=1024)
def noise_for(epsilon: float, rate: float, steps: int, delta: float) -> float:
    """Return the least noise multiplier, to 0.01 in epsilon, with which these steps stay within a budget.

    Raises:
        ConfigError: opacus is not installed, or no noise is enough.
    """
    accountants = opacus()

    def least(orders: Sequence[float]) -> float:
        return float(
            accountants.utils.get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                accountant="rdp",
                alphas=orders,
            )
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Orders that are whole numbers take a fraction of the time of others, and find the region.
            orders, of_a_step = _renyi(least(range(2, 64)), rate)
            best = accountants.analysis.rdp.get_privacy_spent(
                orders=orders, rdp=of_a_step * steps, delta=delta
            )[1]
            return least([order for order in orders if 0.8 * best <= order <= 1.25 * best])
        except ValueError:
            problem = f"no noise is enough for delta = {delta:g} and {steps} steps; write a larger epsilon"
            raise ConfigError("train.privacy.epsilon", epsilon, problem) from None


def opacus() -> Any:
    """Import opacus' accountants.

    Raises:
        ConfigError: opacus is not installed.
    """
    try:
        import opacus.accountants
        import opacus.accountants.utils
    except ImportError:
        problem = "needs opacus to count the budget: pip install 'jwins[privacy]'"
        raise ConfigError("train.privacy", True, problem) from None
    return opacus.accountants
