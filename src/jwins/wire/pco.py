"""Arrays through pcodec (https://github.com/pcodec/pcodec): the sections of the ``pco`` codec.

A position is coded as the number of positions *skipped* before it, in the narrowest of 8, 16 and 32 bits.
Such positions are increasing by construction, need one sum as a check, and take fewer bytes than sorted
positions with pcodec's own differences (90 k vector, density 0.1: 4.75 instead of 4.79 bits; entropy 4.69).

The bytes come from peers. So pcodec only ever fills a buffer whose length was checked first. The result is
accepted only if pcodec reports exactly the expected number of numbers and the end of its data. It ignores bytes
after that end, and so does this module, within the length limit of :func:`max_bytes`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from jwins.errors import CodecError

# Level 8 is pcodec's default. Level 6 saves a third of the time (0.25 instead of 0.36 ms for 27 k float32)
# and costs 0.5 % more bytes; level 12 saves nothing. The data are not smooth, so it does not look for
# differences.
_INTEGERS = ChunkConfig(
    compression_level=8, delta_spec=DeltaSpec.no_op(), mode_spec=ModeSpec.classic(), enable_8_bit=True
)
# Searching for a common step or for zeroed low bits takes 8 % of the time and saves half of the bytes if found.
_FLOATS = ChunkConfig(compression_level=8, delta_spec=DeltaSpec.no_op(), mode_spec=ModeSpec.auto())
_WIDTHS: dict[int, npt.DTypeLike] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def max_bytes(count: int, itemsize: int) -> int:
    """Return the longest valid section; pcodec adds up to 25 bytes, and 14 per 2**18 numbers."""
    return count * itemsize + count // 1024 + 256


def encode_positions(positions: npt.NDArray[np.int64]) -> bytes:
    """Encode positions by pcodec, as the number skipped before each; the first byte is the width.

    Args:
        positions: (k,) int64, strictly increasing, each in [0, 2**32).
    """
    if len(positions) == 0:
        return b""
    skipped = np.empty(len(positions), dtype=np.int64)
    skipped[0] = positions[0]
    np.subtract(positions[1:], positions[:-1], out=skipped[1:])
    skipped[1:] -= 1
    most = int(skipped.max())
    width = 1 if most < 2**8 else 2 if most < 2**16 else 4
    return bytes([width]) + _compress(skipped.astype(_WIDTHS[width]), _INTEGERS)


def decode_positions(data: memoryview, *, count: int, dim: int) -> npt.NDArray[np.int64]:
    """Decode (count,) int64, strictly increasing, each in [0, dim); count <= dim.

    Raises:
        CodecError: the bytes are invalid.
    """
    if count == 0:
        return _nothing(data, np.int64)
    width = data[0] if len(data) else 0
    if width not in _WIDTHS:
        raise CodecError(f"positions of width {width}: expected 1, 2 or 4 bytes")
    skipped = _decompress(data[1:], count, np.dtype(_WIDTHS[width]))
    # Each number and their count are below 2**32, so the sum is exact, and the one below cannot overflow.
    last = int(skipped.sum(dtype=np.uint64)) + count - 1
    if last >= dim:
        raise CodecError(f"position {last} in a vector of {dim}")
    positions = skipped.astype(np.int64)
    del skipped  # at most 12 bytes per position at a time
    positions[1:] += 1
    np.cumsum(positions, out=positions)
    return positions


def encode_floats(values: npt.NDArray[np.float32]) -> bytes:
    """Encode (k,) float32 with pcodec."""
    return _compress(values, _FLOATS)


def decode_floats(data: memoryview, *, count: int) -> npt.NDArray[np.float32]:
    """Decode (count,) float32, or raise CodecError."""
    return _decompress(data, count, np.dtype(np.float32))


def encode_halves(values: npt.NDArray[np.uint16]) -> bytes:
    """Encode the bit patterns of (k,) bfloat16, rotated left by one, with pcodec.

    With the sign as lowest bit, values of similar size and either sign have similar codes: 10.24 instead of
    10.29 bits on model weights.
    """
    return _compress(values << 1 | values >> 15, _INTEGERS)


def decode_halves(data: memoryview, *, count: int) -> npt.NDArray[np.uint16]:
    """Decode (count,) uint16 bit patterns, or raise CodecError."""
    rotated = _decompress(data, count, np.dtype(np.uint16))
    return (rotated >> 1 | rotated << 15).astype(np.uint16, copy=False)


def encode_symbols(symbols: npt.NDArray[np.int32], runs: tuple[int, ...]) -> bytes:
    """Encode (k,) int32 of all runs together with pcodec."""
    return _compress(symbols, _INTEGERS)


def decode_symbols(data: memoryview, *, count: int, runs: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """Decode (count,) int32, or raise CodecError."""
    return _decompress(data, count, np.dtype(np.int32))


def _compress(numbers: npt.NDArray[Any], config: ChunkConfig) -> bytes:
    if len(numbers) == 0:
        return b""
    compressed: bytes = standalone.simple_compress(numbers, config)
    return compressed


def _decompress(data: memoryview, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if count == 0:
        return _nothing(data, dtype)
    if len(data) > max_bytes(count, dtype.itemsize):
        raise CodecError(f"{len(data)} bytes for {count} numbers of {dtype.itemsize} bytes")
    numbers = np.empty(count, dtype=dtype)
    try:
        progress = standalone.simple_decompress_into(bytes(data), numbers)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a Rust panic is a BaseException, but not an Exception
        raise CodecError(f"not pcodec data: {error}") from None
    if progress.n_processed != count or not progress.finished:
        raise CodecError(f"expected {count} numbers, pcodec holds fewer or more")
    return numbers


def _nothing(data: memoryview, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    if len(data):
        raise CodecError(f"{len(data)} bytes for no numbers")
    return np.empty(0, dtype=dtype)
