"""Contents of a run folder, and its lock."""

from __future__ import annotations

import contextlib
import hashlib
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

from jwins.errors import ConfigError, DataError, ResumeError
from jwins.experiment.experiment import Experiment, result_settings
from jwins.experiment.toml import read_toml
from jwins.run_folder.archive import archive_of, is_file, read_text
from jwins.run_folder.record import Record
from jwins.run_folder.rows import StartRow

_OF_FILES = (".md", ".tex", ".csv", ".json", ".png", ".pdf", ".html", ".log", ".tar.xz")
"""Endings of file names in a comparison's folder."""

_LONGEST = 100
"""Maximum length of a folder's name, below the limit of every file system."""


class FolderState(StrEnum):
    """State of an experiment in a run folder."""

    ABSENT = "absent"
    UNFINISHED = "unfinished"
    COMPLETE = "complete"


def variant_folder(name: str) -> str:
    """Return the name of a variant's folder within a comparison's folder.

    The name ends in digits of its hash if letters had to be left out or a file there has that name.

    >>> variant_folder("random 20 %"), variant_folder("summary.json"), variant_folder("\u65e5\u672c")
    ('random-20', 'summary.json-ce684abc', 'variant-ce47dfba')
    """
    plain = re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.")
    lost = any(letter.isalnum() and not letter.isascii() for letter in name)
    if plain and not lost and not plain.endswith(_OF_FILES) and len(plain) <= _LONGEST:
        return plain
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return f"{plain[:_LONGEST].strip('-.') or 'variant'}-{digest}"


def check_folder(path: str, folder: Path) -> None:
    """Refuse a folder that cannot be made because a file has its name or that of a parent folder.

    Raises:
        ConfigError: a file has this name.
    """
    for place in (folder, *folder.parents):
        if place.is_file():
            remedy = f"unpack it (tar -xf {place}) to continue its runs, or " if archive_of(place) else ""
            raise ConfigError(path, str(folder), f"{place} is a file; {remedy}choose another")


def folder_state(experiment: Experiment, folder: Path) -> tuple[FolderState, Experiment]:
    """Read the state of ``folder``.

    Returns:
        The state, and the experiment with the choices of the earlier run.

    Raises:
        ConfigError: a file has the folder's name.
        ResumeError: the folder holds another experiment, or is not a run folder.
    """
    if archive_of(folder) is None:
        check_folder("run.folder", folder)
    config = folder / "config.toml"
    if not is_file(config):
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ResumeError(
                f"{folder}: not empty, and not a run folder (config.toml is missing); choose another run.folder"
            )
        return FolderState.ABSENT, experiment
    try:
        text = read_text(config)
    except UnicodeDecodeError:
        raise ResumeError(f"{config}: not UTF-8 text; choose another run.folder, or remove this one") from None
    stored = read_toml(text, str(config))
    try:
        batching, device = stored["train"]["batching"], stored["run"]["device"]
        theirs = result_settings(stored)
    except (KeyError, TypeError, AttributeError):
        raise ResumeError(f"{config}: not the configuration of a run; choose another run.folder") from None
    same = experiment
    if experiment.train.batching == "auto":
        same = same.changed({"train": {"batching": batching}})
    if experiment.run.device == "auto":
        same = same.changed({"run": {"device": device}})
    mine = result_settings(same.resolved())
    if mine != theirs:
        raise ResumeError(
            f"{folder}: holds another experiment ({_difference(mine, theirs)}); "
            f"choose another run.folder, or remove this one"
        )
    with contextlib.suppress(DataError):
        if Record.read(folder).end is not None:
            return FolderState.COMPLETE, same
    return FolderState.UNFINISHED, same


def _difference(mine: dict[str, Any], stored: dict[str, Any], path: str = "") -> str:
    """Return the first key in which two experiments differ, for people."""
    for key in [*mine, *(key for key in stored if key not in mine)]:
        here = f"{path}.{key}" if path else key
        a, b = mine.get(key), stored.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _difference(a, b, here):
                return found
        elif a != b:
            return f"{here} = {b!r} there, {a!r} here"
    return ""


def check_resume(folder: Path, state: FolderState, resume: bool) -> None:
    """Refuse a run that is in its folder already, unless it is to be resumed."""
    if state is not FolderState.ABSENT and not resume:
        verb = "read it" if state is FolderState.COMPLETE else "continue"
        raise ResumeError(
            f"{folder}: this experiment is {state.value} there; {verb} with --resume (resume=True), choose "
            "another run.folder, or remove it"
        )


def goes_on(folder: Path, start: StartRow) -> bool:
    """Return whether a run continues from a checkpoint; if it does not, its log is removed.

    Raises:
        ResumeError: the task or its data have changed.
    """
    if any((folder / "checkpoints").glob("round-*.safetensors")):
        _check_task_unchanged(folder, start)
        return True
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    return False


def _check_task_unchanged(folder: Path, start: StartRow) -> None:
    """Refuse to continue a run whose task or data have changed, which the digest does not cover.

    The initial model is not compared, because its last bits may depend on the processor. The task's code is not
    compared, so that a mistake that ended a run can be repaired.
    """
    try:
        before = Record.read(folder).start
    except DataError:  # the simulator reports the mistake in the log
        return
    changed = []
    if before.dim != start.dim:
        changed.append(f"parameters per model: {before.dim} there, {start.dim} here")
    for key, what in (
        ("partition", "partitions"),
        ("batches", "batches"),
        ("evaluation", "evaluation samples"),
        ("data", "samples"),
    ):
        now = start.fingerprints[key]
        then = before.fingerprints.get(key, now if key == "data" else None)  # data: only in some versions
        if then != now:
            changed.append(f"{what} differ")
    if changed:
        raise ResumeError(
            f"{folder}: the task or its data have changed since ({', '.join(changed)}); restore them, "
            f"choose another run.folder, or remove this one"
        )
