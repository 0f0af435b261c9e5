"""The paper's coding: Elias gamma codes for positions, fpzip for values. It serves to count the paper's bytes.

Source: P. Lindstrom and M. Isenburg, "Fast and efficient compression of floating-point data", IEEE TVCG
12(5), 2006; https://github.com/llnl/fpzip.

The fpzip library trusts its input, in both directions. On hostile bytes its decoder crashes the process, so
:func:`is_own` recognises payloads of this process, and no others are decoded. Its encoder writes
past the end of its buffer if values are not compressible (32 random bits each are enough), so
:func:`encode_floats` tries first in a buffer that is large enough.
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

OWN_PAYLOADS = 1 << 16
"""Number of latest payloads that a process recognises; a simulation has far fewer under way."""

_RAW, _FPZIP = 0, 1  # first byte of a section: the form of the rest

_own: OrderedDict[bytes, None] = OrderedDict()
_own_lock = threading.Lock()


def remember(payload: bytes) -> None:
    """Remember that this process made ``payload``."""
    digest = hashlib.blake2b(payload, digest_size=16).digest()
    with _own_lock:
        _own[digest] = None
        _own.move_to_end(digest)
        while len(_own) > OWN_PAYLOADS:
            _own.popitem(last=False)


def is_own(payload: bytes | memoryview) -> bool:
    """Return whether ``payload`` is one of the last :data:`OWN_PAYLOADS` of this process, byte for byte."""
    digest = hashlib.blake2b(payload, digest_size=16).digest()
    with _own_lock:
        return digest in _own


def encode_positions(positions: npt.NDArray[np.int64]) -> bytes:
    """Encode the gaps as Elias gamma codes."""
    return elias.encode_positions(positions)


def decode_positions(data: memoryview, *, count: int, dim: int) -> npt.NDArray[np.int64]:
    """Decode (count,) int64, strictly increasing, each in [0, dim), or raise CodecError."""
    return elias.decode_positions(data, count=count, dim=dim)


def encode_floats(values: npt.NDArray[np.float32]) -> bytes:
    """Encode as one byte for the form, then fpzip at full precision, or the plain values if they are shorter.

    Raises:
        ConfigError: fpzip is not installed.
    """
    if len(values) == 0:
        return b""
    library = _library()
    # The library's buffer is always 112 bytes longer than its input. A value takes at most 31 plain bits and
    # one symbol of a model whose rarest symbol takes 16. So a tail of half the number of values, all equal to
    # the last one, makes room for the worst case. It is coded after the values and does not change them.
    roomy = np.concatenate([values, np.full(len(values) // 2 + 64, values[-1])])
    if len(library.compress(roomy)) > values.nbytes:
        return bytes([_RAW]) + values.astype("<f4", copy=False).tobytes()
    return bytes([_FPZIP]) + bytes(library.compress(values))


def decode_floats(data: memoryview, *, count: int) -> npt.NDArray[np.float32]:
    """Decode (count,) float32. Only for bytes of this process."""
    if count == 0:
        return np.empty(0, dtype=np.float32)
    if data[0] == _RAW:
        return np.frombuffer(data[1:], dtype="<f4").astype(np.float32)
    return _decompress(data, count)


def encode_halves(values: npt.NDArray[np.uint16]) -> bytes:
    """Encode as one byte for the form, then fpzip of bfloat16 as float32 at 16 bits of precision.

    A value takes at most 15 plain bits and a symbol of 16, less than the 32 bits in the library's buffer.
    """
    if len(values) == 0:
        return b""
    wide = (values.astype(np.uint32) << 16).view(np.float32)
    packed = bytes(_library().compress(wide, precision=16))
    if len(packed) > values.nbytes:
        return bytes([_RAW]) + values.astype("<u2", copy=False).tobytes()
    return bytes([_FPZIP]) + packed


def decode_halves(data: memoryview, *, count: int) -> npt.NDArray[np.uint16]:
    """Decode (count,) uint16 bit patterns. Only for bytes of this process."""
    if count == 0:
        return np.empty(0, dtype=np.uint16)
    if data[0] == _RAW:
        return np.frombuffer(data[1:], dtype="<u2").astype(np.uint16)
    return (_decompress(data, count).view(np.uint32) >> 16).astype(np.uint16)


def encode_symbols(symbols: npt.NDArray[np.int32], runs: tuple[int, ...]) -> bytes:
    """Encode 1 + zigzag(symbol) as Elias gamma codes; zigzag maps 0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    wide = symbols.astype(np.int64)
    return elias.encode_integers(((wide << 1) ^ (wide >> 63)) + 1)


def decode_symbols(data: memoryview, *, count: int, runs: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """Decode (count,) int32, or raise CodecError."""
    folded = elias.decode_integers(data, count=count) - 1
    return ((folded >> 1) ^ -(folded & 1)).astype(np.int32)


def _decompress(data: memoryview, count: int) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = _library().decompress(bytes(data[1:])).reshape(-1)
    if len(values) != count:
        raise CodecError(f"expected {count} values, fpzip holds {len(values)}")
    return values


def require() -> None:
    """Check that the fpzip package, an optional extra, is installed.

    Raises:
        ConfigError: it is not installed.
    """
    _library()


def _library() -> Any:
    try:
        import fpzip
    except ImportError:
        problem = "needs the fpzip package; install it with: pip install 'jwins[paper]'"
        raise ConfigError("wire.codec", "paper", problem) from None
    return fpzip
