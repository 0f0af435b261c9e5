"""Local training and evaluation of the nodes that one process holds."""
