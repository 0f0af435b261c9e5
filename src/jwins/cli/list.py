"""``jwins list``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jwins.cli.app import EPILOG, app, console_of, errors_said

if TYPE_CHECKING:
    pass


@app.command("list", epilog=EPILOG)
def list_(
    keys: Annotated[bool, typer.Option("--keys", help="Show every key of an experiment instead.")] = False,
) -> None:
    """Show bundled experiments, tasks, algorithms, topologies, partitioners and codecs."""
    with errors_said():
        console = console_of()
        if keys:
            from jwins.experiment.experiment import Experiment
            from jwins.experiment.keys import keys_of

            for key in keys_of(Experiment):
                when = f" ({key.when})" if key.when else ""
                default = f" = {key.default}" if key.default else ""
                kind = key.type.replace("\\|", "|")
                console.print(f"{key.path}{when}{default}", soft_wrap=True, markup=False)
                console.print(f"    {kind}; {key.meaning}", soft_wrap=True, markup=False)
            return
        for heading, entries in _catalogue():
            console.print(f"[bold]{heading}[/]")
            width = max(map(len, entries))
            for name, meaning in entries.items():
                console.print(f"  {name:<{width}}  {meaning}", soft_wrap=True, markup=False)


def _catalogue() -> list[tuple[str, dict[str, str]]]:
    from typing import get_args

    from jwins import experiment
    from jwins.tasks import TASKS
    from jwins.wire.codec import CODECS

    def of(*classes: Any) -> dict[str, str]:
        return {get_args(cls.model_fields["kind"].annotation)[0]: _first_sentence(cls) for cls in classes}

    e = experiment
    return [
        ("experiments and comparisons (jwins run NAME, jwins compare NAME)", e.bundled()),
        ("tasks (task.name)", {name: _first_sentence(cls) for name, cls in TASKS.items()}),
        (
            "sharing algorithms (sharing.kind)",
            of(e.FullConfig, e.RandomKConfig, e.TopKConfig, e.ChocoConfig, e.JwinsConfig),
        ),
        (
            "topologies (topology.kind)",
            of(
                e.RingConfig,
                e.FullyConnectedConfig,
                e.StarConfig,
                e.TorusConfig,
                e.RegularConfig,
                e.SmallWorldConfig,
                e.ErdosRenyiConfig,
                e.OnePeerExponentialConfig,
                e.EdgeListConfig,
            ),
        ),
        (
            "partitioners (task.partition.kind)",
            of(e.IidConfig, e.ShardsConfig, e.DirichletConfig, e.ByKeyConfig),
        ),
        ("codecs (wire.codec)", {name: _first_sentence(cls) for name, cls in CODECS.items()}),
    ]


def _first_sentence(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").strip().partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")
