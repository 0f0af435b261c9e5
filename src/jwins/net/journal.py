"""Log of a node for its operator: one line per event, with a level, as JSON or for people."""

from __future__ import annotations

import json
import logging
import logging.handlers
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from jwins.run_folder.own_files import open_own

_LOGGER = logging.getLogger("jwins.net")


class Journal:
    """Events of one node, for the logger ``jwins.net``.

    Each record has ``event``, ``node`` and ``fields`` as attributes, so that any handler can use them; its
    message has the same content as text.

    Args:
        node: name of the node.

    Attributes:
        last_error: the newest event of level error or higher, as text; "" if there was none.
    """

    def __init__(self, node: str) -> None:
        self.node = node
        self.last_error = ""

    def debug(self, event: str, **fields: object) -> None:
        """Log an event that only helps to find a fault."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Log a normal event."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log a problem that the run handles itself."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Log a problem that needs the operator."""
        self._log(logging.ERROR, event, fields)

    def _log(self, level: int, event: str, fields: dict[str, object]) -> None:
        words = " ".join(f"{key}={plain(value)}" for key, value in fields.items())
        text = f"{event}: {words}" if words else event
        if level >= logging.ERROR:
            self.last_error = text
        extra = {"event": event, "node": self.node, "fields": fields}
        _LOGGER.log(level, "%s: %s", self.node, text, extra=extra)


class JsonLines(logging.Formatter):
    """A record of a :class:`Journal` as one line of JSON: time, level, node, event and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its line end."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "node": getattr(record, "node", ""),
            "event": getattr(record, "event", record.getMessage()),
            **getattr(record, "fields", {}),
        }
        return json.dumps(line, default=str, separators=(",", ":"))


MAX_BYTES = 16 * 2**20
MAX_FILES = 4


class _OwnFile(logging.handlers.RotatingFileHandler):
    """A log file that is rotated, and never opened through a link.

    Warnings and errors go to stderr as well, unless the program has handlers of its own: logging itself shows
    them there only while a logger has no handler at all.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        super().emit(record)
        stderr = logging.lastResort
        if stderr is not None and record.levelno >= stderr.level and not _program_handlers():
            stderr.handle(record)

    def _open(self) -> TextIOWrapper:
        return TextIOWrapper(
            open_own(Path(self.baseFilename), mode=0o600), encoding="utf-8", write_through=True
        )


def _program_handlers() -> list[logging.Handler]:
    """Return the handlers that get the events, without those of this module."""
    found: list[logging.Handler] = []
    logger: logging.Logger | None = _LOGGER
    while logger is not None:
        found += [handler for handler in logger.handlers if not isinstance(handler, _OwnFile)]
        logger = logger.parent if logger.propagate else None
    return found


@contextmanager
def write_journal(path: Path, node: str | None = None) -> Iterator[None]:
    """Within the block, append events to a file of JSON lines, rotated at 16 MiB; three older ones are kept.

    Warnings and errors are still shown on stderr, if the program does not handle them.

    Args:
        path: the file.
        node: only events of the node with this name; None for all of this process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _OwnFile(path, maxBytes=MAX_BYTES, backupCount=MAX_FILES - 1, encoding="utf-8")
    if node is not None:
        handler.addFilter(lambda record: getattr(record, "node", node) == node)
    handler.setFormatter(JsonLines())
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        handler.close()


def plain(value: object) -> str:
    """Return a value as text for people; a peer's text is quoted if it could be misread."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if text.isprintable() and not set(text) & set(" \"'") else json.dumps(text)
