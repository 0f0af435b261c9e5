"""Files that are either as before or complete."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from jwins.run_folder.own_files import open_own

__all__ = ["write_atomically"]


def write_atomically(path: Path, data: bytes, *, sync: bool = True, mode: int = 0o666) -> None:
    """Write a file so that ``path`` is either as before or complete, even if the process is killed.

    A link in its place is replaced and not followed.

    Args:
        path: the file.
        data: its content.
        sync: whether it is to be on the disk at the end.
        mode: permissions, less those of the umask.

    Raises:
        OSError: e.g. a full disk; ``path`` is as before and nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        partial.unlink()  # of a process with the same number that was killed
    try:
        with open_own(partial, new=True, mode=mode) as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if not sync or os.name == "nt":  # where folders cannot be opened
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
