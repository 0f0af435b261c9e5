"""A result and a step of progress print as one line, whatever they hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jwins.experiment import Experiment, NodesConfig, RunConfig
from jwins.experiment.sections import TrainConfig
from jwins.run.run import simulate

if TYPE_CHECKING:
    from jwins.engines.simulator.driver import Progress


def test_result_and_progress_print_as_one_line(tmp_path: Path) -> None:
    seen: list[Progress] = []
    run = RunConfig(rounds=3, eval_every=1, eval_samples=20, folder=tmp_path / "run")
    train = TrainConfig(batching="loop")
    tiny = Experiment(name="tiny", nodes=NodesConfig(count=6), train=train, run=run)
    result = simulate(tiny, progress=seen.append)
    assert repr(result).startswith("<Result tiny, finished, round 3: ")
    assert f"accuracy {result.rows[-1]['accuracy_mean']:.4g}" in repr(result)
    assert str(tmp_path / "run") in repr(result)
    shown = [repr(step) for step in seen]
    assert any(text.startswith("<Progress round 3 of 3, ") and "accuracy" in text for text in shown)
    for text in (repr(result), *shown):
        assert "\n" not in text
        assert len(text) < 300
    page = result._repr_html_()
    assert "<td>tiny</td><td>finished</td><td>3</td>" in page
    assert f"<td>{result.rows[-1]['accuracy_mean']:.4g}</td>" in page
    assert len(page) < 500
