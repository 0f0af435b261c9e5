"""A loop of the user's own that trains with opacus, and shares its model by a peer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "experiments" / "private_loop.py"


@pytest.mark.slow
def test_peers_share_models_that_opacus_trains(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    command = [sys.executable, "-m", "jwins", "launch", "--script", str(EXAMPLE), "--nodes", "3"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    text = ended.stdout + ended.stderr
    for log in tmp_path.rglob("*.log"):
        text += log.read_text(encoding="utf-8")
    assert ended.returncode == 0, text
    found = re.findall(r"node-\d: accuracy ([\d.]+)%, epsilon ([\d.]+) at delta", text)
    assert len(found) >= 3, text
    assert all(float(accuracy) > 50 and 1 < float(epsilon) < 10 for accuracy, epsilon in found), found
