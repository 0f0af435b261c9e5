"""Ray clusters of several small "machines", all on this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MACHINE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "memory": 2 * 2**30}


@contextmanager
def cluster(machines: int, folder: Path, **machine: Any) -> Iterator[Any]:
    """A cluster that this process is connected to, each machine with a folder for what it is sent."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={**MACHINE, **machine, "include_dashboard": False})
    try:
        for number in range(1, machines):
            add_machine(made, folder / f"machine-{number}", **machine)
        ray.init(address=made.address, log_to_driver=False, logging_level="WARNING")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def add_machine(made: Any, folder: Path, **machine: Any) -> Any:
    return made.add_node(**{**MACHINE, **machine}, env_vars={"JWINS_DATA": str(folder)})
