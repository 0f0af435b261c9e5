"""Compiled loops over vectors: what sharing does to each parameter, in as few passes as possible.

Each is a loop as a textbook has it, which numba compiles (:mod:`jwins.kernels.compiler`), and gives the same
bits as its twin in numpy, PyWavelets or torch; ``tests/kernels`` compares them. Arrays are contiguous, live on
the CPU, and are written only where an argument is said to be.
"""
