"""Files for runs on other machines: sent once to each machine, identified by their SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from jwins.errors import DataError
from jwins.tasks.source import cache_folder

_CHUNK_BYTES = 32 * 2**20
"""Piece size for the object store, so that it need not hold a large file at once."""


@dataclass(frozen=True, slots=True)
class SharedPath:
    """A file or a folder under way.

    Attributes:
        origin: its path on the sending machine.
        sha256: hash of its content and the names in it, hex.
        files: SHA-256 of each file, by name within the folder; a single file has the empty name.
        pieces: a file's content in the object store, by SHA-256.
    """

    origin: str
    sha256: str
    files: Mapping[str, str]
    pieces: Mapping[str, tuple[Any, ...]]


class FileSharing:
    """Files in the object store for all machines, each content once, as long as this object exists."""

    def __init__(self) -> None:
        self._sent: dict[Path, SharedPath] = {}
        self._pieces: dict[str, tuple[Any, ...]] = {}

    def send(self, origin: Path) -> SharedPath:
        """Make a file or a folder available to all machines.

        Raises:
            DataError: no such file or folder exists.
        """
        origin = origin.resolve()
        if origin not in self._sent:
            if not origin.exists():
                raise DataError(f"{origin}: no such file or folder, so it cannot be sent to the cluster")
            files = _hashes(origin)
            for name, digest in files.items():
                if digest not in self._pieces:
                    path = origin if origin.is_file() else origin / name
                    self._pieces[digest] = tuple(ray.put(piece) for piece in _read(path))
            pieces = {digest: self._pieces[digest] for digest in files.values()}
            self._sent[origin] = SharedPath(str(origin), _digest(files), files, pieces)
        return self._sent[origin]


def local_copy(sent: SharedPath) -> Path:
    """Return the path of the same content on this machine; fetch it if it is not here yet.

    Raises:
        DataError: the content was damaged on the way, or the disk is full.
    """
    origin = Path(sent.origin)
    if sent.sha256 not in _found:
        if not (origin.exists() and _hashes(origin) == sent.files):
            origin = _from_cache(sent, origin.name)
        _found[sent.sha256] = origin
    return _found[sent.sha256]


_found: dict[str, Path] = {}
"""Files that this process has found or fetched before."""


def _from_cache(sent: SharedPath, name: str) -> Path:
    place = cache_folder() / "shipped" / sent.sha256
    if (place / name).exists():
        return place / name
    try:
        place.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=place))
        try:
            _fetch(sent, partial / name)
            with contextlib.suppress(OSError):  # another process here was first
                (partial / name).rename(place / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{place}: {error.strerror or error}; set JWINS_DATA to a folder with room") from None
    return place / name


def _fetch(sent: SharedPath, target: Path) -> None:
    for name, digest in sent.files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        actual = hashlib.sha256()
        with path.open("wb") as file:
            for piece in sent.pieces[digest]:
                content: bytes = ray.get(piece)
                actual.update(content)
                file.write(content)
        if actual.hexdigest() != digest:
            raise DataError(f"{sent.origin}: {path.name} was damaged on the way; try again")


def _hashes(origin: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by its name below ``origin``; a single file has the empty name."""
    paths = [origin] if origin.is_file() else sorted(path for path in origin.rglob("*") if path.is_file())
    found = {}
    for path in paths:
        digest = hashlib.sha256()
        for piece in _read(path):
            digest.update(piece)
        found["" if path == origin else path.relative_to(origin).as_posix()] = digest.hexdigest()
    return found


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{digest} {name}\n" for name, digest in files.items()).encode()).hexdigest()


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            yield piece
