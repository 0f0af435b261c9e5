"""Archives of runs: read like folders, the same bytes each time, and harmless if damaged or hostile."""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jwins.errors import DataError
from jwins.run_folder import archive, traffic
from jwins.run_folder.rows import EvalRow, read_rows

FILES = {
    "summary.json": b"{}",
    "jwins/seed-1/metrics.jsonl": b"one\n",
    "jwins/seed-10/metrics.jsonl": b"ten\n",
    "jwins/seed-2/config.toml": b'name = "x"\n',
    "jwins/tuning/lr=0.1,gamma=0.2/seed-2/metrics.jsonl": b"",
    "full sharing/seed-1/metrics.jsonl": bytes(range(256)) * 100,
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    archive.write(tmp_path / "runs.tar.xz", FILES)
    return tmp_path / "runs.tar.xz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "jwins",
        "jwins/seed-1",
        "jwins/seed-1/metrics.jsonl",
        "jwins/seed",
        "nothing",
        "jwins/tuning/lr=0.1,gamma=0.2",
    ],
)
def test_an_archive_answers_as_a_folder_does(path: str, packed: Path, folder: Path) -> None:
    there, here = folder / path, packed / path
    assert archive.is_dir(here) == archive.is_dir(there) == there.is_dir()
    assert archive.is_file(here) == archive.is_file(there) == there.is_file()
    if archive.is_file(there):
        with archive.open_file(here) as one, archive.open_file(there) as other:
            assert one.read() == other.read() == there.read_bytes()
    else:
        with pytest.raises(FileNotFoundError, match=r"no such file in runs\.tar\.xz"):
            archive.open_file(here)
    if there.is_dir():
        assert archive.folders(there) == sorted(entry for entry in there.iterdir() if entry.is_dir())
        assert [p.relative_to(packed) for p in archive.folders(here)] == [
            p.relative_to(folder) for p in archive.folders(there)
        ]
        for pattern in ("*/seed-*/metrics.jsonl", "seed-*/*", "*"):
            found = [p.relative_to(folder) for p in archive.find(there, pattern)]
            assert found == [p.relative_to(packed) for p in archive.find(here, pattern)]
    assert archive.archive_of(here) == packed
    assert archive.archive_of(there) is None
    assert (archive.beside(here), archive.beside(there)) == (packed.parent, there)


def test_runs_are_found_and_tuning_is_not(packed: Path) -> None:
    found = archive.find(packed, "*/seed-*/metrics.jsonl")
    names = [path.relative_to(packed).parent.as_posix() for path in found]
    assert names == ["full sharing/seed-1", "jwins/seed-1", "jwins/seed-10"]


def test_the_same_files_give_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    archive.write(tmp_path / "again.tar.xz", dict(reversed(FILES.items())))
    assert (tmp_path / "again.tar.xz").read_bytes() == packed.read_bytes()


def test_any_tar_reads_what_is_written_and_writes_what_is_read(
    packed: Path, folder: Path, tmp_path: Path
) -> None:
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    unpacked = tmp_path / "unpacked"
    assert {
        p.relative_to(unpacked).as_posix(): p.read_bytes() for p in unpacked.rglob("*") if p.is_file()
    } == FILES
    with tarfile.open(tmp_path / "own.tar.xz", "w:xz") as tar:
        tar.add(folder, ".")  # as `tar -cJf own.tar.xz -C runs .`
    assert archive.is_dir(tmp_path / "own.tar.xz" / "jwins")
    assert {name: archive.open_file(tmp_path / "own.tar.xz" / name).read() for name in FILES} == FILES


def test_another_archive_of_the_same_name_is_read_again(packed: Path) -> None:
    assert archive.read_text(packed / "summary.json") == "{}"
    archive.write(packed, {"summary.json": "{äöü}\r\n".encode()})
    assert archive.read_text(packed / "summary.json") == "{äöü}\n"
    assert not archive.is_dir(packed / "jwins")


def test_rows_and_traffic_are_read_through_the_path(tmp_path: Path) -> None:
    row = (
        b'{"kind":"eval","round":1,"time_s":0.5,"nodes":[0],"metrics":{},"per_node":{},"train_loss":null,'
        b'"consensus_distance":0.0,"traffic":{},"samples":3}\n'
    )
    (tmp_path / "traffic.csv").write_bytes(b"")
    traffic.write(tmp_path, [traffic.Traffic(0, 1, traffic.TrafficSplit(values=7))])
    edges = (tmp_path / "traffic.csv").read_bytes()
    archive.write(tmp_path / "runs.tar.xz", {"metrics.jsonl": row + row[:20], "traffic.csv": edges})
    (read,) = read_rows(tmp_path / "runs.tar.xz" / "metrics.jsonl")
    assert isinstance(read, EvalRow)
    assert (read.round, read.samples) == (1, 3)
    assert traffic.read(tmp_path / "runs.tar.xz") == traffic.read(tmp_path)
    assert traffic.read(tmp_path / "runs.tar.xz" / "elsewhere") is None
    archive.write(tmp_path / "runs.tar.xz", {"metrics.jsonl": row + b"nonsense\n"})
    with pytest.raises(DataError, match=r"runs\.tar\.xz.metrics\.jsonl, line 2: not a metrics row"):
        list(read_rows(tmp_path / "runs.tar.xz" / "metrics.jsonl"))


# --- Damaged and hostile archives -------------------------------------------------------------------------


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return lzma.compress(packed.getvalue())


def _link(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


_TWO_FILES = lzma.decompress(_tar((tarfile.TarInfo("jwins/a"), b""), (tarfile.TarInfo("jwins/b"), b"")))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data[: len(data) // 2], r"cut off after [\d,]+ bytes; restore or download it again"),
        (lambda data: b"", "cut off after 0 bytes"),
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], r"damaged \(.+\); restore or download"),
        (
            lambda data: lzma.compress(_TWO_FILES[:1024]) + lzma.compress(_TWO_FILES[1024:]),
            "several compressed streams; pack",
        ),
        (lambda data: b"PK\3\4 is the beginning of a zip file", "not an archive of runs"),
        (lambda data: lzma.compress(b"x" * 2000), "not an archive of runs"),
        (lambda data: _tar((tarfile.TarInfo("../a"), b"")), r"'\.\./a' is not a path within an archive"),
        (lambda data: _tar((tarfile.TarInfo("a/../../b"), b"")), "is not a path within an archive"),
        (lambda data: _tar((tarfile.TarInfo("/a"), b"")), "'/a' is not a path within"),
        (lambda data: _tar((tarfile.TarInfo("a\\b"), b"")), "is not a path within"),
        (lambda data: _tar((tarfile.TarInfo("a//b"), b"")), "is not a path within"),
        (lambda data: _tar((_link("a"), b"")), "'a' is not a plain file"),
        (lambda data: _tar(*[(tarfile.TarInfo("a"), b"1")] * 2), "occurs twice"),
    ],
)
def test_a_bad_archive_is_refused_with_its_name_and_a_remedy(
    change: Callable[[bytes], bytes], problem: str, packed: Path
) -> None:
    packed.write_bytes(change(packed.read_bytes()))
    for ask in (archive.is_file, archive.is_dir, archive.open_file, lambda path: archive.find(path, "*")):
        with pytest.raises(DataError, match=rf"^{packed}: .*{problem}"):
            ask(packed / "jwins")


def test_a_small_file_that_unpacks_to_much_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 100_000)
    assert archive.is_file(packed / "summary.json")
    packed.write_bytes(_tar((tarfile.TarInfo("summary.json"), bytes(100_000))))
    with pytest.raises(DataError, match="holds more than 100,000 bytes; unpack it and give the folder instead"):
        archive.is_file(packed / "summary.json")
    with pytest.raises(DataError, match="at most 100,000 can be read back"):
        archive.write(packed, {"summary.json": bytes(100_000)})


def test_a_dictionary_larger_than_any_of_xz_is_refused(packed: Path) -> None:
    large = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**28}]
    packed.write_bytes(lzma.compress(b"x" * 1000, filters=large))
    with pytest.raises(DataError, match=r"damaged .*[Mm]emory"):
        archive.is_dir(packed / "jwins")


def test_what_could_not_be_read_back_is_not_written(packed: Path) -> None:
    before = packed.read_bytes()
    with pytest.raises(DataError, match="is not a path within an archive"):
        archive.write(packed, {"../a": b""})
    assert packed.read_bytes() == before
