"""Messages between nodes as bytes: codecs of updates, and the frames around them (docs/reference/wire.md)."""

from __future__ import annotations

from jwins.wire.codec import CODECS, MAX_RUNS, Codec, Encoded, codec, max_payload_bytes
from jwins.wire.frame import (
    HEADER_BYTES,
    VERSION,
    Bye,
    Frame,
    Hello,
    KeyframeRequest,
    Message,
    Packed,
    Wire,
    describe,
    max_frame_bytes,
)

__all__ = [
    "CODECS",
    "HEADER_BYTES",
    "MAX_RUNS",
    "VERSION",
    "Bye",
    "Codec",
    "Encoded",
    "Frame",
    "Hello",
    "KeyframeRequest",
    "Message",
    "Packed",
    "Wire",
    "codec",
    "describe",
    "max_frame_bytes",
    "max_payload_bytes",
]
