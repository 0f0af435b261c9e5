"""Experiments from files, or from the package by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jwins.errors import ConfigError
from jwins.experiment.catalogue import TASK_CLASSES
from jwins.experiment.error_messages import nearest
from jwins.experiment.experiment import Experiment, merge_experiment, rewrite_paths_
from jwins.experiment.field_types import from_home
from jwins.experiment.toml import parse_overrides, read_toml
from jwins.run_folder.archive import is_file, read_text

BUNDLED = "experiment/bundled"
"""Folder of the package's experiments."""


def bundled() -> dict[str, str]:
    """Return the bundled experiments and comparisons, with the first comment line of each."""
    found = {}
    for entry in sorted(resources.files("jwins").joinpath(BUNDLED).iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            first = entry.read_text(encoding="utf-8").partition("\n")[0]
            found[entry.name.removesuffix(".toml")] = first.lstrip("# ").strip()
    return found


def read(source: str | Path) -> tuple[dict[str, Any], str]:
    """Read the tables of a TOML file or a bundled experiment, and make their paths absolute.

    Returns:
        The tables, and the name of the source.

    Raises:
        ConfigError: neither a file nor a name, or not TOML.
    """
    path = from_here(source)
    if is_file(path):
        text, origin, folder = _read_text(path), str(path), path.resolve().parent
    elif str(source) in (names := bundled()):
        entry = resources.files("jwins").joinpath(BUNDLED, f"{source}.toml")
        text, origin, folder = entry.read_text(encoding="utf-8"), str(source), Path.cwd()
    else:
        raise ConfigError("experiment", str(source), _unknown(path, names))
    tables = read_toml(text, origin)
    rewrite_paths_(tables, lambda file: _from(file, folder.joinpath))
    return tables, origin


def from_here(source: str | Path) -> Path:
    """Return the path of a file from the command line; ``~`` at its start is the home folder.

    Raises:
        ConfigError: there is no such home folder.
    """
    try:
        return Path(from_home(str(source)))
    except ValueError as error:
        raise ConfigError("experiment", str(source), str(error)) from None


def _from(file: str, absolute: Callable[[str], Path]) -> str:
    """Make a path absolute; one with an unknown home folder is not changed, and refused later."""
    try:
        return str(absolute(from_home(file)))
    except ValueError:
        return file


def _unknown(source: Path, names: Iterable[str]) -> str:
    """Describe a source that is neither a file nor bundled, and the probable intent."""
    bundled_are = f"bundled: {', '.join(names)}; `jwins list` shows all names"
    if source.suffix == ".toml":
        return f"no such file; {bundled_are}"
    if str(source) in TASK_CLASSES:
        return (
            f'a task, not an experiment; write task.name = "{source}" in a file, or for a first look '
            f"`jwins run digits --set task.name={source}`; {bundled_are}"
        )
    return f"neither a file nor the name of an experiment{nearest(str(source), names) or ';'} {bundled_are}"


def _read_text(path: Path) -> str:
    try:
        return read_text(path).removeprefix("\ufeff")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError("experiment", str(path), f"not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ConfigError("experiment", str(path), f"cannot be read: {error.strerror}") from None


def load(source: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Load an experiment from a TOML file, or a bundled one by name.

    Paths in the file are relative to its folder, those in ``overrides`` to the current one.

    Args:
        source: file or name.
        overrides: ``key=value`` assignments as for ``--set``; values are TOML, or else text.

    Raises:
        ConfigError: with TOML path, value and remedy.

    >>> load("digits", ["run.rounds=5", "sharing.kind=full"]).sharing
    FullConfig(kind='full', values='float32', robust=None)
    """
    tables, origin = read(source)
    if "variants" in tables or "compare" in tables:
        raise ConfigError("experiment", str(source), "this is a comparison; run it with `jwins compare`")
    given = parse_overrides(overrides)
    rewrite_paths_(given, lambda file: _from(file, lambda path: Path(path).resolve()))
    tables = merge_experiment(tables, given)
    try:
        return Experiment(**tables)
    except ConfigError as error:
        error.add_note(f"in {origin}")
        raise
