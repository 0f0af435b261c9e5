"""Peers in training loops that others wrote, and runs in their trackers; each file needs an extra."""
