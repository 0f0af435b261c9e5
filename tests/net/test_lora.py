"""The example of LoRA adapters that peers train together."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "experiments" / "lora.py"


@pytest.mark.slow
def test_peers_share_adapters_and_end_with_the_same_ones(tmp_path: Path) -> None:
    """The frozen model of 112,064 parameters begins at a loss of 5.8."""
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    launch = [sys.executable, "-m", "jwins", "launch", "--script", str(EXAMPLE), "--nodes", "3"]
    ended = subprocess.run(
        [*launch, "--", "--steps", "40"], cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    text = ended.stdout + ended.stderr
    for log in tmp_path.rglob("*.log"):
        text += log.read_text(encoding="utf-8")
    assert ended.returncode == 0, text
    found = set(re.findall(r"node-(\d): loss ([\d.]+) on all plays, (\d+) kB sent", text))
    assert {node for node, _, _ in found} == {"0", "1", "2"}, text
    losses = [float(loss) for _, loss, _ in found]
    assert max(losses) < 4.5, found
    assert max(losses) - min(losses) < 0.05, found
    assert all(int(sent) < 100 for _, _, sent in found), "a dense exchange of the model sends 900 kB"
