"""Nodes on different machines: their identities, and authenticated connections."""
