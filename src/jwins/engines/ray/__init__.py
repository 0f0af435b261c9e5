"""Actors and runs on a Ray cluster. The other files of this folder import ``ray``, which is an extra."""
