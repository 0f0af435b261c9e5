"""Every row of ``jwins.experiment.plugins``: built from its table and listed."""

from __future__ import annotations

import tomllib
from typing import Any, get_args

import pytest

from jwins.errors import ConfigError
from jwins.experiment import Experiment, plugins
from jwins.experiment.reference import settings_docs
from jwins.run.builders import build_sharing, build_topology
from jwins.sharing import Sharing

REQUIRED: dict[str, dict[str, Any]] = {
    "random_k": {"fraction": 0.3},
    "top_k": {"fraction": 0.3},
    "choco": {"fraction": 0.3, "gamma": 0.5},
    "beer": {"fraction": 0.3, "gamma": 0.5},
    "sparse_loco": {"fraction": 0.3, "gamma": 0.5},
    "moniqua": {"theta": 0.5},
    "demo": {"gamma": 0.5},
}
QUANTIZERS: dict[str, dict[str, Any]] = {"uniform": {"step": 0.01}, "absmax": {"bits": 4}}
TABLES: list[type[plugins.Plugin]] = [
    *plugins.ALGORITHMS.values(),
    *plugins.QUANTIZER_TABLES.values(),
    *plugins.ROBUST_TABLES.values(),
    *plugins.CUTOFF_TABLES.values(),
    *plugins.TOPOLOGY_TABLES.values(),
    *plugins.PARTITION_TABLES.values(),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_a_table_says_its_name_and_what_it_is(table: type[plugins.Plugin]) -> None:
    assert get_args(table.model_fields["kind"].annotation) == (table.name(),)
    assert table.__doc__


@pytest.mark.parametrize("kind", plugins.ALGORITHMS)
def test_an_algorithm_is_built_from_its_table(kind: str) -> None:
    experiment = Experiment(sharing={"kind": kind, **REQUIRED.get(kind, {})})  # type: ignore[arg-type]
    assert isinstance(experiment.sharing, plugins.ALGORITHMS[kind])
    assert Sharing in type(build_sharing(experiment)).__mro__


@pytest.mark.parametrize("values", ["float32", "bfloat16", *plugins.QUANTIZER_TABLES])
@pytest.mark.parametrize(
    "kind", [kind for kind, table in plugins.ALGORITHMS.items() if "values" in table.model_fields]
)
def test_an_algorithm_takes_every_quantizer(kind: str, values: str) -> None:
    given: Any = {"kind": values, **QUANTIZERS[values]} if values in QUANTIZERS else values
    experiment = Experiment(sharing={"kind": kind, "values": given, **REQUIRED.get(kind, {})})  # type: ignore[arg-type]
    built = build_sharing(experiment).values  # type: ignore[attr-defined]
    if values not in QUANTIZERS:
        assert built == values
        return
    for name, value in QUANTIZERS[values].items():
        assert getattr(built, name) == value
    again = Experiment(**tomllib.loads(experiment.to_toml()))
    assert build_sharing(again) == build_sharing(experiment)


@pytest.mark.parametrize(
    ("values", "path", "problem"),
    [
        ("float16", "sharing.values", 'expected "float32" or "bfloat16", or a table of kind = uniform, absmax'),
        ("absmax", "sharing.values", "or a table of kind"),
        (4, "sharing.values", "expected a table"),
        ({"kind": "unifrm", "step": 1.0}, "sharing.values.kind", 'did you mean "uniform"'),
        ({"kind": "uniform"}, "sharing.values.step", "required"),
        ({"kind": "uniform", "step": 0.0}, "sharing.values.step", "expected a step"),
        ({"kind": "uniform", "step": 1.0, "bits": 4}, "sharing.values.bits", 'for kind = "absmax"'),
        ({"kind": "uniform", "step": 1.0, "dead_zone": 0.4}, "sharing.values.dead_zone", "dead zone"),
        ({"kind": "absmax", "bits": 9}, "sharing.values.bits", "bits in"),
        ({"kind": "absmax", "bits": 4, "block": 8}, "sharing.values.block", "at least 16"),
        ({"kind": "absmax", "bits": 4, "rounding": "dithered"}, "sharing.values.rounding", "stochastic"),
    ],
)
def test_quantizers_that_are_none_say_where_and_why(values: Any, path: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment(sharing={"kind": "full", "values": values})  # type: ignore[arg-type]
    assert caught.value.path == path
    assert problem in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in plugins.TOPOLOGY_TABLES if kind != "edge_list"])
def test_a_topology_is_built_from_its_table(kind: str) -> None:
    experiment = Experiment(topology={"kind": kind})  # type: ignore[arg-type]
    assert build_topology(experiment).num_nodes == experiment.nodes.count


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in plugins.TOPOLOGY_TABLES if kind != "edge_list"])
def test_a_topology_changes_if_its_table_says_so(kind: str, dynamic: bool) -> None:
    if dynamic and "dynamic" not in plugins.TOPOLOGY_TABLES[kind].model_fields:
        pytest.skip("is never drawn anew")
    table = {"kind": kind, "dynamic": True} if dynamic else {"kind": kind}
    experiment = Experiment(topology=table)  # type: ignore[arg-type]
    topology = build_topology(experiment)
    first, *later = [topology.at(r).recipients for r in range(4)]
    assert experiment.topology_changes == any(graph != first for graph in later)


@pytest.mark.parametrize("kind", plugins.PARTITION_TABLES)
def test_a_partitioner_is_built_from_its_table(kind: str) -> None:
    assert callable(plugins.PARTITION_TABLES[kind]().build().split)


def test_the_reference_names_every_kind() -> None:
    types = {key.path: key.type for key in settings_docs(Experiment)}
    for path, kinds in (
        ("sharing", plugins.ALGORITHMS),
        ("sharing.cutoff", plugins.CUTOFF_TABLES),
        ("sharing.values", plugins.QUANTIZER_TABLES),
        ("topology", plugins.TOPOLOGY_TABLES),
        ("task.partition", plugins.PARTITION_TABLES),
    ):
        assert types[path].endswith(f"table; kind = {', '.join(kinds)}")
