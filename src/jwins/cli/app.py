"""The command line: one file for each command.

Torch is loaded only by the commands that need it, so help and errors in a configuration come at once.
"""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from jwins.errors import ConfigError, DataError, JwinsError

if TYPE_CHECKING:
    from rich.console import Console

    from jwins.run.run import Ray

OK, FAILED, USAGE, DIVERGED, NO_DATA, INTERRUPTED = 0, 1, 2, 3, 4, 130

EPILOG = (
    "Exit codes: 0 done; 1 unexpected failure; 2 wrong usage or configuration; 3 the run diverged; "
    "4 data are missing; 130 interrupted (continue with --resume)."
)

app = typer.Typer(
    name="jwins",
    help="Run decentralized learning that sends a fraction of the bytes.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ExperimentFile = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT.toml|NAME", help="File, or name of a bundled experiment (see `jwins list`)."
    ),
]

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting, such as --set run.rounds=50; repeatable."
    ),
]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]

Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder with the data, for tasks that need one.")
]

EngineName = Annotated[
    str | None,
    typer.Option("--engine", metavar="ray", help="Run on the machines of a Ray cluster (extra: ray)."),
]

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="auto|HOST:PORT|ray://...",
        help="Address of a running Ray cluster. Default: $RAY_ADDRESS, or a new cluster of this machine.",
    ),
]


def main() -> None:
    """Run the command line and leave with one of the documented exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # letters that the terminal lacks must not cause a failure
            stream.reconfigure(errors="replace")
    try:
        app()
    except KeyboardInterrupt:
        leave("", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has ended, as in `jwins list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILED) from None


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn an error that the package raises on purpose into one message and an exit code."""
    try:
        yield
    except DataError as error:
        leave(_message(error), NO_DATA)
    except ConfigError as error:
        leave(_message(error), USAGE)
    except JwinsError as error:
        from jwins.errors import ResumeError, UsageError

        leave(_message(error), USAGE if isinstance(error, ResumeError | UsageError) else FAILED)
    except MemoryError as error:
        problem = f"not enough memory: {error}" if str(error) else "not enough memory"
        leave(f"{problem}; use a smaller model, fewer nodes or a smaller train.batch_size", FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        leave(f"{where}{error.strerror or error}; files saved before are intact", FAILED)


def _message(error: Exception) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def leave(message: str, code: int) -> NoReturn:
    """End the command with this exit code, its reason on standard error."""
    console = console_of(stderr=True)
    console.print(f"[bold red]{'interrupted' if code == INTERRUPTED else 'error'}[/]", end="")
    console.print(f": {message}" if message else "", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(code)


def engine_of(name: str | None, address: str | None, actors: int | None = None) -> Ray | None:
    """Return the engine of the options; None for this process.

    Raises:
        ConfigError: no such engine, or options without the engine that they are for.
    """
    if name is None:
        for option, value in (("--address", address), ("--actors", actors)):
            if value is not None:
                raise ConfigError(option, value, "needs a Ray cluster; add --engine ray")
        return None
    if name != "ray":
        raise ConfigError("--engine", name, "expected ray; leave the option out to run in this process")
    import jwins.engines.ray.cluster  # noqa: F401  an error here names the package to install, before anything starts
    from jwins.run.run import Ray

    return Ray(actors=actors or 1, address=address)


def console_of(*, stderr: bool = False) -> Console:
    """Return a console on standard output or error without automatic colours.

    Printed texts contain names and reasons of others, also in cells of tables. Control characters, with which
    they could rewrite the terminal, are printed as ``\\x1b``.
    """
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(visible(text), **how)

    return PlainConsole(stderr=stderr, highlight=False)


def say(console: Console, text: str) -> None:
    """Print a text as it is, neither wrapped nor read as markup."""
    console.print(text, soft_wrap=True, markup=False)


def visible(text: str) -> str:
    """Return the text without control characters.

    >>> visible("a\\x1b[2Jb") == "a\\\\x1b[2Jb"
    True
    """
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf")
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jwins {metadata.version('jwins')}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
