"""Nodes on different machines: who they are, and connections that only they can open."""
