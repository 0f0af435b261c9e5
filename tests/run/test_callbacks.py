"""Functions of the user's own that a run calls, and trackers that are told of it."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jwins
from jwins.engines.simulator import Progress
from jwins.errors import UsageError
from jwins.run.result import Result
from jwins.run_folder.rows import EvalRow


def experiment(folder: Path, batching: str = "loop", **run: Any) -> jwins.Experiment:
    return jwins.Experiment(
        name="watched",
        nodes={"count": 4},  # type: ignore[arg-type]
        topology={"kind": "ring"},  # type: ignore[arg-type]
        train={"batching": batching},  # type: ignore[arg-type]
        compute={"spread": 0.8, "jitter": 0.3},  # type: ignore[arg-type]
        run={"rounds": 5, "eval_every": 2, "checkpoint_every": 2, "folder": folder, **run},  # type: ignore[arg-type]
    )


class Watch(jwins.Callback):
    """Remembers all calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.models: dict[int, dict[int, Mapping[str, Tensor]]] = {}
        self.kept: Any = None

    def on_start(self, experiment: jwins.Experiment) -> None:
        self.calls.append(("start", experiment.train.batching))

    def on_round(self, progress: Progress) -> None:
        self.calls.append(("round", progress.round))

    def on_evaluation(self, row: EvalRow, models: Mapping[int, Mapping[str, Tensor]]) -> None:
        self.calls.append(("evaluation", row.round))
        self.models[row.round] = dict(models)
        self.kept = models

    def on_end(self, result: Result) -> None:
        self.calls.append(("end", result.status))


def test_what_is_called_when(tmp_path: Path) -> None:
    watch, second = Watch(), Watch()
    result = jwins.simulate(experiment(tmp_path / "a", "auto"), callbacks=[watch, second])
    assert watch.calls[0] == ("start", "stacked")
    assert watch.calls[-1] == ("end", "finished")
    assert [at for what, at in watch.calls if what == "evaluation"] == [0, 2, 4, 5]
    rounds = [at for what, at in watch.calls if what == "round"]
    assert rounds == sorted(set(rounds))
    assert rounds[-1] == 5
    for at in (2, 4, 5):
        assert watch.calls.index(("evaluation", at)) < watch.calls.index(("round", at))
    assert second.calls == watch.calls
    plain = jwins.simulate(experiment(tmp_path / "b", "auto"))
    assert plain.sha256 == result.sha256
    assert plain.record.evaluations == result.record.evaluations


def test_the_models_are_those_that_were_measured(tmp_path: Path) -> None:
    """Though some nodes are ahead of an evaluation when the last of them has reached it."""
    watch = Watch()
    result = jwins.simulate(experiment(tmp_path / "a"), callbacks=[watch])
    shorter = jwins.simulate(experiment(tmp_path / "b", rounds=4))
    for models, other in ((watch.models[5], result), (watch.models[4], shorter)):
        assert sorted(models) == [0, 1, 2, 3]
        for node, model in models.items():
            expected = other.parameters(node)
            assert model.keys() == expected.keys()
            assert all(torch.equal(model[name], tensor) for name, tensor in expected.items())
    start = watch.models[0]
    assert all(torch.equal(start[0][name], start[3][name]) for name in start[0])


def test_models_are_read_within_the_call(tmp_path: Path) -> None:
    watch = Watch()
    jwins.simulate(experiment(tmp_path), callbacks=[watch])
    assert (len(watch.kept), list(watch.kept), 7 in watch.kept) == (4, [0, 1, 2, 3], False)
    with pytest.raises(
        UsageError, match="can be read only within on_evaluation; copy there what you need later"
    ):
        watch.kept[0]


def test_a_run_that_goes_on_tells_of_the_rest(tmp_path: Path) -> None:
    class Interrupt(Watch):
        def on_round(self, progress: Progress) -> None:
            super().on_round(progress)
            if progress.round == 3:
                raise KeyboardInterrupt

    first = Interrupt()
    with pytest.raises(KeyboardInterrupt):
        jwins.simulate(experiment(tmp_path), callbacks=[first])
    assert ("evaluation", 2) in first.calls
    second = Watch()
    jwins.simulate(experiment(tmp_path), callbacks=[second], resume=True)
    assert [at for what, at in second.calls if what == "evaluation"][-2:] == [4, 5]
    assert ("round", 1) not in second.calls
    third = Watch()
    jwins.simulate(experiment(tmp_path), callbacks=[third], resume=True)
    assert third.calls == [("end", "finished")]


def test_a_run_that_is_stopped_says_so(tmp_path: Path) -> None:
    watch = Watch()
    rule = {"stop": {"metric": "loss", "target": 100.0}}
    jwins.simulate(experiment(tmp_path / "a", **rule), callbacks=[watch])
    assert watch.calls == [("start", "loop"), ("evaluation", 0), ("end", "stopped")]
    asked = Watch()
    jwins.simulate(experiment(tmp_path / "b"), callbacks=[asked], stop=lambda: True)
    assert asked.calls[-1] == ("end", "interrupted")


def test_what_is_no_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"callbacks\[1\] = .*print.*has no on_start, .*from jwins.Callback"):
        jwins.simulate(experiment(tmp_path), callbacks=[Watch(), print])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"callbacks\[0\] = .*Watch.*: is a class; pass an instance"):
        jwins.simulate(experiment(tmp_path), callbacks=[Watch])  # type: ignore[list-item]
    assert not tmp_path.joinpath("config.toml").exists()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("experiment", "digits"), ("experiment", {}), ("callbacks", jwins.Callback()), ("progress", 3)),
        *(("stop", True), ("engine", "ray")),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(argument: str, value: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"experiment": experiment(tmp_path), argument: value}
    with pytest.raises(UsageError, match=rf"simulate: {argument} = .*: expected"):
        jwins.simulate(**arguments)


def test_a_callback_changes_neither_rows_nor_the_mode_of_autograd(tmp_path: Path) -> None:
    class Clears(jwins.Callback):
        def on_evaluation(self, row: EvalRow, models: Mapping[int, Mapping[str, Tensor]]) -> None:
            row.metrics.clear()  # type: ignore[attr-defined]

    with torch.inference_mode():
        result = jwins.simulate(experiment(tmp_path, rounds=1), callbacks=[Clears()])
    assert "accuracy" in result.record.evaluations[-1].metrics


# --- Trackers ------------------------------------------------------------------------------------------------


class FakeWandbRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def log(self, values: dict[str, float], step: int) -> None:
        assert self.exit_code is None
        assert not self.logged or step > self.logged[-1][0]
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeWandbRun]:
    """A stand-in for the library; the runs that it began."""
    runs: list[FakeWandbRun] = []

    def init(**options: Any) -> FakeWandbRun:
        runs.append(FakeWandbRun(options))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_weights_and_biases(wandb: list[FakeWandbRun], tmp_path: Path) -> None:
    from jwins.integrations.wandb import WandbCallback

    result = jwins.simulate(experiment(tmp_path), callbacks=[WandbCallback(project="p", mode="offline")])
    (run,) = wandb
    assert {key: run.options[key] for key in ("name", "project", "mode")} == {
        "name": "watched",
        "project": "p",
        "mode": "offline",
    }
    assert run.options["config"]["run"]["rounds"] == 5
    assert [step for step, _ in run.logged] == [0, 2, 4, 5]
    assert run.logged[-1][1]["accuracy/mean"] == result.rows[-1]["accuracy_mean"]
    assert run.logged[-1][1]["bytes/total"] == result.rows[-1]["bytes_total"]
    assert run.summary == {"status": "finished", "sha256": result.sha256}
    assert run.exit_code == 0
    again = WandbCallback()
    jwins.simulate(experiment(tmp_path), callbacks=[again], resume=True)
    assert (len(wandb), again.run) == (1, None)


def test_a_run_that_diverged_failed(wandb: list[FakeWandbRun], tmp_path: Path) -> None:
    from jwins.integrations.wandb import WandbCallback

    wild = experiment(tmp_path).changed({"train.optimizer.lr": 1e30})
    assert jwins.simulate(wild, callbacks=[WandbCallback(name="mine")]).status == "diverged"
    (run,) = wandb
    assert (run.options["name"], run.exit_code, run.summary["status"]) == ("mine", 1, "diverged")


class FakeMlflow(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[str, Any]] = []

    def start_run(self, **options: Any) -> None:
        self.calls.append(("start", options))

    def log_params(self, values: dict[str, str]) -> None:
        assert all(isinstance(value, str) and len(value) <= 500 for value in values.values())
        self.calls.append(("params", values))

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("metrics", (step, values)))

    def set_tags(self, values: dict[str, str]) -> None:
        self.calls.append(("tags", values))

    def end_run(self, status: str) -> None:
        self.calls.append(("end", status))


@pytest.mark.parametrize(
    ("run", "stop", "ended", "status"),
    [
        ({}, False, "FINISHED", "finished"),
        ({"stop": {"metric": "loss", "target": 100.0}}, False, "FINISHED", "stopped"),
        ({}, True, "KILLED", "interrupted"),
    ],
)
def test_mlflow(
    run: dict[str, Any], stop: bool, ended: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jwins.integrations.mlflow import MlflowCallback

    library = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", library)
    result = jwins.simulate(
        experiment(tmp_path, **run), callbacks=[MlflowCallback(tags={"a": "b"})], stop=lambda: stop
    )
    calls = dict(library.calls)
    assert calls["start"] == {"run_name": "watched", "tags": {"a": "b"}}
    assert calls["params"]["train.optimizer.lr"] == "0.05"
    assert calls["tags"] == {"status": status, "sha256": result.sha256 or ""}
    assert calls["end"] == ended
    measured = [row.round for row in result.record.evaluations]
    assert [value[0] for name, value in library.calls if name == "metrics"] == measured


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_library_that_is_not_there_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jwins.integrations.mlflow import MlflowCallback
    from jwins.integrations.wandb import WandbCallback

    monkeypatch.setitem(sys.modules, name, None)
    made = {"wandb": WandbCallback, "mlflow": MlflowCallback}[name]
    with pytest.raises(UsageError, match=rf"needs an extra: pip install 'jwins\[{name}\]'"):
        made()
