"""Compact quantized values: short forms of steps and runs, then symbols by a range coder.

The bytes come from peers. Every length is compared with the bytes that are left, or with the number of symbols
that the receiver expects, before memory is allocated for it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jwins.errors import CodecError
from jwins.wire.symbols import decode_symbols, encode_symbols

# One power of two for all runs; one scale for all; upper halves of float32, one for each run; float32 for each.
_SCALE_POWER, _SCALE_ONE, _SCALE_HALVES, _SCALE_WHOLE = range(4)
_RUNS_LISTED, _RUNS_OCTAVES, _RUNS_EQUAL = range(3)
_RUNS_SHIFT, _COUNT_SHIFT = 2, 4
_MANY = 15  # this number of runs, or more, follows as a varint
_VARINT_BYTES = 5
_NOTHING = b"\0"  # no runs
_MANTISSA = 1 << 23  # float32 without sign are exponent * 2^23 + mantissa


def encode(symbols: npt.NDArray[np.int32], scales: npt.NDArray[np.float32], runs: tuple[int, ...]) -> bytes:
    """Encode symbols (k,), the scales (g,) of their runs, and the runs' lengths, which sum to k."""
    count, num_runs = len(symbols), len(runs)
    if not num_runs:
        return _NOTHING
    bits = scales.astype("<f4", copy=False).view("<u4")
    if bool((bits == bits[0]).all()):
        exponent, mantissa = divmod(int(bits[0]), _MANTISSA)
        scale_kind, scale_bytes = _SCALE_ONE, bits[:1].tobytes()
        if not mantissa:
            scale_kind, scale_bytes = _SCALE_POWER, bytes([exponent])
    elif not bool((bits & 0xFFFF).any()):
        scale_kind, scale_bytes = _SCALE_HALVES, (bits >> 16).astype("<u2").tobytes()
    else:
        scale_kind, scale_bytes = _SCALE_WHOLE, bits.tobytes()
    if runs == _octaves(count, num_runs):
        run_kind, run_bytes = _RUNS_OCTAVES, b""
    elif runs == _equal(count, num_runs, runs[0]):
        run_kind, run_bytes = _RUNS_EQUAL, _varint(runs[0])
    else:
        run_kind, run_bytes = _RUNS_LISTED, b"".join(map(_varint, runs[:-1]))
    head = bytes([scale_kind | run_kind << _RUNS_SHIFT | min(num_runs, _MANY) << _COUNT_SHIFT])
    if num_runs >= _MANY:
        head += _varint(num_runs)
    coded = encode_symbols(symbols, runs)
    return b"".join((head, scale_bytes, run_bytes, _varint(len(coded)), coded))


def decode(
    data: memoryview, *, count: int, max_runs: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], tuple[int, ...]]:
    """Decode the arguments of :func:`encode`.

    Args:
        data: any bytes.
        count: expected number of symbols.
        max_runs: largest number of runs.

    Raises:
        CodecError: the bytes are invalid.
    """
    if not len(data):
        raise CodecError("quantized values are cut off")
    if data == _NOTHING and not count:
        return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32), ()
    scale_kind, run_kind, num_runs = data[0] & 3, data[0] >> _RUNS_SHIFT & 3, data[0] >> _COUNT_SHIFT
    at = 1
    if num_runs == _MANY:
        num_runs, at = _read_varint(data, at)
    if run_kind > _RUNS_EQUAL or not num_runs:
        raise CodecError(f"quantized values begin with the unknown byte {data[0]:#04x}")
    end = at + _scale_bytes(scale_kind, num_runs)
    if num_runs > max_runs or end > len(data):
        raise CodecError(f"{num_runs} runs in {len(data)} bytes: expected at most {max_runs}")
    scales = _scales(scale_kind, num_runs, data[at:end])
    at = end
    if run_kind == _RUNS_OCTAVES:
        runs = _octaves(count, num_runs)
    elif run_kind == _RUNS_EQUAL:
        length, at = _read_varint(data, at)
        runs = _equal(count, num_runs, length)
    else:
        listed = []
        for _ in range(num_runs - 1):
            length, at = _read_varint(data, at)
            listed.append(length)
        runs = (*listed, count - sum(listed))
    if len(runs) != num_runs or sum(runs) != count or min(runs) < 0:
        raise CodecError(f"{num_runs} runs do not sum to {count} symbols")
    size, at = _read_varint(data, at)
    if len(data) - at != size:
        raise CodecError(f"{len(data) - at} bytes of symbols, but {size} are announced")
    return decode_symbols(data[at:], count=count, runs=runs), scales, runs


def _scale_bytes(kind: int, num_runs: int) -> int:
    return (1, 4, 2 * num_runs, 4 * num_runs)[kind]


def _scales(kind: int, num_runs: int, data: memoryview) -> npt.NDArray[np.float32]:
    if kind == _SCALE_POWER:
        bits = np.full(num_runs, data[0] * _MANTISSA, dtype=np.uint32)
    elif kind == _SCALE_ONE:
        bits = np.repeat(np.frombuffer(data, dtype="<u4"), num_runs).astype(np.uint32)
    elif kind == _SCALE_HALVES:
        bits = np.frombuffer(data, dtype="<u2").astype(np.uint32) << np.uint32(16)
    else:
        bits = np.frombuffer(data, dtype="<u4").astype(np.uint32)
    return bits.view(np.float32)


def _octaves(count: int, num_runs: int) -> tuple[int, ...]:
    """Return lengths of wavelet subbands, coarsest first: from the end, each has half of the rest."""
    lengths: list[int] = []
    for _ in range(min(num_runs - 1, count.bit_length() + 1)):
        lengths.append(count // 2)
        count -= lengths[-1]
    return (count, *reversed(lengths)) if num_runs == len(lengths) + 1 else ()


def _equal(count: int, num_runs: int, length: int) -> tuple[int, ...]:
    """Return blocks of one length, except the last, which has the rest of 1 to ``length``."""
    rest = count - (num_runs - 1) * length
    return (length,) * (num_runs - 1) + (rest,) if 0 < rest <= length else ()


def _varint(number: int) -> bytes:
    """Encode seven bits per byte, the lowest first; the high bit marks that another byte follows."""
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    coded.append(number)
    return bytes(coded)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    number = 0
    for place in range(_VARINT_BYTES):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << 7 * place
        if byte <= 0x7F:
            return number, at
    raise CodecError("a length is cut off or too long")
