"""Communication graphs with Metropolis-Hastings weights, static or drawn again in each round."""

from jwins.topology.edge_list import EdgeList
from jwins.topology.finite_time import FiniteTime
from jwins.topology.graph import Graph, Topology
from jwins.topology.kinds import (
    TOPOLOGIES,
    ErdosRenyi,
    FullyConnected,
    OnePeerExponential,
    Regular,
    Ring,
    SmallWorld,
    Star,
    Torus,
)

__all__ = [
    "TOPOLOGIES",
    "EdgeList",
    "ErdosRenyi",
    "FiniteTime",
    "FullyConnected",
    "Graph",
    "OnePeerExponential",
    "Regular",
    "Ring",
    "SmallWorld",
    "Star",
    "Topology",
    "Torus",
]
