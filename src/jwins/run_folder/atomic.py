"""Files that are either unchanged or complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from jwins.run_folder.own_files import open_own


def write_atomically(
    path: Path, data: bytes | Sequence[bytes | memoryview], *, sync: bool = True, mode: int = 0o666
) -> None:
    """Write a file so that ``path`` is either unchanged or complete, even if the process is killed.

    A link in its place is replaced, not followed.

    Args:
        path: the file.
        data: content of the file, in one piece or in several.
        sync: whether to flush it to the disk.
        mode: permissions, less those of the umask.

    Raises:
        OSError: e.g. a full disk; ``path`` is unchanged and no temporary file remains.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        partial.unlink()  # left by a killed process with the same number
    try:
        with open_own(partial, new=True, mode=mode) as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if not sync or os.name == "nt":  # on systems where folders cannot be opened
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
