"""Comparisons and pages without the seconds that matplotlib takes to write their figures."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)
"""The smallest PNG."""
NOTHING = '<svg viewBox="0 0 1 1"></svg>'


def _written(figure: Any, target: io.BytesIO | io.StringIO, **options: Any) -> None:
    if isinstance(target, io.StringIO):
        target.write(NOTHING)
    else:
        target.write(PIXEL)


@contextlib.contextmanager
def empty_figures() -> Iterator[None]:
    """Figures are drawn, and the files of them have one pixel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", _written)
        yield
