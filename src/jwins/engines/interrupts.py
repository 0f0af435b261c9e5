"""Ctrl-C as a function that a run calls to learn whether to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interrupts(*also: str) -> Iterator[Callable[[], bool]]:
    """Within the block, remember Ctrl-C; a second one raises KeyboardInterrupt at once.

    Args:
        also: names of other signals to remember, too; they never raise. A signal that is ignored, as under
            nohup, or that has a handler of the program is left alone.

    Yields:
        A function that returns whether a signal arrived. Outside the main thread, where Python delivers no
        signals, it always returns False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    arrived = False

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal arrived
        if arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        arrived = True

    others = [getattr(signal, name) for name in also if hasattr(signal, name)]
    others = [number for number in others if signal.getsignal(number) is signal.SIG_DFL]
    before = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, *others)}
    try:
        yield lambda: arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
