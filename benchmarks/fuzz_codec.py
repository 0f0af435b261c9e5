"""Fuzzes the decoders: whatever the bytes, a message, an update or CodecError, in bounded memory.

    python benchmarks/fuzz_codec.py --minutes 10

Inputs are valid ones, damaged in ways that know the format, and some made up. They go to ``Codec.decode``, the
Elias gamma decoder and the decoder of symbols directly, and to ``unpack`` as frames whose length and checksum
are corrected after the damage, so that what is behind the header is reached. Each round runs in a fresh process
at one vector length: a crash or an endless loop ends that process only. Memory is what the process grew by
during one call.
The exit code is 0 if nothing failed. Input i of a round is a function of (seed, round, i).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import multiprocessing
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pcodec import ChunkConfig, standalone
from rich.console import Console
from rich.table import Table

from jwins.errors import CodecError, FrameError
from jwins.ops.quantize import blocks
from jwins.run.memory import peak_bytes
from jwins.sharing.update import MAX_DIM, Quantized, Sampled, Update
from jwins.wire import MAX_RUNS, VERSION, Bye, Frame, Hello, KeyframeRequest, Wire, codec, quantized
from jwins.wire.codec import Paper
from jwins.wire.elias import decode_positions, encode_positions

DIGEST = b"fuzzing!"
DIMS = (300, 5_000, 100_000, 2_000_000)
SEED = 20240607
MIN_PAST_HEADER = 0.10
HANG_S = 30.0  # one input may take this long
LENGTH_AT, CHECKSUM_AT, HEADER_BYTES = 28, 32, 36  # docs/reference/wire.md
PAYLOAD_HEAD = 9
NOTE = struct.Struct("<QQ16s")  # number of the input, its length and its target; the input follows
NOTE_BYTES = 64 * 2**20

TARGETS: dict[str, Callable[[bytes, int], object]] = {
    "pco": lambda data, dim: codec("pco").decode(data, dim=dim),
    "raw": lambda data, dim: codec("raw").decode(data, dim=dim),
    "paper": lambda data, dim: Paper().decode(data, dim=dim),
    "elias": lambda data, dim: decode_positions(data[4:], count=int.from_bytes(data[:4], "little"), dim=dim),
    "symbols": lambda data, dim: quantized.decode(memoryview(data), count=dim, max_runs=MAX_RUNS),
    "frame pco": lambda data, dim: Wire(codec("pco"), DIGEST, dim).unpack(data),
    "frame raw": lambda data, dim: Wire(codec("raw"), DIGEST, dim).unpack(data),
}


def limit_bytes(dim: int) -> int:
    """Most memory that decoding may take."""
    return 16 * dim + 16 * 2**20


def updates(dim: int, rng: np.random.Generator) -> list[Update]:
    """Valid updates of each kind."""
    some = []
    for density in (0.0, 0.01, 0.2, 0.5, 1.0):
        count = round(density * dim)
        listed = torch.from_numpy(np.sort(rng.choice(dim, count, replace=False)))
        floats = torch.from_numpy(rng.normal(scale=0.1, size=count).astype(np.float32))
        symbols = torch.from_numpy(rng.integers(-9, 10, count).astype(np.int32))
        runs = (count // 2, count - count // 2)
        plain = Quantized(symbols, torch.tensor([0.5, 2.0]), runs)
        dithered = Quantized(symbols, torch.tensor([0.5, 2.0]), runs, int(rng.integers(2**63)), offset=0.1)
        few = torch.from_numpy((rng.laplace(size=count) * rng.choice([0.3, 1, 30])).astype(np.int32))
        in_blocks = Quantized(few, torch.rand(-(-count // 32)) + 0.1, blocks(count, 32))
        rare = Quantized(few, torch.tensor([0.5] * 3), (count // 4, count // 4, count - count // 4 * 2))
        sampled = Sampled(int(rng.integers(2**63)), count)
        kinds = (floats, floats.to(torch.bfloat16), plain, dithered, rare, in_blocks)
        for positions in (listed, sampled, None):
            for values in kinds:
                if positions is not None or count == dim:
                    some.append(Update(dim, positions, values, base=3, check=2**32 - 1))  # noqa: PERF401
    return some


# Coded symbols in 1, 4, 15 and more runs, of which the coder reads one bits, zero bits or noise, from an end of
# the scale of shares or the other.
SYMBOL_BOMBS = [
    head + bytes([1 + len(body), quarters]) + body
    for head in (b"\x10\x7f", b"\x44\x7f", b"\xf4\x0f\x7f", b"\xf8\x80\x80\x04\x7f\x01")
    for quarters in (0, 43)
    for body in (b"", b"\xff" * 100, b"\x01", bytes(99) + b"\x01", bytes(range(1, 121)))
]


def bombs(dim: int) -> list[bytes]:
    """Payloads, small where possible, that claim or hold as many numbers as they can."""
    config = ChunkConfig(enable_8_bit=True)
    some = []
    for count in (dim, dim + 1, min(64 * dim, 20_000_000), 2**32 - 1):
        held = min(count, 20_000_000)
        skipped = b"\x01" + standalone.simple_compress(np.zeros(held, np.uint8), config)
        floats = standalone.simple_compress(np.zeros(held, np.float32), config)
        halves = standalone.simple_compress(np.zeros(held, np.uint16), config)
        for claimed in {min(count, MAX_DIM), dim}:
            for layout, values in ((1, floats), (0, floats), (4, halves), (5, halves)):
                positions = skipped if layout & 1 else b""
                some.append(struct.pack("<BII", layout, claimed, len(positions)) + positions + values)
            symbols = struct.pack("<I", 2**32 - 1) + bytes(64)
            some.append(struct.pack("<BII", 8, claimed, 0) + symbols)
            some.append(struct.pack("<BII", 0xC8, claimed, 0) + struct.pack("<Qf", 7, 0.25) + symbols)
            some += [struct.pack("<BII", 0x0C, claimed, 0) + coded for coded in SYMBOL_BOMBS]
            some.append(struct.pack("<BII", 1, claimed, 2**32 - 1))
    max_runs = (
        struct.pack("<I", 1 << 16) + np.ones(1 << 16, "<f4").tobytes() + np.zeros(1 << 16, "<u4").tobytes()
    )
    some.append(struct.pack("<BII", 9, 0, 0) + max_runs)
    return some


@dataclass(frozen=True)
class Corpus:
    """Inputs to start from, by target, and pieces to splice in."""

    inputs: dict[str, list[bytes]]

    @staticmethod
    def of(dim: int, seed: int) -> Corpus:
        rng = np.random.default_rng(seed)
        some = updates(dim, rng)
        if dim > 1_000_000:
            some = some[::4]
        inputs: dict[str, list[bytes]] = {name: [] for name in TARGETS}
        for name in ("pco", "raw"):
            payloads = [codec(name).encode(update).data for update in some]
            inputs[name] = payloads + bombs(dim)
            messages = [
                *(Frame(1, 2, update, keyframe=True) for update in some),
                Hello(1, 2, dim, "pco", {"jwins": "0.1.0", "torch": "2.6"}, b"x" * 32),
                Bye(1, 2, "done"),
                KeyframeRequest(1, 2),
            ]
            inputs[f"frame {name}"] = [
                Wire(codec(name), DIGEST, dim).pack(message).data for message in messages
            ]
            inputs[f"frame {name}"] += [reframed(framed(payload, name, dim)) for payload in bombs(dim)]
        inputs["paper"] = inputs["raw"]
        for update in some:
            if update.count == dim and isinstance(update.values, Quantized):
                symbols, scales = update.values.symbols.numpy(), update.values.scales.numpy()
                inputs["symbols"].append(quantized.encode(symbols, scales, update.values.runs))
        inputs["symbols"] += SYMBOL_BOMBS
        for update in some:
            if isinstance(update.positions, torch.Tensor):
                head = struct.pack("<I", update.count)
                inputs["elias"].append(head + encode_positions(update.positions.numpy()))
        inputs["elias"] += [struct.pack("<I", claim) + b"\xff" * (dim // 8) for claim in (dim, 2**32 - 1)]
        inputs["elias"] += [struct.pack("<I", dim) + bytes(n) for n in (1, 9, dim)]
        return Corpus(inputs)


def framed(payload: bytes, name: str, dim: int) -> bytes:
    """A frame around a payload, its length and checksum still missing."""
    fields = struct.pack("<4sBBBBII8sII", b"JWNS", VERSION, 2, codec(name).code, 0, 1, 2, DIGEST, dim, 0)
    return fields + bytes(4) + payload


def reframed(data: bytes) -> bytes:
    """The same frame with the right length and checksum."""
    if len(data) < HEADER_BYTES:
        return data
    fields = data[:LENGTH_AT] + struct.pack("<I", len(data) - HEADER_BYTES)
    payload = data[HEADER_BYTES:]
    return fields + struct.pack("<I", zlib.crc32(payload, zlib.crc32(fields))) + payload


def damaged(data: bytes, others: list[bytes], start: int, rng: np.random.Generator) -> bytes:
    """``data`` with one to three injuries behind byte ``start``, half of them near it, where the fields are."""
    out = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        size = len(out)
        near = min(size, start + (64 if rng.random() < 0.5 else size))
        at = int(rng.integers(min(start, size), near + 1))
        injury = int(rng.integers(10))
        if injury <= 1 and at < size:
            out[at] ^= 1 << int(rng.integers(8))
        elif injury == 2 and at < size:
            out[at] = int(rng.integers(256))
        elif injury == 3:
            out[at : at + 4] = _edge(rng).to_bytes(4, "little")
        elif injury == 4 and size >= start + PAYLOAD_HEAD:  # the fields of a payload's head
            field_at = start + int(rng.choice([0, 1, 5]))
            if field_at == start:
                out[start] = int(rng.integers(256))
            else:
                old = int.from_bytes(out[field_at : field_at + 4], "little")
                new = (old + int(rng.integers(-3, 4))) % 2**32 if rng.random() < 0.5 else _edge(rng)
                out[field_at : field_at + 4] = new.to_bytes(4, "little")
        elif injury == 5:
            del out[at:]
        elif injury == 6:
            out += rng.bytes(int(rng.integers(1, 40)))
        elif injury == 7:
            del out[at : at + int(rng.integers(1, 9))]
        elif injury == 8:
            out[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif injury == 9:
            other = others[int(rng.integers(len(others)))]
            cut = int(rng.integers(len(other) + 1))
            out[at:] = other[cut:]
    return bytes(out)


def _edge(rng: np.random.Generator) -> int:
    return int(rng.choice([0, 1, 2, 255, 256, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]))


def cases(corpus: Corpus, seed: int) -> Iterator[tuple[str, bytes]]:
    """Without end: a target, and bytes for it. First every input as it is."""
    for name, some in corpus.inputs.items():
        for data in some:
            yield name, data
    rng = np.random.default_rng(seed)
    names = list(TARGETS)
    while True:
        name = names[int(rng.integers(len(names)))]
        some = corpus.inputs[name]
        if rng.random() < 0.02:
            yield name, rng.bytes(int(rng.integers(200)))
            continue
        data = some[int(rng.integers(len(some)))]
        if not name.startswith("frame"):
            yield name, damaged(data, some, 0, rng)
        elif rng.random() < 0.2:  # the header as well
            yield name, reframed(damaged(data, some, 0, rng))
        else:
            yield name, reframed(damaged(data, some, HEADER_BYTES, rng))


@dataclass
class Tally:
    """Counts of inputs by outcome."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    peak_bytes: dict[int, int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.outcomes += other.outcomes
        self.failures += other.failures
        for dim, peak in other.peak_bytes.items():
            self.peak_bytes[dim] = max(peak, self.peak_bytes.get(dim, 0))

    def of(self, name: str) -> dict[str, int]:
        return {what: n for (target, what), n in self.outcomes.items() if target == name}

    def past_header(self) -> float:
        """The fraction of damaged frames whose header was accepted."""
        frames = Counter[str]()
        for (target, what), n in self.outcomes.items():
            if target.startswith("frame"):
                frames[what] += n
        return 1 - frames["frame error"] / max(1, frames.total())


def run(
    corpus: Corpus,
    dim: int,
    seed: int,
    seconds: float,
    note: Callable[[str, bytes], None] = lambda name, data: None,
    measure: bool = False,
) -> Tally:
    """Decodes one input after the other for some seconds; every input of the corpus at least once."""
    tally = Tally()
    start = time.monotonic()
    fresh = sum(map(len, corpus.inputs.values()))
    for i, (name, data) in enumerate(cases(corpus, seed)):
        if i >= fresh and time.monotonic() - start > seconds:
            break
        note(name, data)
        # Measuring takes longer than decoding a short input: of these, each of the corpus and then some.
        measured = measure and (i < fresh or dim >= 100_000 or i % 16 == 0)
        before = _forget_peak() if measured else 0
        try:
            TARGETS[name](data, dim)
            outcome = "decoded"
        except FrameError:
            outcome = "frame error"
        except CodecError:
            outcome = "codec error"
        except Exception as error:
            outcome = "failure"
            tally.failures.append(f"{name}, dim {dim}, input {i}: {error!r}, bytes {data[:200].hex()}")
        tally.outcomes[name, outcome] += 1
        if measured:
            grown = peak_bytes() - before
            tally.peak_bytes[dim] = max(grown, tally.peak_bytes.get(dim, 0))
            if grown > limit_bytes(dim):
                tally.failures.append(
                    f"{name}, dim {dim}, input {i}: memory grew by {grown:,} bytes, "
                    f"{limit_bytes(dim):,} allowed, {len(data)} bytes {data[:200].hex()}"
                )
    return tally


def _forget_peak() -> int:
    """Sets the peak back to what is resident now, where the system can, and returns it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what the allocator kept back would be taken again unnoticed
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def _child(
    place: str, dim: int, seed: int, seconds: float, results: multiprocessing.SimpleQueue[Tally]
) -> None:
    """One round, in a process of its own. Says in the file at ``place`` what it is about to decode."""
    torch.set_num_threads(1)
    corpus = Corpus.of(dim, seed)
    with open(place, "r+b") as file, mmap.mmap(file.fileno(), 0) as current:
        count = 0

        def note(name: str, data: bytes) -> None:
            nonlocal count
            count += 1
            kept = data[: len(current) - NOTE.size]
            current[: NOTE.size] = NOTE.pack(count, len(kept), name.encode())
            current[NOTE.size : NOTE.size + len(kept)] = kept

        for name in ("pco", "raw", "elias", "symbols"):  # so that what a first call loads is not counted
            with contextlib.suppress(CodecError):
                TARGETS[name](corpus.inputs[name][0], dim)
        results.put(run(corpus, dim, seed, seconds, note, measure=True))


def round_of(dim: int, seed: int, seconds: float, folder: Path) -> Tally:
    """One round in a fresh process: what it found, or how it ended."""
    place = folder / "current"
    with open(place, "wb") as file:
        file.truncate(NOTE_BYTES)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.SimpleQueue[Tally] = context.SimpleQueue()
    child = context.Process(target=_child, args=(str(place), dim, seed, seconds, results))
    child.start()
    seen, since, tally = 0, time.monotonic(), None
    while child.is_alive() or not results.empty():
        if not results.empty():
            tally = results.get()
            break
        child.join(0.2)
        with open(place, "rb") as file:
            count = NOTE.unpack(file.read(NOTE.size))[0]
        if count != seen:
            seen, since = count, time.monotonic()
        elif time.monotonic() - since > HANG_S + (60 if seen == 0 else 0):
            child.kill()
    child.join()
    if tally is None:
        noted = place.read_bytes()
        count, size, name = NOTE.unpack(noted[: NOTE.size])
        saved = folder / f"dim{dim}-seed{seed}.bin"
        saved.write_bytes(noted[NOTE.size : NOTE.size + size])
        how = "took too long" if child.exitcode == -9 else f"ended the process (exit code {child.exitcode})"
        failure = f"{name.rstrip(bytes(1)).decode()}, dim {dim}, input {count - 1}: {how}, bytes in {saved}"
        return Tally(failures=[failure])
    return tally


def fuzz(minutes: float, seed: int, folder: Path, dims: Sequence[int] = DIMS, round_s: float = 20.0) -> Tally:
    """Rounds over all vector lengths until the time is over, at least one each."""
    total, end, number = Tally(), time.monotonic() + 60 * minutes, 0
    while number < len(dims) or time.monotonic() < end:
        dim = dims[number % len(dims)]
        seconds = max(1.0, min(round_s, 60 * minutes / len(dims), end - time.monotonic()))
        total.add(round_of(dim, seed + number, seconds, folder))
        number += 1
        print(f"round {number}: {total.outcomes.total():,} inputs, {len(total.failures)} failures", flush=True)
    return total


def report(total: Tally, console: Console) -> None:
    table = Table("target", "inputs", "decoded", "codec error", "frame error", "failures")
    for name in TARGETS:
        of = total.of(name)
        columns = [of.get(what, 0) for what in ("decoded", "codec error", "frame error", "failure")]
        table.add_row(name, *(f"{n:,}" for n in [sum(columns), *columns]))
    console.print(table)
    memory = Table("dim", "peak MB", "allowed MB")
    for dim, peak in sorted(total.peak_bytes.items()):
        memory.add_row(f"{dim:,}", f"{peak / 2**20:.1f}", f"{limit_bytes(dim) / 2**20:.1f}")
    console.print(memory)
    console.print(f"frames past the header: {total.past_header():.1%} (at least {MIN_PAST_HEADER:.0%} wanted)")
    for failure in total.failures[:20]:
        console.print(f"FAILED {failure}", style="red", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the first round (default: {SEED})")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help=f"vector lengths (default: {DIMS})")
    parser.add_argument(
        "--save", type=Path, help="folder for inputs that end the process (default: a temporary one)"
    )
    options = parser.parse_args()
    folder = options.save or Path(tempfile.mkdtemp(prefix="jwins-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, {options.minutes:g} minutes, vector lengths {tuple(options.dims)}", flush=True)
    try:
        total = fuzz(options.minutes, options.seed, folder, options.dims)
    finally:
        (folder / "current").unlink(missing_ok=True)
        if options.save is None and not any(folder.iterdir()):  # what ended a process stays
            folder.rmdir()
    report(total, Console())
    passed = not total.failures and total.past_header() >= MIN_PAST_HEADER
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
