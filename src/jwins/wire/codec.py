"""Lossless codecs of updates: the payload of a frame.

A payload is a short head, a section of positions and a section of values (docs/reference/wire.md). The codecs
share the head; each writes the arrays of the sections in its own way. Decoding any bytes ends with
an update or with CodecError: each length, count, range and order is checked before memory is allocated for
it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jwins.errors import CodecError, ConfigError, UsageError
from jwins.sharing.update import Quantized, Sampled, Update
from jwins.wire import fpzip, pco, quantized

MAX_RUNS = 1 << 16
"""Largest number of runs of a Quantized in a frame. A run is a Python object in memory; a symbol is not."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An update as bytes.

    Attributes:
        data: the payload.
        positions_bytes: length of its section of positions; 8 for a seed, 0 if all positions are sent.
        values_bytes: length of its section of values, scales and runs included.
    """

    data: bytes
    positions_bytes: int
    values_bytes: int


class Codec(Protocol):
    """A lossless coding of updates: ``decode(encode(update))`` is ``update``, bit for bit.

    Attributes:
        name: as in ``wire.codec``.
        code: as in the header of a frame.
        accepts_foreign: whether it can safely decode bytes of other processes.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    accepts_foreign: ClassVar[bool]

    def encode(self, update: Update) -> Encoded:
        """Encode the update.

        Raises:
            UsageError: positions out of order or range, or more than :data:`MAX_RUNS` runs.
        """

    def decode(self, data: bytes, *, dim: int) -> Update:
        """Decode an update; ``data`` may be any bytes.

        Args:
            data: a payload, bytes or a memoryview of bytes.
            dim: length of the receiver's dense vector. Decoding takes at most 16 bytes of memory per element,
                plus 16 MB.

        Raises:
            CodecError: the bytes are not a payload of this codec. No other exception is raised.
        """


@dataclass(frozen=True, slots=True)
class Raw:
    """Uncompressed arrays: unsigned 32-bit positions, float32, bfloat16 or int32."""

    name: ClassVar[str] = "raw"
    code: ClassVar[int] = 1
    accepts_foreign: ClassVar[bool] = True

    def encode(self, update: Update) -> Encoded:
        """Encode the update."""
        return _encode(update, _Plain)

    def decode(self, data: bytes | memoryview, *, dim: int) -> Update:
        """Decode an update."""
        return _decode(data, dim, _Plain)


@dataclass(frozen=True, slots=True)
class Pco:
    """The default: pcodec for all arrays, or an entropy coder for symbols where that is shorter."""

    name: ClassVar[str] = "pco"
    code: ClassVar[int] = 2
    accepts_foreign: ClassVar[bool] = True

    def encode(self, update: Update) -> Encoded:
        """Encode the update."""
        return _encode(update, pco, coded=True)

    def decode(self, data: bytes | memoryview, *, dim: int) -> Update:
        """Decode an update."""
        return _decode(data, dim, pco, coded=True)


@dataclass(frozen=True, slots=True)
class Paper:
    """Elias gamma and fpzip, to count the paper's bytes in a simulation.

    It decodes only bytes that this process encoded recently, because fpzip crashes the process on hostile
    bytes.
    """

    name: ClassVar[str] = "paper"
    code: ClassVar[int] = 3
    accepts_foreign: ClassVar[bool] = False

    def encode(self, update: Update) -> Encoded:
        """Encode the update.

        Raises:
            ConfigError: the fpzip package is not installed.
        """
        encoded = _encode(update, fpzip)
        fpzip.remember(encoded.data)
        return encoded

    def decode(self, data: bytes | memoryview, *, dim: int) -> Update:
        """Decode an update of this process; bytes of another one raise CodecError before they are read."""
        if not fpzip.is_own(data):
            raise CodecError(
                "paper: fpzip is safe only on bytes that this process encoded recently, and these are others"
            )
        return _decode(data, dim, fpzip)


CODECS: dict[str, type[Raw] | type[Pco] | type[Paper]] = {kind.name: kind for kind in (Pco, Raw, Paper)}
"""Every codec by name."""


def codec(name: str) -> Codec:
    """Return the codec called ``name``: ``pco``, ``raw`` or ``paper``.

    Raises:
        ConfigError: there is none, or it needs a package that is not installed.

    >>> update = Update(dim=3, positions=torch.tensor([0, 2]), values=torch.tensor([1.0, -0.0]))
    >>> encoded = codec("raw").encode(update)
    >>> len(encoded.data), encoded.positions_bytes, encoded.values_bytes
    (25, 8, 8)
    >>> codec("raw").decode(encoded.data, dim=3).values
    tensor([1., -0.])
    """
    if name not in CODECS:
        raise ConfigError("wire.codec", name, f"expected one of {', '.join(CODECS)}")
    if name == Paper.name:
        fpzip.require()
    return CODECS[name]()


def max_payload_bytes(dim: int) -> int:
    """Return the maximum length of a payload for vectors of ``dim``; longer ones are refused."""
    return 12 * dim + (1 << 20)


class PositionsKind(IntEnum):
    """Encoding of the positions."""

    ALL = 0
    LISTED = 1
    SAMPLED = 2


class ValuesKind(IntEnum):
    """Encoding of the values."""

    FLOAT32 = 0
    BFLOAT16 = 1
    QUANTIZED = 2
    CODED = 3


# layout, count, length of the positions' section; then the fields whose bits are set in layout
_HEAD = struct.Struct("<BII")
_WORD = struct.Struct("<I")
_SEED = struct.Struct("<Q")
_OFFSET = struct.Struct("<f")
_VALUES_SHIFT = 2  # bits of layout: 0 and 1 are the PositionsKind, 2 and 3 the ValuesKind
_SHORT_BITS = 2  # entropy-coded symbols with at most this number of bits are taken without trying pcodec
_QUANTIZED = (ValuesKind.QUANTIZED, ValuesKind.CODED)
_HAS_BASE, _HAS_CHECK, _HAS_DITHER, _HAS_OFFSET = 1 << 4, 1 << 5, 1 << 6, 1 << 7
_FIELDS = {_HAS_BASE: _WORD, _HAS_CHECK: _WORD, _HAS_DITHER: _SEED, _HAS_OFFSET: _OFFSET}
_POSITIONS_KINDS, _VALUES_KINDS = tuple(PositionsKind), tuple(ValuesKind)  # by their numbers


@dataclass(frozen=True, slots=True)
class Payload:
    """The fields of a payload and its sections, which are not decoded yet.

    Attributes:
        positions_kind: encoding of the positions.
        values_kind: encoding of the values.
        count: number of values.
        base: see :class:`~jwins.sharing.update.Update`.
        check: see :class:`~jwins.sharing.update.Update`.
        dither: see :class:`~jwins.sharing.update.Quantized`; None for values that are not symbols.
        offset: see :class:`~jwins.sharing.update.Quantized`.
        positions: the section of the positions.
        values: the section of the values.
    """

    positions_kind: PositionsKind
    values_kind: ValuesKind
    count: int
    base: int | None
    check: int | None
    dither: int | None
    offset: float
    positions: memoryview
    values: memoryview


class _Arrays(Protocol):
    """Write and read the arrays of a section. An empty array has no bytes.

    Functions for symbols also take the lengths of their runs (subbands, blocks), because each run may have its
    own distribution. A receiver reads the lengths before it decodes the symbols.
    """

    def encode_positions(self, positions: npt.NDArray[np.int64]) -> bytes: ...
    def decode_positions(self, data: memoryview, *, count: int, dim: int) -> npt.NDArray[np.int64]: ...
    def encode_floats(self, values: npt.NDArray[np.float32]) -> bytes: ...
    def decode_floats(self, data: memoryview, *, count: int) -> npt.NDArray[np.float32]: ...
    def encode_halves(self, values: npt.NDArray[np.uint16]) -> bytes: ...
    def decode_halves(self, data: memoryview, *, count: int) -> npt.NDArray[np.uint16]: ...
    def encode_symbols(self, symbols: npt.NDArray[np.int32], runs: tuple[int, ...]) -> bytes: ...
    def decode_symbols(
        self, data: memoryview, *, count: int, runs: tuple[int, ...]
    ) -> npt.NDArray[np.int32]: ...


class _Plain:
    """Uncompressed arrays, little-endian."""

    @staticmethod
    def encode_positions(positions: npt.NDArray[np.int64]) -> bytes:
        return positions.astype("<u4").tobytes()

    @staticmethod
    def decode_positions(data: memoryview, *, count: int, dim: int) -> npt.NDArray[np.int64]:
        positions = _plain(data, count, "<u4")
        if count and int(positions[-1]) >= dim:
            raise CodecError(f"position {positions[-1]} in a vector of {dim}")
        if not bool((positions[1:] > positions[:-1]).all()):
            raise CodecError("positions are not strictly increasing")
        return positions.astype(np.int64)

    @staticmethod
    def encode_floats(values: npt.NDArray[np.float32]) -> bytes:
        return values.astype("<f4", copy=False).tobytes()

    @staticmethod
    def decode_floats(data: memoryview, *, count: int) -> npt.NDArray[np.float32]:
        return _plain(data, count, "<f4").astype(np.float32)

    @staticmethod
    def encode_halves(values: npt.NDArray[np.uint16]) -> bytes:
        return values.astype("<u2", copy=False).tobytes()

    @staticmethod
    def decode_halves(data: memoryview, *, count: int) -> npt.NDArray[np.uint16]:
        return _plain(data, count, "<u2").astype(np.uint16)

    @staticmethod
    def encode_symbols(symbols: npt.NDArray[np.int32], runs: tuple[int, ...]) -> bytes:
        return symbols.astype("<i4", copy=False).tobytes()

    @staticmethod
    def decode_symbols(data: memoryview, *, count: int, runs: tuple[int, ...]) -> npt.NDArray[np.int32]:
        return _plain(data, count, "<i4").astype(np.int32)


def _plain(data: memoryview, count: int, dtype: str) -> npt.NDArray[Any]:
    expected = count * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise CodecError(f"{len(data)} bytes for {count} numbers, expected {expected}")
    return np.frombuffer(data, dtype=dtype)


def _encode(update: Update, arrays: _Arrays, *, coded: bool = False) -> Encoded:
    if isinstance(update.positions, Tensor):
        positions_kind = PositionsKind.LISTED
        positions = arrays.encode_positions(_checked(update.positions, update.dim))
    elif isinstance(update.positions, Sampled):
        positions_kind, positions = PositionsKind.SAMPLED, _SEED.pack(update.positions.seed)
    else:
        positions_kind, positions = PositionsKind.ALL, b""

    if isinstance(update.values, Quantized):
        values_kind, values = _encode_quantized(update.values, arrays, coded)
    elif update.values.dtype == torch.bfloat16:
        halves = _array(update.values.detach().view(torch.int16)).view(np.uint16)
        values_kind, values = ValuesKind.BFLOAT16, arrays.encode_halves(halves)
    else:
        values_kind, values = ValuesKind.FLOAT32, arrays.encode_floats(_array(update.values))

    layout = positions_kind | values_kind << _VALUES_SHIFT
    words = b""
    if update.base is not None:
        layout, words = layout | _HAS_BASE, _WORD.pack(update.base)
    if update.check is not None:
        layout, words = layout | _HAS_CHECK, words + _WORD.pack(update.check)
    if isinstance(update.values, Quantized) and update.values.dither is not None:
        layout, words = layout | _HAS_DITHER, words + _SEED.pack(update.values.dither)
    if isinstance(update.values, Quantized) and update.values.offset:
        layout, words = layout | _HAS_OFFSET, words + _OFFSET.pack(update.values.offset)
    head = _HEAD.pack(layout, update.count, len(positions)) + words
    return Encoded(b"".join((head, positions, values)), len(positions), len(values))


def _encode_quantized(values: Quantized, arrays: _Arrays, coded: bool) -> tuple[ValuesKind, bytes]:
    num_runs = len(values.runs)
    if num_runs > MAX_RUNS:
        raise UsageError(f"Quantized has {num_runs} runs: at most {MAX_RUNS} go on the wire; use longer runs")
    symbols, scales = _array(values.symbols), _array(values.scales)
    short = quantized.encode(symbols, scales, values.runs) if coded else b""
    if coded and 8 * len(short) <= _SHORT_BITS * len(symbols):
        return ValuesKind.CODED, short
    fields = (
        _WORD.pack(num_runs),
        scales.astype("<f4", copy=False).tobytes(),
        np.array(values.runs, dtype="<u4").tobytes(),
        arrays.encode_symbols(symbols, values.runs),
    )
    plain = b"".join(fields)
    return (ValuesKind.CODED, short) if coded and len(short) < len(plain) else (ValuesKind.QUANTIZED, plain)


def _checked(positions: Tensor, dim: int) -> npt.NDArray[np.int64]:
    array: npt.NDArray[np.int64] = _array(positions)
    if len(array):
        if int(array[0]) < 0 or int(array[-1]) >= dim:
            raise UsageError(f"positions {array[0]} to {array[-1]}: expected 0 to {dim - 1}")
        if not bool((array[1:] > array[:-1]).all()):
            raise UsageError("positions: expected strictly increasing ones")
    return array


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.detach().cpu().contiguous().numpy()


def read_payload(data: bytes | memoryview, *, dim: int) -> Payload:
    """Split a payload into its sections and check its head, without decoding or copying.

    Args:
        data: a payload of any codec.
        dim: length of the dense vector.

    Raises:
        CodecError: the head is cut off, or contradicts itself, ``dim`` or the length of ``data``.
    """
    view = memoryview(data)
    if len(view) < _HEAD.size:
        raise CodecError(f"a payload of {len(view)} bytes: its head alone has {_HEAD.size}")
    layout, count, positions_bytes = _HEAD.unpack_from(view)
    at = _HEAD.size
    positions_code, values_code = layout & 3, layout >> _VALUES_SHIFT & 3
    if positions_code >= len(_POSITIONS_KINDS) or values_code >= len(_VALUES_KINDS):
        raise CodecError(f"layout {layout:#04x} is not defined")
    if layout & (_HAS_DITHER | _HAS_OFFSET) and values_code not in _QUANTIZED:
        raise CodecError(
            f"layout {layout:#04x} is not defined: dither or offset of values that are not quantized"
        )
    fields_bytes = sum(field.size for bit, field in _FIELDS.items() if layout & bit)
    if len(view) < at + fields_bytes + positions_bytes:
        raise CodecError(
            f"a payload of {len(view)} bytes is cut off: {positions_bytes} bytes of positions announced"
        )
    base = check = dither = None
    offset = 0.0
    if layout & _HAS_BASE:
        (base,) = _WORD.unpack_from(view, at)
        at += 4
    if layout & _HAS_CHECK:
        (check,) = _WORD.unpack_from(view, at)
        at += 4
    if layout & _HAS_DITHER:
        (dither,) = _SEED.unpack_from(view, at)
        at += 8
    if layout & _HAS_OFFSET:
        (offset,) = _OFFSET.unpack_from(view, at)
        at += 4
        if not 0.0 < offset < 0.5:
            raise CodecError(f"offset {offset}: expected more than 0 and less than 0.5 quantizer steps")
    kind = _POSITIONS_KINDS[positions_code]
    if count > dim or (kind is PositionsKind.ALL and count != dim):
        raise CodecError(f"{count} values for a vector of {dim}")
    expected = _SEED.size if kind is PositionsKind.SAMPLED else 0
    if kind is not PositionsKind.LISTED and positions_bytes != expected:
        raise CodecError(f"{positions_bytes} bytes of positions, expected {expected}")
    middle = at + positions_bytes
    values_kind = _VALUES_KINDS[values_code]
    return Payload(kind, values_kind, count, base, check, dither, offset, view[at:middle], view[middle:])


def _decode(data: bytes | memoryview, dim: int, arrays: _Arrays, *, coded: bool = False) -> Update:
    payload = read_payload(data, dim=dim)
    if payload.values_kind is ValuesKind.CODED and not coded:
        raise CodecError("entropy-coded symbols in a codec that makes none")
    count = payload.count
    positions: Tensor | Sampled | None = None
    values: Tensor | Quantized  # first, because decoding values takes more memory than the result
    if payload.values_kind is ValuesKind.QUANTIZED:
        values = _decode_quantized(payload, arrays)
    elif payload.values_kind is ValuesKind.CODED:
        symbols, scales, runs = quantized.decode(payload.values, count=count, max_runs=MAX_RUNS)
        _check_scales(scales)
        values = Quantized(
            torch.from_numpy(symbols), torch.from_numpy(scales), runs, payload.dither, payload.offset
        )
    elif payload.values_kind is ValuesKind.BFLOAT16:
        halves = arrays.decode_halves(payload.values, count=count)
        values = torch.from_numpy(halves.view(np.int16)).view(torch.bfloat16)
    else:
        values = torch.from_numpy(arrays.decode_floats(payload.values, count=count))
    if payload.positions_kind is PositionsKind.LISTED:
        positions = torch.from_numpy(arrays.decode_positions(payload.positions, count=count, dim=dim))
    elif payload.positions_kind is PositionsKind.SAMPLED:
        positions = Sampled(seed=_SEED.unpack(payload.positions)[0], count=count)
    return Update(dim, positions, values, payload.base, payload.check)


def _decode_quantized(payload: Payload, arrays: _Arrays) -> Quantized:
    data, count = payload.values, payload.count
    if len(data) < _WORD.size:
        raise CodecError("quantized values are cut off")
    (num_runs,) = _WORD.unpack_from(data)
    middle = _WORD.size + 4 * num_runs
    end = middle + 4 * num_runs
    if num_runs > MAX_RUNS or end > len(data):
        raise CodecError(f"{num_runs} runs in {len(data)} bytes: expected at most {MAX_RUNS}")
    scales = _plain(data[_WORD.size : middle], num_runs, "<f4").astype(np.float32)
    runs = _plain(data[middle:end], num_runs, "<u4").astype(np.int64)
    _check_scales(scales)
    if int(runs.sum()) != count:
        raise CodecError(f"runs sum to {int(runs.sum())}, but there are {count} symbols")
    lengths = tuple(runs.tolist())
    symbols = torch.from_numpy(arrays.decode_symbols(data[end:], count=count, runs=lengths))
    return Quantized(symbols, torch.from_numpy(scales), lengths, payload.dither, payload.offset)


def _check_scales(scales: npt.NDArray[np.float32]) -> None:
    if not bool((np.isfinite(scales) & (scales > 0)).all()):
        raise CodecError("scales: expected finite values > 0")
