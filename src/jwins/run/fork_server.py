"""Processes that share one import of torch, which multiprocessing's fork server loads once for all of them.

To import torch and this package takes seconds of processor time; for eight nodes it would be done nine times.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from jwins.run_folder.own_files import open_own


def can_fork() -> bool:
    """Return whether this system supports the server."""
    return sys.platform == "linux"


def start_forked(arguments: Sequence[str], out: Path) -> Forked:
    """Start ``jwins ARGUMENTS`` in its own process group; its output is appended to ``out``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jwins.run.preloaded"])
    process = context.Process(target=_run, args=(list(arguments), out, dict(os.environ)))
    main = sys.modules["__main__"]
    spec, main.__spec__ = main.__spec__, ModuleSpec("jwins.__main__", None)
    try:
        process.start()  # which would else import the user's program, as processes of a pool need it
    finally:
        main.__spec__ = spec
    return Forked(process)


class Forked:
    """A started process, with the functions of :class:`subprocess.Popen` that a launch calls."""

    def __init__(self, process: ForkServerProcess) -> None:
        assert process.pid is not None
        self._process, self.pid = process, process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raise :class:`subprocess.TimeoutExpired` after ``timeout`` seconds."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(["jwins"], timeout or 0.0)
        return code


def _run(arguments: Sequence[str], out: Path, environment: dict[str, str]) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open_own(out, mode=0o600) as opened:
        for target in (1, 2):
            os.dup2(opened.fileno(), target)
    os.environ.clear()
    os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
    sys.argv = ["jwins", *arguments]

    import torch

    torch.set_num_threads(1)
    runpy.run_module("jwins", run_name="__main__")
