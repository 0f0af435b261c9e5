"""The commands of compose.yaml, run without containers: in three folders of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # doc_blocks.py

import doc_blocks
from jwins.run.launch import free_ports

ROOT = Path(__file__).parents[2]
NAMES = ("alice", "bob", "carol")


def services() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return found


def test_every_peer_sees_its_own_folder_alone() -> None:
    found = services()
    assert set(found) == {"keys", *NAMES}
    for name in NAMES:
        assert found[name]["volumes"] == [f"./state/{name}:/state"]
        assert found[name]["command"][-2:] == ["roster.toml", f"{name}.key"]
        assert found[name]["stop_signal"] == "SIGINT", "so that a peer that is stopped says Bye"
        assert "ports" not in found[name], "peers reach each other within the network of the containers"
    copied = (ROOT / "Dockerfile").read_text()
    for path in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src", "experiments"):
        assert path in copied
        assert (ROOT / path).exists()
        assert path not in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.alone
def test_the_commands_train_three_peers(tmp_path: Path) -> None:
    found, environment = services(), doc_blocks.environment(ROOT, tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    shell, flags, script = found["keys"]["command"]
    for name, port in zip(NAMES, free_ports(3), strict=True):
        script = script.replace(f"{name}:7420", f"127.0.0.1:{port}")
    subprocess.run([shell, flags, script], cwd=state, env=environment, check=True, timeout=120)
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "experiments/own_loop.py"), *found[name]["command"][2:]],
            cwd=state / name,
            env=environment | found[name]["environment"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in NAMES
    ]
    for name, process in zip(NAMES, running, strict=True):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert f"{name}: 30 rounds" in output
        assert (state / name / "peer" / "status.json").exists(), "a restart goes on from here"
