"""Experiments for other machines, with their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jwins.engines.ray.files import FileSharing, SharedPath, local_copy
from jwins.experiment.experiment import Experiment

__all__ = ["RemoteExperiment", "pack_experiment"]


@dataclass(frozen=True, slots=True)
class RemoteExperiment:
    """An experiment for another machine.

    Attributes:
        experiment: the experiment with this machine's paths.
        files: its files, by TOML path.
    """

    experiment: Experiment
    files: Mapping[str, SharedPath]

    def unpack(self) -> Experiment:
        """Return the experiment with its files on this machine.

        Raises:
            DataError: a file did not arrive.
        """
        changes: dict[str, Any] = {}
        for key, sent in self.files.items():
            section, _, name = key.partition(".")
            value = str(local_copy(sent))
            if key == "task.file":
                value += f":{str(self.experiment.task.file).rpartition(':')[2]}"
            changes.setdefault(section, {})[name] = value
        return self.experiment.changed(changes)


def pack_experiment(experiment: Experiment, shipping: FileSharing) -> RemoteExperiment:
    """Send the files of an experiment.

    Raises:
        DataError: a file or folder is missing here.
    """
    named: dict[str, str | Path | None] = {
        "task.data": experiment.task.data,
        "topology.path": getattr(experiment.topology, "path", None),
    }
    if experiment.task.file is not None:
        named["task.file"] = experiment.task.file.rpartition(":")[0]
    files = {key: shipping.send(Path(path)) for key, path in named.items() if path is not None}
    return RemoteExperiment(experiment, files)
