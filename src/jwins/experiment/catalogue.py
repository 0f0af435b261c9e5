"""Bundled tasks and codecs, for commands that show them without importing torch.

``tests/experiment/test_catalogue.py`` compares each entry with its class.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib import resources

TASK_CLASSES: Mapping[str, str] = {
    "digits": "tasks.digits.Digits",
    "cifar10": "tasks.cifar10.Cifar10",
    "femnist": "tasks.femnist.Femnist",
    "celeba": "tasks.celeba.Celeba",
    "shakespeare": "tasks.shakespeare.Shakespeare",
    "movielens": "tasks.movielens.MovieLens",
    "gpt": "tasks.gpt.Gpt",
}
"""The class of each ``task.name``, in the package."""

CODEC_CLASSES: Mapping[str, str] = {
    "pco": "wire.codec.Pco",
    "raw": "wire.codec.Raw",
    "paper": "wire.codec.Paper",
}
"""The class of each ``wire.codec``, in the package."""

USUAL_DIRECTIONS: Mapping[str, str] = {"accuracy": "higher", "loss": "lower"}
"""The better direction of each metric that the base class of tasks declares."""

OTHER_DIRECTIONS: Mapping[str, Mapping[str, str]] = {
    "gpt": {"bits_per_character": "lower", "perplexity": "lower"},
    "movielens": {"within_half_star": "higher", "squared_error": "lower"},
}
"""The same for metrics that a bundled task declares besides, by ``task.name``."""


def docstring_of(cls: str) -> str:
    """Return the docstring of a class of the package from its source, without importing the module.

    >>> docstring_of("tasks.digits.Digits").split()[:2]
    ['Ten', 'digits']
    """
    module, _, name = cls.rpartition(".")
    file = resources.files("jwins").joinpath(*module.split(".")[:-1], module.rpartition(".")[2] + ".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) or ""
    return ""
