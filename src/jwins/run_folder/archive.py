"""Run folders in one compressed file, read without unpacking.

A path may lead through an archive: ``records/digits/runs.tar.xz/jwins/seed-1/metrics.jsonl`` is a member of
``records/digits/runs.tar.xz``. The functions of this module accept such paths and those of files and folders,
so readers of run folders need not distinguish them. Nothing is unpacked to the disk.
"""

from __future__ import annotations

import errno
import io
import lzma
import os
import tarfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from jwins.errors import DataError
from jwins.run_folder.atomic import write_atomically

SUFFIX = ".tar.xz"
NAME = f"runs{SUFFIX}"
"""File of a record that holds its runs."""

MAX_BYTES = 256 * 2**20
"""Limit of an archive's unpacked size, which is held in memory; the largest record has 6 MB."""

_MAX_DICTIONARY_BYTES = 128 * 2**20
"""Memory limit of the decompressor; ``xz -9`` needs 65 MB."""


def archive_of(path: Path) -> Path | None:
    """Return the archive that a path leads to or into, None for the path of a file or folder."""
    return next(
        (place for place in (path, *path.parents) if place.name.endswith(SUFFIX) and place.is_file()), None
    )


def beside(folder: Path) -> Path:
    """Return the folder for results about the runs in a folder: itself, or the folder of its archive."""
    archive = archive_of(folder)
    return folder if archive is None else archive.parent


def is_file(path: Path) -> bool:
    """Return whether a file exists on the disk or in an archive; an archive itself counts as a folder.

    Raises:
        DataError: the path leads into a damaged archive.
    """
    archive = archive_of(path)
    return path.is_file() if archive is None else _inside(path, archive) in _members(archive)


def is_dir(path: Path) -> bool:
    """Return whether a folder exists on the disk or in an archive, or an archive itself.

    Raises:
        DataError: the path leads into a damaged archive.
    """
    archive = archive_of(path)
    if archive is None:
        return path.is_dir()
    start = _inside(path, archive)
    return start == "." or any(name.startswith(f"{start}/") for name in _members(archive))


def open_file(path: Path) -> BinaryIO:
    """Open a file on the disk or in an archive for reading.

    Raises:
        DataError: the path leads into a damaged archive.
        FileNotFoundError: no such file.
    """
    archive = archive_of(path)
    if archive is None:
        return path.open("rb")
    try:
        return io.BytesIO(_members(archive)[_inside(path, archive)])
    except KeyError:
        raise FileNotFoundError(errno.ENOENT, f"no such file in {archive.name}", str(path)) from None


def read_text(path: Path) -> str:
    """Read a UTF-8 file on the disk or in an archive, with the line ends of ``Path.read_text``.

    Raises:
        DataError: the path leads into a damaged archive.
        OSError: no such file, or it cannot be read.
        UnicodeDecodeError: not UTF-8.
    """
    with io.TextIOWrapper(open_file(path), encoding="utf-8") as file:
        return file.read()


def find(folder: Path, pattern: str) -> list[Path]:
    """List the files whose path below ``folder`` matches a pattern without ``**``, in the order of their names.

    Raises:
        DataError: the folder is in a damaged archive.
    """
    archive = archive_of(folder)
    if archive is None:
        return sorted(path for path in folder.glob(pattern) if path.is_file())
    depth = len(PurePosixPath(pattern).parts)
    below = (path.relative_to(folder) for path in _paths(folder, archive))
    return sorted(folder / path for path in below if len(path.parts) == depth and path.match(pattern))


def folders(folder: Path) -> list[Path]:
    """List the folders in a folder, in the order of their names.

    Raises:
        DataError: the folder is in a damaged archive.
    """
    archive = archive_of(folder)
    if archive is None:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir())
    below = (path.relative_to(folder) for path in _paths(folder, archive))
    return sorted({folder / path.parts[0] for path in below if len(path.parts) > 1})


def write(archive: Path, files: Mapping[str, bytes]) -> None:
    """Write an archive atomically; the same files give the same bytes.

    Args:
        archive: ends in ``.tar.xz``.
        files: contents by path within it, with ``/`` between folders.

    Raises:
        DataError: more than ``MAX_BYTES``, or a path that cannot be read back.
        OSError: e.g. a full disk.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        # Files of the same name are similar, so they are packed next to each other.
        for name in sorted(files, key=lambda name: (name.rpartition("/")[2], name)):
            member = tarfile.TarInfo(_checked(name, archive))
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    if packed.tell() > MAX_BYTES:
        raise DataError(f"{archive}: {packed.tell():,} bytes of files; at most {MAX_BYTES:,} can be read back")
    dictionary = min(max(packed.tell(), 2**12), 2**26)  # no more memory than the data need
    how = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    write_atomically(archive, lzma.compress(packed.getvalue(), filters=[how]))


def _inside(path: Path, archive: Path) -> str:
    return path.relative_to(archive).as_posix()


def _paths(folder: Path, archive: Path) -> Iterator[Path]:
    """Return the members of an archive below a folder."""
    return (path for name in _members(archive) if (path := archive / name).is_relative_to(folder))


def _members(archive: Path) -> Mapping[str, bytes]:
    stat = archive.stat()
    return _unpacked(archive, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2)
def _unpacked(archive: Path, mtime_ns: int, size_bytes: int) -> Mapping[str, bytes]:
    """Return the files of an archive by path; time and size are part of the cache key."""
    remedy = "restore or download it again"
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_DICTIONARY_BYTES)
    try:
        data = decompressor.decompress(archive.read_bytes(), max_length=MAX_BYTES + 1)
    except lzma.LZMAError as error:
        raise DataError(f"{archive}: not an archive of runs, or damaged ({error}); {remedy}") from None
    if len(data) > MAX_BYTES:
        raise DataError(
            f"{archive}: holds more than {MAX_BYTES:,} bytes; unpack it and give the folder instead"
        )
    if not decompressor.eof:
        raise DataError(f"{archive}: cut off after {size_bytes:,} bytes; {remedy}")
    if decompressor.unused_data.strip(b"\0"):  # as pxz makes; the files of the others would be missing
        raise DataError(f"{archive}: holds several compressed streams; pack the folder again with tar -cJf")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = _checked(member.name, archive)
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None or name in files:
                    raise DataError(f"{archive}: {name!r} is not a plain file, or occurs twice; {remedy}")
                files[name] = content.read()
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{archive}: not an archive of runs, or damaged ({error}); {remedy}") from None
    return files


def _checked(name: str, archive: Path) -> str:
    """Return a member's path without a leading ``./``; refuse one that leads out of the archive."""
    path = name.removeprefix("./")
    if "\\" in path or os.path.isabs(path) or any(part in ("", ".", "..") for part in path.split("/")):
        raise DataError(f"{archive}: {name!r} is not a path within an archive; pack the folder again with tar")
    return path
