"""Numerical operations on parameter vectors."""
