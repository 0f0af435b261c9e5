"""Errors for users without a cluster, or without the extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import jwins
from jwins.errors import UsageError

BLOCKED = "import sys; sys.modules['ray'] = None; from jwins.cli import main; main()"


def run(*words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code or "from jwins.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("command", [["run", "digits", "--actors", "2"], ["compare", "digits-compare"]])
def test_without_the_extra_nothing_starts(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run(*command, "--engine", "ray", code=BLOCKED)
    assert said.returncode == 2
    assert "the engine ray needs an extra: pip install 'jwins[ray]'" in said.stderr
    assert "Traceback" not in said.stderr
    assert not list(tmp_path.iterdir())


def test_ray_is_loaded_only_when_asked_for() -> None:
    modules = "jwins, jwins.run.run, jwins.compare.runner, jwins.cli"
    code = f"import sys, {modules}; jwins.Ray(actors=2); print('ray' in sys.modules)"
    assert run(code=code).stdout == "False\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "digits", "--actors", "2"], "--actors = 2: needs a Ray cluster; add --engine ray"),
        (["compare", "digits-compare", "--address", "auto"], "--address = 'auto': needs a Ray cluster"),
        (["run", "digits", "--engine", "spark"], "--engine = 'spark': expected ray; leave the option out"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    said = run(*words)
    assert said.returncode == 2
    assert message in said.stderr


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="actors = 0: expected at least 1"):
        jwins.Ray(actors=0)
    with pytest.raises(UsageError, match="restarts = -1: expected at least 0"):
        jwins.Ray(restarts=-1)


@pytest.mark.slow
@pytest.mark.alone
def test_an_address_without_a_cluster_is_named(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "RAY_TMPDIR", str(tmp_path_factory.mktemp("ray"))
    )  # where clusters of other tests are not
    said = run("run", "digits", "--engine", "ray", "--address", "auto")
    assert said.returncode == 2, said.stderr
    assert "--address auto: no suitable Ray cluster" in said.stderr
    assert "Traceback" not in said.stderr
    assert not list(tmp_path.iterdir())
