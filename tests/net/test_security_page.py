"""The page about security names a test for each attack, and these tests are there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "explanation" / "security.md"


def test_every_attack_of_a_member_names_tests_that_exist() -> None:
    there = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in HERE.glob("test_*.py")), re.M))
    text = PAGE.read_text()
    section = text[text.index("## Attacks by a hostile member") : text.index("## Information in shared models")]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(rows) >= 14
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= there, row
