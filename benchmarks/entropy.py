"""Bytes of integer symbols against their entropy, and how long coding takes.

    python -m benchmarks entropy [--symbols FOLDER]

Symbols are those of a uniform quantizer for Laplacian values of four scales, one per subband, 92 % of them
zero. The entropy is that of the symbols' own histogram, of all symbols in one or of each subband by itself; no
coder that knows nothing else does better on average, and it does not count telling the histogram. Sizes of ours
are those of the whole section, and of the symbols without its step and lengths.
Every coder encodes and decodes in turn, nine times; the fastest counts, in seconds of the processor. The last
row of Laplacian symbols, of which 3 % are not zero, is for the speed.
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

from jwins.wire import MAX_RUNS, pco, quantized
from jwins.wire.symbols import decode_symbols, encode_symbols

COUNTS = (10_000, 50_000, 500_000)
RATIO = 1.55  # from each subband's scale to the next
ZEROS = 0.92
SPARSE_COUNT, SPARSE_ZEROS = 2_000_000, 0.97
SEED = 1
REPEATS = 9
TARGETS = {10_000: 0.05, 50_000: 0.02, 500_000: 0.008}  # above the entropy given the subband
STEP = 0.01

Symbols = npt.NDArray[np.int32]
Runs = tuple[int, ...]


@dataclass(frozen=True)
class Coded:
    """Result of one coder for some symbols: bytes, and milliseconds to encode and decode."""

    size: int
    encode_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Row:
    """Symbols, what is the least for them, and what coders make of them; entropies are in bytes."""

    name: str
    count: int
    zeros: float
    entropy: float
    conditional: float
    coders: dict[str, Coded]
    target: float | None = None


def entropy_bytes(symbols: Symbols) -> float:
    """Of the histogram of the symbols."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / len(symbols))).sum() / 8)


def conditional_bytes(symbols: Symbols, runs: Runs) -> float:
    """Of the histogram of each run."""
    return sum(entropy_bytes(part) for part in np.split(symbols, np.cumsum(runs)[:-1]) if len(part))


def laplacian(count: int, zeros: float = ZEROS, seed: int = SEED) -> tuple[Symbols, Runs]:
    """Symbols of four subbands, coarsest first, with the given fraction of zeros."""
    runs = (count // 8, count // 8, count // 4, count // 2)
    values = np.random.default_rng([seed, count]).laplace(size=count)
    values *= np.repeat(RATIO ** -np.arange(4.0), runs)
    step = 2 * np.quantile(np.abs(values), zeros)
    return np.round(values / step).astype(np.int32), runs


def coders() -> dict[str, tuple[Callable[[Symbols, Runs], bytes], Callable[[bytes, int, Runs], Symbols]]]:
    """Each as how to encode and how to decode; zstd where Python has it."""

    def plain(symbols: Symbols) -> bytes:
        return symbols.astype(np.int8).tobytes() if np.abs(symbols).max() < 128 else symbols.tobytes()

    def wide(data: bytes, count: int) -> Symbols:
        return np.frombuffer(data, dtype=np.int8 if len(data) == count else np.int32).astype(np.int32)

    def coded(symbols: Symbols, runs: Runs) -> bytes:
        return quantized.encode(symbols, np.full(len(runs), STEP, dtype=np.float32), runs)

    found: dict[str, Any] = {
        "ours": (
            coded,
            lambda data, count, runs: quantized.decode(memoryview(data), count=count, max_runs=MAX_RUNS)[0],
        ),
        "ours, symbols": (
            encode_symbols,
            lambda data, count, runs: decode_symbols(memoryview(data), count=count, runs=runs),
        ),
        "pcodec": (
            pco.encode_symbols,
            lambda data, count, runs: pco.decode_symbols(memoryview(data), count=count, runs=runs),
        ),
        "zlib-9": (
            lambda symbols, runs: zlib.compress(plain(symbols), 9),
            lambda data, count, runs: wide(zlib.decompress(data), count),
        ),
    }
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        return found
    found["zstd-19"] = (
        lambda symbols, runs: zstd.compress(plain(symbols), 19),
        lambda data, count, runs: wide(zstd.decompress(data), count),
    )
    return found


def measured(name: str, symbols: Symbols, runs: Runs, target: float | None = None) -> Row:
    """One row; every coder gives back the same symbols."""
    made: dict[str, Coded] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(REPEATS):
        for coder, (encode, decode) in coders().items():
            started = time.process_time()
            data = encode(symbols, runs)
            encoded = time.process_time()
            back = decode(data, len(symbols), runs)
            ended = time.process_time()
            assert np.array_equal(back, symbols), coder
            times.setdefault(coder, []).append((1e3 * (encoded - started), 1e3 * (ended - encoded)))
            encode_ms, decode_ms = map(min, zip(*times[coder], strict=True))
            made[coder] = Coded(len(data), encode_ms, decode_ms)
    zeros = float((symbols == 0).mean())
    return Row(
        name, len(symbols), zeros, entropy_bytes(symbols), conditional_bytes(symbols, runs), made, target
    )


def rows(folder: Path | None = None) -> list[Row]:
    """Of Laplacian symbols, then of those in ``folder``: npz files with arrays ``symbols`` and ``runs``."""
    found = [measured("Laplacian", *laplacian(count), TARGETS[count]) for count in COUNTS]
    found.append(measured("Laplacian", *laplacian(SPARSE_COUNT, SPARSE_ZEROS)))
    for path in sorted(folder.glob("*.npz")) if folder is not None else ():
        with np.load(path, allow_pickle=False) as arrays:
            symbols, runs = arrays["symbols"].astype(np.int32), tuple(arrays["runs"].tolist())
        found.append(measured(path.stem, symbols, runs))
    return found


def table(found: list[Row]) -> Table:
    """The rows as a table."""
    shown = Table(title="bytes against the entropy of the symbols in each subband", box=box.SIMPLE)
    for name in (
        "symbols",
        "count",
        "zeros",
        "entropy",
        "by subband",
        "coder",
        "bytes",
        "excess",
        "ms in",
        "ms out",
        "million/s out",
    ):
        shown.add_column(name, justify="left" if name in ("symbols", "coder") else "right", no_wrap=True)
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
            if row.target is not None and coder == "ours, symbols":
                verdict = f" ({row.target:.1%} {'met' if excess <= row.target else 'MISSED'})"
            speed = row.count / max(of.decode_ms, 1e-3) / 1e3
            times = f"{of.encode_ms:.2f}", f"{of.decode_ms:.2f}", f"{speed:,.0f}"
            shown.add_row(*about, coder, f"{of.size:,}", f"{excess:+.2%}{verdict}", *times)
            about = [""] * len(about)
    return shown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--symbols", type=Path, help="folder of npz files with further symbols")
    Console(width=150).print(table(rows(parser.parse_args().symbols)))
