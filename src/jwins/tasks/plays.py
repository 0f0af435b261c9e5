"""Plays as plain text: characters as numbers, files, and the speeches of each role."""

from __future__ import annotations

import bz2
import logging
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jwins.errors import DataError
from jwins.tasks.source import refuse_repeats

_ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""Alphabet: printable ASCII. All other characters share one more class, the last."""

CLASSES = len(_ALPHABET) + 1
"""Characters in the alphabet, with the one that stands for all others."""
_CODES = np.full(256, CLASSES - 1, dtype=np.uint8)
_CODES[np.frombuffer(_ALPHABET.encode("ascii"), dtype=np.uint8)] = np.arange(len(_ALPHABET), dtype=np.uint8)

_ROLE = re.compile(r"[\u200b-\u200f\u2060]*(\w[^:\n]{0,60}):\s*")  # marks of direction and width are no letters
_BLANK = re.compile(r"\n[^\S\n]*\n\s*")
_NEXT_PLAY = "\f\n"

_log = logging.getLogger(__name__)


def codes(text: str) -> npt.NDArray[np.uint8]:
    """Return each character's number, below :data:`CLASSES`.

    >>> codes("\\n ~é").tolist()
    [0, 1, 95, 96]
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    found: npt.NDArray[np.uint8] = _CODES[np.minimum(points, 255)]
    return found


@lru_cache(maxsize=1)
def bundled_plays() -> tuple[str, ...]:
    """Return the eight plays that come with the package; see ``data/README.md`` for their origin."""
    packed = resources.files("jwins.tasks").joinpath("data", "plays.txt.bz2").read_bytes()
    return tuple(bz2.decompress(packed).decode("ascii").split(_NEXT_PLAY))


def read_plays(task: str, paths: Sequence[Path]) -> list[str]:
    """Return the text of each file, without byte order marks.

    Raises:
        DataError: a file cannot be read or is not UTF-8, or two files have the same lines.
    """
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{task}: {path} cannot be read as a UTF-8 text ({error})") from error
        # Byte order marks are also between files that were joined.
        found.append(text.replace("\ufeff", ""))
    lines = [unicodedata.normalize("NFC", text).split("\n") for text in found]
    hashes = [[hash(line.strip()) for line in own if line.strip()] for own in lines]
    refuse_repeats(task, dict(zip(paths, hashes, strict=True)))
    return found


def speeches(task: str, plays: Sequence[str], names: Sequence[object]) -> list[str]:
    """Return the text of each role in each play, its speeches joined; roles in alphabetical order.

    Args:
        task: name of the task, for messages.
        plays: texts in which a line ``NAME:`` after an empty one starts a speech.
        names: names of the plays, for messages.

    Raises:
        DataError: nobody speaks.
    """
    speeches: dict[tuple[int, str], list[str]] = {}
    for number, play in enumerate(plays):
        speaker = None
        no_names, within = [], []
        for paragraph in _BLANK.split(play.strip()):
            first, _, rest = paragraph.partition("\n")
            name = _ROLE.fullmatch(first)
            if name is not None:
                speaker, paragraph = (number, unicodedata.normalize("NFC", name[1])), rest
            elif first.rstrip().endswith((":", "：")):
                no_names.append(first)
            within += [line for line in rest.split("\n") if line.isupper() and _ROLE.fullmatch(line)]
            # a paragraph without a name continues the speech; before the first it is a stage direction
            if speaker is not None:
                speeches.setdefault(speaker, []).append(paragraph + "\n")
        if no_names:
            _log.warning(
                "%s: %s: %d lines after an empty line end in a colon but are not names of roles; the "
                "first is %r. A name begins with a letter or a digit, has up to 61 characters and ends in "
                "':'. These lines count as text of the previous role",
                *(task, names[number], len(no_names), no_names[0][:80]),
            )
        if within:
            _log.warning(
                "%s: %s: %d lines look like names of roles but follow no empty line; the first is %r. They "
                "count as text of the previous role",
                *(task, names[number], len(within), within[0][:80]),
            )
    if not speeches:
        raise DataError(f"{task}: {names[0]}: no speech; expected lines such as 'HAMLET:' after an empty line")
    return ["".join(speeches[role]) for role in sorted(speeches)]
