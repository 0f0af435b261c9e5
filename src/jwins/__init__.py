"""Decentralized learning that sends a fraction of the bytes.

>>> import jwins
>>> experiment = jwins.load("digits", ["run.rounds=50"])
>>> experiment.run.rounds
50

``jwins.simulate(experiment)`` runs it; :class:`jwins.Peer` takes part from a training loop of one's own.
Algorithms are in :mod:`jwins.sharing`, settings in :mod:`jwins.experiment`, comparisons in
:mod:`jwins.compare`; they are imported when they are first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jwins.engines.callbacks import Callback
    from jwins.experiment.experiment import Experiment
    from jwins.experiment.load import load
    from jwins.net.peer import Peer
    from jwins.run.result import Result
    from jwins.run.run import Ray, simulate

__all__ = ["Callback", "Experiment", "Peer", "Ray", "Result", "__version__", "load", "simulate"]

_HOMES = {
    "Callback": "engines.callbacks",
    "Experiment": "experiment",
    "load": "experiment",
    "Peer": "net.peer",
    "Ray": "run.run",
    "Result": "run.result",
    "simulate": "run.run",
}
_ROOMS = ("compare", "errors", "experiment", "net", "report", "sharing", "tasks", "topology", "wire")
"""Subpackages that can be used as ``jwins.NAME`` without importing them."""


def __getattr__(name: str) -> object:
    """Load a name at its first use, so that importing the package does not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"jwins.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"jwins.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jwins")
    raise AttributeError(f"module 'jwins' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
