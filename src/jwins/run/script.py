"""A user's own training loop, run as several peers on this machine.

Each process finds its roster, its key and its folder in the environment, where ``jwins.Peer(model)`` looks for
them; the address in the roster has the port.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jwins.engines.interrupts import interrupts
from jwins.errors import ConfigError
from jwins.net.peer_settings import FOLDER, KEY, ROSTER
from jwins.net.roster import read_roster
from jwins.run.launch import (
    INTERRUPT_S,
    LOOK_EVERY_S,
    MAX_RESTARTS,
    RESTART_AFTER_S,
    NodeFailedError,
    NodeView,
    make_roster,
    read_status,
)
from jwins.run_folder.own_files import private_folder

MAX_NODES = 256
MAX_LINE_BYTES = 1 << 16


def launch_script(
    script: Path,
    arguments: Sequence[str] = (),
    *,
    count: int,
    folder: Path | None = None,
    line: Callable[[str, str], None] = lambda name, text: None,
    progress: Callable[[tuple[NodeView, ...]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Run a script as several peers, each a process; one that is killed is started again.

    Args:
        script: a Python file that makes a ``jwins.Peer``.
        arguments: arguments of the script.
        count: number of peers.
        folder: for keys, roster, checkpoints and logs; None for one that is removed at the end.
        line: called with each line that a process prints, and the name of its node.
        progress: called with the nodes' states a few times per second.
        stop: called as often; if it returns True, all processes are interrupted.

    Returns:
        ``finished`` or ``interrupted``.

    Raises:
        ConfigError: there is no such file, or the number is out of range.
        NodeFailedError: a process ended with an error; the others were interrupted.
    """
    if not script.is_file():
        raise ConfigError("--script", str(script), "there is no such file")
    if not 1 <= count <= MAX_NODES:
        raise ConfigError("--nodes", count, f"expected 1 to {MAX_NODES}")
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jwins-launch-")))
        interrupted = stack.enter_context(interrupts("SIGTERM", "SIGHUP"))
        peers = stack.enter_context(_Peers(private_folder(folder), script, arguments, count, line))
        while peers.look():
            if progress is not None:
                progress(tuple(peers.views))
            if interrupted() or stop():
                peers.interrupt()
                return "interrupted"
    if progress is not None:
        progress(tuple(peers.views))
    return "finished"


@dataclass(slots=True)
class _Process:
    """The process of a peer, and when to start the next one if it was killed."""

    popen: subprocess.Popen[bytes] | None = None
    again_at: float = 0.0
    unread: bytes = b""
    last_lines: list[str] = field(default_factory=list)


class _Peers:
    """Processes of all peers, and their output."""

    def __init__(
        self,
        folder: Path,
        script: Path,
        arguments: Sequence[str],
        count: int,
        line: Callable[[str, str], None],
    ) -> None:
        self._folder, self._line = folder, line
        self._command = [sys.executable, str(script.resolve()), *arguments]
        self.views = [NodeView(f"node-{i}") for i in range(count)]
        self._roster = _roster_in(folder, [view.name for view in self.views])
        self._processes = [_Process() for _ in self.views]
        self._outputs = selectors.DefaultSelector()
        self._ended: set[int] = set()

    def __enter__(self) -> _Peers:
        for node in range(len(self.views)):
            self._start(node)
        return self

    def __exit__(self, *error: object) -> None:
        for node, process in enumerate(self._processes):
            if process.popen is not None:
                if process.popen.poll() is None:
                    process.popen.kill()
                    process.popen.wait()
                self._close(node)
        self._outputs.close()

    def _start(self, node: int) -> None:
        view = self.views[node]
        place = self._folder / view.name
        (place / "status.json").unlink(missing_ok=True)
        given = {
            ROSTER: str(self._roster),
            KEY: str(self._folder / "keys" / f"{view.name}.key"),
            FOLDER: str(place),
            "PYTHONUNBUFFERED": "1",
        }
        popen = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1"} | os.environ | given,
            # One SIGINT each: with the terminal's own at Ctrl-C it would be the second.
            process_group=None if os.name == "nt" else 0,
        )
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        self._outputs.register(popen.stdout, selectors.EVENT_READ, node)
        self._processes[node] = _Process(popen)
        view.pid, view.state = popen.pid, "starting"

    def look(self) -> bool:
        """Print new output, and restart killed processes; return False if all have ended.

        Raises:
            NodeFailedError: one ended with an error.
        """
        self._pass_on(LOOK_EVERY_S)
        for node, (process, view) in enumerate(zip(self._processes, self.views, strict=True)):
            if node in self._ended:
                continue
            if process.popen is None:
                if time.monotonic() >= process.again_at:
                    view.restarts += 1
                    self._start(node)
                continue
            read_status(self._folder / view.name / "status.json", view)
            if (code := process.popen.poll()) is None:
                continue
            self._pass_on(0.0)
            self._close(node)
            if code < 0 and sum(v.restarts for v in self.views) < MAX_RESTARTS:
                process.popen, process.again_at = None, time.monotonic() + RESTART_AFTER_S
                view.state = "killed"
                self._line(view.name, f"[killed by {signal.Signals(-code).name}, starts again]")
            elif code == 0:
                view.state = "finished"
                self._ended.add(node)
            else:
                view.state = "failed"
                self.interrupt()
                output = "; ".join(process.last_lines[-3:])
                raise NodeFailedError(f"{view.name} ended with code {code}: {output}")
        return len(self._ended) < len(self.views)

    def _pass_on(self, timeout_s: float) -> None:
        for key, _ in self._outputs.select(timeout_s):
            node: int = key.data
            process = self._processes[node]
            with contextlib.suppress(BlockingIOError):
                if not (data := os.read(key.fd, MAX_LINE_BYTES)):
                    self._outputs.unregister(key.fileobj)
                    continue
                *lines, process.unread = (process.unread + data).split(b"\n")
                if len(process.unread) > MAX_LINE_BYTES:
                    lines, process.unread = [*lines, process.unread], b""
                for raw in lines:
                    self._print_line(node, raw)

    def _print_line(self, node: int, raw: bytes) -> None:
        text = raw.decode(errors="replace").rstrip("\r")
        self._processes[node].last_lines = [*self._processes[node].last_lines[-9:], text]
        self._line(self.views[node].name, text)

    def _close(self, node: int) -> None:
        process = self._processes[node]
        assert process.popen is not None
        assert process.popen.stdout is not None
        if process.popen.stdout.closed:
            return
        if process.unread:
            self._print_line(node, process.unread)
        with contextlib.suppress(KeyError):
            self._outputs.unregister(process.popen.stdout)
        process.popen.stdout.close()

    def interrupt(self) -> None:
        """Ask all to end, and wait for them for a minute in all."""
        running = [p.popen for p in self._processes if p.popen is not None and p.popen.poll() is None]
        for popen in running:
            popen.send_signal(signal.SIGINT)
        until = time.monotonic() + INTERRUPT_S
        while time.monotonic() < until and any(popen.poll() is None for popen in running):
            self._pass_on(LOOK_EVERY_S)


def _roster_in(folder: Path, names: Sequence[str]) -> Path:
    """Make keys and a roster for this machine, unless the folder has those of the same number of peers."""
    path = folder / "roster.toml"
    if not path.exists():
        return make_roster(folder, names)
    if [member.name for member in read_roster(path).members] == list(names):
        return path
    raise ConfigError("--folder", str(folder), "has the roster of other peers; choose another folder")
