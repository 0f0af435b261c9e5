"""What no file of the package may do. Read from the source, not by importing."""

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


def tree(path: Path) -> ast.Module:
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


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions too."""
    for node in runtime_nodes(tree(path)):
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


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_name_their_whole_path(path: Path) -> None:
    """Which room may import which is stated in pyproject.toml and checked by `make lint`, which reads paths."""
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{label(path)}:{node.lineno}"


# Reading bytes with one of these can run code that the bytes choose.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
UNSAFE_NAMES = {"eval", "exec", "__import__"}
UNSAFE_CALLS = {"torch.load", "torch.save", "yaml.load", "np.load", "numpy.load"}
OWN_CODE = {"tasks/load.py", "__init__.py", "compare/__init__.py", "run/__init__.py"}
"""Where a Python file that the user names is imported, and where the package finds its own names."""


@pytest.mark.parametrize("path", FILES, ids=label)
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    for line, module in imported(path):
        assert module.split(".")[0] not in UNSAFE_MODULES, f"{label(path)}:{line} imports {module}"
    for node in ast.walk(tree(path)):
        where = f"{label(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Name):
            assert node.id not in UNSAFE_NAMES, f"{where} uses {node.id}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in UNSAFE_CALLS, f"{where} calls {name}"
            assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), f"{where} allows pickle"
            if name in ("importlib.import_module", "importlib.util.spec_from_file_location"):
                assert label(path) in OWN_CODE, f"{where} imports code by name"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_nothing_draws_from_a_global_generator(path: Path) -> None:
    """Randomness comes from jwins.rng. The trainer seeds torch's generator for models that draw from it."""
    for line, module in imported(path):
        assert module.split(".")[0] != "random", f"{label(path)}:{line} imports random"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
            assert node.attr in ("Generator", "Philox"), (
                f"{label(path)}:{node.lineno} uses np.random.{node.attr}"
            )


CORE = (
    "rng.py",
    "sharing/update.py",
    "scenario.py",
    "node.py",
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
    modules = {module.split(".")[0] for _, module in imported(SOURCE / name)}
    assert not modules & CLOCKS_AND_IO
    calls = {ast.unparse(n.func) for n in ast.walk(tree(SOURCE / name)) if isinstance(n, ast.Call)}
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


# --- Sizes ------------------------------------------------------------------------------------------------

MAX_LINES = 500
"""Of a file: what one reads in a sitting."""
MAX_LINES_OF_A_FUNCTION = 60
"""With its docstring: a screen."""

LONG_FILES = {
    "engines/node_group.py": "one class; a third of it is what its functions promise",
    "engines/ray/node_group.py": "the two ends of one conversation, of driver and actor",
    "experiment/plugins.py": "the tables of settings, one after the other",
    "net/transport.py": "who is connected with whom, and all that may end a connection",
    "report/curve_charts.py": "the figure of a comparison, from its curves to its legend",
    "wire/entropy.py": "encoder, decoder and the odds that both must agree on",
    "node.py": "a third is the events, commands and state that it speaks of; the machine is read as a whole",
    "engines/simulator/driver.py": "one driver, from its events to what a checkpoint keeps",
}
"""Files that may be longer, and why."""

LONG_FUNCTIONS = {
    "cli/compare.py: compare": "two thirds declare the options and their help",
    "cli/node.py: node": "two thirds declare the options and their help",
    "cli/report.py: report": "two thirds declare the options and their help",
    "net/peer.py: Peer.__init__": "what a peer is made of, in the order of need",
    "run/node.py: run_node": "a third is what it promises",
    "run/run.py: simulate": "two thirds are what it promises and the refusals of a folder",
    "tasks/partition.py: checked_split": "the promises of a partitioner, one after the other",
    "training/trainer.py: Trainer.__init__": "what a trainer is made of, in the order of need",
}
"""Functions that may be longer, and why."""


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(qualified name, lines) of every function, those in classes and functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            assert child.end_lineno is not None
            yield prefix + child.name, child.end_lineno - child.lineno + 1
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(child, f"{prefix}{child.name}." if named else prefix)  # type: ignore[attr-defined]


def test_files_are_read_in_a_sitting() -> None:
    lines = {label(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {name for name, count in lines.items() if count > MAX_LINES}
    assert long - LONG_FILES.keys() == set(), "divide it, or say in LONG_FILES why it is one file"
    assert LONG_FILES.keys() - long == set(), "no longer needs its place in LONG_FILES"


def test_functions_fit_on_a_screen() -> None:
    long = {
        f"{label(path)}: {name}"
        for path in FILES
        for name, lines in functions(tree(path))
        if lines > MAX_LINES_OF_A_FUNCTION
    }
    assert long - LONG_FUNCTIONS.keys() == set(), "divide it, or say in LONG_FUNCTIONS why it is one function"
    assert LONG_FUNCTIONS.keys() - long == set(), "no longer needs its place in LONG_FUNCTIONS"
