"""Checks that settings and the objects built from them have in common, each stated once.

A rule describes the expected value. Settings find all problems at once through pydantic; an object that Python
code builds refuses the first one by :meth:`Within.check`. Neither pydantic nor torch is needed to import this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from jwins.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


class _Missing:
    def __repr__(self) -> str:
        return "<missing>"


MISSING = _Missing()
"""Stands for the value in the error about a required key that is not there."""


@dataclass(frozen=True, slots=True)
class Within:
    """A range of finite numbers; in settings ``Annotated[float, Within("a fraction", 0, 1, open_low=True)]``.

    Attributes:
        what: noun with article, as in "expected a fraction in (0, 1]".
        low: smallest value, None for no limit.
        high: largest value, None for no limit.
        open_low: whether ``low`` itself is out of range.

    >>> Within("a fraction", 0, 1, open_low=True).problem(1.4)
    'expected a fraction in (0, 1]; did you mean 0.14?'
    """

    what: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check after the type has been checked."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.validated, handler(source))

    @property
    def interval(self) -> str:
        """Return a text, e.g. ``in (0, 1]`` or ``of at least 1``."""
        if self.low is not None and self.high is not None:
            return f"in {'(' if self.open_low else '['}{_short(self.low)}, {_short(self.high)}]"
        if self.low is not None:
            return f"{'above' if self.open_low else 'of at least'} {self.low:g}"
        return "" if self.high is None else f"of at most {self.high:g}"

    @property
    def expected(self) -> str:
        """Return a text, e.g. ``expected a fraction in (0, 1]``."""
        return f"expected {self.what} {self.interval}".rstrip()

    def problem(self, value: float) -> str | None:
        """Describe the mistake in ``value`` and the probable intent; None if it is in range."""
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        below = self.high is None or value <= self.high
        if above and below and value == value and abs(value) != float("inf"):
            return None
        hint = ""
        if self.high == 1 and 1 < value <= 100:
            hint = f"; did you mean {value / (10 if value < 10 else 100):.6g}?"
        return self.expected + hint

    def check(self, path: str, value: float) -> None:
        """Raise a ConfigError with ``path`` unless ``value`` is in range."""
        if isinstance(value, bool) or not isinstance(value, Real):  # which numpy's numbers are, too
            raise ConfigError(path, value, self.expected)
        problem = self.problem(value)
        if problem is not None:
            raise ConfigError(path, value, problem)

    def check_whole(self, path: str, value: int) -> None:
        """Check a whole number; a float is refused even if it is whole."""
        if type(value) is not int:
            raise ConfigError(path, value, f"expected {self.what}")
        self.check(path, value)

    def check_each(self, path: str, value: float | tuple[float, ...]) -> None:
        """Check one number, or a list with one for each node."""
        if not isinstance(value, tuple):
            self.check(path, value)
            return
        for index, number in enumerate(value):
            self.check(f"{path}[{index}]", number)

    def validated(self, value: float) -> float:
        """Return ``value``, or raise pydantic's error."""
        problem = self.problem(value)
        if problem is not None:
            from pydantic_core import PydanticCustomError

            raise PydanticCustomError("settings", "{text}", {"text": problem})
        return value


FRACTION = Within("a fraction", 0, 1, open_low=True)
GAMMA = Within("a consensus step size", 0, 1, open_low=True)
COUNT = Within("a whole number", 1)

STEP = Within("a step", 1e-12, 1e5)
STEP_RATIO = Within("a multiple", 0, 1000, open_low=True)
BITS = Within("bits per parameter and round", 0, 32, open_low=True)
BYTES = Within("bytes per round", 1)
SECONDS = Within("seconds per round", 0, open_low=True)
MBPS = Within("a rate in Mbit/s", 0, open_low=True)
DEAD_ZONE = Within("a number of steps", 0.5, 4)
RATE = Within("a fraction", 0, 1)
HISTORY = Within("a number of rounds", 0, 64)
RANK = Within("a rank", 1, 64)
MOMENTUM = Within("a factor", 0, 0.999)
LEARNING_RATE = Within("a learning rate", 0, open_low=True)
NORM = Within("a norm", 0, open_low=True)

MAX_LEVELS = 24
"""Most levels of a wavelet transform: ``periodization`` pads to a multiple of ``2**levels``."""
LEVELS = Within("a whole number", 1, MAX_LEVELS)


def _short(number: float) -> str:
    if isinstance(number, int) and number >= 1e6 and number & number + 1 == 0:
        return f"2^{number.bit_length()} - 1"
    return f"{number:g}" if abs(number) < 1e6 else f"{'-' if number < 0 else ''}2^{math.log2(abs(number)):g}"
