"""Every exception the package raises on purpose, as one tree.

Two families are kept apart, as h11 does: :class:`UsageError` says that *the caller* did something
wrong, :class:`PeerError` that *a remote peer* did. Catching :class:`JwinsError` catches both.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path


class JwinsError(Exception):
    """Base of every exception raised on purpose by this package."""


class UsageError(JwinsError, ValueError):
    """The caller broke the contract of a function or an object."""


class ConfigError(UsageError):
    """An experiment cannot be built as written.

    Args:
        path: where, as a TOML path, e.g. ``sharing.cutoff.fractions[2]``.
        value: the value there.
        problem: the expected value, and the remedy.
    """

    def __init__(self, path: str, value: object, problem: str) -> None:
        self.path = path
        self.value = value
        self.problem = problem
        super().__init__(f"{path} = {value!r}: {problem}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        return type(self), (self.path, self.value, self.problem)  # pickle would pass the message alone


class DataError(JwinsError):
    """A data set is missing, incomplete or not of the expected schema."""


class ResumeError(JwinsError):
    """A run folder cannot be continued: nothing to continue, or another experiment."""


class ActorLostError(ResumeError):
    """A machine or a process that held a part of a run is gone; its last checkpoint is on this machine."""


class PeerError(JwinsError):
    """A remote peer sent something that is not acceptable."""


class RemovedError(PeerError):
    """A node was removed from the roster; the others continue without it."""


class CodecError(PeerError):
    """Bytes do not decode to an update. The only exception a decoder may raise."""


class FrameError(CodecError):
    """Bytes are not a frame of this experiment: bad magic, version, checksum, digest or length."""


_NOT_THE_USERS = (str(Path(os.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep)
_INSTALLED = ("site-packages", "dist-packages")


def error_text(error: Exception) -> str:
    """Describe an error in one line, with the last line of the user's own files in its traceback."""
    if isinstance(error, JwinsError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
    places = [
        f" ({Path(frame.filename).name}, line {frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith(".py")
        and not frame.filename.startswith(_NOT_THE_USERS)
        and not any(folder in Path(frame.filename).parts for folder in _INSTALLED)
    ]
    if isinstance(error, SyntaxError) and error.filename:  # its text ends with the place
        places = []
    return f"{type(error).__name__}: {reason}".removesuffix(": ") + "".join(places[-1:])
