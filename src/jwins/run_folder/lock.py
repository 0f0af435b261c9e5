"""Lock of a folder, for one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jwins.errors import ResumeError
from jwins.run_folder.own_files import open_own


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Within the block, keep other processes out of the folder. A killed process loses the lock, too.

    Raises:
        ResumeError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open_own(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResumeError(
                f"{folder}: another process is running {what} here, or this one does already"
            ) from None
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # forked processes have the file open, too
