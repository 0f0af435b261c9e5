"""Files and folders of a run in its own folder, which another person may have prepared."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def open_own(path: Path, *, new: bool = False, mode: int = 0o666) -> IO[bytes]:
    """Open a regular file for appending and reading; links are not followed.

    A copied or unpacked folder may have something else in place of a file of the run. With a link the run would
    write elsewhere. With a pipe it would wait forever.

    Args:
        path: the file; made if it does not exist.
        new: whether it must not exist yet.
        mode: permissions of a new file, less those of the umask.

    Raises:
        OSError: it is a link or not a regular file, it exists although it must not, or it cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _BINARY | _NO_FOLLOW | (os.O_EXCL if new else 0)
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise OSError(error.errno, "is a symbolic link; remove it", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file; remove it", str(path))
    return os.fdopen(descriptor, "ab+")


def private_folder(folder: Path) -> Path:
    """Make a folder that only its owner can read, and its parents with the usual permissions; return it.

    A folder that exists keeps its permissions.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
