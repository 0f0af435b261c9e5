"""Callbacks of a user, called between the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from safetensors.torch import load
from torch import Tensor

from jwins.errors import UsageError
from jwins.run_folder.rows import EvalRow

if TYPE_CHECKING:
    from jwins.engines.simulator.driver import Progress
    from jwins.experiment.experiment import Experiment
    from jwins.run.result import Result


class MeasuredModels(Mapping[int, dict[str, Tensor]]):
    """Models of an evaluation, by node. Looking up a node reads its model: a state dict of copies.

    They can be read only during the call of ``on_evaluation`` that receives them.

    Args:
        read: returns a node's model as a safetensors file.
    """

    def __init__(self, nodes: tuple[int, ...], read: Callable[[int], bytes]) -> None:
        self._nodes, self._read = nodes, read
        self._over = False

    def __getitem__(self, node: int) -> dict[str, Tensor]:
        if node not in self._nodes:
            raise KeyError(node)
        if self._over:
            raise UsageError("models can be read only within on_evaluation; copy there what you need later")
        tensors: dict[str, Tensor] = load(self._read(node))
        return tensors

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        return f"<MeasuredModels of {len(self)} nodes>"

    def end(self) -> None:
        """Refuse to read from now on."""
        self._over = True


class Callback:
    """Base class of the entries of ``simulate(..., callbacks=[...])``; write the methods that you need.

    All are called in the process that called ``simulate``, between two steps of the run. An exception ends the
    run. A run that continues from a checkpoint reports the evaluations again that it repeats.

    Example::

        class Best(jwins.Callback):
            best = 0.0

            def on_evaluation(self, row, models):
                if row.metrics["accuracy"].mean > self.best:
                    self.best = row.metrics["accuracy"].mean
                    torch.save(models[0], "best.pt")
    """

    def on_start(self, experiment: Experiment) -> None:
        """Called before the run begins or continues.

        Args:
            experiment: the experiment with all defaults resolved.
        """

    def on_round(self, progress: Progress) -> None:
        """Called when all live nodes have completed further rounds; see ``progress.round``."""

    def on_evaluation(self, row: EvalRow, models: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Called after each evaluation.

        Args:
            row: the measurements.
            models: models of the nodes that were measured, by number: the tensors of a ``state_dict``.
        """

    def on_end(self, result: Result) -> None:
        """Called at the end of the run, also of an interrupted one; see ``result.status``."""
