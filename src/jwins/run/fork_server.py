"""Processes that share one import of torch: a server that has loaded everything forks each of them.

To import torch and this package takes seconds of processor time, and a launch of eight nodes did it nine times.
The server is forked from this process if that has a single thread, also in native code, for to fork one with
more can block its children forever; else it is a process of its own that loads everything once more. Requests
and answers are lines of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jwins.errors import JwinsError

_ANSWER_S = 60.0
"""Time for the server to start and to answer; to load torch from a slow disk takes long."""
_END_S = 5.0


class Process(Protocol):
    """A started process, with functions of :class:`subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Return the process id."""

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""

    def kill(self) -> None:
        """Kill it."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, at most ``timeout`` seconds.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """


def can_fork() -> bool:
    """Return whether this system supports the server."""
    return hasattr(os, "fork") and hasattr(os, "setpgid") and sys.platform != "darwin"


class ForkServer:
    """Server that starts commands of this package, each in its own process group."""

    def __init__(self) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._popen: subprocess.Popen[bytes] | None = None
        if _may_fork():
            self._pid = _forked_server(requests, answers, (self._requests, self._answers))
        else:
            command = [sys.executable, "-m", "jwins.run.fork_server", str(requests), str(answers)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            passed = (requests, answers)
            self._popen = subprocess.Popen(command, pass_fds=passed, env=environment, process_group=0)
            self._pid = self._popen.pid
        os.close(requests)
        os.close(answers)
        os.set_blocking(self._answers, False)
        self._unread = b""
        self._codes: dict[int, int] = {}
        self._started: list[int] = []
        self._ended = False

    def start(self, arguments: Sequence[str], out: Path) -> Process:
        """Start ``jwins ARGUMENTS``; its output is appended to ``out``.

        Raises:
            JwinsError: the server has ended, or does not answer.
        """
        line = json.dumps({"arguments": list(arguments), "out": str(out)}) + "\n"
        with contextlib.suppress(BrokenPipeError):
            os.write(self._requests, line.encode())
        until = time.monotonic() + _ANSWER_S
        while not self._started:
            if self._ended or time.monotonic() > until:
                raise JwinsError("the server that starts nodes does not answer; see its output above")
            self._read(timeout_s=0.5)
        return _Forked(self, self._started.pop(0))

    def code_of(self, pid: int) -> int | None:
        """Return the exit code of a process, negative for a signal; None while it runs."""
        self._read()
        if pid not in self._codes and self._ended and not _is_alive(pid):
            self._codes[pid] = -signal.SIGKILL  # nobody is left to say
        return self._codes.get(pid)

    def close(self) -> None:
        """End the server; processes that it started continue."""
        os.close(self._requests)
        until = time.monotonic() + _END_S
        while not self._ended and time.monotonic() < until:
            self._read(timeout_s=0.1)
        if not self._ended:
            os.kill(self._pid, signal.SIGKILL)
        if self._popen is not None:
            self._popen.wait()
        else:
            os.waitpid(self._pid, 0)
        os.close(self._answers)

    def _read(self, timeout_s: float = 0.0) -> None:
        select.select([self._answers], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._answers, 1 << 16):
                self._unread += data
            self._ended = True  # nobody can write any more
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "code" in answer:
                self._codes[answer["pid"]] = answer["code"]
            else:
                self._started.append(answer["pid"])


class _Forked:
    """A process of a :class:`ForkServer`."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid

    def poll(self) -> int | None:
        return self._server.code_of(self.pid)

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        until = float("inf") if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= until:
                raise subprocess.TimeoutExpired(["jwins"], timeout or 0.0)
            time.sleep(0.02)
        return code


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _may_fork() -> bool:
    """Return whether this process has one thread, and no GPU, which its children could not use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _forked_server(requests: int, answers: int, others: tuple[int, int]) -> int:
    """Fork the server from this process; return its number."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # both processes would print a buffered text
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        for descriptor in others:
            os.close(descriptor)
        os.setpgid(0, 0)
        code = _serve(requests, answers)
    except BaseException:
        traceback.print_exc()
    finally:  # the frames above are the launcher's, and none of their contexts may end here
        _leave(code)
    return 0


# --- In the server ----------------------------------------------------------------------------------------


def _serve(requests: int, answers: int) -> int:
    """Fork for each request until the client ends; return the exit code of this process."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN if name == "SIGINT" else signal.SIG_DFL)
    _load()
    gc.collect()
    gc.freeze()  # no page is copied because an unused object was looked at
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    unread = b""
    while True:
        ready, _, _ = select.select([requests, awake], [], [])
        if awake in ready:
            os.read(awake, 1 << 12)
            _report_ends(answers)
        if requests not in ready:
            continue
        if not (data := os.read(requests, 1 << 16)):
            return 0
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                for descriptor in (awake, wake, requests, answers):
                    os.close(descriptor)
                return _run(json.loads(line))
            _say(answers, {"pid": pid})


def _load() -> None:
    """Import the modules that nodes need, except the command line, which is above this room and loads soon."""
    import jwins.experiment.load
    import jwins.net.driver
    import jwins.net.membership
    import jwins.net.status
    import jwins.run.node
    import jwins.training.allocator  # noqa: F401


def _report_ends(answers: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _say(answers, {"pid": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})


def _say(answers: int, answer: Mapping[str, int]) -> None:
    os.write(answers, json.dumps(answer).encode() + b"\n")


def _run(request: Mapping[str, Any]) -> int:
    """Run the requested command in this process; return its exit code."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(request["out"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, descriptor in ((0, nothing), (1, out), (2, out)):
        os.dup2(descriptor, target)
    os.close(out)
    os.close(nothing)
    sys.stdin = os.fdopen(0, closefd=False)  # what the launcher has in their place may be no file
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["jwins", *request["arguments"]]

    import torch

    torch.set_num_threads(1)
    try:
        runpy.run_module("jwins", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> None:
    """End this process and its own objects only."""
    with contextlib.suppress(Exception):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(_serve(int(sys.argv[1]), int(sys.argv[2])))
