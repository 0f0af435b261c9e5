from __future__ import annotations

from collections.abc import Iterator

import pytest

from empty_figures import empty_figures


@pytest.fixture
def complete_figures() -> None:
    """A test uses this if it reads the files of figures."""


@pytest.fixture(autouse=True)
def _figures(request: pytest.FixtureRequest) -> Iterator[None]:
    if "complete_figures" in request.fixturenames:
        yield
    else:
        with empty_figures():
            yield
