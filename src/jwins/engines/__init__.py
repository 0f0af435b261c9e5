"""Engines that carry out runs: the simulator, groups of nodes, and actors on Ray."""
