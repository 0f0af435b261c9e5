"""Blocks of code in the documentation, and the surroundings in which they run.

A comment in the line before a block says how the tests treat it, unless they run it as it stands:

    <!-- not run: REASON -->    it is only parsed
    <!-- run: slow -->          it takes more than a few seconds
    <!-- run: with NAME -->     it runs inside one of SURROUNDINGS, whose names it sees
    <!-- run: in FOLDER -->     a step of a tutorial, which a test of its own follows
    <!-- run: saved as NAME --> likewise, a file of that tutorial
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import functools
import itertools
import os
import re
import shlex
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BLOCK = re.compile(
    r"(?:^<!-- (?P<how>run|not run): (?P<what>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block of a page: what the comment before it says, and its text."""

    language: str
    body: str
    skipped: str = ""
    slow: bool = False
    surroundings: str = ""
    folder: str = ""
    file: str = ""


@functools.cache
def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page in order."""
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        how, what = match["how"], match["what"] or ""
        words = what.split(", ") if how == "run" else []
        given = {"with": "", "in": "", "saved as": ""}
        for word in words:
            key = next((key for key in given if word.startswith(f"{key} ")), None)
            assert key or word == "slow", f"{page}: {what}"
            if key:
                given[key] = word.removeprefix(f"{key} ")
        assert given["with"] in SURROUNDINGS, f"{page}: {what}"
        found.append(
            Block(
                match["language"],
                match["body"],
                what if how == "not run" else "",
                "slow" in words,
                given["with"],
                given["in"],
                given["saved as"],
            )
        )
    return found


# --- Python ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def two_peers(folder: Path) -> Iterator[dict[str, Any]]:
    """Names of a training loop, and a second member of ``roster.toml`` that exchanges beside it."""
    import torch
    from torch import nn

    import jwins
    from jwins.net.roster import Member, Roster, write_roster
    from jwins.run.launch import free_ports

    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(20, 5)

    members = []
    (folder / "keys").mkdir()
    for name, port in zip(("alice", "bob"), free_ports(2), strict=True):
        address = f"127.0.0.1:{port}"
        members.append(Member.new(len(members), name, address, folder / "keys"))
        (folder / f"{name}.key").write_bytes((folder / "keys" / f"{name}.key").read_bytes())
        (folder / f"{name}.key").chmod(0o600)
    write_roster(Roster(members=tuple(members)), folder / "roster.toml")
    rounds = 3
    alices, bobs = model(), model()  # both before the thread: torch's generator belongs to the process
    failed: list[BaseException] = []

    def bob() -> None:
        try:
            with jwins.Peer(bobs, roster=folder / "roster.toml", key=folder / "bob.key") as peer:
                for _ in range(rounds):
                    peer.exchange()
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=bob, daemon=True)
    other.start()
    trained: list[object] = []

    def train_locally(model: nn.Module, loader: object) -> None:
        trained.append(loader)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)

    yield {"model": alices, "loader": object(), "rounds": rounds, "train_locally": train_locally}
    other.join(30.0)
    assert not other.is_alive()
    assert not failed, failed
    assert len(trained) == rounds


@contextlib.contextmanager
def nothing(folder: Path) -> Iterator[dict[str, Any]]:
    """No names."""
    yield {}


SURROUNDINGS = {"": nothing, "two peers": two_peers}


def save_files(page: Path, folder: Path) -> None:
    """Save the page's experiments and comparisons under their names, as readers are told to."""
    for block in blocks_of(page):
        if block.language == "toml" and not block.skipped:
            name = tomllib.loads(block.body).get("name")
            if isinstance(name, str):
                (folder / f"{name}.toml").write_text(block.body, encoding="utf-8")


def run_python(page: Path, folder: Path) -> int:
    """Run a page's blocks of Python one after another, with the same names; how many there were."""
    names: dict[str, Any] = {"__name__": "documentation"}
    count = 0
    save_files(page, folder)
    for block in blocks_of(page):
        if block.language != "python":
            continue
        if block.skipped or block.file:
            ast.parse(block.body, filename=str(page))
            continue
        count += 1
        with contextlib.chdir(folder), SURROUNDINGS[block.surroundings](folder) as given:
            names.update(given)
            if ">>>" in block.body:
                _run_examples(block.body, names, page)
            else:
                exec(compile(block.body, str(page), "exec", dont_inherit=True), names)
    return count


def _run_examples(body: str, names: dict[str, Any], page: Path) -> None:
    test = doctest.DocTestParser().get_doctest(body, names, page.name, str(page), 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    result = runner.run(test, out=said.append, clear_globs=False)
    names.update(test.globs)
    assert result.attempted > 0
    assert result.failed == 0, "".join(said)


# --- shell -------------------------------------------------------------------------------------------------

OTHER_COMMANDS = {
    *(
        "git",
        "cd",
        "source",
        "mkdir",
        "cp",
        "docker",
        "ssh",
        "sbatch",
        "tensorboard",
        "pip",
        "#!/bin/bash",
        "export",
        "srun",
    ),
    *("head=$(scontrol", "cat", "deactivate", "sed"),
}


def commands_of(body: str) -> list[list[str]]:
    """The commands of a block, as words; comments and what they are redirected to are left out."""
    joined = body.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        for command in re.split(r" && ", line):
            words = shlex.split(command, comments=not command.startswith("#!"))
            if words and not words[0].startswith("#SBATCH"):
                found.append(words[: words.index(">")] if ">" in words else words)
    return found


def check_command(words: list[str], saved: frozenset[str] = frozenset()) -> None:
    """Parse a command of ``jwins`` as the command line does; look for what others name.

    Raises:
        AssertionError: there is no such command, option, setting, make target, module or file.
    """
    root = Path(__file__).parents[1]
    first, rest = words[0], words[1:]
    while re.fullmatch(r"[A-Z_]+=\S*", first):
        first, rest = rest[0], rest[1:]
    if first == "srun" and "jwins" in rest:
        first, rest = "jwins", rest[rest.index("jwins") + 1 :]
    program = first.removeprefix(".venv/bin/")
    if program == "jwins":
        check_jwins(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program in {"python", "jupyter-execute"}:
        file = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else next(w for w in rest if w[0] != "-")
        assert (root / file).exists() or file in saved or file in {"venv.py", "pip.py"}, words
    else:
        assert program in OTHER_COMMANDS, f"{' '.join(words)}: not known to tests/doc_blocks.py"


def check_jwins(words: list[str]) -> None:
    """Parse the arguments of ``jwins``; settings of bundled experiments are checked, too."""
    import typer

    from jwins.cli import app
    from jwins.experiment import bundled, load

    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        if rest[0] in {"--version", "--help"}:
            return
        assert rest[0] in command.commands, f"jwins {' '.join(words)}: no such command"
        command = command.commands[rest.pop(0)]
    try:
        command.make_context(command.name, [word for word in rest if word != "…"])
    except typer.Exit:
        return
    except Exception as error:  # typer has its own copy of click, whose classes have no public name
        if getattr(error, "exit_code", None) != 2:
            raise
        pytest.fail(f"jwins {' '.join(words)}: {error}")
    changed = [value for option, value in itertools.pairwise(rest) if option == "--set"]
    if command.name in {"run", "launch"} and rest[0] in bundled():
        load(rest[0], changed)


def environment(root: Path, folder: Path) -> dict[str, str]:
    """The environment of a reader who has activated ``.venv``."""
    import sys

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
