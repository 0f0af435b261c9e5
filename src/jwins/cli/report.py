"""``jwins report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jwins.cli.app import EPILOG, Quiet, app, console_of, reported_errors, say
from jwins.errors import ConfigError
from jwins.run_folder.archive import beside


@app.command(epilog=EPILOG)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS...",
            help="Run folders, comparison folders, records, or folders of these, in any mixture.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="File of the page. Default: report.html in the folder, if one is given."
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the figures as PDF and PNG. Default: <page>-figures beside the page.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Metric to show; NAME:lower if lower is better. Default: the first."),
    ] = None,
    open_: Annotated[
        str, typer.Option("--open", metavar="yes|no", help="Whether to open the page in a browser.")
    ] = "no",
    quiet: Quiet = False,
) -> None:
    """Write one self-contained HTML page about runs, and its figures as PDF and PNG."""
    with reported_errors():
        if open_ not in ("yes", "no"):
            raise ConfigError("--open", open_, "expected yes or no")
        if out is None:
            out = beside(runs[0]) / "report.html" if len(runs) == 1 else Path("report.html")
        if out.is_dir() or out.suffix not in (".html", ".htm"):
            raise ConfigError("--out", str(out), "expected a file that ends in .html")
        from jwins.report.page import write_page

        page, files = write_page(runs, out, figures=figures, metric=metric)
        if not quiet:
            console = console_of()
            say(console, f"page: {page}")
            if files:
                say(console, f"{len(files)} figures (PDF, PNG): {files[0].parent}")
        if open_ == "yes":
            import webbrowser

            webbrowser.open(page.resolve().as_uri())
