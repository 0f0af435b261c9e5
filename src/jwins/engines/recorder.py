"""Recorder of a run: rows, checkpoints, traffic, final models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jwins.engines.node_group import NodeGroupLike, NodeGroupState, NodeSnapshot
from jwins.errors import ConfigError, DataError, ResumeError
from jwins.node import Phase
from jwins.run_folder import checkpoint, traffic
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.checkpoint import Dumped
from jwins.run_folder.rows import EndRow, EvalRow, MetricsLog, Row, StartRow, Traffic, read_rows
from jwins.wire.frame import Frame, KeyframeRequest


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointManifest:
    """A checkpoint: the driver's state, and the names of the node groups' shards.

    Attributes:
        log_bytes: length of the log at that time.
        shards: names of the shard files, one per node group.
    """

    log_bytes: int
    driver: Any
    shards: tuple[str, ...]


class Recorder:
    """Recorder of a run's measurements, in a folder or only in memory.

    Args:
        folder: folder for metrics, checkpoints and final models; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self._log: MetricsLog | None = None

    def begin(self, start: StartRow) -> None:
        """Begin a run with its first row.

        Raises:
            ResumeError: the folder holds another run's checkpoints.
        """
        if self.folder is not None:
            if any((self.folder / "checkpoints").glob("round-*")):
                raise ResumeError(
                    f"{self.folder} holds checkpoints of another run; resume that run, or choose another folder"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = MetricsLog(self.folder / "metrics.jsonl", keep_bytes=0)
        self.append(start)

    def resume(self, types: Iterable[type], rounds: int | None = None) -> tuple[Any, NodeGroupState]:
        """Continue from the newest checkpoint; later rows are dropped.

        Args:
            types: the dataclasses that the driver's state and the node groups' shards may contain.
            rounds: rounds of the run. A checkpoint in which a node has finished earlier cannot be used. None
                for no such check.

        Returns:
            The driver's state, and the node groups' shards combined, by node.

        Raises:
            ConfigError: the recorder has no folder.
            ResumeError: the folder has no checkpoint.
            DataError: the log is shorter than at the checkpoint.
        """
        saved, groups = self.newest_checkpoint(types, rounds)
        assert self.folder is not None
        path = self.folder / "metrics.jsonl"
        self._log = MetricsLog(path, keep_bytes=saved.log_bytes)
        self.rows = list(read_rows(path))
        return saved.driver, groups

    def newest_checkpoint(
        self, types: Iterable[type], rounds: int | None = None
    ) -> tuple[CheckpointManifest, NodeGroupState]:
        """Return the checkpoint from which :meth:`resume` continues, for the same arguments.

        Raises:
            ConfigError: there is no folder.
            ResumeError: nothing to resume.
        """
        if self.folder is None:
            raise ConfigError("run.folder", None, "expected the folder of the run to resume")
        folder, known = self.folder / "checkpoints", (*types, CheckpointManifest)

        def complete(saved: object) -> tuple[CheckpointManifest, NodeGroupState]:
            if not isinstance(saved, CheckpointManifest):
                raise DataError("written by another version of this package")
            groups = _merged([checkpoint.read_shard(folder, name, known) for name in saved.shards])
            for node, held in groups.nodes.items():
                at, waits = held.node.round, held.node.phase == Phase.WAITING and held.present is not None
                # In an asynchronous run a node waits in its last round only.
                if rounds is not None and (
                    (held.node.phase == Phase.DONE and at < rounds) or (waits and at + 1 < rounds)
                ):
                    raise DataError(
                        f"node {node} has finished at round {at}, so it cannot go on to round {rounds}"
                    )
            return saved, groups

        found: tuple[CheckpointManifest, NodeGroupState] = checkpoint.latest(folder, known, complete)[0]
        return found

    def append(self, row: Row) -> None:
        """Add a row."""
        self.rows.append(row)
        if self._log is not None:
            self._log.append(row)

    def newest(self, count: int) -> EvalRow | None:
        """Return the last evaluation, unless it is among the first ``count`` rows."""
        row = self.rows[-1] if len(self.rows) > count else None
        return row if isinstance(row, EvalRow) else None

    def save(self, round: int, driver: object, shards: Sequence[NodeGroupState | Dumped]) -> None:
        """Flush the log, then write a checkpoint that refers to its rows. Without a folder, do nothing.

        Raises:
            OSError: e.g. a full disk; existing checkpoints are intact.
        """
        if self.folder is None or self._log is None:
            return
        self._log.sync()
        folder = self.folder / "checkpoints"
        names = [checkpoint.write_shard(folder, round, number, shard) for number, shard in enumerate(shards)]
        checkpoint.write(folder, round, CheckpointManifest(self._log.size_bytes, driver, tuple(names)))

    def finish(self, groups: Sequence[NodeGroupLike], end: EndRow, edges: Sequence[Traffic]) -> Tensor:
        """Write the end: final models, traffic, and the last row with the hash of all parameters.

        Returns:
            (N, P) float32, the parameters of all nodes.
        """
        at = {node: group for group in groups for node in group.nodes}
        params = torch.stack([at[node].parameters(node) for node in sorted(at)])
        if self.folder is not None:
            final = self.folder / "final"
            final.mkdir(parents=True, exist_ok=True)
            for node, group in sorted(at.items()):
                write_atomically(final / f"node-{node}.safetensors", group.model_file(node))
            traffic.write(self.folder, edges)
        digest = hashlib.sha256(params.numpy().astype("<f4", copy=False).tobytes()).hexdigest()
        self.append(EndRow(end.status, end.round, end.time_s, end.reason, digest, end.wall_s))
        if self._log is not None:
            self._log.sync()
        return params

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()


def _merged(shards: Sequence[NodeGroupState]) -> NodeGroupState:
    nodes: dict[int, NodeSnapshot] = {}
    messages: dict[int, Frame | KeyframeRequest] = {}
    for shard in shards:
        nodes |= shard.nodes
        messages |= shard.messages
    return NodeGroupState(nodes, messages)
