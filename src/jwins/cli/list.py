"""``jwins list``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from jwins.cli.app import EPILOG, app, console_of, reported_errors, say

if TYPE_CHECKING:
    from jwins.experiment.reference import SettingDoc


@app.command("list", epilog=EPILOG)
def list_(
    keys: Annotated[
        bool, typer.Option("--keys", help="Show all settings of experiments and comparisons instead.")
    ] = False,
) -> None:
    """Show bundled experiments, tasks, algorithms, quantizers, topologies, partitioners and codecs."""
    with reported_errors():
        console = console_of()
        if keys:
            for key in chain.from_iterable(documented().values()):
                when = f" ({key.when})" if key.when else ""
                default = f" = {key.default}" if key.default else ""
                kind = key.type.replace("\\|", "|")
                say(console, f"{key.path}{when}{default}")
                say(console, f"    {kind}; {key.meaning}")
            return
        for heading, entries in _catalogue():
            console.print(f"[bold]{heading}[/]")
            width = max(map(len, entries))
            for name, meaning in entries.items():
                say(console, f"  {name:<{width}}  {meaning}")


def documented() -> dict[str, Iterator[SettingDoc]]:
    """Return the settings of experiments and of the sections of a comparison."""
    from jwins.compare.settings import CompareConfig, VariantTable
    from jwins.compare.tuning import TuneConfig
    from jwins.experiment.experiment import Experiment
    from jwins.experiment.reference import settings_docs

    return {
        "experiment": settings_docs(Experiment),
        "compare": settings_docs(CompareConfig, "compare"),
        "variants": settings_docs(VariantTable, "variants"),
        "tune": settings_docs(TuneConfig, "tune"),
    }


def _catalogue() -> list[tuple[str, dict[str, str]]]:
    from jwins.experiment.catalogue import CODEC_CLASSES, TASK_CLASSES, docstring_of
    from jwins.experiment.load import bundled
    from jwins.experiment.plugins import ALGORITHMS, PARTITION_TABLES, QUANTIZER_TABLES, TOPOLOGY_TABLES

    def described(classes: Mapping[str, type]) -> dict[str, str]:
        return {name: _first_sentence(cls.__doc__ or "") for name, cls in classes.items()}

    def read(classes: Mapping[str, str]) -> dict[str, str]:
        return {name: _first_sentence(docstring_of(cls)) for name, cls in classes.items()}

    return [
        ("experiments and comparisons (jwins run NAME, jwins compare NAME)", bundled()),
        ("tasks (task.name)", read(TASK_CLASSES)),
        ("sharing algorithms (sharing.kind)", described(ALGORITHMS)),
        ("quantizers (sharing.values.kind)", described(QUANTIZER_TABLES)),
        ("topologies (topology.kind)", described(TOPOLOGY_TABLES)),
        ("partitioners (task.partition.kind)", described(PARTITION_TABLES)),
        ("codecs (wire.codec)", read(CODEC_CLASSES)),
    ]


def _first_sentence(docstring: str) -> str:
    text = " ".join(docstring.strip().partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")
