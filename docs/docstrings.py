"""Turn cross-references of docstrings (``:class:`name```) into links, and examples into blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc|obj):`(~?)([\w.]+)`")

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1    .*)*", re.MULTILINE)


def _fenced(found: re.Match[str]) -> str:
    return f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"


def _link(found: re.Match[str]) -> str:
    short, name = found[1], found[2]
    text = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{name}"><code>{text}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrite each docstring that has some."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_fenced, ROLE.sub(_link, obj.docstring.value))
