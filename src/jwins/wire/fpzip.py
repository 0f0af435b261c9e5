"""The paper's coding: Elias gamma codes for positions, fpzip for values. Serves to count the paper's bytes.

Source: P. Lindstrom and M. Isenburg, "Fast and efficient compression of floating-point data", IEEE TVCG
12(5), 2006; https://github.com/llnl/fpzip.

The fpzip library trusts its input, in both directions. On hostile bytes its decoder crashes the process, so
:func:`is_own` tells which payloads this process made itself, and nothing else is decoded. Its encoder writes
behind the end of its buffer when values are not compressible (32 random bits each are enough), so
:func:`encode_floats` finds out first, in a buffer that is large enough.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from jwins.errors import CodecError, ConfigError
from jwins.wire import elias

__all__ = [
    "OWN_PAYLOADS",
    "decode_floats",
    "decode_halves",
    "decode_positions",
    "decode_symbols",
    "encode_floats",
    "encode_halves",
    "encode_positions",
    "encode_symbols",
    "is_own",
    "remember",
    "require",
]

OWN_PAYLOADS = 1 << 16
"""Number of latest payloads that a process recognises: far more than are ever under way in a simulation."""

_RAW, _FPZIP = 0, 1  # first byte of a section: what follows

_own: OrderedDict[bytes, None] = OrderedDict()
_own_lock = threading.Lock()


def remember(payload: bytes) -> None:
    """Notes that this process made ``payload``."""
    digest = hashlib.blake2b(payload, digest_size=16).digest()
    with _own_lock:
        _own[digest] = None
        _own.move_to_end(digest)
        while len(_own) > OWN_PAYLOADS:
            _own.popitem(last=False)


def is_own(payload: bytes | memoryview) -> bool:
    """Whether this process made ``payload``, byte for byte, as one of its last :data:`OWN_PAYLOADS`."""
    digest = hashlib.blake2b(payload, digest_size=16).digest()
    with _own_lock:
        return digest in _own


def encode_positions(positions: npt.NDArray[np.int64]) -> bytes:
    """Elias gamma codes of the gaps."""
    return elias.encode_positions(positions)


def decode_positions(data: memoryview, *, count: int, dim: int) -> npt.NDArray[np.int64]:
    """(count,) int64, strictly increasing, each in [0, dim), or CodecError."""
    return elias.decode_positions(data, count=count, dim=dim)


def encode_floats(values: npt.NDArray[np.float32]) -> bytes:
    """One byte that tells the form, then fpzip at full precision, or the values as they are if that is shorter.

    Raises:
        ConfigError: fpzip is not installed.
    """
    if len(values) == 0:
        return b""
    library = _library()
    # The library's buffer is 112 bytes longer than its input, whatever it writes. A value takes at most 31
    # plain bits and one symbol of a model whose rarest symbol takes 16, so a tail of half as many values, all
    # equal to the last one, makes room for the worst. It is coded after the values and does not change them.
    roomy = np.concatenate([values, np.full(len(values) // 2 + 64, values[-1])])
    if len(library.compress(roomy)) > values.nbytes:
        return bytes([_RAW]) + values.astype("<f4", copy=False).tobytes()
    return bytes([_FPZIP]) + bytes(library.compress(values))


def decode_floats(data: memoryview, *, count: int) -> npt.NDArray[np.float32]:
    """(count,) float32. Only for bytes of this process."""
    if count == 0:
        return np.empty(0, dtype=np.float32)
    if data[0] == _RAW:
        return np.frombuffer(data[1:], dtype="<f4").astype(np.float32)
    return _decompress(data, count)


def encode_halves(values: npt.NDArray[np.uint16]) -> bytes:
    """One byte that tells the form, then fpzip of bfloat16 as float32 at 16 bits of precision, which are all.

    A value takes at most 15 plain bits and a symbol of 16, less than the 32 of the library's buffer.
    """
    if len(values) == 0:
        return b""
    wide = (values.astype(np.uint32) << 16).view(np.float32)
    packed = bytes(_library().compress(wide, precision=16))
    if len(packed) > values.nbytes:
        return bytes([_RAW]) + values.astype("<u2", copy=False).tobytes()
    return bytes([_FPZIP]) + packed


def decode_halves(data: memoryview, *, count: int) -> npt.NDArray[np.uint16]:
    """(count,) uint16 bit patterns. Only for bytes of this process."""
    if count == 0:
        return np.empty(0, dtype=np.uint16)
    if data[0] == _RAW:
        return np.frombuffer(data[1:], dtype="<u2").astype(np.uint16)
    return (_decompress(data, count).view(np.uint32) >> 16).astype(np.uint16)


def encode_symbols(symbols: npt.NDArray[np.int32], runs: tuple[int, ...]) -> bytes:
    """Elias gamma codes of 1 + zigzag(symbol), where zigzag counts 0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    wide = symbols.astype(np.int64)
    return elias.encode_integers(((wide << 1) ^ (wide >> 63)) + 1)


def decode_symbols(data: memoryview, *, count: int, runs: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """(count,) int32, or CodecError."""
    folded = elias.decode_integers(data, count=count) - 1
    return ((folded >> 1) ^ -(folded & 1)).astype(np.int32)


def _decompress(data: memoryview, count: int) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = _library().decompress(bytes(data[1:])).reshape(-1)
    if len(values) != count:
        raise CodecError(f"expected {count} values, fpzip holds {len(values)}")
    return values


def require() -> None:
    """Checks that the fpzip package, an optional extra, is there.

    Raises:
        ConfigError: it is not; says how to install it.
    """
    _library()


def _library() -> Any:
    try:
        import fpzip
    except ImportError:
        problem = "needs the fpzip package; install it with: pip install 'jwins[paper]'"
        raise ConfigError("wire.codec", "paper", problem) from None
    return fpzip
