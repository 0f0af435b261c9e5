"""Sharing algorithms: what a node tells its neighbours, and what it makes of what they tell it.

Read :mod:`jwins.sharing.sparse` first; it holds full sharing, random-k, top-k and JWINS on one screen each.
"""

from jwins.sharing.base import Cutoff, Precision, Quantizer, Sharing, mix, place
from jwins.sharing.choco import Choco, choco
from jwins.sharing.cutoff import PAPER_FRACTIONS, FixedCutoff, RandomCutoff
from jwins.sharing.quantizers import AbsmaxQuantizer, Rounding, UniformQuantizer
from jwins.sharing.sparse import (
    Full,
    Jwins,
    RandomK,
    ScoreRule,
    full,
    jwins,
    random_k,
    top_k,
)

__all__ = [
    "PAPER_FRACTIONS",
    "AbsmaxQuantizer",
    "Choco",
    "Cutoff",
    "FixedCutoff",
    "Full",
    "Jwins",
    "Precision",
    "Quantizer",
    "RandomCutoff",
    "RandomK",
    "Rounding",
    "ScoreRule",
    "Sharing",
    "UniformQuantizer",
    "choco",
    "full",
    "jwins",
    "mix",
    "place",
    "random_k",
    "top_k",
]
