"""Bytes of integer levels against their entropy, and how long coding takes.

    python -m benchmarks entropy [--levels FOLDER]

Levels are those of a uniform quantizer for Laplacian values of four scales, one per subband, 92 % of them zero.
The entropy is that of the levels' own histogram, of all levels in one or of each subband by itself; no coder
that knows nothing else does better on average, and it does not count telling the histogram. Sizes of ours are
those of the whole section, and without its step (4 bytes) and lengths: what levels and their models take. Every
coder encodes and decodes in turn, nine times; the fastest counts.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from jwins.wire import MAX_RUNS, entropy, pco, quantized

COUNTS = (10_000, 50_000, 500_000)
RATIO = 1.55  # from each subband's scale to the next
ZEROS = 0.92
SEED = 1
REPEATS = 9
TARGETS = {10_000: 0.03, 50_000: 0.007, 500_000: 0.007}  # above the entropy given the subband
STEP = 0.01
WORD = 2**32 - 1  # stands for the step where only levels are looked at; not counted there

Levels = npt.NDArray[np.int32]
Runs = tuple[int, ...]


@dataclass(frozen=True)
class Coded:
    """What one coder makes of some levels: bytes, and milliseconds to encode and decode."""

    size: int
    encode_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Row:
    """Levels, what is the least for them, and what coders make of them; entropies are in bytes."""

    name: str
    count: int
    zeros: float
    entropy: float
    conditional: float
    coders: dict[str, Coded]
    target: float | None = None


def entropy_bytes(levels: Levels) -> float:
    """Of the histogram of the levels."""
    counts = np.unique(levels, return_counts=True)[1]
    return float(-(counts * np.log2(counts / len(levels))).sum() / 8)


def conditional_bytes(levels: Levels, runs: Runs) -> float:
    """Of the histogram of each run."""
    return sum(entropy_bytes(part) for part in np.split(levels, np.cumsum(runs)[:-1]) if len(part))


def laplacian(count: int, seed: int = SEED) -> tuple[Levels, Runs]:
    """Levels of four subbands, coarsest first, with the given fraction of zeros."""
    runs = (count // 8, count // 8, count // 4, count // 2)
    values = np.random.default_rng([seed, count]).laplace(size=count)
    values *= np.repeat(RATIO ** -np.arange(4.0), runs)
    step = 2 * np.quantile(np.abs(values), ZEROS)
    return np.round(values / step).astype(np.int32), runs


def coders() -> dict[str, tuple[Callable[[Levels, Runs], bytes], Callable[[bytes, int, Runs], Levels]]]:
    """Each as how to encode and how to decode; zstd where Python has it."""

    def plain(levels: Levels) -> bytes:
        return levels.astype(np.int8).tobytes() if np.abs(levels).max() < 128 else levels.tobytes()

    def wide(data: bytes, count: int) -> Levels:
        return np.frombuffer(data, dtype=np.int8 if len(data) == count else np.int32).astype(np.int32)

    def coded(levels: Levels, runs: Runs) -> bytes:
        return quantized.encode(levels, np.full(len(runs), STEP, dtype=np.float32), runs)

    found: dict[str, Any] = {
        "ours": (
            coded,
            lambda data, count, runs: quantized.decode(memoryview(data), count=count, most_runs=MAX_RUNS)[0],
        ),
        "ours, levels": (
            lambda levels, runs: entropy.encode_levels(levels, runs, WORD),
            lambda data, count, runs: entropy.decode_levels(memoryview(data), count=count, runs=runs)[0],
        ),
        "pcodec": (
            pco.encode_levels,
            lambda data, count, runs: pco.decode_levels(memoryview(data), count=count, runs=runs),
        ),
        "zlib-9": (
            lambda levels, runs: zlib.compress(plain(levels), 9),
            lambda data, count, runs: wide(zlib.decompress(data), count),
        ),
    }
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        return found
    found["zstd-19"] = (
        lambda levels, runs: zstd.compress(plain(levels), 19),
        lambda data, count, runs: wide(zstd.decompress(data), count),
    )
    return found


def measured(name: str, levels: Levels, runs: Runs, target: float | None = None) -> Row:
    """One row; every coder gives back the same levels."""
    made: dict[str, Coded] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(REPEATS):
        for coder, (encode, decode) in coders().items():
            started = time.perf_counter()
            data = encode(levels, runs)
            encoded = time.perf_counter()
            back = decode(data, len(levels), runs)
            ended = time.perf_counter()
            assert np.array_equal(back, levels), coder
            times.setdefault(coder, []).append((1e3 * (encoded - started), 1e3 * (ended - encoded)))
            encode_ms, decode_ms = map(min, zip(*times[coder], strict=True))
            size = len(data) - 4 if coder == "ours, levels" else len(data)
            made[coder] = Coded(size, encode_ms, decode_ms)
    zeros = float((levels == 0).mean())
    return Row(name, len(levels), zeros, entropy_bytes(levels), conditional_bytes(levels, runs), made, target)


def rows(folder: Path | None = None) -> list[Row]:
    """Of Laplacian levels, then of those in ``folder``: npz files with arrays ``levels`` and ``runs``."""
    found = [measured("Laplacian", *laplacian(count), TARGETS[count]) for count in COUNTS]
    for path in sorted(folder.glob("*.npz")) if folder is not None else ():
        with np.load(path, allow_pickle=False) as arrays:
            levels, runs = arrays["levels"].astype(np.int32), tuple(arrays["runs"].tolist())
        found.append(measured(path.stem, levels, runs))
    return found


def table(found: list[Row]) -> Table:
    """The rows as a table."""
    shown = Table(title="bytes against the entropy of the levels in each subband", box=box.SIMPLE)
    for name in (
        "levels",
        "count",
        "zeros",
        "entropy",
        "by subband",
        "coder",
        "bytes",
        "excess",
        "ms in",
        "ms out",
    ):
        shown.add_column(name, justify="left" if name in ("levels", "coder") else "right", no_wrap=True)
    for row in found:
        about = [
            row.name,
            f"{row.count:,}",
            f"{row.zeros:.1%}",
            f"{row.entropy:,.0f}",
            f"{row.conditional:,.0f}",
        ]
        for coder, of in row.coders.items():
            excess = of.size / row.conditional - 1
            verdict = ""
            if row.target is not None and coder == "ours, levels":
                verdict = f" ({row.target:.1%} {'met' if excess <= row.target else 'MISSED'})"
            times = f"{of.encode_ms:.2f}", f"{of.decode_ms:.2f}"
            shown.add_row(*about, coder, f"{of.size:,}", f"{excess:+.2%}{verdict}", *times)
            about = [""] * len(about)
    return shown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--levels", type=Path, help="folder of npz files with further levels")
    Console(width=150).print(table(rows(parser.parse_args().levels)))
