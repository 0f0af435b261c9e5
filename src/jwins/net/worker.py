"""A worker thread that does not keep the program alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Worker that does jobs in order.

    Its thread is a daemon. Python waits for the threads of a ``ThreadPoolExecutor`` when a program ends, but a
    job here may wait for a call that the program will then never make.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Queue ``work(*arguments)``."""
        job: Future[T] = Future()

        def run() -> None:
            try:
                job.set_result(work(*arguments))
            except BaseException as error:
                job.set_exception(error)

        self._jobs.put(run)
        if self._thread.ident is None:
            self._thread.start()
        return job

    def close(self, *, wait: bool = True) -> None:
        """Stop after the current job; ``wait`` for it."""
        self._jobs.put(None)
        if wait and self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while (run := self._jobs.get()) is not None:
            run()
