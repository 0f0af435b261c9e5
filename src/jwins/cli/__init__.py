"""The command line: one file for each command.

Torch is loaded only by the commands that need it, so help and errors in a configuration come at once.
"""

from jwins.cli import compare, doctor, inspect, keys, list, report, roster, run  # noqa: A004, F401  each adds its command
from jwins.cli.app import app, main

__all__ = ["app", "main"]
