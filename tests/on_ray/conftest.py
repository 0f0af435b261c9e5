import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # clusters.py


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from clusters import cluster

    with cluster(2, tmp_path_factory.mktemp("machines")) as made:
        yield made
