"""Decentralized learning that sends a fraction of the bytes."""
