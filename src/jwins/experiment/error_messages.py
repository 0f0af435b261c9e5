"""Errors of settings with path, value and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jwins.errors import ConfigError
from jwins.experiment.reference import join, kind_of, models_of, settings_docs
from jwins.experiment.toml import toml_value
from jwins.validation import MISSING


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean "..."?`` for the known word nearest to ``word``, or an empty text.

    >>> nearest("fracton", ["fraction", "gamma"])
    '; did you mean "fraction"?'
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{found[0]}"?' if found else ""


_EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected a text in quotes",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list, such as [1, 2]",
    "list_type": "expected a list, such as [1, 2]",
    "dict_type": "expected a table",
    "path_type": "expected a path in quotes",
    "too_short": "expected at least one entry",
    "string_too_short": "expected at least one character",
}


def explain(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]) -> ConfigError:
    """Describe all problems that pydantic found, by the paths of the settings.

    Returns:
        One error with path and value of the first problem, and a line for each further problem.
    """
    problems = [_explain_one(details, model, values) for details in error.errors(include_url=False)]
    path, value, problem = problems[0]
    for other in problems[1:]:
        problem += f"\n{other[0]} = {other[1]!r}: {other[2]}"
    return ConfigError(path, value, problem)


def _explain_one(
    details: ErrorDetails, model: type[BaseModel], values: Mapping[str, Any]
) -> tuple[str, object, str]:
    path, models = _locate(details["loc"], model, values)
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, ConfigError):  # raised by a validator that compares several keys
        return join(path, cause.path), cause.value, cause.problem
    name = re.sub(r"\[\d+\]", "", path.rpartition(".")[2])
    if kind == "missing":
        field = next((m.model_fields[name] for m in models if name in m.model_fields), None)
        meaning = f": {field.description}" if field is not None and field.description else ""
        return path, MISSING, f"required{meaning}"
    if kind == "extra_forbidden":
        return path, value, _unknown_key(path, name, models, model)
    if kind == "union_tag_not_found":
        return join(path, "kind"), MISSING, f"required, one of: {', '.join(_tags(models, name))}"
    if kind == "union_tag_invalid":
        kinds_known = re.findall(r"'([^']+)'", context["expected_tags"])
        tag = value.get("kind") if isinstance(value, Mapping) else value
        hint = nearest(str(tag), kinds_known)
        return join(path, "kind"), tag, f"unknown kind{hint or ';'} kinds: {', '.join(kinds_known)}"
    if kind == "literal_error":
        known = re.findall(r"'([^']+)'", context["expected"])
        tags = _tags(models, name)
        table = f", or a table of kind = {', '.join(tags)}" if tags else ""
        return path, value, f"expected {_alternatives(known)}{table}{nearest(str(value), known)}"
    if kind in ("model_type", "model_attributes_type"):
        return path, value, "expected a table" + _as_table(name, value, models)
    if kind == "tuple_type" and (tables := _tags(models, name)):
        return path, value, f"expected an array of tables, [[{path}]], each with a kind: {', '.join(tables)}"
    if kind in _EXPECTED:
        return path, value, _EXPECTED[kind] + _unquote(kind, value)
    return path, value, details["msg"]


def _as_table(name: str, value: object, models: list[type[BaseModel]]) -> str:
    """Return the remedy for another value in place of the table ``name``."""
    fields = [m.model_fields[name] for m in models if name in m.model_fields]
    keys = list(dict.fromkeys(key for f in fields for m in models_of(f) for key in m.model_fields))
    if isinstance(value, str) and "kind" in keys:
        return f'; write {name} = {{ kind = "{value}" }}'
    own = "; a task of your own goes into task = {'own': ...}" if "own" in keys else ""
    return f"; its keys: {', '.join(keys)}{own}" if keys else ""


def _locate(
    loc: tuple[int | str, ...], model: type[BaseModel], values: Mapping[str, Any]
) -> tuple[str, list[type[BaseModel]]]:
    """Return the TOML path of a pydantic location, and the possible models of its last table.

    Locations contain the names of the unions' branches, which are recognised because they are not keys.
    """
    path: str = ""
    here: Any = values
    models = last = [model]
    for index, step in enumerate(loc):
        at_end = index == len(loc) - 1
        if isinstance(step, int):
            path += f"[{step}]"
            here = here[step] if isinstance(here, Sequence) and step < len(here) else None
            continue
        fields = [m.model_fields[step] for m in models if step in m.model_fields]
        present = isinstance(here, Mapping) and step in here and here.get("kind") != step
        branch = isinstance(here, Mapping) and here.get("kind") == step and not fields
        if fields or present or (at_end and isinstance(here, Mapping) and not branch):
            path, last = join(path, step), models
            here = here.get(step) if isinstance(here, Mapping) else None
            models = [m for field in fields for m in models_of(field)]
        else:  # the branch of a union
            models = last = [m for m in models if kind_of(m) == step] or models
    return path, last


def _tags(models: list[type[BaseModel]], name: str) -> list[str]:
    fields = [m.model_fields[name] for m in models if name in m.model_fields]
    return [tag for field in fields for m in models_of(field) if (tag := kind_of(m))]


def _unknown_key(path: str, name: str, models: list[type[BaseModel]], root: type[BaseModel]) -> str:
    known = [key for model in models for key in model.model_fields]
    if difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        return f"unknown key{nearest(name, known)}"
    same = [key for key in settings_docs(root) if key.path.rpartition(".")[2] == name]
    if kinds := sorted({key.when for key in same if key.path == path}):
        return f"this key is for kind = {_alternatives(kinds)}; known here: {', '.join(known)}"
    if same:
        return f"unknown key here; did you mean {_alternatives(sorted({key.path for key in same}))}?"
    if hint := nearest(name, known):
        return f"unknown key{hint}"
    return f"unknown key; known here: {', '.join(known) or 'none'}"


def _alternatives(words: Sequence[str]) -> str:
    """Join words as in ``"a", "b" or "c"``."""
    quoted = [f'"{word}"' for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _unquote(kind: str, value: object) -> str:
    """Return the remedy for a text that looks like a value of the right type."""
    if isinstance(value, str):
        parsed = toml_value(value)
        wanted: dict[str, tuple[type, ...]] = {
            "int_type": (int,),
            "float_type": (int, float),
            "bool_type": (bool,),
        }
        if type(parsed) in wanted.get(kind, ()):
            return f"; write {value} without quotes"
    if isinstance(value, float) and kind in ("int_type", "int_from_float") and value.is_integer():
        return f"; write {int(value)}"
    return ""
