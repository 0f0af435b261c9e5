"""``jwins inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jwins.cli.app import EPILOG, app, console_of, reported_errors, say
from jwins.errors import CodecError, ConfigError


@app.command(epilog=EPILOG)
def inspect(
    frame: Annotated[Path, typer.Argument(metavar="FRAME", help="File with the bytes of one frame.")],
) -> None:
    """Show the contents of a frame."""
    with reported_errors():
        if frame.is_dir():
            raise ConfigError("FRAME", str(frame), "is a folder; expected a file with the bytes of one frame")
        if not frame.is_file():
            raise ConfigError("FRAME", str(frame), "there is no such file")
        from jwins.wire.frame import describe

        try:
            about = describe(frame.read_bytes())
        except CodecError as error:
            raise ConfigError("FRAME", str(frame), f"not a valid frame: {error}") from None
        console = console_of()
        width = max(map(len, about))
        for key, value in about.items():
            shown = f"{value:.6g}" if isinstance(value, float) else value
            say(console, f"{key:<{width}}  {shown}")
