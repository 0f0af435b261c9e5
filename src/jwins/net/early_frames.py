"""Frames of later rounds, which stay encoded until their round, so that a peer can fill little memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from jwins.errors import CodecError
from jwins.node import over_budget
from jwins.wire.frame import FrameHeader

_T = TypeVar("_T")


class EarlyFrames:
    """Frames of one peer for rounds that this node has not begun."""

    def __init__(self) -> None:
        self._frames: dict[tuple[int, bool], tuple[int, bytes]] = {}

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def size_bytes(self) -> int:
        """Return the bytes of memory of these frames."""
        return sum(len(data) for _, data in self._frames.values())

    def objection(self, frame: FrameHeader, max_frames: int, max_bytes: float) -> str | None:
        """Return why no further frame may wait, or None; frames count with their decoded size."""
        return over_budget([count for count, _ in self._frames.values()], frame.count, max_frames, max_bytes)

    def add(self, frame: FrameHeader, data: bytes) -> None:
        """Keep a frame."""
        self._frames[frame.round, frame.keyframe] = (frame.count, data)

    def take(self, round: int) -> list[bytes]:
        """Return the frames of a round, the keyframe last, and forget those of rounds before it."""
        taken = [data for (at, _), (_, data) in sorted(self._frames.items()) if at == round]
        self._frames = {name: frame for name, frame in self._frames.items() if name[0] > round}
        return taken


def decode(read: Callable[[], _T]) -> _T:
    """Decode a peer's message; a lack of memory counts as the peer's fault.

    Raises:
        CodecError: raised by ``read``, or there is not enough memory.
    """
    try:
        return read()
    except MemoryError as error:
        raise CodecError("there is no memory to decode it") from error
    except RuntimeError as error:  # torch's
        if "not enough memory" in str(error) or "out of memory" in str(error):
            raise CodecError("there is no memory to decode it") from error
        raise
