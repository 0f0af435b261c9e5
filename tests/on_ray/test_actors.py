"""One simulation over the machines of a cluster measures what one process measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clusters import MACHINE, cluster

import jwins
from jwins.engines.simulator.driver import Progress
from jwins.errors import ActorLostError, ConfigError, UsageError
from jwins.run.result import Result

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore"),  # Ray's own leave sockets and files open
]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two with room for two actors each."""
    with cluster(
        2, tmp_path_factory.mktemp("machines"), **MACHINE | {"num_cpus": 2, "memory": 4 * 2**30}
    ) as made:
        yield made


def experiment(folder: Path, **tables: Any) -> jwins.Experiment:
    base: dict[str, Any] = {
        "name": "spread",
        "nodes": {"count": 16},
        "topology": {"kind": "regular", "degree": 3},
        "sharing": {"kind": "jwins"},
        "train": {"local_steps": 1, "batching": "loop"},
        "run": {"rounds": 6, "eval_every": 3, "checkpoint_every": 2, "folder": folder},
    }
    for section, table in tables.items():
        base[section] = {**base.get(section, {}), **table} if section != "faults" else table
        if "kind" in table:
            base[section] = table
    return jwins.Experiment(**base)


def measured(result: Result) -> Any:
    """All but the seconds of the process."""
    record = result.record
    assert record.end is not None
    traffic = sorted((result.folder / "final").glob("*")), result.edges
    return record.evaluations, msgspec.structs.replace(record.end, wall_s={}), len(traffic[0]), traffic[1]


FULL, CHOCO = {"kind": "full"}, {"kind": "choco", "fraction": 0.2, "gamma": 0.4}
DYNAMIC = {"kind": "regular", "degree": 3, "dynamic": True}
CASES: dict[str, dict[str, Any]] = {
    "full": {"sharing": FULL},
    "full-dynamic": {"sharing": FULL, "topology": DYNAMIC},
    "jwins": {},
    "jwins-dynamic": {"topology": DYNAMIC},
    "choco": {"sharing": CHOCO},
    "choco-dynamic": {"sharing": CHOCO, "topology": DYNAMIC},
    "quasi-global": {
        "train": {
            "local_steps": 1,
            "batching": "loop",
            "optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "quasi_global": 0.9},
        },
        "faults": [{"kind": "crash", "node": 1, "round": 2}, {"kind": "rejoin", "node": 1, "round": 4}],
        "run": {"deadline_s": 0.5},
    },
    "stacked": {"train": {"local_steps": 1, "batching": "stacked"}, "nodes": {"count": 150}},
    "stopped": {"run": {"stop": {"metric": "loss", "target": 2.28}, "eval_every": 1, "rounds": 30}},
    "uneven-steps": {"train": {"local_steps": (1, 2, 3, 2) * 4}},
    "asynchronous": {
        "compute": {"step_ms": 5.0, "spread": 1.0},
        "train": {"balanced": True, "batching": "loop"},
        "faults": [{"kind": "crash", "node": 1, "round": 2}, {"kind": "rejoin", "node": 1, "round": 4}],
        "run": {"mode": "async"},
    },
    "participation": {"nodes": {"count": 16, "participation": 0.5}, "sharing": CHOCO},
    "attackers": {
        "sharing": {"kind": "full", "robust": {"kind": "median"}},
        "faults": [{"kind": "attack", "form": "little", "nodes": [3, 12]}],
        "task": {"name": "digits", "label_noise": 0.3},
    },
    "schedule": {
        "train": {
            "local_steps": 2,
            "batching": "loop",
            "optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1, "weight_decay_on": "matrices"},
            "schedule": {"kind": "cosine", "warmup_steps": 3},
            "clip_norm": 1.0,
            "precision": "bfloat16",
            "outer": {"kind": "nesterov", "lr": 0.7, "momentum": 0.5},
        },
    },
    "privacy": {"sharing": FULL, "train": {"privacy": {"noise_multiplier": 1.0}}},
    "uneven": {"compute": {"step_ms": 5.0, "spread": 0.5}, "links": {"uplink_mbps": 50, "latency_ms": 1}},
    "faults": {
        "sharing": CHOCO,
        "faults": [{"kind": "crash", "node": 1, "round": 2}, {"kind": "rejoin", "node": 1, "round": 4}],
        "run": {"deadline_s": 0.5},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_actors_on_a_cluster_measure_the_same(machines: Any, case: str, tmp_path: Path) -> None:
    if case == "privacy":
        pytest.importorskip("opacus")
    reference = jwins.simulate(experiment(tmp_path / "here", **CASES[case]))
    for actors in (1, 2, 4) if case == "choco" else (2,):
        spread = jwins.simulate(
            experiment(tmp_path / f"{actors}", **CASES[case]), engine=jwins.Ray(actors=actors)
        )
        assert measured(spread) == measured(reference), actors
        for path in sorted((reference.folder / "final").iterdir()):
            assert (spread.folder / "final" / path.name).read_bytes() == path.read_bytes()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The actors of the simulation under way."""
    from jwins.run import on_ray

    actors: list[Any] = []
    start_actors = on_ray.start_actors

    @contextmanager
    def noted(*args: Any, **options: Any) -> Iterator[list[Any]]:
        with start_actors(*args, **options) as made:
            actors[:] = made
            yield made
        actors.clear()

    monkeypatch.setattr(on_ray, "start_actors", noted)
    return actors


def test_a_lost_actor_is_made_up_for(machines: Any, tmp_path: Path, held: list[Any]) -> None:
    """An actor dies twice: the run goes on from its last checkpoint, and measures the same."""
    reference = measured(jwins.simulate(experiment(tmp_path / "here", sharing=CHOCO)))
    kills = [2, 5]

    def kill(progress: Progress) -> None:
        if kills and progress.round == kills[0]:
            kills.pop(0)
            ray.kill(held[len(kills)]._actor)

    run = experiment(tmp_path / "there", sharing=CHOCO)
    result = jwins.simulate(run, engine=jwins.Ray(actors=2), progress=kill)
    assert not kills
    assert measured(result) == reference

    kills = [3]
    with pytest.raises(ActorLostError, match=r"actor \d with 8 nodes from \d+ is lost") as caught:
        jwins.simulate(
            experiment(tmp_path / "no", sharing=CHOCO), engine=jwins.Ray(actors=2, restarts=0), progress=kill
        )
    assert "continue with --resume" in caught.value.__notes__[0]
    here = jwins.simulate(experiment(tmp_path / "no", sharing=CHOCO), resume=True)
    assert measured(here) == reference


def until(last: int, run: jwins.Experiment, engine: jwins.Ray | None) -> Result:
    """Go on with a run, and interrupt it after so many rounds."""
    at = 0

    def look(progress: Progress) -> None:
        nonlocal at
        at = progress.round

    return jwins.simulate(run, resume=True, engine=engine, progress=look, stop=lambda: at >= last)


def test_a_run_goes_on_with_other_actors(machines: Any, tmp_path: Path) -> None:
    """Begun with two actors, interrupted, gone on with here, interrupted, ended with three."""
    reference = measured(jwins.simulate(experiment(tmp_path / "whole", sharing=CHOCO)))
    run = experiment(tmp_path / "parts", sharing=CHOCO)
    for engine, last in ((jwins.Ray(actors=2), 1), (None, 3), (jwins.Ray(actors=3), 9)):
        result = until(last, run, engine)
    assert measured(result) == reference


def test_what_cannot_be_spread_is_refused(machines: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wire\.codec = 'paper': cannot be used by several processes"):
        jwins.simulate(experiment(tmp_path / "codec", wire={"codec": "paper"}), engine=jwins.Ray())
    with pytest.raises(
        UsageError, match=r"too small: 5 actors of 1 core, .* of memory each do not fit, 4 would"
    ):
        jwins.simulate(experiment(tmp_path / "five"), engine=jwins.Ray(actors=5))
    few = experiment(tmp_path / "few", nodes={"count": 3}, topology={"kind": "ring"})
    with pytest.raises(ConfigError, match=r"actors = 4: expected at most 3 for 3 nodes"):
        jwins.simulate(few, engine=jwins.Ray(actors=4))
    assert not [*(tmp_path).glob("*/config.toml")]
