"""Messages as frames, and back, for codecs and digests of one's choice."""

from __future__ import annotations

from jwins.wire import Codec, Message, Packed, Wire


def pack(message: Message, codec: Codec, digest: bytes) -> Packed:
    """Encode a message."""
    return Wire(codec, digest, dim=0).pack(message)


def unpack(data: bytes, codec: Codec, digest: bytes, *, dim: int) -> Message:
    """Decode the message of a frame."""
    return Wire(codec, digest, dim).unpack(data)
