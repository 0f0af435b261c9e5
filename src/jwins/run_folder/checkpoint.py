"""Checkpoints: files of tensors and JSON. There is no pickle, so loading a file never runs code from it.

A state is a tree of frozen dataclasses, dicts, lists, tuples, frozensets, strings, numbers, bytes, None,
numpy arrays and tensors. Tensors and bytes go to a safetensors file as they are; the rest becomes JSON in that
file's metadata. Dataclasses are written by name and read back only if the reader lists them, so a file cannot
name a class of its choosing.

A file is written beside its final place, flushed to the disk, and renamed. Its name ends in its own SHA-256. So
a file under its final name is complete, even if the process was killed, and damage is detected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from jwins.errors import DataError, ResumeError, UsageError
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.own_files import private_folder

FORMAT = "jwins-state-3"

_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types of tensors, in the order in which safetensors files have them."""

_NAME = re.compile(r"round-(\d{8})-([0-9a-f]{16})\.safetensors")
_SHARD = re.compile(r"shard-(\d{8})-\d+-([0-9a-f]{16})\.safetensors")


@dataclasses.dataclass(frozen=True, slots=True)
class Dumped:
    """Result of :func:`dump`, perhaps from another process."""

    data: bytes


def dump(state: object) -> bytes:
    """Encode a state as the bytes of a safetensors file, which :func:`write` does without a copy of the state.

    Equal states give equal bytes. Tensors and bytes that are the same object are stored once and restored as
    one object. Dataclass fields with ``init=False`` are caches and are left out.

    Raises:
        UsageError: a type in the state cannot be stored; the message names its place.
    """
    return b"".join(_pieces(state))


def _pieces(state: object) -> list[bytes | memoryview]:
    """Return the header and the memory of all tensors, as safetensors orders them; nothing is copied."""
    tensors: dict[str, Tensor | bytes] = {}
    tree = _pack(state, "state", tensors, {})
    # One metadata entry, because safetensors does not keep the order of several.
    text = json.dumps({"format": FORMAT, "state": tree}, separators=(",", ":"))
    header: dict[str, object] = {"__metadata__": {"jwins": text}}
    pieces: list[bytes | memoryview] = []
    order, end = {dtype: at for at, dtype in enumerate(_DTYPES)}, 0
    for name, value in sorted(tensors.items(), key=lambda item: (order[_dtype(item[1])], item[0])):
        piece = value if isinstance(value, bytes) else _memory(value)
        shape = [len(value)] if isinstance(value, bytes) else list(value.shape)
        begin, end = end, end + len(piece)
        header[name] = {"dtype": _DTYPES[_dtype(value)], "shape": shape, "data_offsets": [begin, end]}
        pieces.append(piece)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return [len(head).to_bytes(8, "little") + head, *pieces]


def _memory(tensor: Tensor) -> memoryview:
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _dtype(value: Tensor | bytes) -> torch.dtype:
    return torch.uint8 if isinstance(value, bytes) else value.dtype


def load(data: bytes, classes: Iterable[type]) -> Any:
    """Decode a state of :func:`dump`.

    Raises:
        DataError: not a checkpoint, a damaged one, or one with a class that is not listed.
        UsageError: two different classes have the same name.
    """
    known: dict[str, type] = {}
    for one in classes:
        if known.setdefault(one.__name__, one) is not one:
            raise UsageError(f"two classes of a checkpoint are called {one.__name__}: rename one of them")
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"]["jwins"])
        if content["format"] != FORMAT:
            raise DataError(f"checkpoint of format {content['format']!r}: this version reads {FORMAT!r}")
        return _unpack(content["state"], tensors, known, {})
    except DataError:
        raise
    except Exception as error:  # any error that a damaged file causes, also in libraries
        raise DataError(f"not a checkpoint, or a damaged one ({type(error).__name__}: {error})") from error


def write(folder: Path, round: int, state: object, *, keep: int = 2) -> Path:
    """Add a checkpoint to ``folder`` and remove all but the newest ``keep``, with their shards.

    Two are kept, so that a damaged file does no harm. The shards of this round have been written before.

    Raises:
        OSError: the disk is full; existing checkpoints are unchanged.
    """
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    path = _write(folder, f"round-{round:08d}", state)
    others = [p for p in _all(folder) if p != path]
    for old in others[max(0, keep - 1) :]:
        old.unlink(missing_ok=True)
    rounds = {path.name[6:14] for path in _all(folder)}
    for shard in folder.iterdir():
        if (match := _SHARD.fullmatch(shard.name)) and match[1] not in rounds:
            shard.unlink(missing_ok=True)
    return path


def write_shard(folder: Path, round: int, number: int, state: object) -> str:
    """Write a shard of a checkpoint before the checkpoint itself, which then names it.

    Returns:
        The file's name, for :func:`read_shard`.

    Raises:
        OSError: the disk is full; existing checkpoints are unchanged.
    """
    return _write(folder, f"shard-{round:08d}-{number}", state).name


def _write(folder: Path, label: str, state: object) -> Path:
    private_folder(folder)
    pieces = [state.data] if isinstance(state, Dumped) else _pieces(state)
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    path = folder / f"{label}-{digest.hexdigest()[:16]}.safetensors"
    write_atomically(path, pieces)
    return path


def latest(
    folder: Path, classes: Iterable[type], complete: Callable[[Any], Any] = lambda state: state
) -> tuple[Any, Path]:
    """Read the newest undamaged checkpoint in ``folder``.

    Args:
        folder: folder of checkpoints.
        classes: the dataclasses that may occur.
        complete: converts a state to the return value, for example by reading its shards. It raises DataError
            for a state that cannot be used.

    Raises:
        ResumeError: no such checkpoint.
    """
    known = tuple(classes)
    problems = []
    for path in _all(folder):
        try:
            return complete(read(path, known)), path
        except (DataError, OSError) as error:
            problems.append(f"{path.name}: {error}")
    detail = "; ".join(problems) or "none was written yet"
    raise ResumeError(
        f"{folder}: no usable checkpoint ({detail}); remove the run's folder, or choose another one"
    )


def read_shard(folder: Path, name: str, classes: Iterable[type]) -> Any:
    """Read the state of a shard that a checkpoint names.

    Raises:
        DataError: no such shard, or a damaged one.
    """
    if not _SHARD.fullmatch(name):
        raise DataError(f"{name!r} is not the name of a shard")
    try:
        return read(folder / name, classes)
    except (DataError, OSError) as error:
        raise DataError(f"{name}: {error}") from error


def read(path: Path, classes: Iterable[type]) -> Any:
    """Read the state of one file, after checking the SHA-256 in its name.

    Raises:
        DataError: damaged or not a checkpoint.
    """
    match = _NAME.fullmatch(path.name) or _SHARD.fullmatch(path.name)
    data = path.read_bytes()
    if match and not hashlib.sha256(data).hexdigest().startswith(match[2]):
        raise DataError("its content does not match the SHA-256 in its name")
    return load(data, classes)


def _all(folder: Path) -> list[Path]:
    """List the checkpoints in ``folder`` without shards, newest first: by round, then by time of writing."""
    found = [
        (int(match[1]), path.stat().st_mtime_ns, path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, _, path in sorted(found, reverse=True)]


def _pack(value: object, where: str, tensors: dict[str, Tensor | bytes], seen: dict[int, str]) -> object:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else {"f": str(value)}
    if isinstance(value, (Tensor, bytes)):
        name = seen.get(id(value))
        if name is None:
            if isinstance(value, Tensor) and value.dtype not in _DTYPES:
                raise UsageError(f"{where}: a tensor of {value.dtype} cannot be part of a checkpoint")
            name = seen[id(value)] = f"t{len(tensors)}"
            tensors[name] = value if isinstance(value, bytes) else value.detach().cpu().contiguous()
        return {"b" if isinstance(value, bytes) else "t": name}
    if isinstance(value, np.ndarray):
        try:  # of a copy: torch warns of read-only arrays, and ascontiguousarray changes shape () to (1,)
            tensor = torch.from_numpy(np.array(value, order="C"))
        except (TypeError, ValueError):
            raise UsageError(f"{where}: a ndarray of {value.dtype} cannot be part of a checkpoint") from None
        return {"n": _pack(tensor, where, tensors, {})}
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return _pack(value.item(), where, tensors, seen)
    if isinstance(value, Mapping):
        return {
            "d": [
                [_pack(k, where, tensors, seen), _pack(v, f"{where}[{k!r}]", tensors, seen)]
                for k, v in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        tag = "l" if isinstance(value, list) else "u"
        return {tag: [_pack(v, f"{where}[{i}]", tensors, seen) for i, v in enumerate(value)]}
    if isinstance(value, (set, frozenset)):
        try:
            ordered = sorted(value)  # equal sets may iterate in different orders
        except TypeError as error:
            raise UsageError(
                f"{where}: a {type(value).__name__} whose elements cannot be sorted ({error}); use a list"
            ) from None
        return {"s": [_pack(v, where, tensors, seen) for v in ordered]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _pack(getattr(value, f.name), f"{where}.{f.name}", tensors, seen)
            for f in dataclasses.fields(value)
            if f.init  # the others are caches
        }
        return {"c": type(value).__name__, "v": fields}
    raise UsageError(f"{where}: a {type(value).__name__} cannot be part of a checkpoint")


def _unpack(
    tree: Any, tensors: Mapping[str, Tensor], classes: Mapping[str, type], texts: dict[str, bytes]
) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "c" in tree:
        cls = classes.get(tree["c"])
        if cls is None:
            raise DataError(f"checkpoint has a {tree['c']}, which is not allowed here")
        return cls(**{k: _unpack(v, tensors, classes, texts) for k, v in tree["v"].items()})
    ((tag, content),) = tree.items()
    match tag:
        case "t":
            return tensors[content]
        case "n":
            return _unpack(content, tensors, classes, texts).numpy()
        case "f":
            return float(content)
        case "b":
            if content not in texts:
                texts[content] = tensors[content].numpy().tobytes()
            return texts[content]
        case "d":
            return {
                _unpack(k, tensors, classes, texts): _unpack(v, tensors, classes, texts) for k, v in content
            }
        case "l":
            return [_unpack(v, tensors, classes, texts) for v in content]
        case "u":
            return tuple(_unpack(v, tensors, classes, texts) for v in content)
        case "s":
            return frozenset(_unpack(v, tensors, classes, texts) for v in content)
        case _:
            raise DataError(f"checkpoint has an unknown tag {tag!r}")
