"""Pieces of messages and control messages over one TLS connection, as WebSocket frames.

The library's protocol object does the framing without I/O. A control message is a text frame with JSON.
A message of the user is announced by one with its length, and follows in binary frames of at most 256 KiB.
Nothing else is accepted: no continuations, no pings of the library, no extensions and thus no compression.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from websockets.client import ClientProtocol
from websockets.exceptions import PayloadTooBig
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from jwins.errors import PeerError
from jwins.net.limits import CHUNK_BYTES, CONTROL_BYTES
from jwins.net.sockets import acknowledged, not_sent

VERSION = 2
"""Version of this protocol; nodes of different versions do not connect."""

READ_BYTES = 1 << 17
WRITE_BUFFER_BYTES = 4 * CHUNK_BYTES
REFUSED = 4000
"""Close code beside a reason for not accepting the peer."""

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Id: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]

_quiet = logging.getLogger("jwins.net.websockets")
_quiet.setLevel(logging.ERROR)  # the library logs every frame


class PeerRefused(PeerError):  # noqa: N818  the name describes a peer, not an error of the program
    """A peer broke a rule. It receives the reason, and the refusal is counted."""


class ChannelHello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """First message of either side.

    Attributes:
        id: id of the sender; its certificate must be that of this id.
        to: id of the node that it expects.
        instance: random number of the process, which distinguishes a restarted node from one that dials twice.
        probe: whether the sender only measures; the node then does not learn of it.
        clock: Unix time, so that people can find wrong clocks; nothing depends on it.
    """

    version: _Count
    id: _Id
    to: _Id
    instance: Annotated[str, msgspec.Meta(max_length=32)]
    probe: bool = False
    greeting: Annotated[bytes, msgspec.Meta(max_length=4096)] = b""
    clock: float = 0.0


class Go(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="go"):
    """The side with the lower id takes this connection and no other."""


class Begin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="begin"):
    """A message of this length follows."""

    size: _Count


class Ping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ping"):
    """A keep-alive that requests an answer."""

    token: _Count


class Pong(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="pong"):
    """The answer to a ping."""

    token: _Count


class Sunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="sunk"):
    """Answer to a message of a measuring peer: the number of bytes that arrived."""

    size: _Count


class KeyInUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="key_in_use"):
    """Another process tried to connect with the key of the receiver."""

    address: Annotated[str, msgspec.Meta(max_length=128)]


Control: TypeAlias = ChannelHello | Go | Begin | Ping | Pong | Sunk | KeyInUse

C = TypeVar("C", ChannelHello, Go)

_decoder = msgspec.json.Decoder(Control)
_encoder = msgspec.json.Encoder()


class Channel:
    """Connection after its TLS handshake."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        protocol: ClientProtocol | ServerProtocol,
    ) -> None:
        self.protocol = protocol
        self._reader, self._writer = reader, writer
        self._frames: deque[Frame] = deque()
        self._written_bytes = 0
        self._arrived_bytes = 0
        writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    @staticmethod
    async def dial(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> Channel:
        """Begin as the side that dialled.

        Raises:
            PeerError: the other side does not speak this protocol.
        """
        protocol = ClientProtocol(parse_uri(f"wss://{address}/jwins"), max_size=CHUNK_BYTES, logger=_quiet)
        channel = Channel(reader, writer, protocol)
        protocol.send_request(protocol.connect())
        channel._flush()
        while protocol.state is State.CONNECTING:
            await channel._read()
            if protocol.handshake_exc is not None:
                raise PeerError(f"it does not speak this protocol ({protocol.handshake_exc})")
            channel._keep(protocol.events_received())
        return channel

    @staticmethod
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Channel:
        """Begin as the side that was dialled.

        Raises:
            PeerError: the other side does not speak this protocol.
        """
        protocol = ServerProtocol(max_size=CHUNK_BYTES, logger=_quiet)
        channel = Channel(reader, writer, protocol)
        while protocol.state is State.CONNECTING:
            await channel._read()
            for event in protocol.events_received():
                if isinstance(event, Request):
                    protocol.send_response(protocol.accept(event))
                    channel._flush()
                else:
                    channel._keep([event])
            if protocol.handshake_exc is not None:
                raise PeerError(f"it does not speak this protocol ({protocol.handshake_exc})")
        return channel

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """Return the state of TLS."""
        found: ssl.SSLObject = self._writer.get_extra_info("ssl_object")
        return found

    def fileno(self) -> int:
        """Return the file descriptor of its socket; -1 if that is closed."""
        return int(self._writer.get_extra_info("socket").fileno())

    @property
    def unsent_bytes(self) -> int:
        """Return the bytes that were written and are not with the operating system yet."""
        return self._writer.transport.get_write_buffer_size()

    @property
    def waiting_bytes(self) -> int:
        """Return the bytes that were written and have not left this machine, as far as the system knows."""
        return self.unsent_bytes + not_sent(self._writer.get_extra_info("socket"))

    @property
    def arrived_bytes(self) -> int:
        """Return the bytes that have arrived, or the written bytes if the system does not report arrivals."""
        found = acknowledged(self._writer.get_extra_info("socket"))
        if found is not None:
            self._arrived_bytes = found
        return self._arrived_bytes if self._arrived_bytes else self._written_bytes - self.unsent_bytes

    # --- Receiving ----------------------------------------------------------------------------------------

    async def receive(self) -> Control | bytes | bytearray | memoryview:
        """Receive the next control message, or piece of a message.

        Raises:
            PeerRefused: the peer broke a rule.
            PeerError: it ended the connection.
            OSError: the connection broke.
        """
        while not self._frames:
            if self.protocol.parser_exc is not None:
                raise PeerRefused(_violation(self.protocol.parser_exc))
            await self._read()
            self._keep(self.protocol.events_received())
        frame = self._frames.popleft()
        if frame.opcode is Opcode.CLOSE:
            closed = self.protocol.close_rcvd
            reason = closed.reason if closed is not None else ""
            raise PeerError(f"it closed the connection{f': {reason}' if reason else ''}")
        if frame.opcode is Opcode.BINARY and frame.fin:
            piece: bytes | bytearray | memoryview = frame.data
            return piece
        if frame.opcode is not Opcode.TEXT or not frame.fin:
            raise PeerRefused(f"a frame of an unexpected kind ({frame.opcode.name})")
        if len(frame.data) > CONTROL_BYTES:
            raise PeerRefused(f"a control message that is too long ({len(frame.data)} bytes)")
        try:
            message: Control = _decoder.decode(frame.data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PeerRefused(f"not a control message ({error})") from None
        return message

    async def control(self, kind: type[C]) -> C:
        """Receive the next message, which must be of this kind.

        Raises:
            PeerRefused: the message is of another kind.
        """
        found = await self.receive()
        if not isinstance(found, kind):
            raise PeerRefused(f"expected {kind.__name__} and got {type(found).__name__}")
        return found

    async def _read(self) -> None:
        data = await self._reader.read(READ_BYTES)
        if not data:
            raise ConnectionResetError("the other side broke the connection")
        self.protocol.receive_data(data)
        self._flush()

    def _keep(self, events: list[Frame | Request | Response]) -> None:
        self._frames.extend(event for event in events if isinstance(event, Frame))

    # --- Sending ------------------------------------------------------------------------------------------

    def write(self, message: Control) -> None:
        """Write a control message without waiting; call :meth:`drained` so that messages do not pile up."""
        if self.protocol.state is State.OPEN:
            self.protocol.send_text(_encoder.encode(message))
            self._flush()

    async def write_piece(self, piece: memoryview) -> None:
        """Write a piece of a message, and wait until there is room for another.

        Raises:
            OSError: the connection broke.
        """
        if self.protocol.state is not State.OPEN:
            raise ConnectionResetError("the connection is closed")
        self.protocol.send_binary(piece)
        self._flush()
        await self.drained()

    async def drained(self) -> None:
        """Wait until there is room to write.

        Raises:
            OSError: the connection broke.
        """
        await self._writer.drain()

    def close(self, reason: str, *, refused: bool = False) -> None:
        """Tell the peer that the connection ends, and why; its earlier messages can still be read."""
        if self.protocol.state is State.OPEN:
            text = reason.encode()[:120].decode(errors="ignore")
            self.protocol.send_close(REFUSED if refused else 1000, text)
            self._flush()

    def end(self) -> None:
        """Close the connection; written bytes are still sent, for at most a second."""
        if not self._writer.is_closing():
            self._writer.close()

    def abort(self) -> None:
        """Close the connection, and drop written bytes."""
        self._writer.transport.abort()

    def _flush(self) -> None:
        for data in self.protocol.data_to_send():
            # b"" marks the end of the stream, which TLS does not have.
            if data and not self._writer.is_closing():
                self._writer.write(data)
                self._written_bytes += len(data)


def _violation(error: Exception) -> str:
    if isinstance(error, PayloadTooBig):
        return f"a frame that is too long ({error})"
    return f"a violation of the protocol ({error})"
