"""The command line as a script sees it: output, files and exit codes."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from frames import pack
from jwins.cli.app import app, reported_errors
from jwins.sharing.update import Update
from jwins.wire.codec import codec
from jwins.wire.frame import Bye, Frame

TINY = ["nodes.count=4", "topology.kind=ring", "run.rounds=3", "run.eval_every=2", "run.checkpoint_every=1"]
TINY += ["train.batching=loop"]  # a stack's step is recorded first, which takes longer than these rounds


def sets(*assignments: str) -> list[str]:
    return [part for assignment in assignments for part in ("--set", assignment)]


def jwins(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_tiny(folder: Path, *more: str) -> Result:
    return jwins("run", "digits", *sets(*TINY, f"run.folder={folder}"), *more)


def shell(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jwins", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# --- run --------------------------------------------------------------------------------------------------


def test_run_writes_the_folder_and_says_what_it_found(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = run_tiny(folder, *sets("train.batching=auto"))
    assert result.exit_code == 0, result.output
    assert "round 3/3  accuracy " in result.stdout
    assert "finished after 3 rounds" in result.stdout
    assert str(folder) in result.stdout
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.toml", "metrics.jsonl", "final/node-0.safetensors", "final/node-3.safetensors"} <= found
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["start", "eval", "eval", "eval", "end"]
    assert 'batching = "auto"' not in (folder / "config.toml").read_text()


def test_run_says_what_replicas_cost_where_neighbours_change(tmp_path: Path) -> None:
    changing = sets("topology={kind='regular',degree=2,dynamic=true}")
    assert "note:" not in run_tiny(tmp_path / "jwins", *changing).stdout
    noted = run_tiny(tmp_path / "replicas", *changing, *sets("sharing.kind=closed_loop"))
    assert noted.exit_code == 0, noted.output
    assert "note: neighbours change from round to round, and sharing.kind = 'closed_loop'" in noted.stdout


def test_run_says_where_the_seconds_went(tmp_path: Path) -> None:
    said = run_tiny(tmp_path / "out", *sets("train.batching=auto")).stdout
    (line,) = [line for line in said.splitlines() if " seconds here: " in line]
    whole, _, parts = line.partition(" seconds here: ")
    spent = {name: float(seconds) for name, _, seconds in (p.rpartition(" ") for p in parts.split(", "))}
    assert list(spent) == sorted(spent, key=lambda name: -spent[name])
    assert {"start-up", "training", "share and merge", "decoding", "evaluation", "other"} <= set(spent)
    assert spent["start-up"] > 0.0  # torch is loaded, data are read
    assert sum(spent.values()) == pytest.approx(float(whole), abs=0.05 * (len(spent) + 1))
    again = run_tiny(tmp_path / "out", *sets("train.batching=auto"), "--resume").stdout  # which takes no time
    assert "seconds here" not in again


@pytest.mark.slow
def test_launch_says_what_it_found_and_where_the_seconds_of_all_processes_went(tmp_path: Path) -> None:
    few = ("nodes.count=3", 'topology={kind="ring"}', "train.batching=loop", "run.rounds=2", "run.eval_every=2")
    settings = sets(*few, f"run.folder={tmp_path}/out")
    result = jwins("launch", "digits", *settings)
    assert result.exit_code == 0, result.output
    assert "finished after 2 rounds" in result.stdout
    assert "seconds here; in all nodes' processes together: " in result.stdout
    assert str(tmp_path / "out") in result.stdout.replace("\n", "")


def test_the_folders_own_config_repeats_the_run(tmp_path: Path) -> None:
    run_tiny(tmp_path / "a")
    again = jwins("run", tmp_path / "a" / "config.toml", "--set", f"run.folder={tmp_path / 'b'}", "--quiet")
    assert (again.exit_code, again.output) == (0, "")
    ends = [json.loads((tmp_path / x / "metrics.jsonl").read_text().splitlines()[-1]) for x in "ab"]
    assert ends[0]["sha256"] == ends[1]["sha256"]
    assert (tmp_path / "a" / "final" / "node-1.safetensors").read_bytes() == (
        tmp_path / "b" / "final" / "node-1.safetensors"
    ).read_bytes()


def test_a_complete_run_is_not_run_again(tmp_path: Path) -> None:
    run_tiny(tmp_path / "out")
    log = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    refused = run_tiny(tmp_path / "out")
    assert refused.exit_code == 2
    assert "this experiment is complete there; read it with --resume" in refused.stderr
    read = run_tiny(tmp_path / "out", "--resume")
    assert read.exit_code == 0
    assert "this run is complete; nothing to do" in read.stdout
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == log


def test_another_experiments_folder_is_refused(tmp_path: Path) -> None:
    run_tiny(tmp_path / "out")
    for more in ([], ["--resume"]):
        result = run_tiny(tmp_path / "out", *sets("run.seed=2"), *more)
        assert result.exit_code == 2
        assert "holds another experiment (run.seed = 1 there, 2 here)" in result.stderr
    config = tmp_path / "out" / "config.toml"
    older = [line for line in config.read_text().splitlines() if not line.startswith(("eval_own", "eval_last"))]
    config.write_text("\n".join(older))
    assert "this run is complete" in run_tiny(tmp_path / "out", "--resume").stdout
    refused = run_tiny(tmp_path / "out", *sets("run.seed=2"), "--resume")
    assert "holds another experiment (run.seed = 1 there, 2 here)" in refused.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    result = run_tiny(tmp_path / "mine")
    assert result.exit_code == 2
    assert "not a run folder" in result.stderr


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "below"):
        for more in ([], ["--resume"]):
            result = run_tiny(folder, *more)
            assert result.exit_code == 2, result.output
            assert f"run.folder = '{folder}': {tmp_path / 'mine'} is a file; choose another" in result.stderr
    assert (tmp_path / "mine").read_text() == "precious"


OWN_TASK = """
import torch
from jwins.tasks import Dataset, Task

class Mine(Task):
    def __init__(self):
        generator = torch.Generator().manual_seed(SEED)
        inputs = torch.randn(40, 3, generator=generator)
        self.train = self.test = Dataset(inputs, (inputs.sum(dim=1) > 0).long())

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(3, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 2))
"""


@pytest.mark.parametrize(
    ("seed", "width", "problem"),
    [(1, 9, "parameters per model: 50 there, 56 here"), (2, 8, "evaluation samples differ")],
)
def test_a_task_that_has_changed_does_not_go_on(seed: int, width: int, problem: str, tmp_path: Path) -> None:
    def run(seed: int, width: int, *more: str) -> Result:
        (tmp_path / "mine.py").write_text(OWN_TASK.replace("SEED", str(seed)).replace("WIDTH", str(width)))
        return run_tiny(folder, *sets(f'task={{ file = "{tmp_path / "mine.py"}:Mine" }}'), *more)

    folder = tmp_path / "out"
    assert run(1, 8).exit_code == 0
    log = folder / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))  # as if interrupted before the end
    cut = log.read_bytes()
    refused = run(seed, width, "--resume")
    assert refused.exit_code == 2
    assert problem in refused.stderr
    assert "the task or its data have changed since" in refused.stderr
    assert log.read_bytes() == cut
    assert run(1, 8, "--resume").exit_code == 0
    sha256 = [json.loads(text.splitlines()[-1])["sha256"] for text in (whole, log.read_bytes())]
    assert sha256[0] == sha256[1]


FROZEN_TASK = (
    OWN_TASK.replace("SEED", "1").replace("WIDTH", "8").replace("return torch", "model = torch")
    + """
        model[0].requires_grad_(False)
        return model
"""
)


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_frozen_parameters_cost_nothing_and_are_in_the_final_models(batching: str, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> Path:
        own = sets(f'task={{ file = "{tmp_path / "mine.py"}:Mine" }}', f"train.batching={batching}")
        result = run_tiny(tmp_path / name, *own, *more)
        assert result.exit_code == 0, result.output
        return tmp_path / name

    (tmp_path / "mine.py").write_text(FROZEN_TASK)
    folder = run("out")
    log = folder / "metrics.jsonl"
    whole = log.read_bytes()
    assert json.loads(whole.splitlines()[0])["dim"] == 8 * 2 + 2
    models = [load_file(folder / "final" / f"node-{node}.safetensors") for node in range(4)]
    plain = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    for model in models:
        plain.load_state_dict(model, strict=True)
        assert torch.equal(model["0.weight"], models[0]["0.weight"])
    assert not torch.equal(models[0]["2.weight"], models[1]["2.weight"])
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))  # as if interrupted before the end
    run("out", "--resume")
    sha256 = [json.loads(text.splitlines()[-1])["sha256"] for text in (whole, log.read_bytes())]
    assert sha256[0] == sha256[1]


@pytest.mark.parametrize("text", [b"\x9f\x00 not text", b"x = [", b"", b"x = 1"])
def test_a_damaged_config_is_no_traceback(text: bytes, tmp_path: Path) -> None:
    run_tiny(tmp_path / "out")
    (tmp_path / "out" / "config.toml").write_bytes(text)
    result = run_tiny(tmp_path / "out", "--resume")
    assert result.exit_code == 2
    assert "config.toml" in result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_resume_without_a_checkpoint_starts_from_the_start(tmp_path: Path) -> None:
    run_tiny(tmp_path / "a")
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "config.toml").write_bytes((tmp_path / "a" / "config.toml").read_bytes())
    lines = (tmp_path / "a" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(lines[0] + lines[1][:20])
    assert run_tiny(folder).exit_code == 2
    assert run_tiny(folder, "--resume").exit_code == 0
    last = (folder / "metrics.jsonl").read_bytes().splitlines()[-1]
    assert json.loads(last)["sha256"] == json.loads(lines[-1])["sha256"]


def test_a_diverging_run_has_its_own_exit_code(tmp_path: Path) -> None:
    result = run_tiny(tmp_path / "out", *sets("sharing.kind=full", "train.optimizer.lr=1e20"))
    assert result.exit_code == 3
    assert re.search(r"diverged in round \d", result.stderr)
    assert "Traceback" not in result.output
    assert (
        run_tiny(tmp_path / "out", *sets("sharing.kind=full", "train.optimizer.lr=1e20"), "--resume").exit_code
        == 3
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["run", "digits", "--set", "run.rounds=0"],
            2,
            "run.rounds = 0: expected a whole number of at least 1",
        ),
        (["run", "digits", "--set", "run.rounds=0"], 2, "in digits"),
        (["run", "digit"], 2, 'did you mean "digits"?'),
        (["run", "cifar10"], 2, 'a task, not an experiment; write task.name = "cifar10" in a file'),
        (["run", "cifar10"], 2, "`jwins run digits --set task.name=cifar10`"),
        (["compare", "movielens"], 2, "`jwins list` shows all names"),
        (["run", "digits-compare"], 2, "jwins compare"),
        (["compare", "digits"], 2, "variants = <missing>: required in a comparison"),
        (["compare", "digits-compare", "--seeds", "1;2"], 2, "--seeds = '1;2': expected whole numbers"),
        (["compare", "digits-compare", "--report-only", "--only", "JWINS"], 2, "leave out one"),
        (["run", "digits", "--set", "task.name=digit"], 2, "task.name = 'digit'"),
        (["run", "digits", "--set", "topology.degree=16"], 2, "topology.degree = 16"),
        (["run", "digits", "--set", "run.eval_samples=999"], 2, "run.eval_samples = 999: the test set has 360"),
        (["run", "digits", "--set", "train.batch_size=1000000000000"], 2, "GB are free; use at most"),
        (["run", "digits", "--set", "train.optimizer.kind=sdg"], 2, "train.optimizer.kind = 'sdg'"),
        (["run", "digits", "--data", "/nonexistent"], 4, "there is no such folder"),
        (["run", "digits", "--nonsense"], 2, "No such option"),
        (["inspect", "/nonexistent"], 2, "there is no such file"),
        (["inspect", "."], 2, "FRAME = '.': is a folder; expected a file with the bytes of one frame"),
    ],
)
def test_wrong_usage_is_explained(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = jwins(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_missing_data_has_its_own_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = jwins(
        "run", "digits", *sets("task.name=movielens", "task.partition.kind=by_key"), "--data", "empty"
    )
    assert result.exit_code == 4, result.output
    assert "Traceback" not in result.output


def test_own_task_beside_the_file(tmp_path: Path) -> None:
    task = Path(__file__).parents[2] / "experiments" / "my_task.py"
    (tmp_path / "my_task.py").write_text(task.read_text(encoding="utf-8"))
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\n[task]\nfile = "my_task.py:Spirals"\noptions = { points = 400 }\n'
    )
    result = jwins("run", tmp_path / "mine.toml", *sets(*TINY, f"run.folder={tmp_path / 'out'}"))
    assert result.exit_code == 0, result.output
    assert 'file = "../my_task.py:Spirals"' in (tmp_path / "out" / "config.toml").read_text()


# --- compare, inspect, list -------------------------------------------------------------------------------


def test_compare_prints_the_table(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "digits-compare", "--seeds", "3", "--jobs", "1"]
    result = jwins(*arguments, *sets(*TINY, f"compare.folder={out}", "compare.target={accuracy=0.99}"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("variant "))
    assert [line.split("  ")[0] for line in lines[head + 1 : head + 6]] == [
        "full sharing",
        "random sampling",
        "CHOCO-SGD",
        "JWINS",
        "closed loop",
    ]
    assert all(" —  " in line and line.endswith("finished") for line in lines[head + 1 : head + 6])
    assert {"table.md", "table.csv", "summary.json", "comparison.png"} <= {path.name for path in out.iterdir()}
    refused = jwins(*arguments, "--no-resume", *sets(*TINY, f"compare.folder={out}"))
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr


def test_inspect_shows_a_frame(tmp_path: Path) -> None:
    update = Update(dim=1000, positions=torch.arange(0, 1000, 4), values=torch.linspace(-1, 1, 250))
    packed = pack(Frame(sender=3, round=7, update=update), codec("pco"), bytes(8))
    path = tmp_path / "frame.bin"
    path.write_bytes(packed.data)
    result = jwins("inspect", path)
    assert result.exit_code == 0, result.output
    shown = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert (shown["sender"], shown["round"], shown["count"], shown["density"]) == ("3", "7", "250", "0.25")
    assert int(shown["frame_bytes"]) == len(packed.data)
    path.write_bytes(packed.data[:-1])
    damaged = jwins("inspect", path)
    assert damaged.exit_code == 2
    assert "not a valid frame" in damaged.stderr


def test_inspect_prints_no_escape_sequences(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    packed = pack(Bye(sender=3, round=7, reason=evil), codec("pco"), bytes(8))
    (tmp_path / "frame.bin").write_bytes(packed.data)
    result = jwins("inspect", tmp_path / "frame.bin")
    assert result.exit_code == 0
    assert all(letter.isprintable() or letter == "\n" for letter in result.stdout)
    assert r"\x1b]0;owned\x07\x1b[2J\u202e" in result.stdout


def test_tables_and_errors_print_no_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    from jwins.cli.app import console_of, leave

    table = Table("variant\x1b[2J")
    table.add_row("a\x1b]8;;http://x\x07b")
    console_of().print(table)
    with pytest.raises(SystemExit):
        leave("round \x1b[31m7", 1)
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err
    assert r"\x1b]8" in told.out
    assert r"\x1b[31m7" in told.err


def test_list_has_everything_that_has_a_name() -> None:
    result = jwins("list")
    assert result.exit_code == 0
    for name in ("digits-compare", "cifar10", "random_k", "small_world", "dirichlet", "paper"):
        assert re.search(rf"^  {name} +\S", result.stdout, re.MULTILINE), name
    keys = jwins("list", "--keys").stdout
    assert "sharing.cutoff.fractions (random) = [0.1," in keys
    assert (
        "run.rounds = 200\n    a whole number of at least 1; number of rounds of training and sharing" in keys
    )
    for key in ("compare.final_over", "variants.bytes_as", "tune.sensitivity"):
        assert f"\n{key}" in keys


# --- As a process -----------------------------------------------------------------------------------------


WITHOUT_TORCH = """
import sys
from jwins.cli import main
for arguments in (["--help"], ["--version"], ["run", "--help"], ["run", "digits", "--set", "run.rounds=0"]):
    sys.argv = ["jwins", *arguments]
    try:
        main()
    except SystemExit:
        pass
    assert "torch" not in sys.modules and "matplotlib" not in sys.modules, arguments
"""


def test_help_and_version_come_without_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"jwins \d+\.\d+", shell("--version", cwd=tmp_path).stdout)
    assert "130 interrupted" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_resume_gives_the_same_result(tmp_path: Path) -> None:
    command = [
        "run",
        "digits",
        *sets(*TINY, "run.rounds=200", "run.checkpoint_every=1000", "run.eval_samples=10"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "jwins", *command, "--set", "run.folder=a"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_bytes().count(b"\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "interrupted: continue with --resume\n"
    assert list((tmp_path / "a" / "checkpoints").glob("*.safetensors"))
    assert jwins(*command, *sets(f"run.folder={tmp_path / 'a'}"), "--resume").exit_code == 0
    assert jwins(*command, *sets(f"run.folder={tmp_path / 'b'}"), "--quiet").exit_code == 0
    ends = [json.loads((tmp_path / x / "metrics.jsonl").read_text().splitlines()[-1]) for x in "ab"]
    assert ends[0]["sha256"] == ends[1]["sha256"]
    rows = [(tmp_path / x / "metrics.jsonl").read_text().splitlines()[1:-1] for x in "ab"]
    assert rows[0] == rows[1]


def test_a_second_process_is_kept_out_of_the_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "out"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run_tiny(folder)
    assert result.exit_code == 2
    assert "another process" in result.stderr


def test_freed_memory_is_kept_where_the_c_library_is_glibc() -> None:
    code = "from jwins.training.allocator import keep_freed_memory; print(keep_freed_memory())"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == str(platform.libc_ver()[0] == "glibc")


def test_lack_of_memory_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, reported_errors():
        raise MemoryError("Unable to allocate 7 TiB")
    assert left.value.code == 1
    assert "not enough memory: Unable to allocate 7 TiB" in capsys.readouterr().err
