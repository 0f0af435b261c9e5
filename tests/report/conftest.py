import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from empty_figures import empty_figures

sys.path.insert(0, str(Path(__file__).parent))  # made_up.py


@pytest.fixture
def unseen_figures() -> Iterator[None]:
    """A test that looks at no figure uses this."""
    with empty_figures():
        yield
