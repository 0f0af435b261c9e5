"""Data of tasks: from a local folder, the cache or a download.

A task's files are in the user's folder or, if none is named, in the cache, which a download fills once.
Images are decoded once and kept in the cache as safetensors. The cache is in the platform's folder for caches,
or at ``$JWINS_DATA``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import wrap_file
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from jwins.errors import ConfigError, DataError
from jwins.rng import stream

SPLIT_SEED = 20230718
"""Seed of every split into training and test samples, the same in every experiment."""

_DECODER = "1"
"""Part of the names of decoded files; change it whenever their meaning changes."""

_TIMEOUT_S = 30.0
_MAX_SHARED_FRACTION = 0.75
"""Fraction of the smaller file's rows that two different files may share. With more they are copies."""
_MIN_ROWS = 5
"""Different rows that both files need: fewer may be blank images, or the few rows of an owner."""

_SHARD = re.compile(r"(.*-)(\d+)-of-(\d+)\.parquet")
_COPY = re.compile(r"(.+?)(?: ?\(\d+\)|(?: -)?[-_. ](?:copy|backup|bak|old|orig)\b.*)", re.IGNORECASE)
"""Names that browsers, desktops and people give to a second copy of a file."""

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder for downloads and decoded images: ``$JWINS_DATA``, or the platform's cache folder."""
    if override := os.environ.get("JWINS_DATA"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jwins"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "jwins" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jwins"


# --- files ---------------------------------------------------------------------------------------------


def hub_files(task: str, repo: str, data: Path | None, splits: Sequence[str]) -> dict[str, list[Path]]:
    """Find or download the parquet files of a data set of the Hugging Face hub, by split.

    Args:
        task: the task's name, for messages.
        repo: the data set's name on the hub.
        data: a folder with the hub's files, at any depth; None uses the cache and, if
            necessary, the network.
        splits: required splits.

    Raises:
        DataError: the files are missing and cannot be downloaded; the message has the remedy.
    """
    folder = cache_folder() / "hub" / repo.replace("/", "--") if data is None else data
    if data is None and not folder.is_dir():
        _download_hub(task, repo, folder, splits)
    found = _splits_in(task, folder, splits) if folder.is_dir() else {}
    absent = [split for split in splits if not found.get(split)]
    if not absent:
        return found
    problem = f"has no {absent[0]}-*.parquet" if folder.is_dir() else "is not a folder"
    again = "remove the folder to download it again"
    remedy = again if data is None else f"{_what_to_get(repo, splits)} into that folder"
    raise DataError(f"{task}: {folder} {problem}; {remedy}")


def zip_member(task: str, url: str, member: str) -> Path:
    """Return a file of a zip archive on the network, which is downloaded once.

    The download must be complete, and the member's checksum must match.

    Raises:
        DataError: the download failed; the message has the remedy.
    """
    path = cache_folder() / "files" / task / Path(member).name
    if path.is_file():
        return path
    remedy = f"download {url} yourself, unpack it, and name its folder with --data"
    archive = io.BytesIO()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            expected = int(response.headers.get("Content-Length") or 0)
            console = Console(stderr=True)
            with wrap_file(response, expected, description=f"Downloading {task}", console=console) as reader:
                shutil.copyfileobj(reader, archive)
    except OSError as error:  # includes URLError, timeouts and broken connections
        raise DataError(f"{task}: no data, and the download failed ({error}); {remedy}") from error
    size = archive.tell()
    if expected and size != expected:
        raise DataError(
            f"{task}: the download broke off after {size} of {expected} bytes; try again, or {remedy}"
        )
    try:
        with zipfile.ZipFile(archive) as opened:
            content = opened.read(member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{task}: {url} is not the expected archive ({error}); {remedy}") from error
    try:
        _write_whole(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise DataError(f"{task}: {path} cannot be written ({error}); set JWINS_DATA, or {remedy}") from error
    return path


def _what_to_get(repo: str, splits: Sequence[str]) -> str:
    wanted = " and ".join(f"{split}-*.parquet" for split in splits)
    return f"get {wanted} from https://huggingface.co/datasets/{repo} (tab Files) and put them"


def _splits_in(task: str, folder: Path, splits: Sequence[str]) -> dict[str, list[Path]]:
    found = {split: sorted(folder.rglob(f"{split}*.parquet")) for split in splits}
    for files in found.values():
        _refuse_other_shards(task, files)
        refuse_copies(task, files)
        _check_all_shards(files)
    return found


def refuse_copies(task: str, files: Sequence[Path]) -> None:
    """Refuse files of the same content, or with the names of a file and its copy.

    Raises:
        DataError: two files are copies; the message names them.
    """
    names: dict[Path, Path] = {}
    sizes: dict[int, list[Path]] = {}
    contents: dict[str, Path] = {}
    try:
        for file in files:
            copied = _COPY.fullmatch(file.stem)
            other = names.setdefault(file.with_name(copied[1] if copied is not None else file.stem), file)
            if other is not file:
                raise _twice(task, other, file)
            sizes.setdefault(file.stat().st_size, []).append(file)
        for file in (file for size, same in sizes.items() if size and len(same) > 1 for file in same):
            other = contents.setdefault(_content_hash(file), file)
            if other is not file:
                raise _twice(task, other, file)
    except OSError as error:
        raise DataError(f"{task}: {error.filename} cannot be read ({error})") from error


def refuse_repeats(task: str, hashes: Mapping[Path, Sequence[int]]) -> None:
    """Refuse two files of which one has most rows of the other, such as a copy that was written anew.

    Args:
        task: the task's name.
        hashes: 64-bit hashes of each file's rows.

    Raises:
        DataError: two files share more than three quarters of the smaller one's different rows, and each has at
            least five of them.
    """
    files = list(hashes)
    each = [np.unique(np.asarray(own, dtype=np.int64)) for own in hashes.values()]
    holder = np.repeat(np.arange(len(files)), [len(own) for own in each])
    _, first, inverse = np.unique(np.concatenate(each), return_index=True, return_inverse=True)
    pairs, counts = np.unique(holder[first[inverse]] * len(files) + holder, return_counts=True)
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        one, other = divmod(pair, len(files))
        smaller = min(len(each[one]), len(each[other]))
        if one != other and smaller >= _MIN_ROWS and count > _MAX_SHARED_FRACTION * smaller:
            raise _twice(task, files[one], files[other])


def _refuse_other_shards(task: str, files: Sequence[Path]) -> None:
    """Refuse equal names in two folders, and a file beside the three of ``…-00000-of-00003``."""
    names: dict[str, Path] = {}
    sets: dict[object, Path] = {}
    for file in files:
        other = names.setdefault(file.name, file)
        if other is not file:
            raise _twice(task, other, file)
        numbered = _SHARD.fullmatch(file.name)
        sets.setdefault(file if numbered is None else (file.parent, numbered[1], numbered[3]), file)
    if len(sets) > 1 and not all(isinstance(key, Path) for key in sets):
        raise _twice(task, *list(sets.values())[:2])


def _twice(task: str, one: Path, other: Path) -> DataError:
    return DataError(f"{task}: the samples would be read twice, from {one} and {other}; keep one of the two")


def _check_all_shards(files: Sequence[Path]) -> None:
    """Check that all three files of ``…-00000-of-00003`` are present."""
    for file in files:
        numbered = _SHARD.fullmatch(file.name)
        if numbered is None:
            continue
        for number in range(int(numbered[3])):
            other = f"{numbered[1]}{number:0{len(numbered[2])}d}-of-{numbered[3]}.parquet"
            if not (file.parent / other).is_file():
                raise DataError(
                    f"{file.parent} lacks {other}, one of {int(numbered[3])} files; download the missing ones"
                )


def _download_hub(task: str, repo: str, folder: Path, splits: Sequence[str]) -> None:
    """Download a data set's files unchanged; :func:`datasets.load_dataset` would keep two more copies."""
    remedy = f"{_what_to_get(repo, splits)} into a folder that you name with --data"
    try:
        import huggingface_hub  # comes with `datasets`
    except ImportError as error:
        raise DataError(
            f"{task}: no data, and the download needs an extra: pip install 'jwins[hf]'; or {remedy}"
        ) from error
    # It is kept after a failure, so that the next attempt continues there.
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        huggingface_hub.snapshot_download(  # shows progress, checks sizes
            repo, repo_type="dataset", allow_patterns="*.parquet", local_dir=partial
        )
    except Exception as error:  # several libraries, each with its own exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{task}: no data, and the download of {repo} failed ({reason}); {remedy}") from error
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file, which appears at ``path`` only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="partial-", dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


# --- decoded images -------------------------------------------------------------------------------------


def decoded_once(
    task: str, files: Mapping[str, Sequence[Path]], options: object, build: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the result of ``build``, cached under a hash of the content of ``files``.

    Args:
        task: the task's name.
        files: the files that ``build`` reads.
        options: other dependencies; their ``repr`` enters the name.
        build: makes the tensors.

    Raises:
        DataError: two files are copies, such as one for training and one for testing.
    """
    key = hashlib.blake2b(f"{_DECODER} {options!r}".encode(), digest_size=16)
    for split, paths in sorted(files.items()):
        for path in paths:
            key.update(f"{split} {_content_hash(path)}".encode())
    path = cache_folder() / "decoded" / f"{task}-{key.hexdigest()}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            _log.warning("%s is damaged (%s) and is made again", path, error)
    tensors = build()
    refuse_copies(task, [file for paths in files.values() for file in paths])  # after errors that say more
    try:
        _write_whole(path, lambda partial: save_file(tensors, partial))
    except OSError as error:
        _log.warning("decoded images are not kept: %s", error)
    return tensors


def _content_hash(path: Path) -> str:
    """Return the hash of a file's content, cached by name, size and time of change: CelebA has 12 GB."""
    stat = path.stat()
    seen = hashlib.blake2b(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=16)
    kept = cache_folder() / "hashes" / seen.hexdigest()
    with contextlib.suppress(OSError):
        return kept.read_text(encoding="ascii")
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "blake2b").hexdigest()
    with contextlib.suppress(OSError):
        _write_whole(kept, lambda partial: partial.write_text(found, encoding="ascii"))
    return found


# --- natural owners ------------------------------------------------------------------------------------


def key_numbers(keys: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Number owners' names, (n,) of str or int, from 0 in increasing order of the names.

    >>> key_numbers(["b", "a", "b"]).tolist()
    [1, 0, 1]
    """
    return np.unique(np.asarray(keys), return_inverse=True)[1].astype(np.int64)


def chosen_keys(
    task: str, option: str, keys: npt.NDArray[np.int64], count: int | None
) -> npt.NDArray[np.int64]:
    """Return the samples of ``count`` owners, drawn by :data:`SPLIT_SEED`, or all for None.

    Returns:
        (m,) int64, increasing sample numbers.

    Raises:
        ConfigError: the data have fewer owners.
    """
    if count is None:
        return np.arange(len(keys))
    owners = np.unique(keys)
    if not 1 <= count <= len(owners):
        raise ConfigError(
            f"task.options.{option}", count, f"expected 1 to {len(owners)}, the number in the data"
        )
    chosen = stream(SPLIT_SEED, f"{task} {option}").permutation(owners)[:count]
    return np.flatnonzero(np.isin(keys, chosen))


def split_within_keys(
    task: str, keys: npt.NDArray[np.int64], test_fraction: float, *, last: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split the samples of each owner into training and test samples.

    ``round(test_fraction * m)`` of an owner's m samples are for testing, but never all of them.

    Args:
        task: the task's name.
        keys: (n,) owners.
        test_fraction: in (0, 1).
        last: whether to test on the last samples of each owner, in place of samples drawn by
            :data:`SPLIT_SEED`.

    Returns:
        Two arrays of increasing sample numbers.

    >>> split_within_keys("t", np.array([7, 7, 7, 8]), 0.3, last=True)
    (array([0, 1, 3]), array([2]))
    """
    n = len(keys)
    shuffled = np.arange(n)[::-1] if last else stream(SPLIT_SEED, f"{task} split").permutation(n)
    order = shuffled[np.argsort(keys[shuffled], kind="stable")]
    _, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    num_test = np.minimum(np.rint(test_fraction * counts).astype(np.int64), counts - 1)
    place = np.arange(n) - np.repeat(starts, counts)
    is_test = np.zeros(n, dtype=bool)
    is_test[order[place < np.repeat(num_test, counts)]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)
