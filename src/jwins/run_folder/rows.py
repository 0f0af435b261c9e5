"""Measurements of a run: typed rows, and the append-only JSONL log that keeps them.

One line per row, tagged by ``kind``. Rows are written once and never changed; a resumed run truncates the
log to the length in its checkpoint and appends from there. So the file of an interrupted run and that of an
uninterrupted one have the same measurements.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import msgspec

from jwins.errors import DataError
from jwins.run_folder.archive import open_file
from jwins.run_folder.own_files import open_own


class Spread(msgspec.Struct, frozen=True):
    """One metric over the nodes; a number that is not finite is None, because JSON cannot express it.

    Attributes:
        mean: over nodes.
        sd: standard deviation over nodes (of the population of nodes, so 0 for one).
        min: the worst or best node, whichever is smaller.
        max: the other end.
        average_model: the metric of the average of all nodes' parameters.
    """

    mean: float | None
    sd: float | None
    min: float | None
    max: float | None
    average_model: float | None = None


class TrafficSplit(msgspec.Struct, frozen=True):
    """Bytes sent, by kind. Every sent byte is in exactly one of the five kinds.

    Attributes:
        positions: compressed positions of updates.
        values: compressed values of updates.
        header: headers, lengths and checksums of updates.
        keyframe: whole frames that carry a keyframe (a full replica for a neighbour that lacks it).
        control: whole messages without parameters.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("positions", "values", "header", "keyframe", "control")
    """The names of the five kinds, in the order in which tables show them."""

    positions: int = 0
    values: int = 0
    header: int = 0
    keyframe: int = 0
    control: int = 0

    @property
    def total(self) -> int:
        """Return the number of all bytes."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """Return the bytes by the names of the five kinds, in the order of :attr:`KINDS`."""
        return {kind: getattr(self, kind) for kind in self.KINDS}

    def __add__(self, other: TrafficSplit) -> TrafficSplit:
        return TrafficSplit(
            *(a + b for a, b in zip(self.by_kind().values(), other.by_kind().values(), strict=True))
        )


class Traffic(msgspec.Struct, frozen=True):
    """Bytes from one node to another over the whole run."""

    source: int
    target: int
    bytes: TrafficSplit


class StartRow(msgspec.Struct, frozen=True, tag="start", tag_field="kind", omit_defaults=True):
    """The first row of a run.

    Attributes:
        digest: hash of all settings that affect the result, hex.
        dim: parameters per model that are exchanged, P.
        neighbours_mean: mean number of recipients of a node in round 0.
        versions: versions of this package and of the libraries that compute results.
        machine: processor, cores, platform.
        fingerprints: hashes of the initial model, the partition, the batches and the codec, which show whether
            two runs are comparable.
        batching: "loop" or "stacked", as chosen, and the reason if it is a fallback.
        clock: "virtual" or "wall": kind of the seconds in other rows.
        better: "higher" or "lower" for each metric that the task adds.
    """

    name: str
    digest: str
    seed: int
    num_nodes: int
    dim: int
    neighbours_mean: float
    versions: dict[str, str]
    machine: dict[str, str]
    fingerprints: dict[str, str]
    batching: str
    clock: str = "virtual"
    better: dict[str, str] = {}


class EvalRow(msgspec.Struct, frozen=True, tag="eval", tag_field="kind", omit_defaults=True):
    """Measurements of all nodes after the same number of rounds.

    Attributes:
        round: completed rounds; 0 is the common start.
        time_s: seconds at which the last of the measured nodes completed it.
        nodes: measured nodes (all, unless some had crashed).
        metrics: each metric's spread over those nodes.
        per_node: each metric's value per measured node, in the order of ``nodes``.
        train_loss: mean training loss over the nodes in the last round, None at the start.
        consensus_distance: root mean square over nodes of the distance to the average model; None if it is
            not finite.
        traffic: bytes of all nodes up to this round.
        early: each metric's mean over nodes on the samples of earlier evaluations, if those are a subset of
            these; else empty.
        consensus_rounds: number of rounds at the end without training.
        epsilon: largest epsilon of the measured nodes up to this round; None without
            ``train.privacy``.
    """

    round: int
    time_s: float
    nodes: list[int]
    metrics: dict[str, Spread]
    per_node: dict[str, list[float | None]]
    train_loss: float | None
    consensus_distance: float | None
    traffic: TrafficSplit
    samples: int
    early: dict[str, float | None] = {}
    consensus_rounds: int = 0
    epsilon: float | None = None

    @property
    def means(self) -> dict[str, float | None]:
        """Return each metric's mean over nodes."""
        return {name: spread.mean for name, spread in self.metrics.items()}

    def means_text(self) -> str:
        """Return the means as one line of text."""
        texts = ((name, "not finite" if mean is None else f"{mean:.4g}") for name, mean in self.means.items())
        return ", ".join(f"{name} {text}" for name, text in texts)


class EndRow(msgspec.Struct, frozen=True, tag="end", tag_field="kind", omit_defaults=True):
    """The last row of a run that ended by itself.

    Attributes:
        status: ``finished``, ``stopped`` if the rule of ``run.stop`` ended it, ``diverged`` if a node's
            parameters stopped being finite, or ``stalled`` if all nodes went down.
        round: rounds completed by every live node; of a run that was stopped, by the final models.
        time_s: seconds on the clock of the start row.
        reason: text, for a run that did not finish.
        sha256: hash of the final parameters of all nodes in id order, little-endian float32.
        wall_s: real seconds by activity, of the process that ended the run. Only these numbers
            differ between two runs of the same experiment.
        traffic: bytes per directed edge, in old runs without ``traffic.csv``; else empty.
    """

    status: str
    round: int
    time_s: float
    reason: str
    sha256: str
    wall_s: dict[str, float]
    traffic: list[Traffic] = []


Row = StartRow | EvalRow | EndRow

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Row] = msgspec.json.Decoder(Row)


class MetricsLog:
    """Append-only JSONL file of rows.

    Args:
        path: the file; made if it does not exist.
        keep_bytes: length to keep of an existing file; the rest was written after the checkpoint that is
            resumed. None keeps everything except an incomplete last line.
    """

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        self.path = path
        self._file = open_own(path)
        if keep_bytes is None:
            self._file.seek(0)
            keep_bytes = self._file.read().rfind(b"\n") + 1
        size = self._file.seek(0, os.SEEK_END)
        if size < keep_bytes:
            self._file.close()
            raise DataError(
                f"{path}: {size} bytes, but the checkpoint needs the first {keep_bytes}; restore the file, "
                "or remove the folder and run again"
            )
        self._file.truncate(keep_bytes)
        self._file.seek(0, os.SEEK_END)

    @property
    def size_bytes(self) -> int:
        """Return the length of the file, which a checkpoint contains."""
        return self._file.tell()

    def append(self, row: Row) -> None:
        """Write one row and flush it to the operating system."""
        self._file.write(_encoder.encode(row) + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush the rows to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a metrics file, which may be in an archive, in order.

    An incomplete last line (of a killed run) is left out.

    Raises:
        DataError: a line other than the last is not a row.
    """
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield _decoder.decode(line)
            except msgspec.DecodeError as error:
                raise DataError(f"{path}, line {number}: not a metrics row ({error})") from error
