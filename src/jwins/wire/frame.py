"""Messages between nodes as frames: a header of 36 bytes, then the payload (docs/reference/wire.md).

The checksum detects accidents, not attacks: an attacker who changes a frame can also correct its CRC-32. The
transport ensures authenticity.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple, TypeAlias, TypeVar

import msgspec
import torch
from torch import Tensor

from jwins.errors import CodecError, FrameError, UsageError
from jwins.sharing.update import MAX_DIM, Update
from jwins.wire.codec import CODECS, Codec, PositionsKind, ValuesKind, max_payload_bytes, read_payload

MAGIC = b"JWNS"
VERSION = 3
DIGEST_BYTES = 8
MAX_CONTROL_BYTES = 4096
"""Longest payload of a control message."""
MAX_NAME_CHARS = 64
"""Longest name of a codec, and longest name and number of a version."""
MAX_VERSIONS = 16
"""Largest number of versions in a Hello."""
MAX_HASH_BYTES = 64
"""Longest hash of the initial parameters."""
MAX_REASON_CHARS = 500
"""Longest reason of a Bye."""
NONCE_BYTES = 16
MAX_SIGNATURE_BYTES = 512
"""Longest signature of a round: that of RSA with 4096 bits."""
DESCRIBED_DIM = 100_000_000
"""Largest vector whose values :func:`describe` decodes, so that a file cannot claim gigabytes of memory."""

# magic, version, kind, codec, flags, sender, round, digest, dim, length of the payload; then the checksum
_FIELDS = struct.Struct(f"<4sBBBBII{DIGEST_BYTES}sII")
_CHECKSUM = struct.Struct("<I")
_ROUND = struct.Struct("<I")
_ROUND_REQUEST = struct.Struct(f"<I{NONCE_BYTES}s")  # asker, nonce
_SIGNED_ROUND = struct.Struct("<II")  # member, asker; then the signature
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
_HELLO, _FRAME, _KEYFRAME_REQUEST, _BYE, _STATE_REQUEST, _ROUND_REQUESTED, _ROUND_SIGNED = 1, 2, 3, 4, 5, 6, 7
_KINDS = {
    _HELLO: "hello",
    _FRAME: "frame",
    _KEYFRAME_REQUEST: "keyframe_request",
    _BYE: "bye",
    _STATE_REQUEST: "state_request",
    _ROUND_REQUESTED: "round_request",
    _ROUND_SIGNED: "signed_round",
}
_LONGEST = {
    _KEYFRAME_REQUEST: _ROUND.size,
    _STATE_REQUEST: 0,
    _ROUND_REQUESTED: _ROUND_REQUEST.size,
    _ROUND_SIGNED: _SIGNED_ROUND.size + MAX_SIGNATURE_BYTES,
}
"""Longest payload of those control messages that have a smaller limit than others."""
_KEYFRAME_FLAG = 1
ROSTER_VERSIONS = 128
"""Roster versions in frames are modulo this number: they have 7 bits."""
_U32 = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a node; with it both sides check that they run the same experiment.

    Attributes:
        sender: the sending node.
        round: the sender's round.
        dim: length of its parameter vector.
        codec: name of the codec of its frames.
        versions: names and numbers of the versions that must agree, at most :data:`MAX_VERSIONS`.
        x0: hash of its initial parameters, at most :data:`MAX_HASH_BYTES` bytes.
        resend_from: first round whose frames it needs; None if it only answers a Hello.
        settled: whether it has merged since it last took over the round of others.
    """

    sender: int
    round: int
    dim: int
    codec: str
    versions: dict[str, str]
    x0: bytes
    resend_from: int | None = None
    settled: bool = True


@dataclass(frozen=True, slots=True)
class Frame:
    """One update of one node.

    Attributes:
        sender: the sending node.
        round: the sender's round.
        update: the update for its neighbours.
        keyframe: whether it is a keyframe, which stands alone, instead of the round's update.
        roster_version: version of the roster whose graph the sender uses in that round, modulo
            :data:`ROSTER_VERSIONS`.
    """

    sender: int
    round: int
    update: Update
    keyframe: bool = False
    roster_version: int = 0


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """Header of a frame that is not decoded: fields as in :class:`Frame`, and the update's number of values."""

    sender: int
    round: int
    keyframe: bool
    roster_version: int
    count: int


@dataclass(frozen=True, slots=True)
class KeyframeRequest:
    """Request for a keyframe of the receiver.

    Attributes:
        sender: the requesting node.
        round: the sender's round.
        replica_round: round of the receiver's replica that the sender still has, so that increments since then
            are enough. None if it has no replica.
    """

    sender: int
    round: int
    replica_round: int | None = None


@dataclass(frozen=True, slots=True)
class StateRequest:
    """Request for the receiver's model of ``round``, or of a later one."""

    sender: int
    round: int


@dataclass(frozen=True, slots=True)
class RoundRequest:
    """Request for signed rounds.

    Attributes:
        sender: the sending node.
        round: the sender's round.
        asker: the node that will check the signatures. A receiver that is asked by ``asker`` itself passes the
            request on to its neighbours, and they answer with their own rounds.
        nonce: :data:`NONCE_BYTES` bytes of the asker, which the signatures must cover.
    """

    sender: int
    round: int
    asker: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class SignedRound:
    """A round that a member has reached, signed with its key, so that others may pass it on.

    Attributes:
        sender: the sending node.
        round: the number of rounds that ``member`` has completed.
        member: the node that has signed.
        asker: the node that has requested it.
        signature: at most :data:`MAX_SIGNATURE_BYTES`.
    """

    sender: int
    round: int
    member: int
    asker: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Bye:
    """Announcement that ``sender`` leaves in ``round``, with a reason of at most :data:`MAX_REASON_CHARS`."""

    sender: int
    round: int
    reason: str


Message: TypeAlias = Hello | Frame | KeyframeRequest | StateRequest | RoundRequest | SignedRound | Bye
"""Every message between nodes."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A message as bytes, with their count by kind.

    Attributes:
        data: header and payload.
        positions_bytes: bytes of the positions' section.
        values_bytes: bytes of the values' section.
    """

    data: bytes
    positions_bytes: int
    values_bytes: int

    @property
    def size_bytes(self) -> int:
        """Return the length of the whole message."""
        return len(self.data)

    @property
    def header_bytes(self) -> int:
        """Return the other bytes: the header and the head of the payload; all of a control message."""
        return self.size_bytes - self.positions_bytes - self.values_bytes


@dataclass(frozen=True, slots=True)
class Wire:
    """Encoder and decoder of the messages of one experiment.

    Attributes:
        codec: codec of updates.
        digest: 8 bytes that identify the experiment.
        dim: length of the vectors that updates refer to.

    >>> from jwins.wire.codec import codec
    >>> wire = Wire(codec("raw"), b"8 bytes.", dim=10)
    >>> wire.unpack(wire.pack(KeyframeRequest(sender=1, round=7)).data)
    KeyframeRequest(sender=1, round=7, replica_round=None)
    """

    codec: Codec
    digest: bytes
    dim: int

    def pack(self, message: Message) -> Packed:
        """Encode a message.

        Raises:
            UsageError: a number, name or payload is larger than the format allows.
        """
        if len(self.digest) != DIGEST_BYTES:
            raise UsageError(f"digest of {len(self.digest)} bytes: expected {DIGEST_BYTES}")
        if not 0 <= message.sender <= _U32 or not 0 <= message.round <= _U32:
            raise UsageError(
                f"sender {message.sender}, round {message.round}: expected unsigned 32-bit integers"
            )
        code = flags = dim = positions_bytes = values_bytes = 0
        if isinstance(message, Frame):
            encoded = self.codec.encode(message.update)
            if not 0 <= message.roster_version < ROSTER_VERSIONS:
                raise UsageError(
                    f"Frame.roster_version = {message.roster_version}: expected 0 to {ROSTER_VERSIONS - 1}"
                )
            flags = _KEYFRAME_FLAG * message.keyframe | message.roster_version << 1
            kind, code, dim = _FRAME, self.codec.code, message.update.dim
            payload, positions_bytes, values_bytes = encoded.data, encoded.positions_bytes, encoded.values_bytes
            if len(payload) > _U32:
                raise UsageError(f"an update of {len(payload)} bytes does not fit a frame: at most {_U32}")
        elif isinstance(message, Hello):
            if not 0 <= message.dim <= MAX_DIM:
                raise UsageError(f"Hello.dim = {message.dim}: expected 0 to {MAX_DIM}")
            kind, dim = _HELLO, message.dim
            payload = _encode_body(
                _HelloBody(message.codec, message.versions, message.x0, message.resend_from, message.settled)
            )
        elif isinstance(message, StateRequest):
            kind, payload = _STATE_REQUEST, b""
        elif isinstance(message, RoundRequest | SignedRound):
            kind, payload = _encode_round(message)
        elif isinstance(message, Bye):
            kind, payload = _BYE, _encode_body(_ByeBody(message.reason))
        else:
            if message.replica_round is not None and not 0 <= message.replica_round <= _U32:
                raise UsageError(
                    f"KeyframeRequest.replica_round = {message.replica_round}: "
                    "expected None or an unsigned 32-bit round"
                )
            kind, payload = (
                _KEYFRAME_REQUEST,
                b"" if message.replica_round is None else _ROUND.pack(message.replica_round),
            )
        fields = _FIELDS.pack(
            MAGIC, VERSION, kind, code, flags, message.sender, message.round, self.digest, dim, len(payload)
        )
        checksum = _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(fields)))
        return Packed(b"".join((fields, checksum, payload)), positions_bytes, values_bytes)

    def unpack(self, data: bytes | memoryview) -> Message:
        """Decode the message of a frame; ``data`` may be any bytes, with nothing after the payload.

        A Hello is returned with any vector length and codec: the receiver compares them.

        Raises:
            FrameError: the bytes are not a frame of this experiment and codec, or were damaged on the way.
            CodecError: the frame is valid, but its payload is not.
        """
        header, payload = _read_header(data)
        self._check_digest(header)
        if header.kind == _HELLO:
            hello = _decode_body(payload, _HelloBody)
            return Hello(
                header.sender,
                header.round,
                header.dim,
                hello.codec,
                hello.versions,
                hello.x0,
                hello.resend_from,
                hello.settled,
            )
        if header.kind == _BYE:
            return Bye(header.sender, header.round, _decode_body(payload, _ByeBody).reason)
        if header.kind == _STATE_REQUEST:
            return StateRequest(header.sender, header.round)
        if header.kind == _ROUND_REQUESTED:
            return RoundRequest(header.sender, header.round, *_ROUND_REQUEST.unpack(payload))
        if header.kind == _ROUND_SIGNED:
            member, asker = _SIGNED_ROUND.unpack_from(payload)
            return SignedRound(header.sender, header.round, member, asker, bytes(payload[_SIGNED_ROUND.size :]))
        if header.kind == _KEYFRAME_REQUEST:
            return KeyframeRequest(header.sender, header.round, _replica_round_of(payload))
        self._check_update(header)
        # memoryview: a payload is as large as the vector, and a second copy would exceed the promised memory
        update = self.codec.decode(payload, dim=self.dim)  # type: ignore[arg-type]
        return Frame(
            header.sender, header.round, update, bool(header.flags & _KEYFRAME_FLAG), header.flags >> 1
        )

    def peek(self, data: bytes | memoryview) -> FrameHeader | None:
        """Read the header of a frame without decoding; return None for any other message.

        Exceptions are those of :meth:`unpack`; sections of the payload are not read.
        """
        header, payload = _read_header(data)
        self._check_digest(header)
        if header.kind != _FRAME:
            return None
        self._check_update(header)
        count = read_payload(payload, dim=self.dim).count
        keyframe, roster_version = bool(header.flags & _KEYFRAME_FLAG), header.flags >> 1
        return FrameHeader(header.sender, header.round, keyframe, roster_version, count)

    def renewed(self, packed: Packed) -> Packed:
        """Return the message with the digest of this run, for messages under way when a run is extended."""
        header = _FIELDS.unpack_from(packed.data)
        if header[7] == self.digest:
            return packed
        fields, payload = _FIELDS.pack(*header[:7], self.digest, *header[8:]), packed.data[HEADER_BYTES:]
        checksum = _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(fields)))
        return replace(packed, data=fields + checksum + payload)

    def _check_digest(self, header: _Header) -> None:
        if header.digest != self.digest:
            theirs, ours = header.digest.hex(), self.digest.hex()
            raise FrameError(f"the frame is from experiment {theirs}, but this run is {ours}")

    def _check_update(self, header: _Header) -> None:
        code, name = self.codec.code, self.codec.name
        if header.codec != code:
            raise FrameError(f"a frame in codec {header.codec}, this experiment uses {code} ({name})")
        if header.dim != self.dim:
            raise FrameError(f"an update of a vector of {header.dim}, expected {self.dim}")


def _replica_round_of(payload: memoryview) -> int | None:
    """Return the payload of a KeyframeRequest, if it has one."""
    if not len(payload):
        return None
    if len(payload) != _ROUND.size:
        raise FrameError(f"a KeyframeRequest with {len(payload)} bytes of payload: expected none, or 4")
    (replica_round,) = _ROUND.unpack(payload)
    return int(replica_round)


def max_frame_bytes(dim: int) -> int:
    """Return the maximum length of a frame for vectors of ``dim``; a transport may refuse a longer one."""
    return HEADER_BYTES + max(MAX_CONTROL_BYTES, max_payload_bytes(dim))


def describe(data: bytes) -> dict[str, object]:
    """Describe a frame for people, without knowing the experiment.

    Values are decoded only by codecs that accept foreign bytes, and up to :data:`DESCRIBED_DIM` elements.

    Returns:
        ``kind version codec sender round digest dim`` and ``frame_bytes header_bytes``; then for a frame
        ``keyframe roster_version base check count density positions positions_bytes bits_per_position values
        dither offset values_bytes bits_per_value`` and, if they were decoded, ``value_min value_max
        not_finite`` (over the finite ones; None if there are none), for a Hello ``codec_name versions x0``, for
        a Bye ``reason``.

    Raises:
        FrameError: the bytes are not a frame.
        CodecError: the payload is invalid.
    """
    header, payload = _read_header(data)
    names = {kind.code: name for name, kind in CODECS.items()}
    about: dict[str, object] = {
        "kind": _KINDS[header.kind],
        "version": VERSION,
        "codec": names.get(header.codec, "none" if header.codec == 0 else f"unknown ({header.codec})"),
        "sender": header.sender,
        "round": header.round,
        "digest": header.digest.hex(),
        "dim": header.dim,
        "frame_bytes": len(data),
    }
    if header.kind == _HELLO:
        hello = _decode_body(payload, _HelloBody)
        about |= {"codec_name": hello.codec, "versions": hello.versions, "x0": hello.x0.hex()}
    elif header.kind == _BYE:
        about |= {"reason": _decode_body(payload, _ByeBody).reason}
    if header.kind != _FRAME:
        return about | {"header_bytes": len(data)}
    sections = read_payload(payload, dim=header.dim)
    count = sections.count
    about |= {
        "header_bytes": len(data) - len(sections.positions) - len(sections.values),
        "keyframe": bool(header.flags & _KEYFRAME_FLAG),
        "roster_version": header.flags >> 1,
        "base": sections.base,
        "check": sections.check,
        "count": count,
        "density": count / header.dim if header.dim else 0.0,
        "positions": PositionsKind(sections.positions_kind).name.lower(),
        "positions_bytes": len(sections.positions),
        "bits_per_position": 8 * len(sections.positions) / count if count else 0.0,
        "values": ValuesKind(sections.values_kind).name.lower(),
        "dither": sections.dither,
        "offset": sections.offset,
        "values_bytes": len(sections.values),
        "bits_per_value": 8 * len(sections.values) / count if count else 0.0,
    }
    name = names.get(header.codec)
    if name is not None and CODECS[name].accepts_foreign and header.dim <= DESCRIBED_DIM:
        values = CODECS[name]().decode(payload, dim=header.dim).dense_values()
        about |= _range(values)
    return about


def _range(values: Tensor) -> dict[str, object]:
    finite = values[torch.isfinite(values)]
    return {
        "value_min": float(finite.min()) if len(finite) else None,
        "value_max": float(finite.max()) if len(finite) else None,
        "not_finite": len(values) - len(finite),
    }


class _Header(NamedTuple):
    kind: int
    codec: int
    flags: int
    sender: int
    round: int
    digest: bytes
    dim: int


def _read_header(data: bytes | memoryview) -> tuple[_Header, memoryview]:
    """Read the header and the payload of a frame, and check the checksum."""
    view = memoryview(data)
    if len(view) < HEADER_BYTES:
        raise FrameError(f"{len(view)} bytes: a frame has at least {HEADER_BYTES}")
    magic, version, kind, code, flags, sender, round_, digest, dim, length = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise FrameError(f"starts with {magic!r}: not a frame")
    if version != VERSION:
        raise FrameError(f"format version {version}: this release reads version {VERSION}")
    if kind not in _KINDS:
        raise FrameError(f"message of kind {kind}: expected {min(_KINDS)} to {max(_KINDS)}")
    longest = max_payload_bytes(dim) if kind == _FRAME else _LONGEST.get(kind, MAX_CONTROL_BYTES)
    least = {_ROUND_REQUESTED: longest, _ROUND_SIGNED: _SIGNED_ROUND.size}.get(kind, 0)
    if length != len(view) - HEADER_BYTES or not least <= length <= longest:
        raise FrameError(
            f"{_KINDS[kind]} with {len(view) - HEADER_BYTES} bytes after the header, which announces {length}; "
            f"{least} to {longest} are allowed"
        )
    payload = view[HEADER_BYTES:]
    (checksum,) = _CHECKSUM.unpack_from(view, _FIELDS.size)
    if zlib.crc32(payload, zlib.crc32(view[: _FIELDS.size])) != checksum:
        raise FrameError("checksum does not match: the frame was changed on the way")
    if (kind != _FRAME and (flags or code)) or (kind not in (_HELLO, _FRAME) and dim):
        raise FrameError(f"{_KINDS[kind]} with flags {flags:#04x}, codec {code}, dim {dim}")
    return _Header(kind, code, flags, sender, round_, digest, dim), payload


_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]


class _HelloBody(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    codec: _Name
    versions: Annotated[dict[_Name, _Name], msgspec.Meta(max_length=MAX_VERSIONS)]
    x0: Annotated[bytes, msgspec.Meta(max_length=MAX_HASH_BYTES)]
    resend_from: Annotated[int, msgspec.Meta(ge=0, le=_U32)] | None = None
    settled: bool = True


class _ByeBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON_CHARS)]


def _encode_body(body: _HelloBody | _ByeBody) -> bytes:
    try:
        payload = msgspec.msgpack.encode(body)
    except (TypeError, ValueError) as error:  # a value of another type, or text that UTF-8 cannot encode
        raise UsageError(f"this message cannot be sent, {body}: {error}") from None
    try:
        msgspec.msgpack.decode(payload, type=type(body))  # the limits that receivers check
    except msgspec.MsgspecError as error:
        raise UsageError(f"this message cannot be sent, {body}: {error}") from None
    if len(payload) > MAX_CONTROL_BYTES:
        raise UsageError(
            f"this message cannot be sent, {body}: {len(payload)} bytes, at most {MAX_CONTROL_BYTES}"
        )
    return payload


def _encode_round(message: RoundRequest | SignedRound) -> tuple[int, bytes]:
    """Return the kind and payload of a message about signed rounds."""
    try:
        if isinstance(message, RoundRequest) and len(message.nonce) == NONCE_BYTES:
            return _ROUND_REQUESTED, _ROUND_REQUEST.pack(message.asker, message.nonce)
        if isinstance(message, SignedRound) and len(message.signature) <= MAX_SIGNATURE_BYTES:
            return _ROUND_SIGNED, _SIGNED_ROUND.pack(message.member, message.asker) + message.signature
    except struct.error:
        pass
    raise UsageError(f"this message cannot be sent, {message}: a number or a length is out of range")


_B = TypeVar("_B", _HelloBody, _ByeBody)


def _decode_body(payload: bytes | memoryview, kind: type[_B]) -> _B:
    if len(payload) > MAX_CONTROL_BYTES:
        raise CodecError(f"control message of {len(payload)} bytes: at most {MAX_CONTROL_BYTES}")
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise CodecError(f"control message: {error}") from None
