"""Hooks of the site's build: pages made from the code, from files outside ``docs/`` and from notebooks.

Pages link to files of the repository by relative paths. In the site such a link leads to a page with the file's
text; a link to something the site does not show becomes plain text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s:]+)\)")
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"^<!-- (settings|options): ([\w.-]+) -->$", re.MULTILINE)
TEST_MARKER = re.compile(r"^<!-- (?:run|not run|on)\b.*? -->\n", re.MULTILINE)
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "sh", ".csv": "text", ".txt": "text", "": "text"}


# --- pages made from the code ------------------------------------------------------------------------------


def settings_table(name: str) -> str:
    """Return the table of all keys of an experiment or of a section of a comparison."""
    from jwins.cli.list import documented

    rows = ["| key | for kind | type and range | default | meaning |", "|---|---|---|---|---|"]
    for key in documented()[name]:
        default = f"`{key.default}`" if key.default else ""
        cells = [f"`{key.path}`", key.when, key.type, default, key.meaning]
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(rows)


def options_table(name: str) -> str:
    """Return the usage, the arguments and the options of one command, such as ``keys-new``."""
    import typer

    from jwins.cli import app

    command: Any = typer.main.get_command(app)
    for word in name.split("-"):
        command = command.commands[word]
    rows = ["| | meaning |", "|---|---|"]
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
        metavar = parameter.metavar or parameter.name.upper()
        if parameter.param_type_name == "argument":
            names = metavar
        elif not parameter.is_flag:
            names = f"{names} {metavar}"
        escaped = names.replace("|", "\\|")
        rows.append(f"| `{escaped}` | {(parameter.help or '').replace('|', chr(92) + '|')} |")
    text = " ".join((command.help or "").partition("\n\n")[0].split())
    return "\n".join([text, "", *rows])


def expand(markdown: str) -> str:
    """Put the tables made from the code where the page asks for them."""
    tables: dict[str, Callable[[str], str]] = {"settings": settings_table, "options": options_table}
    return MARKER.sub(lambda found: tables[found[1]](found[2]), markdown)


# --- notebooks ---------------------------------------------------------------------------------------------


def notebook_page(path: Path) -> str:
    """Return an executed notebook as Markdown: its cells in order, each with its outputs."""
    parts: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts.extend(text for output in cell["outputs"] if (text := _shown(output)))
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        image = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="" src="data:image/png;base64,{image}">'
    if "text/html" in data:
        html = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
        return re.sub(r"\n\s*", "", html)
    text = "".join(data.get("text/plain", ""))
    return f"```text\n{text}\n```" if text else ""


# --- files outside docs/ -----------------------------------------------------------------------------------


def page_of(file: str) -> str | None:
    """Return where the site has a file of the repository, or None if it does not show it."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/").replace(".ipynb", ".md")
    if file == "README.md":
        return "index.md"
    if file.endswith(".md"):
        return f"project/{file.lower()}" if "/" not in file else file.replace("README.md", "index.md")
    suffix = os.path.splitext(file)[1]
    if (ROOT / file).is_file() and suffix in LANGUAGES and (ROOT / file).stat().st_size < 200_000:
        return f"source/{file}.md"
    return None


def linked(file: str, markdown: str) -> Iterator[str]:
    """Yield the files of the repository that a file's text links to."""
    for _, link in LINK.findall(markdown):
        if not re.match(r"[a-z]+:|#", link):
            yield os.path.normpath(os.path.join(os.path.dirname(file), link.partition("#")[0]))


def relinked(file: str, markdown: str) -> str:
    """Make links of a file of the repository lead to the site's pages."""
    here = page_of(file)
    assert here is not None

    def link(found: re.Match[str]) -> str:
        text, to = found[1], found[2]
        if re.match(r"[a-z]+:|#", to):
            return found[0]
        path, mark, anchor = to.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(file), path))
        if (ROOT / target).is_dir():
            target = f"{target}/README.md" if (ROOT / target / "README.md").is_file() else ""
        page = page_of(target) if target else None
        if page is None:
            return text
        return f"[{text}]({os.path.relpath(page, os.path.dirname(here) or '.')}{mark}{anchor})"

    return outside_fences(lambda text: LINK.sub(link, text), markdown)


def outside_fences(change: Callable[[str], str], markdown: str) -> str:
    """Apply ``change`` to the Markdown between blocks of code."""
    pieces: list[str] = []
    end = 0
    for fence in FENCE.finditer(markdown):
        pieces += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, change(markdown[end:])])


def unbroken(markdown: str) -> str:
    """Keep numbers and their units on one line."""
    units = re.compile(r"(?<=[0-9]) (?=(?:±|%|[kMG]?B\b))|(?<=±) (?=[0-9])")
    return outside_fences(lambda text: units.sub("\u00a0", text), markdown)


def folded_diagrams(markdown: str) -> str:
    """Fold the sources of diagrams, which the site cannot draw without a library from elsewhere."""
    summary = "<summary>The diagram's source, in Mermaid</summary>"
    folded = f"<details markdown>\n{summary}\n\n```text\n{{}}```\n\n</details>"
    return DIAGRAM.sub(lambda found: folded.format(found[1]), markdown)


def pages_outside() -> dict[str, tuple[str, str]]:
    """Return the pages of files outside ``docs/``: their place in the site, the file and its Markdown."""
    pages: dict[str, tuple[str, str]] = {}
    known = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    known += [name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md") if (ROOT / name).exists()]
    known += [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("records/*/README.md"))]
    for file in known:
        text = (ROOT / file).read_text(encoding="utf-8")
        if not file.startswith("docs/"):
            pages[str(page_of(file))] = (file, text)
        for target in linked(file, text):
            page = page_of(target)
            if page is None or target.startswith("docs/") or target == "README.md" or page in pages:
                continue
            content = (ROOT / target).read_text(encoding="utf-8") if (ROOT / target).is_file() else ""
            if page.startswith("source/"):
                language = LANGUAGES[os.path.splitext(target)[1]]
                content = f"# {target}\n\n````{language}\n{content}````\n"
            pages[page] = (target, content)
    return pages


# --- what mkdocs calls -------------------------------------------------------------------------------------

_FILES: dict[str, str] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of notebooks and of files outside ``docs/``."""
    from mkdocs.structure.files import File

    _FILES.clear()
    for page, (file, content) in pages_outside().items():
        _FILES[page] = file
        files.append(File.generated(config, page, content=content))
        for image in IMAGE.findall(content) if file.endswith(".md") else ():
            source = (ROOT / file).parent / image
            uri = os.path.normpath(os.path.join(os.path.dirname(page), image))
            files.append(File.generated(config, uri, abs_src_path=str(source)))
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        file = path.relative_to(ROOT).as_posix()
        old = files.get_file_from_path(file.removeprefix("docs/"))
        if old is not None:
            files.remove(old)
        files.append(File.generated(config, str(page_of(file)), content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Expand the tables, make links lead to the site's pages, and leave out what only tests read."""
    uri = page.file.src_uri
    text = folded_diagrams(expand(TEST_MARKER.sub("", markdown)))
    return unbroken(relinked(_FILES.get(uri, f"docs/{uri}"), text))
