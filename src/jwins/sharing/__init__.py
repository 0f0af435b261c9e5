"""Sharing algorithms: the update of a node for its neighbours, and the merge of received updates.

Read :mod:`jwins.sharing.sparse` first; it holds full sharing, random-k, top-k and JWINS on one screen each.
"""

from jwins.sharing.base import Cutoff, Precision, Quantizer, Sharing, Vectors, mix, place
from jwins.sharing.beer import Beer, beer
from jwins.sharing.choco import Choco, choco
from jwins.sharing.closed_loop import ClosedLoop, closed_loop
from jwins.sharing.cutoff import CUTOFFS, PAPER_FRACTIONS, FixedCutoff, RandomCutoff
from jwins.sharing.demo import CommonDemo, Demo, demo
from jwins.sharing.moniqua import Moniqua, moniqua
from jwins.sharing.noloco import NoLoCo, noloco
from jwins.sharing.outer import Nesterov
from jwins.sharing.power_gossip import PowerGossip, power_gossip
from jwins.sharing.quantizers import QUANTIZERS, AbsmaxQuantizer, Rounding, UniformQuantizer
from jwins.sharing.rate import Budget, FixedStep, LinkBudget, RelativeStep, StepRule
from jwins.sharing.robust import ROBUST_MERGES, ClippedGossip, CoordinateMedian, RobustMerge, TrimmedMean
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
from jwins.sharing.sparse_loco import CommonSparseLoco, SparseLoco, sparse_loco
from jwins.sharing.stateless import Stateless, stateless

__all__ = [
    "CUTOFFS",
    "CommonDemo",
    "CommonSparseLoco",
    "PAPER_FRACTIONS",
    "QUANTIZERS",
    "ROBUST_MERGES",
    "AbsmaxQuantizer",
    "Beer",
    "Budget",
    "Choco",
    "ClippedGossip",
    "ClosedLoop",
    "CoordinateMedian",
    "Cutoff",
    "Demo",
    "FixedCutoff",
    "FixedStep",
    "Full",
    "Jwins",
    "LinkBudget",
    "Moniqua",
    "Nesterov",
    "NoLoCo",
    "PowerGossip",
    "Precision",
    "Quantizer",
    "RandomCutoff",
    "RandomK",
    "RelativeStep",
    "RobustMerge",
    "Rounding",
    "ScoreRule",
    "Sharing",
    "SparseLoco",
    "Stateless",
    "StepRule",
    "TrimmedMean",
    "UniformQuantizer",
    "Vectors",
    "beer",
    "choco",
    "closed_loop",
    "demo",
    "full",
    "jwins",
    "mix",
    "moniqua",
    "noloco",
    "place",
    "power_gossip",
    "random_k",
    "sparse_loco",
    "stateless",
    "top_k",
]
