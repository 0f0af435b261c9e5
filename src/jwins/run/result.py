"""Measurements of a run, read from its folder."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jwins.errors import DataError
from jwins.experiment.experiment import Experiment
from jwins.run.builders import bits_per_step, build_task, mean_local_steps, raw_bytes_per_node
from jwins.run_folder import traffic
from jwins.run_folder.record import Record, flat_rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn


@dataclass(frozen=True)
class Result:
    """Measurements of a run, read from its folder.

    Attributes:
        experiment: resolved experiment.
        folder: the run folder.
        status: ``finished``, ``stopped`` by ``run.stop``, ``diverged``, ``interrupted``, or ``stalled`` if all
            simulated nodes went down.
        record: the typed rows.
        was_complete: whether nothing had to be done, because the run was complete before.

    Example::

        result = jwins.simulate(jwins.Experiment(name="tiny"))
        frame = pandas.DataFrame(result.rows)
        frame.plot(x="bytes_per_node", y="accuracy_mean")
    """

    experiment: Experiment
    folder: Path
    status: str
    record: Record
    was_complete: bool = False

    def __repr__(self) -> str:
        measured = [f"round {row.round}: {row.means_text()}" for row in self.record.evaluations[-1:]]
        return f"<Result {', '.join([self.experiment.name, self.status, *measured, repr(str(self.folder))])}>"

    def _repr_html_(self) -> str:
        """Return the same for notebooks, with a table of the last evaluation."""
        cells: dict[str, object] = {"run": self.experiment.name, "status": self.record.status}
        for row in self.record.evaluations[-1:]:
            cells |= {"round": row.round, "MB per node": f"{self.record.bytes_per_node()[-1] / 1e6:.3g}"}
            cells |= {
                name: "—" if (s := spread.mean) is None else f"{s:.4g}" for name, spread in row.metrics.items()
            }
        head = "".join(f"<th>{html.escape(name)}</th>" for name in cells)
        body = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells.values())
        return f"<table><tr>{head}</tr><tr>{body}</tr></table>"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict per evaluation, with ``round``, ``accuracy_mean``, ``bytes_total``, ..."""
        return flat_rows(self.record)

    @property
    def bits_per_step(self) -> tuple[float, float] | None:
        """Return bits per parameter and local step: sent to one neighbour, and sent and received in all.

        Means over nodes until the last evaluation; None before a round, or where ``local_steps`` alone does not
        decide the steps.
        """
        start, rounds, sent = self.record.start, self.record.rounds, self.record.bytes_per_node()
        raw = raw_bytes_per_node(self.experiment, start.dim, rounds)
        steps = mean_local_steps(self.experiment.model_dump(include={"train", "nodes", "run"}))
        return bits_per_step(sent[-1] if sent else 0.0, raw, start.dim, rounds, steps)

    @property
    def edges(self) -> list[dict[str, int]]:
        """Return the bytes of each directed edge over the whole run; empty for an interrupted run."""
        if self.record.end is None:
            return []
        edges = traffic.read(self.folder) or self.record.end.traffic
        return [
            {"source": edge.source, "target": edge.target, "bytes_total": edge.bytes.total}
            | {f"bytes_{kind}": size_bytes for kind, size_bytes in edge.bytes.by_kind().items()}
            for edge in edges
        ]

    @property
    def partition(self) -> list[npt.NDArray[np.int64]]:
        """Return the positions of each node's training samples in ``task.train``, increasing.

        Raises:
            DataError: the folder has no readable ``partition.safetensors``, as those of older runs.
        """
        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = self.folder / "partition.safetensors"
        try:
            holder = load(path.read_bytes())["node"]
        except (OSError, KeyError, SafetensorError) as error:
            problem = "cannot be read; build_partition of jwins.run.builders draws the partition again"
            raise DataError(f"{path}: {problem} ({error})") from error
        return [np.flatnonzero(holder == node) for node in range(self.experiment.nodes.count)]

    @property
    def sha256(self) -> str | None:
        """Return the hash of all final parameters, hex; None for an interrupted run."""
        return None if self.record.end is None else self.record.end.sha256

    def parameters(self, node: int) -> dict[str, Tensor]:
        """Return a node's final tensors by name.

        Raises:
            DataError: the run has no final model of that node.
        """
        from safetensors.torch import load_file

        path = self.folder / "final" / f"node-{node}.safetensors"
        if not path.is_file():
            raise DataError(f"{path}: no final model of node {node}; the run is {self.status}")
        tensors: dict[str, Tensor] = load_file(path)
        return tensors

    def model(self, node: int) -> nn.Module:
        """Return a node's final model.

        Raises:
            DataError: the run has no final model of that node.
        """
        import torch

        tensors = self.parameters(node)
        task = build_task(self.experiment)
        with torch.random.fork_rng(devices=[]):
            model = task.model()
        # Not strict: tied parameters are stored once.
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unexpected:
            raise DataError(
                f"{self.folder}: the task's model has no {unexpected[0]}; it has changed since the run"
            )
        return model.eval()
