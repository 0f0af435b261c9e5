"""States come back as they were; a damaged, half-written or hostile file does no harm."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from jwins.errors import DataError, ResumeError, UsageError
from jwins.node import Phase
from jwins.run_folder import checkpoint


@dataclass(frozen=True)
class Inner:
    name: str
    vector: Any


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner | None
    items: Any
    cache: Any = field(default=None, init=False)


CLASSES = (Inner, Outer)

floats = st.floats(allow_nan=True)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), floats, st.text(max_size=6), st.binary(max_size=6))
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@st.composite
def some_tensors(draw: Any) -> torch.Tensor:
    shape = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0, 3)]))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 100))
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def some_arrays(draw: Any) -> np.ndarray:
    shape = draw(st.sampled_from([(), (0,), (3,), (2, 3)]))
    dtype = draw(st.sampled_from(["f4", "f8", "i8", "i4", "u1", "u4", "u8", "?"]))
    return np.asarray(np.arange(int(np.prod(shape))).reshape(shape) % 2, dtype=dtype)


keys = st.one_of(st.integers(), st.text(max_size=4), st.tuples(st.integers(), st.integers()), st.booleans())
states = st.recursive(
    st.one_of(scalars, some_tensors(), some_arrays()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.frozensets(st.integers(), max_size=3),
        st.frozensets(st.tuples(st.integers(), st.text(max_size=2)), max_size=3),
        st.builds(Inner, st.text(max_size=4), inner),
        st.builds(Outer, st.none() | st.builds(Inner, st.text(max_size=2), inner), inner),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (a != a and b != b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (Inner, Outer)):
        return all(same(getattr(a, n), getattr(b, n)) for n in a.__dataclass_fields__)
    return bool(a == b)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --- Round trips ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(states)
def test_comes_back_as_it_was(state: Any) -> None:
    data = checkpoint.dump(state)
    again = checkpoint.load(data, CLASSES)
    assert same(state, again)
    assert checkpoint.dump(again) == data, "equal states give equal bytes"


def test_what_is_one_object_stays_one() -> None:
    tensor, data = torch.arange(1000.0), bytes(range(256)) * 10
    dumped = checkpoint.dump([tensor, {"a": tensor}, data, (data,)])
    assert len(dumped) < 4000 + 2560 + 500
    first, second, third, fourth = checkpoint.load(dumped, ())
    assert first is second["a"]
    assert third is fourth[0]


def test_equal_tensors_that_are_two_objects_stay_two() -> None:
    a, b = checkpoint.load(checkpoint.dump([torch.zeros(3), torch.zeros(3)]), ())
    assert a is not b
    a.add_(1)
    assert b.tolist() == [0, 0, 0]


def test_views_of_one_memory_are_stored_apart_and_whole() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    rows = {i: matrix[i] for i in range(3)}
    again = checkpoint.load(checkpoint.dump([rows, matrix.T, matrix[:, 1], torch.nn.Parameter(matrix)]), ())
    assert torch.equal(again[0][2], matrix[2])
    assert torch.equal(again[1], matrix.T)
    assert torch.equal(again[2], matrix[:, 1])
    assert torch.equal(again[3], matrix)
    assert not again[3].requires_grad


def test_numpy_arrays_of_any_layout() -> None:
    readonly = np.arange(6)
    readonly.flags.writeable = False
    matrix = np.arange(6.0).reshape(2, 3)
    state = [readonly, matrix.T, matrix[:, ::2], np.array(3.0), np.zeros((2, 0))]
    for before, after in zip(state, checkpoint.load(checkpoint.dump(state), ()), strict=True):
        assert same(np.array(before, order="C"), after)
        assert after.flags.writeable


def test_numbers_of_other_kinds_become_plain_ones() -> None:
    state = [np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), Phase.WAITING, 2**80, -0.0]
    again = checkpoint.load(checkpoint.dump(state), ())
    assert [type(value) for value in again] == [int, float, float, bool, str, int, float]
    assert again[:2] == [3, 0.5]
    assert again[4:6] == ["waiting", 2**80]
    assert str(again[6]) == "-0.0"


def test_strings_of_any_kind() -> None:
    for text in ("", "\x00", "ä☃\U0001f600", "\ud800", '"\\', "\n"):
        assert checkpoint.load(checkpoint.dump({text: text}), ()) == {text: text}


def test_fields_that_are_not_arguments_are_left_out() -> None:
    outer = Outer(None, 1)
    object.__setattr__(outer, "cache", lambda: None)
    again = checkpoint.load(checkpoint.dump(outer), CLASSES)
    assert (again.items, again.cache) == (1, None)


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": [1, object()]}, r"state\['a'\]\[1\]: a object"),
        (Inner("x", print), r"state.vector: a builtin_function_or_method"),
        ([Inner], r"state\[0\]: a type"),
        ([1j], r"state\[0\]: a complex"),
        ({"n": np.array(["text"])}, r"state\['n'\]: a ndarray"),
        ({"n": np.zeros(2, dtype=">f4")}, r"state\['n'\]: a ndarray"),
        ({"n": np.array([object()])}, r"state\['n'\]: a ndarray"),
        ([{1, "a"}], r"state\[0\]: a set"),
    ],
)
def test_what_cannot_be_stored_is_named(state: Any, where: str) -> None:
    with pytest.raises(UsageError, match=where):
        checkpoint.dump(state)


# --- Files that are not what they seem ------------------------------------------------------------------------


def crafted(tree: Any, format: str = checkpoint.FORMAT) -> bytes:
    return save({"t0": torch.zeros(2)}, metadata={"jwins": json.dumps({"format": format, "state": tree})})


def test_only_listed_classes_come_back() -> None:
    data = checkpoint.dump(Inner("a", 1))
    with pytest.raises(DataError, match="Inner, which is not allowed here"):
        checkpoint.load(data, (Outer,))
    for name in ("os.system", "builtins.eval", "Path"):
        with pytest.raises(DataError, match="is not allowed here"):
            checkpoint.load(crafted({"c": name, "v": {}}), CLASSES)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",  # a pickle
        b"\xff" * 100,
        save({"a": torch.zeros(1)}),
        save({"a": torch.zeros(1)}, metadata={"jwins": "{"}),
        crafted(1, format="jwins-state-9"),
        crafted({"x": 1}),
        crafted({"t": "t9"}),
        crafted({"t": ["t0"]}),
        crafted({"a": 1, "b": 2}),
        crafted({}),
        crafted({"c": "Inner", "v": {"nonsense": 1}}),
        crafted({"c": ["Inner"], "v": {}}),
        crafted({"d": [[{"l": []}, 1]]}),
        crafted({"d": [1]}),
        crafted({"f": "one"}),
    ],
    ids=range(17),
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        checkpoint.load(data, CLASSES)


def test_deep_trees_are_refused_not_a_crash() -> None:
    text = '{"format":"jwins-state-1","state":' + '{"l":[' * 100_000 + "]}" * 100_000 + "}"
    with pytest.raises(DataError):
        checkpoint.load(save({"a": torch.zeros(1)}, metadata={"jwins": text}), CLASSES)


# --- Damage ---------------------------------------------------------------------------------------------------


def state_of(round: int) -> Any:
    return {"round": round, "params": torch.arange(20.0) + round}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for r in (10, 20):
        checkpoint.write(tmp_path / "checkpoints", r, state_of(r))
    return tmp_path / "checkpoints"


def newest(folder: Path) -> Path:
    return max(folder.glob("round-*"))


def round_of(folder: Path) -> int:
    state, path = checkpoint.latest(folder, ())
    assert same(state, state_of(state["round"]))
    assert path.name.startswith(f"round-{state['round']:08d}-")
    return int(state["round"])


def test_every_truncation_falls_back_to_the_older_file(folder: Path) -> None:
    path = newest(folder)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DataError):
            checkpoint.read(path, ())
        assert round_of(folder) == 10
    path.write_bytes(data)
    assert round_of(folder) == 20


def test_every_flipped_byte_falls_back_to_the_older_file(folder: Path) -> None:
    path = newest(folder)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 + at % 255)]) + data[at + 1 :])
        with pytest.raises(DataError):
            checkpoint.read(path, ())
    assert round_of(folder) == 10


def test_appended_bytes_are_noticed(folder: Path) -> None:
    path = newest(folder)
    path.write_bytes(path.read_bytes() + b"\x00")
    assert round_of(folder) == 10


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_that_no_hash_protects_gives_data_error_or_a_state(data: Any) -> None:
    """``load`` alone, as for a file under another name."""
    good = bytearray(
        checkpoint.dump(Outer(Inner("a", torch.arange(4.0)), {1: [b"x", 2.5], (1, 2): frozenset({3})}))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        checkpoint.load(bytes(good), CLASSES)


def test_when_all_are_damaged_each_is_named(folder: Path) -> None:
    names = []
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
        names.append(path.name)
    with pytest.raises(ResumeError, match=r"no usable checkpoint.*; remove the run.s folder") as caught:
        checkpoint.latest(folder, ())
    assert all(name in str(caught.value) for name in names)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ResumeError, match="none was written yet"):
            checkpoint.latest(folder, ())


def test_an_unreadable_file_is_not_the_end(folder: Path) -> None:
    path = newest(folder)
    path.unlink()
    path.mkdir()
    assert round_of(folder) == 10


# --- Writing --------------------------------------------------------------------------------------------------


def test_keeps_the_newest_two(tmp_path: Path) -> None:
    for r in (1, 2, 3, 10, 100):
        path = checkpoint.write(tmp_path, r, state_of(r))
        assert round_of(tmp_path) == r
        assert path in tmp_path.iterdir()
    assert sorted(p.name[:14] for p in tmp_path.iterdir()) == ["round-00000010", "round-00000100"]


def test_the_file_that_was_just_written_is_never_removed(tmp_path: Path) -> None:
    """A run that resumed from an older file writes earlier rounds than a damaged newer one."""
    for r in (10, 20):
        checkpoint.write(tmp_path, r, state_of(r))
    newest(tmp_path).write_bytes(b"damaged")
    checkpoint.write(tmp_path, 15, state_of(15))
    assert round_of(tmp_path) == 15
    checkpoint.write(tmp_path, 16, state_of(16))
    assert round_of(tmp_path) == 16


def test_two_of_one_round(tmp_path: Path) -> None:
    first = checkpoint.write(tmp_path, 5, state_of(5))
    os.utime(first, ns=(0, 0))
    second = checkpoint.write(tmp_path, 5, {"round": 5, "more": 1})
    assert checkpoint.latest(tmp_path, ())[1] == second
    assert checkpoint.write(tmp_path, 5, {"round": 5, "more": 1}) == second


def test_the_name_holds_the_hash(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 7, state_of(7))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"round-00000007-{digest[:16]}.safetensors"


def test_leftovers_are_cleaned_and_strangers_left_alone(folder: Path) -> None:
    leftover = folder / ".round-00000030-0123456789abcdef.safetensors.999.partial"
    stranger = folder / "notes.txt"
    leftover.write_bytes(b"half")
    stranger.write_text("mine")
    assert round_of(folder) == 20
    checkpoint.write(folder, 30, state_of(30))
    assert not leftover.exists()
    assert stranger.read_text() == "mine"
    assert round_of(folder) == 30


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["os.fsync", "pathlib.Path.replace", "open", "write"])
def test_a_full_disk_leaves_everything_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with monkeypatch.context() as patch:
        if what == "write":
            patch.setattr("jwins.run_folder.atomic.os.fsync", full_disk)
            patch.setattr("jwins.run_folder.checkpoint.dump", lambda *a, **k: b"x" * 10)
        elif what == "open":
            patch.setattr("jwins.run_folder.atomic.open_own", full_disk)
        else:
            patch.setattr(what, full_disk)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.write(folder, 30, state_of(30))
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert round_of(folder) == 20


def test_a_write_that_stops_half_way_leaves_everything_as_it_was(folder: Path) -> None:
    """The operating system's own limit: the file is cut in the middle of a write."""
    before = {p: p.read_bytes() for p in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError):
            checkpoint.write(folder, 30, torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    checkpoint.write(folder, 30, state_of(30))
    assert round_of(folder) == 30


def test_an_interrupt_while_writing_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(folder.iterdir())

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(folder, 30, state_of(30))
    assert set(folder.iterdir()) == before


ON_A_SMALL_DISK = """
import sys
from pathlib import Path
import torch
from jwins.run_folder import checkpoint

folder = Path(sys.argv[1])
checkpoint.write(folder, 1, {"round": 1, "x": torch.zeros(1000)})
try:
    checkpoint.write(folder, 2, {"round": 2, "x": torch.zeros(100_000)})
except OSError as error:
    assert error.errno == 28, error
else:
    raise SystemExit("the disk was large enough")
assert [p.name[:14] for p in folder.iterdir()] == ["round-00000001"], list(folder.iterdir())
assert checkpoint.latest(folder, ())[0]["round"] == 1
checkpoint.write(folder, 3, {"round": 3, "x": torch.zeros(1000)})
assert checkpoint.latest(folder, ())[0]["round"] == 3
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1)")
    mount = 'mount -t tmpfs -o size=128k tmpfs "$0" '
    trial = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, str(tmp_path)], capture_output=True, check=False
    )
    if trial.returncode:
        pytest.skip("may not mount a file system of its own")
    result = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            mount + '&& exec "$1" -c "$2" "$0"',
            str(tmp_path),
            sys.executable,
            ON_A_SMALL_DISK,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def ctypes_arrays() -> int:
    gc.collect()
    return sum(type(thing) is type(ctypes.c_ubyte * 1) for thing in gc.get_objects())


def test_nothing_stays_of_states_of_ever_new_lengths() -> None:
    """Frames are kept as bytes, and hardly two have the same length: a peer writes thousands."""
    checkpoint.dump(b"first")
    before = ctypes_arrays()
    for length in range(5000, 5200):
        checkpoint.dump([bytes(length), torch.zeros(length)])
    assert ctypes_arrays() - before < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_bytes_do_not_depend_on_the_way(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    data = checkpoint.dump({"a": tensor, "b": [b"xyz", torch.tensor(3.0)]})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert data == save(load(data), header["__metadata__"])
