"""The documentation leads somewhere and runs: links, names of files and make targets, Python and TOML."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest

import doc_blocks
from jwins.errors import UsageError
from jwins.experiment.plugins import ALGORITHMS
from jwins.run.launch import free_ports
from jwins.run_folder.archive import find, read_text
from jwins.sharing import choco, closed_loop, full, jwins, random_k, stateless, top_k

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("records/*/README.md")})
SOURCES = [
    path
    for pattern in (
        "*",
        ".ci/*",
        "src/**/*",
        "docs/**/*",
        "benchmarks/**/*",
        "experiments/**/*",
        "records/**/*",
    )
    for path in ROOT.glob(pattern)
    if path.is_file()
    and path.suffix in {".md", ".py", ".toml", ".txt", ".json", ".jsonl", ".csv", ""}
    and "__pycache__" not in path.parts
    and path.name != ".git"  # of a second working tree, which says where the first is
    and path.stat().st_size < 2_000_000
]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FOLDERS = ("src/", "tests/", "docs/", "benchmarks/", "experiments/", "tests/")
ARCHITECTURE = ROOT / "docs" / "explanation" / "architecture.md"
PACKAGE = ROOT / "src" / "jwins"
# /home/you is the reader's; what else looks like a home or a checkout is somebody's own.
MACHINE = re.compile(r"(?<![\w.~-])/(?:work|root|Users|home/(?!you\b)|opt)/[\w.-]+")
REGISTRY = re.compile(
    r"https?://[\w.-]*(?:pypi|pythonhosted|anaconda|conda-forge|download\.pytorch)[\w.-]*", re.I
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def pages_with(*languages: str, slow: bool | None = None) -> list[Path]:
    """The pages that have a block in one of the languages; those with and without slow ones if asked for."""
    found = []
    for page in PAGES:
        blocks = [block for block in doc_blocks.blocks_of(page) if block.language in languages]
        if blocks and slow in {None, any(block.slow for block in blocks)}:
            found.append(page)
    return found


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def target(page: Path, link: str) -> Path:
    file = unquote(link.partition("#")[0])
    return (page.parent / file).resolve() if file else page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), f"{name(page)}: {link}"
            continue
        found = target(page, link)
        assert found.exists(), f"{name(page)}: {link} leads nowhere"
        assert found.is_relative_to(ROOT), f"{name(page)}: {link} leads out of the project"
        anchor = link.partition("#")[2]
        assert not anchor or anchor in anchors(found), f"{name(page)}: {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page: Path) -> None:
    for code in CODE.findall(prose(page)):
        if code.startswith(FOLDERS) and not set(code) & set("*<> ="):
            assert (ROOT / code).exists(), f"{name(page)} names {code}, which does not exist"


def test_named_tests_exist() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    there = {word for file in files for word in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))}
    named = {(name(page), code) for page in PAGES for code in CODE.findall(prose(page))}
    tests = {(page, code) for page, code in named if re.fullmatch(r"test_\w+", code)}
    assert len(tests) > 50
    assert not {(page, code) for page, code in tests if code not in there}


def architecture() -> str:
    return prose(ARCHITECTURE)


def file_of_the_package(code: str) -> Path:
    return ROOT / code if code.startswith(FOLDERS) else PACKAGE / code


def test_the_architecture_names_files_that_exist() -> None:
    named = {code for code in CODE.findall(architecture()) if re.fullmatch(r"[\w./-]+(/|\.py|\.md)", code)}
    assert len(named) > 60
    missing = sorted(code for code in named if not file_of_the_package(code).exists())
    assert not missing, f"{name(ARCHITECTURE)} names {', '.join(missing)}"


def test_the_architecture_names_what_is_in_the_files() -> None:
    """``NAME`` of ``FILE``, ``NAME`` and ``NAME`` in ``FILE``: the words are in the file."""
    pairs = re.findall(r"`([\w.]+)`(?: and `([\w.]+)`)? (?:of|in) `([\w/]+\.py)`", architecture())
    assert len(pairs) > 25
    for *names, file in pairs:
        text = file_of_the_package(file).read_text(encoding="utf-8")
        for word in names:
            last = word.rpartition(".")[2]
            assert re.search(rf"\b{last}\b", text) or not last, f"{name(ARCHITECTURE)}: {word} is not in {file}"
    # Classes are in the package, whatever else their sentence says.
    classes = {code for code in CODE.findall(architecture()) if re.fullmatch(r"([A-Z][a-z]+){2,}", code)}
    package = "".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    assert len(classes) > 5
    assert not {word for word in classes if not re.search(rf"\b{word}\b", package)}


def test_every_room_has_its_row() -> None:
    """In the table as in the picture, the rooms that may not import each other side by side."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contracts["contracts"][0]["layers"] if layer != "__main__"]
    rooms = {room for layer in layers for room in layer}
    rows = " ".join(re.findall(r"^\| (`[^|]*) \|", architecture(), re.MULTILINE))
    assert {code.removesuffix("/").removesuffix(".py") for code in CODE.findall(rows)} == rooms
    picture = (ROOT / "docs" / "figures" / "architecture.svg").read_text(encoding="utf-8")
    drawn: dict[int, list[str]] = {}
    for y, room in re.findall(r'class="mono" x="\d+" y="(\d+)">(\w+)<', picture.partition("</g>")[0]):
        drawn.setdefault(int(y), []).append(room)
    assert [sorted(drawn[y]) for y in sorted(drawn)] == [sorted(layer) for layer in layers]


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {target(index, link) for link in LINK.findall(prose(index)) if not link.startswith("https:")}
    pages = [page for page in PAGES if page.is_relative_to(index.parent) and page.name != "index.md"]
    missing = [name(page) for page in pages if page not in linked and page.parent.name != "api"]
    assert not missing, f"docs/index.md does not link {', '.join(missing)}"
    assert len(pages) > 20


def test_the_page_of_algorithms_has_every_kind() -> None:
    page = (ROOT / "docs/reference/algorithms.md").read_text(encoding="utf-8")
    table = page.partition("## All algorithms")[2].partition("## Baselines")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == {"kind", *ALGORITHMS}


def test_every_page_is_in_its_kinds_index() -> None:
    for index in (ROOT / "docs").glob("*/index.md"):
        linked = {target(index, link) for link in LINK.findall(prose(index))}
        missing = [name(page) for page in index.parent.glob("*.md") if page != index and page not in linked]
        assert not missing, f"{name(index)} does not link {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    assert named <= known, f"{name(page)}: make {', '.join(sorted(named - known))}"


@pytest.mark.parametrize("page", pages_with("python", slow=False), ids=name)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """A page's blocks run one after another in an empty folder that has the page's TOML files."""
    doc_blocks.run_python(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python", slow=True), ids=name)
def test_slow_python_runs(page: Path, tmp_path: Path) -> None:
    doc_blocks.run_python(page, tmp_path)


def test_most_python_runs() -> None:
    """A block that does not run states the reason."""
    blocks = [block for page in PAGES for block in doc_blocks.blocks_of(page) if block.language == "python"]
    skipped = [block for block in blocks if block.skipped]
    assert len(skipped) <= 5
    assert len(blocks) - len(skipped) >= 9


@pytest.mark.parametrize("page", pages_with("sh", "console"), ids=name)
def test_commands_are_known(page: Path) -> None:
    """Commands of ``jwins`` are parsed with their options and settings; others name what is there."""
    blocks = doc_blocks.blocks_of(page)
    saved = frozenset({"alone.py", *(block.file for block in blocks)})
    for block in blocks:
        if block.language in {"sh", "console"}:
            for words in doc_blocks.commands_of(block.body):
                doc_blocks.check_command(words, saved)


@pytest.mark.slow
@pytest.mark.alone
def test_the_tutorial_of_two_machines(tmp_path: Path) -> None:
    """Every step, word by word, in two folders; Alice and Bob train at the same time."""
    folders = {name: tmp_path / "two-machines" / name for name in ("alice", "bob")}
    ports = free_ports(2)
    running: list[tuple[subprocess.Popen[bytes], Path]] = []

    def output_of(process: subprocess.Popen[bytes], log: Path) -> str:
        code = process.wait(timeout=120.0)
        text = log.read_text(encoding="utf-8")
        assert code == 0, text
        return text

    for block in doc_blocks.blocks_of(ROOT / "docs" / "tutorials" / "two-machines.md"):
        if block.file:
            for folder in folders.values():
                (folder / block.file).write_text(block.body, encoding="utf-8")
        if block.folder:
            log = tmp_path / f"step-{len(running)}.log"
            script = block.body.replace(":7420", f":{ports[0]}").replace(":7421", f":{ports[1]}")
            with log.open("wb") as file:
                process = subprocess.Popen(
                    ["bash", "-ec", script],
                    cwd=folders.get(block.folder, tmp_path),
                    env=doc_blocks.environment(ROOT, tmp_path),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            running.append((process, log))
            if not script.startswith("python train.py alice"):
                output_of(process, log)
    outputs = "".join(output_of(process, log) for process, log in running)
    reached = sorted(map(int, re.findall(r"accuracy on both halves (\d+)%", outputs)))
    assert len(reached) == 3
    assert reached[0] < 70 < 80 < reached[1]  # alone, and together
    assert all((folder / "model.pt").exists() for folder in folders.values())


@pytest.mark.slow
def test_the_tutorial_of_a_first_run(tmp_path: Path) -> None:
    page = ROOT / "docs" / "tutorials" / "first-run.md"
    doc_blocks.save_files(page, tmp_path)
    for block in doc_blocks.blocks_of(page):
        if block.language == "sh" and not block.skipped:
            ended = subprocess.run(
                ["bash", "-ec", block.body],
                cwd=tmp_path,
                env=doc_blocks.environment(ROOT, tmp_path),
                capture_output=True,
                text=True,
                check=False,
            )
            assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs" / "first-compare" / "report.html").exists()


def test_an_unknown_command_or_setting_is_found() -> None:
    with pytest.raises(AssertionError, match="no such command"):
        doc_blocks.check_jwins(["rum", "digits"])
    with pytest.raises(pytest.fail.Exception, match="--colour"):
        doc_blocks.check_jwins(["run", "digits", "--colour", "red"])
    with pytest.raises(UsageError, match=r"run\.round "):
        doc_blocks.check_jwins(["run", "digits", "--set", "run.round=3"])


def test_every_block_has_a_language() -> None:
    known = {"python", "toml", "sh", "console", "text", "yaml", "ini", "mermaid", ""}
    for page in PAGES:
        for block in doc_blocks.blocks_of(page):
            assert block.language in known, f"{name(page)}: {block.language}"
            assert block.language not in {"yaml", "ini"} or block.skipped, (
                f"{name(page)}: say why it is not run"
            )


@pytest.mark.parametrize("page", pages_with("toml"), ids=name)
def test_toml_is_an_experiment_or_a_comparison(page: Path, tmp_path: Path) -> None:
    """Tables are built, unless they say that they belong to something else."""
    from jwins.compare.comparison import load_comparison
    from jwins.experiment import Experiment

    for block in doc_blocks.blocks_of(page):
        if block.language != "toml":
            continue
        tables = tomllib.loads(block.body)
        if tables.keys() & {"variants", "compare"}:
            (tmp_path / "comparison.toml").write_text(block.body, encoding="utf-8")
            assert load_comparison(tmp_path / "comparison.toml").variants
        elif not block.skipped:
            assert Experiment(**tables).run.rounds >= 1


NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    copy = tmp_path / notebook.name
    copy.write_bytes(notebook.read_bytes())
    if importlib.util.find_spec("wandb") is None:  # a stand-in, which the kernel finds beside the notebook
        (tmp_path / "wandb.py").write_text(
            "from unittest.mock import MagicMock\n\n\ndef init(**options):\n    return MagicMock()\n"
        )
    execute = [str(Path(sys.executable).with_name("jupyter-execute")), copy.name]
    ended = subprocess.run(
        execute,
        cwd=tmp_path,
        env=doc_blocks.environment(ROOT, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebook_is_kept_with_its_results(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {kind for cell in code for output in cell["outputs"] for kind in output.get("data", {})}
    assert {"text/html", "image/png"} <= kinds
    assert notebook.stat().st_size < 200_000


def test_the_table_of_memory_is_what_algorithms_state() -> None:
    page = (ROOT / "docs" / "explanation" / "assumptions.md").read_text()
    table = {
        "full sharing": full(),
        "random sampling of a fifth": random_k(0.2),
        "top-k without accumulation": top_k(0.1),
        "JWINS, `since_sent`": jwins(score="since_sent"),
        "JWINS, `reference`, `training_only`": jwins(),
        "CHOCO-SGD": choco(0.2, 0.5),
        "closed loop, `history = 0`": closed_loop(history=0),
        "closed loop": closed_loop(),
        "stateless": stateless(),
    }
    for label, algorithm in table.items():
        none, one = algorithm.vectors(0), algorithm.vectors(1)
        cells = [sum_text(a, b - a) for a, b in zip(none, one, strict=True)]
        assert f"| {label} | {' | '.join(cells)} |" in page.splitlines()


def sum_text(constant: float, each: float) -> str:
    """A number, and one for each of d neighbours, as in the table."""
    term = "" if not each else "d" if each == 1 else f"{each:.3g} d"
    return f"{constant:.3g} + {term}" if term else f"{constant:.3g}"


def test_the_site_shows_what_the_code_says() -> None:
    """Every command and option has its row; links to files of the repository lead to pages of the site."""
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    page = hooks["expand"]((ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8"))
    assert "`--neighbour-timeout" in page or "`--neighbour-timeout" in page
    linked = "[base](../../src/jwins/sharing/base.py), [there](../../src/jwins/), [in](wire.md#header)"
    expected = "[base](../source/src/jwins/sharing/base.py.md), there, [in](wire.md#header)"
    assert hooks["relinked"]("docs/reference/x.md", linked) == expected


def test_no_machine_or_registry_is_named() -> None:
    archives = sorted(ROOT.glob("records/*/runs.tar.xz"))
    assert archives
    members = (member for path in archives for depth in range(6) for member in find(path, "*/" * depth + "*"))
    for path in itertools.chain(SOURCES, members):
        text = read_text(path)
        for pattern in (MACHINE, REGISTRY):
            found = pattern.search(text)
            assert found is None, f"{name(path)}: {found[0]}"
