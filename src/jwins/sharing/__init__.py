"""Sharing algorithms: what a node tells its neighbours, and what it makes of what they tell it.

Read :mod:`jwins.sharing.sparse` first; it holds full sharing, random-k, top-k and JWINS on one screen each.
"""

from jwins.sharing.base import Cutoff, Precision, Sharing, mix, place
from jwins.sharing.choco import Choco, choco
from jwins.sharing.sparse import (
    PAPER_FRACTIONS,
    FixedCutoff,
    Full,
    Jwins,
    RandomCutoff,
    RandomK,
    ScoreRule,
    full,
    jwins,
    random_k,
    top_k,
)

__all__ = [
    "PAPER_FRACTIONS",
    "Choco",
    "Cutoff",
    "FixedCutoff",
    "Full",
    "Jwins",
    "Precision",
    "RandomCutoff",
    "RandomK",
    "ScoreRule",
    "Sharing",
    "choco",
    "full",
    "jwins",
    "mix",
    "place",
    "random_k",
    "top_k",
]
