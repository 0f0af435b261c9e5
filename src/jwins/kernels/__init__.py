"""Compiled loops over vectors, with as few passes as possible.

Each is a plain loop, which numba compiles (:mod:`jwins.kernels.compiler`). It gives the same bits as an
implementation in numpy, PyWavelets or torch; ``tests/kernels`` compares both. Arrays are contiguous and on the
CPU. A kernel changes an array only if its docstring says so.
"""
