"""The file ``status.json`` with a node's progress."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jwins.run_folder.atomic import write_atomically

if TYPE_CHECKING:
    from jwins.net.driver import NodeProgress

EVERY_S = 0.5


class StatusFile:
    """Writer of the node's progress, at most twice a second."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path, self._names = path, names
        self._last = 0.0
        self._metrics: dict[str, float | None] = {}

    def __call__(self, now: NodeProgress, status: str = "running") -> None:
        """Write the file if it is time, or if the node has ended."""
        if now.row is not None:
            self._metrics = now.row.means
        if status == "running" and time.monotonic() - self._last < EVERY_S:
            return
        self._last = time.monotonic()
        found = asdict(now) | {"status": status, "metrics": self._metrics}
        del found["row"]
        for key in ("waiting_for", "connected", "suspect"):
            found[key] = [self._names[peer] for peer in found[key]]
        with contextlib.suppress(OSError):  # a full disk must not end the run
            write_atomically(self._path, (json.dumps(found) + "\n").encode(), sync=False, mode=0o600)
