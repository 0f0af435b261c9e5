"""Experiments as settings: TOML and Python say the same, and errors name path, value and remedy."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import runpy
import subprocess
import sys
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jwins import experiment as e
from jwins import sharing
from jwins.errors import ConfigError
from jwins.experiment import Experiment, bundled, digest_of, identity_settings, load, plugins, result_settings
from jwins.experiment.reference import settings_docs
from jwins.experiment.settings import Settings
from jwins.experiment.toml import merge, parse_overrides, read_toml, write_toml
from jwins.run.assembly import build
from jwins.run.builders import build_sharing, build_task, build_topology
from jwins.run.evaluation_plan import evaluation_rounds
from jwins.run.run import simulate
from jwins.run_folder import archive
from jwins.tasks import partition

BUNDLED_RUNS = [name for name in bundled() if not name.endswith("compare")]


# --- Errors -----------------------------------------------------------------------------------------------

WRONG: list[tuple[list[str], str]] = [
    (
        ["sharing.cutoff.fractions=[0.1, 0.2, 1.4]"],
        "sharing.cutoff.fractions[2] = 1.4: expected a fraction in (0, 1]; did you mean 0.14?",
    ),
    (
        ["sharing.kind=random_k", "sharing.fraction=30"],
        "sharing.fraction = 30: expected a fraction in (0, 1]; did you mean 0.3?",
    ),
    (
        ["sharing.kind=jwin"],
        "sharing.kind = 'jwin': unknown kind; did you mean \"jwins\"? kinds: full, random_k, top_k, choco,",
    ),
    (["run.round=3"], 'run.round = 3: unknown key; did you mean "rounds"?'),
    (["rounds=3"], 'rounds = 3: unknown key here; did you mean "run.rounds"?'),
    (["task.colour=red"], "task.colour = 'red': unknown key; known here: name, file,"),
    (["run.rounds='3'"], "run.rounds = '3': expected a whole number; write 3 without quotes"),
    (["run.rounds=3.0"], "run.rounds = 3.0: expected a whole number; write 3"),
    (["run.rounds=0"], "run.rounds = 0: expected a whole number of at least 1"),
    (["run.seed=true"], "run.seed = True: expected a whole number"),
    (["run.seed=9223372036854775808"], "expected a signed 64-bit number in [-2^63, 2^63 - 1]"),
    (["run.deadline_s=nan"], "run.deadline_s = nan: expected a time above 0"),
    (["links.latency_ms=inf"], "links.latency_ms = inf: expected a time of at least 0"),
    (["topology=ring"], "topology = 'ring': expected a table; write topology = { kind = \"ring\" }"),
    (["topology.kind=torus", "topology.row=3"], 'topology.row = 3: unknown key; did you mean "rows"?'),
    (
        ["task.partition.alpha=3"],
        'task.partition.alpha = 3: this key is for kind = "dirichlet" or "quantity"; known here: kind',
    ),
    (["sharing.kind=choco"], "sharing.fraction = <missing>: required"),
    (
        ["sharing.kind=closed_loop", "sharing.budget=0.3", "sharing.step_ratio=3.0"],
        "sharing.step_ratio = 3.0: budget sets the rate already; remove one of them",
    ),
    (["faults=3"], "faults = 3: expected an array of tables, [[faults]], each with a kind: crash, "),
    (["sharing.levels=25"], "sharing.levels = 25: expected a whole number in [1, 24]"),
    (["sharing.kind=choco"], "sharing.gamma = <missing>: required"),
    (["train.batching=stack"], 'expected "auto", "loop" or "stacked"; did you mean "stacked"?'),
    (["train.optimizer.lr=-1"], "train.optimizer.lr = -1: expected a learning rate above 0"),
    (
        ["train.optimizer.quasi_global=1.0"],
        "train.optimizer.quasi_global = 1.0: expected a factor in [0, 0.999]",
    ),
    (
        ["train.schedule={kind='cosine', warmup_steps=30}", "run.rounds=10", "train.local_steps=3"],
        "train.schedule.warmup_steps = 30: the run has 30 local steps (run.rounds * train.local_steps)",
    ),
    (["train.schedule=cosine"], 'expected a table; write schedule = { kind = "cosine" }'),
    (
        ["train.schedule={kind='constant', final_fraction=0.1}"],
        'train.schedule.final_fraction = 0.1: this key is for kind = "cosine" or "linear"',
    ),
    (
        ["train.schedule={kind='linear'}", "train.optimizer={momentum=0.9, quasi_global=0.9}"],
        "train.schedule.kind = 'linear': train.optimizer.quasi_global needs one learning rate",
    ),
    (["train.outer={lr=-1.0}"], "train.outer.lr = -1.0: expected a learning rate above 0"),
    (
        ["train.outer={}", "train.buffers=shared"],
        "train.buffers = 'shared': train.outer would extrapolate the shared statistics; write \"local\", or",
    ),
    (
        ["train.balanced=true", "train.buffers=shared"],
        "train.buffers = 'shared': train.balanced would extrapolate the shared statistics; write \"local\", or",
    ),
    (["train.outer={kind='adam'}"], "train.outer.kind = 'adam': expected \"nesterov\""),
    (
        ["train.outer={}", "train.optimizer={momentum=0.9, quasi_global=0.9}"],
        "train.optimizer.quasi_global = 0.9: train.outer also applies momentum to the merged models",
    ),
    (
        ["train.outer={}", "sharing={kind='noloco'}"],
        "train.outer = 'nesterov': sharing.kind = \"noloco\" has an outer step of its own; remove one",
    ),
    (
        ["train.outer={}", "sharing={kind='demo', lr=0.01}"],
        "train.outer = 'nesterov': sharing.kind = \"demo\" has an outer step of its own; remove one",
    ),
    (
        ["train.buffers=shared", "sharing={kind='demo', lr=0.01}"],
        "train.buffers = 'shared': sharing.lr would extrapolate the shared statistics; write \"local\", or",
    ),
    (["sharing={kind='demo'}"], "sharing.lr = <missing>: expected lr on a complete graph, as in the paper, or"),
    (["sharing={kind='demo', lr=0.1, gamma=0.5}"], "sharing.lr = 0.1: belongs to the outer step"),
    (["sharing={kind='demo', sign=true, gamma=0.5}"], "sharing.sign = True: belongs to the outer step"),
    (["sharing={kind='demo', lr=0.1}"], "needs all nodes as neighbours in every round"),
    (
        ["sharing={kind='demo', lr=0.1}", "topology={kind='fully_connected'}", "run.deadline_s=1.0"],
        'run.deadline_s = 1.0: sharing.kind = "demo" without gamma needs every frame; remove this, or set',
    ),
    (
        [
            "sharing={kind='demo', lr=0.1}",
            "topology={kind='fully_connected'}",
            "faults=[{kind='crash', node=1, round=2}]",
        ],
        "faults[0].kind = 'crash': sharing.kind = \"demo\" without gamma needs every frame; remove this, or",
    ),
    (
        ["sharing={kind='sparse_loco'}", "topology={kind='ring'}"],
        "needs all nodes as neighbours in every round",
    ),
    (
        ["sharing={kind='sparse_loco'}", "topology={kind='fully_connected'}", "nodes.participation=0.5"],
        "needs all nodes as neighbours in every round",
    ),
    (
        ["sharing={kind='power_gossip'}", "topology={kind='one_peer_exponential'}"],
        "topology.kind = 'one_peer_exponential': sharing.kind = \"power_gossip\": its edges have a direction",
    ),
    (["train.clip_norm=0"], "train.clip_norm = 0: expected a norm above 0"),
    (["train.precision=float16"], 'expected "float32" or "bfloat16"; did you mean "bfloat16"?'),
    (["links.uplink_mbps=[1, 2]"], "links.uplink_mbps = [1.0, 2.0]: 2 numbers for 16 nodes"),
    (["links.uplink_mbps=[1, -2]"], "links.uplink_mbps[1] = -2: expected a rate in Mbit/s above 0"),
    (["links.uplink_mbps=fast"], "links.uplink_mbps = 'fast': expected a number"),
    (["run.eval_samples=some"], 'expected a number of samples of at least 1, or "all"'),
    (["run.stop={}"], "run.stop = {'metric': 'accuracy'}: expected one of target and patience"),
    (["run.stop={target=0.9, patience=3}"], "expected one of target and patience"),
    (["run.stop={patience=0}"], "run.stop.patience = 0: expected a whole number of at least 1"),
    (["run.stop={target=nan}"], "run.stop.target = nan: expected a number"),
    (
        ["run.stop={target=0.9}", "run.consensus_rounds=2"],
        "run.stop = {'metric': 'accuracy', 'target': 0.9}: such a run may never reach",
    ),
    (
        ["run.stop={patience=2}", "run.eval_samples_early=10"],
        "the last evaluations are not known in advance; remove this, or run.eval_samples_early",
    ),
    (["run.eval_at=[300]"], "run.eval_at[0] = 300: the run ends after run.rounds = 200"),
    (
        ["faults=[{kind='drop', sender=1, round=2}]"],
        "run.deadline_s = <missing>: required when frames are dropped",
    ),
    (["faults=[{kind='crash', node=16, round=2}]"], "faults[0].node = 16: there are nodes 0 to 15"),
    (
        ["run.deadline_s=1.0", "faults=[{kind='drop', sender=16, round=2}]"],
        "faults[0].sender = 16: there are nodes 0 to 15",
    ),
    (["faults=[{kind='crash', node=1, round=200}]"], "faults[0].round = 200: expected a round, 0 to 199"),
    (
        ["faults=[{kind='delay', sender=1, round=2, seconds=0}]"],
        "faults[0].seconds = 0: expected a time above 0",
    ),
    (
        ["faults=[{kind='delay', sender=1, receiver=1, round=2, seconds=1}]"],
        "faults[0].receiver = 1: is the sender itself",
    ),
    (["faults=[{kind='rejoin', node=1, round=2}]"], "the node rejoins without a crash in an earlier round"),
    (["faults=[{kind='drap'}]"], "faults[0].kind = 'drap': unknown kind; did you mean \"drop\"?"),
    (["faults=[{node=1}]"], "faults[0].kind = <missing>: required, one of: crash, rejoin, drop, delay, attack"),
    (
        ["faults=[{kind='attack', form='sign_flip', nodes=[1, 16]}]"],
        "faults[0].nodes[1] = 16: there are nodes 0 to 15",
    ),
    (
        [
            "faults=[{kind='attack', form='gaussian', nodes=[1]},"
            "{kind='attack', form='sign_flip', nodes=[2, 1]}]"
        ],
        "faults[1].nodes[1] = 1: also attacks in faults[0]; remove it from one",
    ),
    (
        ["faults=[{kind='attack', form='sign_flip', nodes=[]}]"],
        "faults[0].nodes = []: expected at least one entry",
    ),
    (["faults=[{kind='attack', form='flip', nodes=[1]}]"], "faults[0].form = 'flip': expected"),
    (
        ["faults=[{kind='attack', form='sign_flip', nodes=[1], scale=0}]"],
        "scale = 0: expected a number above 0",
    ),
    (
        ["faults=[{kind='attack', form='label_flip', nodes=[1], round=3}]"],
        "labels are flipped from round 0 on",
    ),
    (
        ["faults=[{kind='attack', form='label_flip', nodes=[1], scale=2.0}]"],
        "all labels are flipped; leave it out",
    ),
    (["faults=[{kind='attack', form='sign_flip', nodes=[1], round=200}]"], "round = 200: expected 0 to 199"),
    (
        ["faults=[{kind='attack', form='little', nodes=[1]}]"],
        "faults[0].form = 'little': needs whole models of its neighbours",
    ),
    (
        ["nodes.count=2", "topology.kind=ring", "faults=[{kind='attack', form='gaussian', nodes=[0, 1]}]"],
        "faults = '2 attackers': all nodes attack; leave at least one honest",
    ),
    (["sharing.kind=full", "sharing.robust={kind='trimed_mean'}"], 'did you mean "trimmed_mean"'),
    (["sharing.kind=full", "sharing.robust={kind='median', attackers=2}"], "sharing.robust.attackers = 2: "),
    (["sharing.kind=full", "sharing.robust={kind='clipped_gossip', radius=0}"], "expected a distance above 0"),
    (["sharing.robust={kind='median'}"], "sharing.robust = {'kind': 'median'}: "),
    (["name=a/b"], "name = 'a/b': expected a name that can be a folder's name"),
    (["nodes=3"], "nodes = 3: expected a table; its keys: count, participation"),
    (
        ["train.local_steps=[1, 2]"],
        "train.local_steps = [1, 2]: 2 numbers for 16 nodes; write one per node, or one",
    ),
    (["train.local_steps=[1, 0]"], "train.local_steps[1] = 0: expected a whole number of at least 1"),
    (["train.local_steps=1.5"], "train.local_steps = 1.5: expected a whole number"),
    (
        ["train.local_steps=5", "train.local_epochs=1.0"],
        "train.local_epochs = 1.0: local_steps = 5 already sets how much a node trains; remove one of them",
    ),
    (
        ["train.local_epochs=1.0", "train.batching=stacked"],
        "train.batching = 'stacked': nodes with different numbers of local steps train one by one",
    ),
    (
        ["train.local_epochs=1.0", "train.schedule={kind='cosine'}"],
        "train.schedule.kind = 'cosine': needs the same number of local steps at all nodes: one number of "
        "train.local_steps, without train.local_epochs and train.balanced",
    ),
    (
        ["train.balanced=true", "train.local_epochs=1.0"],
        "train.balanced = True: needs one number of local_steps, that of a node of median speed; remove one",
    ),
    (
        ["run.mode=async", "run.deadline_s=1.0"],
        'run.deadline_s = 1.0: with run.mode = "async" no node waits; remove it',
    ),
    (
        ["run.mode=async", "run.consensus_rounds=2"],
        'run.consensus_rounds = 2: with run.mode = "async" nodes have no rounds in common; remove it',
    ),
    (
        ["run.mode=async", "nodes.participation=0.5"],
        "nodes.participation = 0.5: chooses the nodes of a round, and with run.mode",
    ),
    (
        ["run.mode=async", "topology.dynamic=true"],
        "topology.kind = 'regular': run.mode = \"async\" needs the same neighbours in all rounds; take another",
    ),
    (["train.local_epochs=0"], "train.local_epochs = 0: expected a number of passes above 0"),
    (["nodes.participation=0"], "nodes.participation = 0: expected a fraction in (0, 1]"),
    (["nodes.participation=50.0"], "expected a fraction in (0, 1]; did you mean 0.5?"),
    (["wire=pco"], "wire = 'pco': expected a table; its keys: codec"),
    (["sharing=full"], "sharing = 'full': expected a table; write sharing = { kind = \"full\" }"),
    (["train.optimizer=sgd"], 'expected a table; write optimizer = { kind = "sgd" }'),
    (
        ["sharing.cutoff={kind='random', fractions=[]}"],
        "sharing.cutoff.fractions = []: expected at least one entry",
    ),
    (["sharing.wavelet=3"], "sharing.wavelet = 3: expected a text in quotes"),
    (["task.file=my_task.py"], "expected file and class"),
    (["task.own=x"], "task.own = 'x': only Python code can pass a task object"),
    (["rounds"], "--set = 'rounds': expected KEY=VALUE"),
    (["run=3", "run.rounds=4"], "run already has the value 3"),
    (["sharing.kind=object"], "was made with a Python object here; pass the object from Python again"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(o)[:40] for o, _ in WRONG])
def test_error_names_path_value_and_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("digits", overrides)
    assert message in str(caught.value)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load("digits", ["run.threads=0", "nodes.count=x"])
    assert {line.partition(" = ")[0] for line in str(caught.value).splitlines()} == {
        "run.threads",
        "nodes.count",
    }
    assert caught.value.path in ("run.threads", "nodes.count")


def test_errors_from_python_are_the_same() -> None:
    with pytest.raises(
        ConfigError, match=r"^fraction = 1.5: expected a fraction in \(0, 1\]; did you mean 0.15\?"
    ):
        e.RandomKConfig(fraction=1.5)
    with pytest.raises(ConfigError, match=r"^sharing.fraction = 1.5"):
        Experiment(sharing={"kind": "random_k", "fraction": 1.5})  # type: ignore[arg-type]


def test_toml_syntax_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text('name = "x"\n[run]\nrounds 5\n')
    with pytest.raises(ConfigError, match=r"broken.toml, line 3 = 'rounds 5': not TOML: Expected '='"):
        load(path)


def test_toml_of_an_editor_that_marks_the_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "mine"\r\n')
    assert load(path).name == "mine"


def test_a_transform_that_pads_beyond_measure_is_refused() -> None:
    """2^24 coefficients of 12,010 parameters would take gigabytes on 16 nodes, for nothing."""
    wavelet = ["sharing.mode=periodization", "run.rounds=1", "nodes.count=2", "topology.kind=ring"]
    with pytest.raises(ConfigError, match=r"^sharing\.levels = 24: .*16,777,216.*12,010.*at most 13"):
        build(load("digits", ["sharing.levels=24", *wavelet]))
    build(load("digits", ["sharing.levels=13", *wavelet]))


def test_unknown_experiments_are_guessed_and_listed() -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor .*; did you mean \"digits\"\? bundled: digits"):
        load("digit")
    with pytest.raises(ConfigError, match="no such file"):
        load("nowhere.toml")
    with pytest.raises(ConfigError, match="jwins compare"):
        load("digits-compare")


def test_error_says_which_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[run]\nrounds = 0\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.__notes__ == [f"in {path}"]


# --- Round trips ------------------------------------------------------------------------------------------

EVERYTHING = [
    "task.partition={kind='dirichlet', alpha=0.1}",
    "task.options={model='cnn'}",
    "topology={kind='small_world', degree=4, rewire=0.2, dynamic=true}",
    "train.optimizer={kind='adamw', lr=0.001, weight_decay=0.01, betas=[0.9, 0.99]}",
    "links.uplink_mbps=[1, 2, 3, 4]",
    "nodes.count=4",
    "run.eval_at=[1, 3]",
    "run.deadline_s=2.5",
    "faults=[{kind='drop', sender=1, round=2}, {kind='delay', sender=0, receiver=1, round=3, seconds=0.5}]",
    "sharing.wavelet=none",
]


@pytest.mark.parametrize(
    "overrides", [[], EVERYTHING, ["sharing.kind=full"]], ids=["plain", "everything", "full"]
)
def test_resolved_toml_reads_back_as_the_same_experiment(overrides: list[str], tmp_path: Path) -> None:
    first = load("digits", overrides)
    path = tmp_path / "config.toml"
    path.write_text(first.to_toml(tmp_path))
    second = load(path)
    assert second.digest() == first.digest()
    assert second.resolved() == first.resolved()
    assert second.changed({}) == second


def test_paths_are_relative_to_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "mine.toml"
    path.write_text('[task]\nfile = "t.py:T"\ndata = "d"\n[topology]\nkind = "edge_list"\npath = "g.txt"\n')
    monkeypatch.chdir(tmp_path)
    experiment = load(path)
    assert experiment.task.file == f"{tmp_path / 'sub' / 't.py'}:T"
    assert experiment.task.data == tmp_path / "sub" / "d"
    written = tomllib.loads(experiment.to_toml(tmp_path / "runs" / "x"))
    assert written["task"]["file"] == "../../sub/t.py:T"
    assert written["topology"]["path"] == "../../sub/g.txt"
    assert load(path, ["task.data=e"]).task.data == tmp_path / "e"


@pytest.mark.parametrize(
    ("key", "text", "found"),
    [
        ("run.folder", "~/a", "a"),
        ("task.data", "~/a/b", "a/b"),
        ("topology.path", "~/g.txt", "g.txt"),
        ("task.file", "~/t.py:T", "t.py:T"),
    ],
)
@pytest.mark.parametrize("given_in", ["file", "override", "python"])
def test_a_tilde_is_the_home_folder(
    key: str, text: str, found: str, given_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    section, name = key.split(".")
    beside = {"topology.path": {"kind": "edge_list"}, "task.data": {"name": "digits"}}
    table = {section: {name: text} | beside.get(key, {})}
    start = table if section == "task" else {"task": {"name": "digits"}, **table}
    (tmp_path / "mine.toml").write_text(write_toml(start))
    if given_in == "file":
        experiment = load(tmp_path / "mine.toml")
    elif given_in == "override":
        pairs = table[section].items()
        experiment = load("digits", [f"{section}.{name}={value}" for name, value in pairs])
    else:
        experiment = Experiment(**table)
    assert str(getattr(getattr(experiment, section), name)) == str(tmp_path / "home" / found)
    (tmp_path / "again.toml").write_text(experiment.to_toml(tmp_path))
    again = load(tmp_path / "again.toml")
    assert getattr(getattr(again, section), name) == getattr(getattr(experiment, section), name)


def test_a_home_folder_that_is_not_there_is_refused() -> None:
    for key in ("run.folder", "task.data"):
        with pytest.raises(ConfigError, match=f"{key} = .*no home folder ~nobody-of-that-name"):
            load("digits", [f"{key}=~nobody-of-that-name/x"])
    with pytest.raises(ConfigError, match="no home folder ~nobody-of-that-name"):
        Experiment(task=e.TaskConfig(file="~nobody-of-that-name/t.py:T"))


def test_an_experiment_and_the_base_of_a_comparison_may_be_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jwins.compare.comparison import load_comparison

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "sub").mkdir(parents=True)
    (tmp_path / "home" / "start.toml").write_text("[run]\nrounds = 7\n")
    variants = "[compare]\ntarget = { accuracy = 0.5 }\n[[variants]]\nname = 'a'\n"
    (tmp_path / "home" / "sub" / "other.toml").write_text("base = '~/start.toml'\n" + variants)
    (tmp_path / "home" / "beside.toml").write_text("base = 'start.toml'\n" + variants)
    for source in ("~/start.toml", Path("~/start.toml")):
        assert load(source).run.rounds == 7
    for source in ("~/sub/other.toml", Path("~/beside.toml")):
        comparison = load_comparison(source)
        assert [variant.experiment.run.rounds for variant in comparison.variants] == [7]
    with pytest.raises(ConfigError, match=r"~/nowhere.toml'|home/nowhere.toml'"):
        load("~/nowhere.toml")
    with pytest.raises(ConfigError, match=r"experiment = .*no home folder ~nobody-of-that-name"):
        load("~nobody-of-that-name/start.toml")


def test_changed_takes_dotted_keys() -> None:
    first = load("digits", ["sharing.kind=jwins"])
    assert first.changed({"run.rounds": 3}) == first.changed({"run": {"rounds": 3}})
    both = first.changed({"run.rounds": 3, "run": {"seed": 2}, "train.optimizer.lr": 0.5})
    assert (both.run.rounds, both.run.seed, both.train.optimizer.lr) == (3, 2, 0.5)
    assert first.changed({"sharing.cutoff.kind": "fixed", "sharing.cutoff.fraction": 0.3}) == first.changed(
        {"sharing": {"cutoff": {"kind": "fixed", "fraction": 0.3}}}
    )
    for wrong in ({"run.rouns": 3}, {"run.rounds.more": 3}, {"run.": 3}, {"run": 3, "run.rounds": 3}):
        with pytest.raises(ConfigError, match="run"):
            first.changed(wrong)


@given(
    st.recursive(
        st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_toml_writer_is_read_back_by_tomllib(value: Any) -> None:
    tables = {"plain": value, "table": {"inner": value}, "array": [{"a": value}, {"b": 1}]}
    assert tomllib.loads(write_toml(tables)) == tables


def test_toml_lines_keep_every_kind_of_space() -> None:
    assert read_toml(write_toml({"a": '\n\t\x7f\x85\u2028\\"'}), "x") == {"a": '\n\t\x7f\x85\u2028\\"'}


# --- Merging and overriding -------------------------------------------------------------------------------


def test_table_of_another_kind_takes_the_place_of_the_first() -> None:
    experiment = load("digits", ["sharing.gamma=0.3", "sharing.kind=choco", "sharing.fraction=0.2"])
    assert experiment.sharing == e.ChocoConfig(fraction=0.2, gamma=0.3)
    assert merge({"s": {"kind": "a", "x": 1}}, {"s": {"kind": "a", "y": 2}}) == {
        "s": {"kind": "a", "x": 1, "y": 2}
    }


def test_own_task_takes_the_place_of_a_named_one() -> None:
    experiment = load("digits", ["task.file=my_task.py:MyTask"])
    assert experiment.task.name is None
    assert str(experiment.task.file).endswith("my_task.py:MyTask")


def test_override_values_are_toml_or_text() -> None:
    assert parse_overrides(["a.b=1", "a.c=x y", "a.d=[1]", 'a.e="1"', "a.f=", "a.g=a=b"]) == {
        "a": {"b": 1, "c": "x y", "d": [1], "e": "1", "f": "", "g": "a=b"}
    }


# --- Digest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("run.threads=2", True),
        ("run.device=cpu", True),
        ("train.batching=loop", True),
        ("run.folder=elsewhere", True),
        ("run.checkpoint_every=1", True),
        ("name=other", True),
        ("task.data=somewhere", True),
        ("run.seed=2", False),
        ("run.rounds=201", False),
        ("run.eval_every=7", False),
        ("run.stop={target=0.9}", False),
        ("train.local_epochs=1.0", False),
        ("run.mode=async", False),
        ("run.max_staleness=4", True),  # without effect in a synchronous run
        ("train.balanced=true", False),
        ("train.local_steps=[3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4]", False),
        ("faults=[{kind='attack', form='sign_flip', nodes=[1]}]", False),
        ("nodes.participation=1.0", True),
        ("nodes.participation=0.5", False),
        ("sharing.levels=3", False),
        ("links.latency_ms=21", False),
        ("train.optimizer.momentum=0.9", False),
        ("train.optimizer.quasi_global=0.9", False),
        ("train.optimizer.weight_decay_on=all", True),
        ("train.optimizer.weight_decay_on=matrices", False),
        ("train.schedule={kind='constant'}", True),
        ("train.schedule={kind='constant', warmup_steps=1}", False),
        ("train.schedule={kind='cosine'}", False),
        ("train.clip_norm=1.0", False),
        ("train.outer={kind='nesterov'}", False),
        ("train.precision=float32", True),
        ("train.precision=bfloat16", False),
        ("wire.codec=raw", False),
    ],
)
def test_digest_covers_what_affects_results(override: str, same: bool) -> None:
    assert (load("digits", [override]).digest() == load("digits").digest()) is same


def test_a_run_folder_is_of_one_device_and_one_batching() -> None:
    """Settings in which machines may differ change last bits, so a run cannot continue with others."""
    for key, values in (("run.device", ("cpu", "cuda")), ("train.batching", ("loop", "stacked"))):
        first, second = (load("digits", [f"{key}={value}"]) for value in values)
        assert first.digest() == second.digest()
        assert result_settings(first.resolved()) != result_settings(second.resolved())
        assert identity_settings(first.resolved()) == identity_settings(second.resolved())


RECORDS = sorted(Path(__file__).parents[2].glob("records/*/runs.tar.xz"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.parent.name)
def test_recorded_runs_are_known_again(record: Path) -> None:
    """Settings that were written by an earlier version are those of the same run and experiment today."""
    patterns = ("*/seed-1/config.toml", "*/*/seed-1/config.toml")
    configs = [config for pattern in patterns for config in archive.find(record, pattern)]
    assert configs
    for path in configs:
        stored = read_toml(archive.read_text(path), str(path))
        experiment = Experiment(**stored)
        assert result_settings(experiment.resolved()) == result_settings(stored), path
        assert experiment.digest() == digest_of(stored), path


def test_threads_left_out_are_left_to_the_machine() -> None:
    experiment = load("digits")
    assert experiment.run.threads is None
    assert "threads" not in experiment.to_toml()
    assert load("digits", ["run.threads=3"]).resolved()["run"]["threads"] == 3


def test_digest_is_eight_bytes_and_stable() -> None:
    experiment = load("digits")
    assert len(experiment.digest()) == 8
    assert digest_of(experiment.resolved()) == experiment.digest()
    assert experiment.digest() == pickle.loads(pickle.dumps(experiment)).digest()


# --- Python says what TOML says ---------------------------------------------------------------------------


def test_settings_have_the_constructors_names_and_defaults() -> None:
    """TOML keys are the constructors' argument names, and leaving one out means the same in both."""
    from jwins import sharing, topology
    from jwins.engines import simulator
    from jwins.tasks import partition
    from jwins.wire.codec import CODECS

    def same(config: type[Settings], target: Any, skip: tuple[str, ...] = ()) -> None:
        for name, parameter in inspect.signature(target).parameters.items():
            if name in skip or name.startswith("_"):
                continue
            field = config.model_fields[name]
            if parameter.default is inspect.Parameter.empty:
                assert field.is_required(), (config, name)
            elif name != "cutoff":
                assert field.get_default() == parameter.default, (config, name)
        assert set(config.model_fields) - {"kind"} <= set(inspect.signature(target).parameters)

    for kind, table in plugins.ALGORITHMS.items():
        same(table, getattr(sharing, kind))
    assert e.RandomCutoffConfig().fractions == sharing.PAPER_FRACTIONS
    same(e.LinksConfig, simulator.Links)
    same(e.ComputeConfig, simulator.Compute)
    for by_kind, classes in (
        (plugins.TOPOLOGY_TABLES, topology.TOPOLOGIES),
        (plugins.PARTITION_TABLES, partition.PARTITIONERS),
        (plugins.CUTOFF_TABLES, sharing.CUTOFFS),
        (plugins.QUANTIZER_TABLES, sharing.QUANTIZERS),
    ):
        assert list(by_kind) == list(classes)
        for kind, cls in classes.items():
            arguments = [f for f in fields(cls) if f.init and f.name not in ("num_nodes", "seed")]  # type: ignore[arg-type]
            assert {f.name for f in arguments} == set(by_kind[kind].model_fields) - {"kind"}
            for f in arguments:
                default = by_kind[kind].model_fields[f.name].get_default()
                assert f.default is MISSING or f.default == default, (kind, f.name)
    assert set(get_args(e.WireConfig.model_fields["codec"].annotation)) == set(CODECS)


def test_objects_may_stand_for_tables() -> None:
    from jwins.sharing import FixedCutoff, jwins, top_k
    from jwins.tasks.digits import Digits
    from jwins.tasks.partition import Iid
    from jwins.topology import Ring

    algorithm = top_k(0.25)
    experiment = Experiment(
        task=e.TaskConfig(own=Digits, options={"model": "cnn"}, partition=Iid()),
        nodes=e.NodesConfig(count=4),
        topology=Ring(4),
        sharing=algorithm,
    )
    assert build_sharing(experiment) is algorithm
    assert build_topology(experiment) == Ring(4)
    assert isinstance(build_task(experiment), Digits)
    assert experiment.resolved()["sharing"] == {"kind": "object", "object": repr(algorithm)}
    assert experiment.resolved()["task"]["own"] == "jwins.tasks.digits.Digits"
    assert experiment.changed({"run": {"seed": 2}}).sharing is algorithm
    assert experiment.digest() != experiment.changed({"sharing": {"kind": "full"}}).digest()
    own_cutoff = Experiment(sharing=e.JwinsConfig(cutoff=FixedCutoff(0.5)))
    assert build_sharing(own_cutoff) == jwins(cutoff=FixedCutoff(0.5))
    assert build_sharing(own_cutoff.changed({"run": {"seed": 2}})) == jwins(cutoff=FixedCutoff(0.5))


def test_a_task_in_place_of_its_table_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"^task = .*; a task of your own goes into task = {'own': \.\.\.}"):
        Experiment(task=Everywhere())  # type: ignore[arg-type]


def test_a_quantizer_may_stand_for_a_precision() -> None:
    class Halves:
        def __call__(self, values: Any, subbands: Any, ctx: Any) -> Any:
            return (2 * values).round() / 2

    quantizer = Halves()
    for table in (e.FullConfig(values=quantizer), e.JwinsConfig(values=quantizer)):
        experiment = Experiment(sharing=table)
        assert build_sharing(experiment).values is quantizer  # type: ignore[attr-defined]
        assert build_sharing(experiment.changed({"run": {"seed": 2}})).values is quantizer  # type: ignore[attr-defined]
        assert "0x" not in experiment.to_toml()
    with pytest.raises(ConfigError, match='expected "float32" or "bfloat16"'):
        Experiment(sharing={"kind": "full", "values": "float16"})  # type: ignore[arg-type]


class Forgetful:
    """Lacks what ``jwins.sharing.Sharing`` would have given it."""

    def init(self, params: Any) -> None: ...
    def share(self, state: Any, params: Any, ctx: Any) -> Any: ...
    def merge(self, state: Any, params: Any, received: Any, ctx: Any) -> Any: ...


class Fixed(sharing.Full):
    share = None  # type: ignore[assignment]


class Everywhere:
    def at(self, round: int) -> Any: ...


@pytest.mark.parametrize(
    ("settings", "path", "problem"),
    [
        (
            {"sharing": Forgetful()},
            "sharing",
            "has no keyframe, stale_peers, replica_round, delta_since, update_dim, projected, "
            "for_model, for_peer, remembers_peers, per_peer, state_types; derive its class from "
            "jwins.sharing.Sharing",
        ),
        (
            {"topology": Everywhere()},
            "topology",
            "has no num_nodes; derive its class from jwins.topology.Topology",
        ),
        ({"sharing": Fixed()}, "sharing", "has no share; derive"),
        ({"sharing": sharing.Full}, "sharing", "is a class; pass an instance"),
        ({"task": {"name": "digits", "partition": partition.Iid}}, "task.partition", "is a class; pass an"),
    ],
)
def test_an_object_that_lacks_something_is_refused(settings: Any, path: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Experiment(**settings)
    assert caught.value.path == path


class Sub(sharing.Full):
    def __init__(self, fraction: float) -> None:
        super().__init__()
        object.__setattr__(self, "fraction", fraction)


class Chord:
    num_nodes = 4

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def at(self, round: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Outer(sharing.Full):
    inner: Any = None


@pytest.mark.parametrize(
    ("settings", "cls"),
    [
        ({"sharing": Sub(0.1)}, "Sub"),
        ({"sharing": Outer(inner=Chord(1))}, "Chord"),
        ({"topology": Chord(1)}, "Chord"),
    ],
)
def test_an_object_whose_repr_hides_its_arguments_is_refused(settings: Any, cls: str) -> None:
    problem = (
        f"the repr of {cls} does not name its arguments, .*; make {cls} a dataclass, or give it a __repr__"
    )
    with pytest.raises(ConfigError, match=problem) as caught:
        Experiment(**settings)
    assert caught.value.path == next(iter(settings))
    assert Experiment(sharing=Outer(inner=0.1)).digest() != Experiment(sharing=Outer(inner=0.2)).digest()


class Fixed4:
    num_nodes = 4

    def __init__(self) -> None:
        self.cache: dict[int, Any] = {}

    def at(self, round: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Prepared:
    num_nodes: int
    ready: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ready", Chord(self.num_nodes))

    def at(self, round: int) -> Any: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Unset:
    num_nodes: int
    ready: Any = dataclasses.field(init=False, repr=False)

    def at(self, round: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Told:
    chord: Chord
    num_nodes: int = 4

    def __repr__(self) -> str:
        return f"Told({self.chord.seed})"

    def at(self, round: int) -> Any: ...


@pytest.mark.parametrize(
    ("cls", "arguments"), [(Fixed4, []), (Prepared, [4]), (Unset, [4]), (Told, [Chord(1)])]
)
def test_an_object_whose_repr_names_what_it_was_made_of_is_accepted(cls: Any, arguments: list[Any]) -> None:
    topology = cls(*arguments)
    experiment = Experiment(topology=topology)
    assert experiment.topology is topology
    assert experiment.digest() == Experiment(topology=cls(*arguments)).digest()


def test_subclasses_of_full_sharing_that_are_no_dataclasses_count_as_different() -> None:
    class Mine(sharing.Full):
        pass

    digests = {Experiment(sharing=own).digest() for own in (sharing.Full(), Mine(), Mine("bfloat16"))}
    assert len(digests) == 3


def test_fields_of_a_dataclass_are_set_by_path() -> None:
    own = Experiment(sharing=Outer(inner=sharing.FixedCutoff(0.5)))
    changed = own.changed({"sharing.inner.fraction": 0.25, "sharing.values": "bfloat16"})
    assert changed.sharing == Outer("bfloat16", inner=sharing.FixedCutoff(0.25))
    table = Experiment(sharing=e.JwinsConfig(cutoff=sharing.FixedCutoff(0.5)))
    assert table.changed({"sharing.cutoff.fraction": 0.25}).sharing.cutoff == sharing.FixedCutoff(0.25)  # type: ignore[union-attr]
    assert own.changed({"sharing": {"kind": "full"}}).sharing == e.FullConfig()


@pytest.mark.parametrize(
    ("settings", "path", "problem"),
    [
        (
            {"sharing.fraktion": 0.2},
            "sharing.fraktion",
            "Outer has no such field; its fields: values, robust, inner",
        ),
        (
            {"topology.seed": 2},
            "topology",
            r"is an object \(Everywhere\) and no dataclass, .*; pass a new object",
        ),
        ({"sharing.inner.fraction": 2.0}, "sharing.cutoff.fraction", "expected"),
    ],
)
def test_a_field_that_cannot_be_set_is_refused_by_path(settings: Any, path: str, problem: str) -> None:
    mesh = Everywhere()
    mesh.num_nodes = 16  # type: ignore[attr-defined]
    own = Experiment(sharing=Outer(inner=sharing.FixedCutoff(0.5)), topology=mesh)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=problem) as caught:
        own.changed(settings)
    assert caught.value.path == path


def test_a_derived_algorithm_must_have_the_three_functions() -> None:
    class NoMerge(sharing.Sharing[None]):
        def init(self, params: Any) -> None: ...
        def share(self, state: None, params: Any, ctx: Any) -> Any: ...

    with pytest.raises(TypeError, match="merge"):
        NoMerge()  # type: ignore[abstract]


def test_documented_algorithm_runs_and_resumes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    path = root / "experiments" / "my_sharing.py"
    assert f"```python\n{path.read_text()}```" in (root / "docs" / "how-to" / "own-algorithm.md").read_text()
    scope = runpy.run_path(str(path))

    def experiment(folder: str, algorithm: Any) -> Experiment:
        run = e.RunConfig(rounds=6, eval_every=6, checkpoint_every=2, folder=tmp_path / folder)
        return Experiment(sharing=algorithm, nodes=e.NodesConfig(count=6), run=run)

    def interrupt(now: Any) -> None:
        if now.round == 4:
            raise TimeoutError

    blocks = scope["Blocks"](3)
    whole = simulate(experiment("whole", blocks))
    assert whole.rows[-1]["accuracy_mean"] > whole.rows[0]["accuracy_mean"]
    everything = simulate(experiment("full", sharing.full()))
    assert 0.3 < whole.rows[-1]["bytes_total"] / everything.rows[-1]["bytes_total"] < 0.37
    with pytest.raises(TimeoutError):
        simulate(experiment("parts", blocks), progress=interrupt)
    assert simulate(experiment("parts", blocks), resume=True).sha256 == whole.sha256


def test_documented_quantizer_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "own-algorithm.md").read_text(encoding="utf-8")
    path = tmp_path / "my_quantizer.py"
    path.write_text(page.split("## Fewer bits per value")[1].split("```python\n")[1].split("```")[0])
    algorithm = runpy.run_path(str(path))["algorithm"]
    run = e.RunConfig(rounds=4, eval_every=4, folder=tmp_path / "out")
    few = simulate(Experiment(sharing=algorithm, nodes=e.NodesConfig(count=6), run=run))
    all_bits = simulate(
        Experiment(nodes=e.NodesConfig(count=6), run=run).changed({"run": {"folder": tmp_path / "plain"}})
    )
    assert few.rows[-1]["bytes_total"] < 0.5 * all_bits.rows[-1]["bytes_total"]
    assert few.rows[-1]["accuracy_mean"] > few.rows[0]["accuracy_mean"]


def test_an_object_handed_over_again_is_the_same_experiment() -> None:
    """Its text in config.toml must contain no address in memory, or no other process could resume."""

    def experiment() -> Experiment:
        class Half:
            def __call__(self, ctx: Any) -> float:
                return 0.5

        return Experiment(sharing=e.JwinsConfig(cutoff=Half()))

    first, second = experiment(), experiment()
    assert first.digest() == second.digest()
    assert "0x" not in first.to_toml()
    assert "Half object" in first.to_toml()
    assert "0x" not in Experiment(sharing=e.JwinsConfig(cutoff=lambda ctx: 0.5)).to_toml()


def test_classes_of_the_script_have_one_name_in_the_processes_that_it_spawns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def experiment(module: str) -> Experiment:
        monkeypatch.setattr(Half, "__module__", module)
        return Experiment(task={"own": Half()}, sharing=e.JwinsConfig(cutoff=Half()))  # type: ignore[arg-type]

    class Half:
        def __call__(self, ctx: Any) -> float:
            return 0.5

    here, there = experiment("__main__").resolved(), experiment("__mp_main__").resolved()
    assert here == there
    assert here["task"]["own"].startswith("__main__.")


@pytest.mark.parametrize("kind", ["full", "random_k", "top_k", "choco", "jwins"])
def test_every_kind_of_sharing_is_built(kind: str) -> None:
    given = {
        "random_k": {"fraction": 0.3},
        "top_k": {"fraction": 0.3},
        "choco": {"fraction": 0.3, "gamma": 0.5},
    }
    experiment = Experiment(sharing={"kind": kind, "values": "bfloat16", **given.get(kind, {})})  # type: ignore[arg-type]
    assert build_sharing(experiment).values == "bfloat16"  # type: ignore[attr-defined]


def test_no_wavelet_can_be_said_in_both() -> None:
    assert build_sharing(Experiment(sharing=e.JwinsConfig(wavelet=None))).transform is None  # type: ignore[attr-defined]
    assert build_sharing(load("digits", ["sharing.wavelet=none"])).transform is None  # type: ignore[attr-defined]


def test_start_and_end_are_always_evaluated() -> None:
    run = e.RunConfig(rounds=25, eval_every=10, eval_at=(3,))
    assert evaluation_rounds(Experiment(run=run)) == {0, 3, 10, 20, 25}


@pytest.mark.parametrize("name", BUNDLED_RUNS)
def test_bundled_experiments_load(name: str) -> None:
    assert load(name).name == name


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("experiments/*.toml")), ids=lambda p: p.name
)
def test_example_files_load(path: Path) -> None:
    from jwins.compare.comparison import load_comparison

    if "[[variants]]" in path.read_text(encoding="utf-8"):
        load_comparison(path)
    else:
        load(path)


def test_package_is_imported_without_torch() -> None:
    code = "import sys, jwins; jwins.load('digits'); jwins.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


IN_FRESH_PROCESSES = """
import os
import sys
import torch  # takes seconds, and imports nothing of the package
import jwins
assert not [name for name in sys.modules if name.startswith("jwins.")]
for code in sys.argv[1:]:
    if os.fork() == 0:
        exec(code)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"failed: {code}")
"""


def test_rooms_are_there_after_importing_the_package() -> None:
    programs = [
        "jwins.sharing.jwins()",
        "jwins.Peer; jwins.sharing.jwins()",
        "jwins.load; jwins.sharing.closed_loop()",
        "jwins.errors.RemovedError",
        "jwins.tasks.Task",
        "jwins.experiment.RunConfig",
        "jwins.compare.load_comparison",
        "jwins.topology.Topology",
        "jwins.report; jwins.net; jwins.wire",
        "[getattr(jwins, name) for name in dir(jwins)]",
        "from jwins.training.optimizer import Optimizer; Optimizer().has_state()\n"
        "assert 'torch._dynamo' not in sys.modules, 'it takes as long as torch'",
    ]
    command = [sys.executable, "-c", IN_FRESH_PROCESSES, *programs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# --- Documentation ----------------------------------------------------------------------------------------


def test_the_callers_torch_is_left_as_it_was(tmp_path: Path) -> None:
    import torch

    sets = ["nodes.count=2", "topology.kind=ring", "train.batching=loop", "run.rounds=1"]
    sets += [f"run.folder={tmp_path / 'out'}"]
    before, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(2)
    try:
        simulate(load("digits", sets))
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)


def test_a_run_is_the_same_whatever_the_callers_torch_takes_for_granted(tmp_path: Path) -> None:
    import torch

    sets = ["nodes.count=2", "topology.kind=ring", "run.rounds=1"]
    usual = simulate(load("digits", [*sets, f"run.folder={tmp_path / 'usual'}"]))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # what is made there holds no numbers
            changed = simulate(load("digits", [*sets, f"run.folder={tmp_path / 'changed'}"]))
            assert torch.empty(0).device.type == "meta"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)
    assert changed.sha256 == usual.sha256


def test_every_key_has_a_meaning_and_is_documented() -> None:
    from jwins.compare.settings import CompareConfig, VariantTable
    from jwins.compare.tuning import TuneConfig

    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "reference" / "settings.md").read_text(encoding="utf-8")
    text = runpy.run_path(str(docs / "hooks.py"))["expand"](page)
    comparison = [(CompareConfig, "compare"), (TuneConfig, "tune"), (VariantTable, "variants")]
    for key in [
        *settings_docs(Experiment),
        *(key for model, path in comparison for key in settings_docs(model, path)),
    ]:
        assert key.meaning, key
        default = f"`{key.default}`" if key.default else ""
        cells = [f"`{key.path}`", key.when, key.type, default, key.meaning]
        line = f"| {' | '.join(cells)} |".replace("|  |", "| |")
        assert line in text, f"docs/reference/settings.md lacks:\n{line}"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"run.rounds": 3, "run": {"rounds": 2}}, "run = .*: another key sets the same; remove one of the two"),
        ({"run": {"rounds": 2}, "run.rounds": 3}, "run.rounds = 3: another key sets the same"),
        ({3: 3}, "3 = 3: unknown key"),
        ({"run.folder": ""}, "run.folder = '': expected a path"),
        ({"run.folder": "a\0b"}, "expected a path"),
        ({"name": "x" * 300}, "expected a name that can be a folder's name"),
    ],
)
def test_keys_paths_and_names_without_a_meaning_are_refused(tables: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("digits").changed(tables)


def test_two_keys_of_one_table_are_both_taken() -> None:
    made = load("digits").changed({"run.stop.metric": "loss", "run": {"stop": {"patience": 3}, "rounds": 4}})
    assert made.run.stop is not None
    assert (made.run.rounds, made.run.stop.metric, made.run.stop.patience) == (4, "loss", 3)
