import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # wires.py
sys.path.insert(0, str(Path(__file__).parent.parent / "engines"))  # worlds.py

from wires import Wires


@pytest.fixture
def wires() -> Iterator[Wires]:
    made = Wires()
    yield made
    made.close()
