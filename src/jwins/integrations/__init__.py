"""Peers in training loops that others wrote. The other files here each import a library that is an extra."""
