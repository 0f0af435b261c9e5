"""Members that a node has cut off for hostile conduct, kept in a file for later processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jwins.errors import ConfigError
from jwins.run_folder.atomic import write_atomically

NAME = "cut.json"


class Cuts:
    """Reasons of the cuts, by name of the member.

    Args:
        folder: folder of the node; None to forget them at the end of the process.

    Raises:
        ConfigError: the file is not one of these.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / NAME
        self._reasons: dict[str, str] = {}
        if self._path is None or not self._path.is_file():
            return
        try:
            found = json.loads(self._path.read_bytes())
            self._reasons = {str(name): str(reason) for name, reason in found.items()}
        except (ValueError, AttributeError):
            problem = "expected names of members and reasons; correct it, or remove it to lift all cuts"
            raise ConfigError(NAME, str(self._path), problem) from None

    def of(self, names: Sequence[str]) -> Mapping[int, str]:
        """Return the reasons by the place of the member in ``names``."""
        return {place: self._reasons[name] for place, name in enumerate(names) if name in self._reasons}

    def add(self, name: str, reason: str) -> None:
        """Record that a member was cut off.

        Raises:
            OSError: e.g. a full disk.
        """
        if name in self._reasons:
            return
        self._reasons[name] = reason
        if self._path is not None:
            write_atomically(self._path, (json.dumps(self._reasons, indent=2) + "\n").encode(), mode=0o600)
