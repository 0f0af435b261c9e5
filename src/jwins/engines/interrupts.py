"""Ctrl-C as a question that a run asks: only one of those who may want it to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["interrupts"]


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is remembered; a second one raises KeyboardInterrupt at once.

    Yields:
        Whether there was one. Outside the main thread, where Python delivers no signals, it is never true.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    heard = False

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal heard
        if heard:
            raise KeyboardInterrupt
        heard = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: heard
    finally:
        signal.signal(signal.SIGINT, before)
