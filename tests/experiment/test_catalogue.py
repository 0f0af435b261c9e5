"""Tasks and codecs are listed as their classes are, and listing them imports no torch."""

from __future__ import annotations

import inspect
import subprocess
import sys

from jwins.experiment.catalogue import (
    CODEC_CLASSES,
    OTHER_DIRECTIONS,
    TASK_CLASSES,
    USUAL_DIRECTIONS,
    docstring_of,
)
from jwins.tasks import TASKS, Task
from jwins.wire.codec import CODECS


def test_every_task_and_codec_is_listed_with_its_docstring() -> None:
    for listed, classes in ((TASK_CLASSES, TASKS), (CODEC_CLASSES, CODECS)):
        assert list(listed.items()) == [
            (name, f"{cls.__module__.removeprefix('jwins.')}.{cls.__name__}") for name, cls in classes.items()
        ]
        for name, cls in classes.items():
            assert docstring_of(listed[name]) == inspect.getdoc(cls)


def test_directions_are_those_that_the_classes_declare() -> None:
    assert Task.directions() == USUAL_DIRECTIONS
    for name, cls in TASKS.items():
        assert cls.directions() == {**USUAL_DIRECTIONS, **OTHER_DIRECTIONS.get(name, {})}
    assert OTHER_DIRECTIONS.keys() <= TASKS.keys()


PROGRAM = """
import sys
from jwins.cli import app
from jwins.report.page import write_page
for arguments in (["--help"], ["list"], ["list", "--keys"], ["report", "--help"], ["report", "nowhere"]):
    try:
        app(arguments)
    except SystemExit as end:
        assert end.code == (4 if arguments[-1] == "nowhere" else 0), arguments
    slow = {"torch", "numba", "ray", "scipy"} & sys.modules.keys()
    assert not slow, f"jwins {' '.join(arguments)} imports {slow}"
"""


def test_help_list_and_report_import_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
