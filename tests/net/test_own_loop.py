"""The example with a loop of one's own, as two processes run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from members import roster_of

from jwins.net.roster import write_roster

EXAMPLE = Path(__file__).parents[2] / "experiments" / "own_loop.py"


@pytest.mark.slow
def test_two_members_with_half_of_the_classes_each_learn_all(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    write_roster(roster, tmp_path / "roster.toml")
    members = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLE), "roster.toml", f"{member.name}.key", "--rounds", "25"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for member in roster.members
    ]
    try:
        outputs = [member.communicate(timeout=240)[0] for member in members]
    finally:
        for member in members:
            member.kill()
    for member, output in zip(roster.members, outputs, strict=True):
        assert f"{member.name}: 25 rounds" in output, output
        assert "timed out" not in output
        found = re.search(r"accuracy on all digits: ([\d.]+) %", output)
        assert found is not None, output
        assert float(found[1]) > 80.0, "half of the classes alone would be 50 %"
