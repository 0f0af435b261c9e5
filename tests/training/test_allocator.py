"""A process that stays gives memory back when it has nothing to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from pathlib import Path
from jwins.training.allocator import trim_freed_memory, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

assert keep_freed_memory()
held = [torch.ones(1_000_000) for _ in range(100)]
before = resident()
del held
kept = resident()
trim_freed_memory()
print(before - kept, before - resident())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory where Linux has it")
def test_what_is_freed_is_kept_until_it_is_given_back() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=100, check=False
    )
    if "AssertionError" in printed.stderr:
        pytest.skip("not glibc")
    at_once, in_the_end = map(float, printed.stdout.split())
    assert at_once < 100, "of 400 MB"
    assert in_the_end > 300
