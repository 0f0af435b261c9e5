"""The command line: ``jwins run``, ``launch``, ``node``, ``keys``, ``compare`` and others.

Torch is loaded only by the commands that need it, so help and errors in a configuration come at once.
"""

from jwins.cli import (  # noqa: F401  each adds its command
    compare,
    doctor,
    inspect,
    keys,
    launch,
    list,  # noqa: A004
    node,
    report,
    roster,
    run,
)
from jwins.cli.app import app, main

__all__ = ["app", "main"]
