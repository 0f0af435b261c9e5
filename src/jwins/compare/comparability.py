"""Checks that runs are comparable, by the fingerprints and versions in their first rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jwins.compare.comparison import Cell, Comparison, Variant
from jwins.errors import ConfigError
from jwins.run_folder.record import Record
from jwins.run_folder.rows import StartRow

_ALSO = {"task": "model", "data": "evaluation"}
"""Aspects that imply others: variants with another model may also have other code."""


def check_comparable(comparison: Comparison, records: Mapping[tuple[str, int], Record]) -> None:
    """Check that all variants of a seed have the same fingerprints, except in ``allow_different``.

    A group may differ from the first variant, for example in its number of nodes; it is compared within itself.

    Raises:
        ConfigError: runs differ; the message names the variant, the seed and the difference.
    """
    for seed in comparison.compare.seeds:
        there = [variant for variant in comparison.variants if (variant.name, seed) in records]
        for variant in there[1:]:
            leader = next(other for other in there if other.group == variant.group)
            for first in dict.fromkeys([there[0].name, leader.name]):
                within = first == leader.name != there[0].name
                _check_pair(comparison.variant(first), variant, seed, records, within=within)


def _check_pair(
    first: Variant, variant: Variant, seed: int, records: Mapping[tuple[str, int], Record], *, within: bool
) -> None:
    expected = records[first.name, seed].start.fingerprints
    found = records[variant.name, seed].start.fingerprints
    for what in expected:
        if what in _ALSO and what not in found:  # written by a version without this fingerprint
            continue
        names = {what, _ALSO.get(what, what)}
        allowed = names.intersection((*first.allow_different, *variant.allow_different))
        if within and what != "codec" and names & {*first.allow_different} & {*variant.allow_different}:
            allowed = set()
        if found.get(what) != expected[what] and not allowed:
            raise ConfigError(
                f"variants: {variant.name!r}, seed {seed}, {what}",
                found.get(what),
                f"{first.name!r} has {expected[what]!r}, so the two are not comparable; make them "
                f"the same, or set allow_different = [{what!r}] in the variant",
            )


class TaskChangeCheck:
    """Check that the task's code and its data do not change between the runs of each variant."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], tuple[Cell, str]] = {}

    def check(self, cell: Cell, start: StartRow) -> None:
        """Compare a run's first row with those of earlier runs of its variant.

        Raises:
            ConfigError: code or data have changed; the message names the run.
        """
        if any(key.startswith("task.") for key in cell.settings):
            return
        for what, changed in (("task", "the task's code has"), ("data", "the task's data have")):
            found = start.fingerprints.get(what)
            if found is None or what in cell.variant.allow_different:
                continue
            first, expected = self._first.setdefault((cell.variant.name, what), (cell, found))
            if found != expected:
                raise ConfigError(
                    f"variants: {cell.name}, {what}",
                    found,
                    f"{changed} changed since {first.folder} was run ({expected!r}); restore the former files, "
                    f"or remove the earlier runs, or set allow_different = [{what!r}] in the variant",
                )


def version_note(starts: Iterable[StartRow]) -> str | None:
    """Return a warning if runs were made with different versions of this package or a library, else None.

    >>> class Start:
    ...     def __init__(self, **versions): self.versions = versions
    >>> version_note([Start(jwins="1.0", torch="2.1"), Start(jwins="1.1", torch="2.1")])
    'The runs were made with different versions: jwins 1.0 and 1.1.'
    """
    found: dict[str, dict[str, None]] = {}
    for start in starts:
        for library, version in start.versions.items():
            found.setdefault(library, {})[version] = None
    several = [
        f"{library} {' and '.join(versions)}" for library, versions in found.items() if len(versions) > 1
    ]
    return f"The runs were made with different versions: {', '.join(several)}." if several else None
