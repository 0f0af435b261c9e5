"""Actors and runs on the machines of a Ray cluster. The other files here import ``ray``, which is an extra."""
