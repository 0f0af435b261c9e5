"""Rules for every file of the package, checked in the source without importing it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "jwins"

FILES = sorted(SOURCE.rglob("*.py"))


def label(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions too."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            if node.module == "jwins":
                for alias in node.names:
                    yield node.lineno, f"jwins.{alias.name}"
            else:
                yield node.lineno, node.module


def dotted(node: ast.AST) -> str:
    """Return the dotted name of a node, such as `np.random.Generator`; "?" for others."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


# Reading bytes with one of these can run code that the bytes choose.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
UNSAFE_NAMES = {"eval", "exec", "__import__"}
UNSAFE_CALLS = {"torch.load", "torch.save", "yaml.load", "np.load", "numpy.load"}
OWN_CODE = {"tasks/load.py", "__init__.py", "compare/__init__.py", "run/__init__.py"}
"""Where a Python file that the user names is imported, and where the package finds its own names."""


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_breaks_no_rule(
    path: Path,
) -> None:
    """Which room may import which is stated in pyproject.toml and checked by `make lint`, which reads paths.

    Randomness comes from jwins.rng. The trainer seeds torch's generator for models that draw from it.
    """
    tree, file = tree_of(path), label(path)
    for node in ast.walk(tree):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{where} is relative"
        if isinstance(node, ast.Name):
            assert node.id not in UNSAFE_NAMES, f"{where} uses {node.id}"
        if isinstance(node, ast.Attribute) and dotted(node.value) in ("np.random", "numpy.random"):
            assert node.attr in ("Generator", "Philox"), f"{where} uses np.random.{node.attr}"
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            assert name not in UNSAFE_CALLS, f"{where} calls {name}"
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"{where} allows pickle"
            if name in ("importlib.import_module", "importlib.util.spec_from_file_location"):
                assert file in OWN_CODE, f"{where} imports code by name"
    for line, module in imported(tree):
        assert module.split(".")[0] not in UNSAFE_MODULES | {"random"}, f"{file}:{line} imports {module}"


CORE = (
    "rng.py",
    "sharing/update.py",
    "scenario.py",
    "node/state_machine.py",
    "node/inbox.py",
    "node/rules.py",
    "sharing/base.py",
    "sharing/sparse.py",
    "sharing/choco.py",
    "sharing/cutoff.py",
    "sharing/replicas.py",
    "topology/graph.py",
    "topology/kinds.py",
)
CLOCKS_AND_IO = {"os", "io", "sys", "time", "datetime", "socket", "asyncio", "threading", "logging"}


@pytest.mark.parametrize("name", CORE)
def test_the_core_does_no_io_and_reads_no_clock(name: str) -> None:
    tree = tree_of(SOURCE / name)
    modules = {module.split(".")[0] for _, module in imported(tree)}
    assert not modules & CLOCKS_AND_IO
    calls = {dotted(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not calls & {"open", "print", "input"}


@pytest.mark.parametrize("module", ["torch", "matplotlib", "networkx", "pywt", "pandas"])
def test_importing_the_package_is_cheap(module: str, loaded: frozenset[str]) -> None:
    assert module not in loaded


@pytest.fixture(scope="module")
def loaded() -> frozenset[str]:
    script = "import sys, jwins; print('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return frozenset(result.stdout.split())


def test_the_lines_that_deliberate_bugs_replace_stand_once() -> None:
    """``python -m benchmarks.check_tests`` would end at one that has changed."""
    sys.path.insert(0, str(SOURCE.parents[1]))
    try:
        from benchmarks.check_tests import BUGS
    finally:
        sys.path.pop(0)
    counts = {bug.name: (SOURCE / bug.file).read_text(encoding="utf-8").count(bug.old) for bug in BUGS}
    assert {name: count for name, count in counts.items() if count != 1} == {}
