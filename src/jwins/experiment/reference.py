"""All keys of a settings class, for reference tables and error messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jwins.experiment.field_types import OneOf, OneOrMany, OrWord, OrWords
from jwins.experiment.toml import toml_text
from jwins.validation import Within


def join(path: str, key: str) -> str:
    """Join two parts of a TOML path; each may be empty."""
    return f"{path}.{key}" if path and key else path or key


def kind_of(model: type[BaseModel]) -> str | None:
    """Return the ``kind`` of this class, or None if it is not a table of a union."""
    field = model.model_fields.get("kind")
    return (
        get_args(field.annotation)[0] if field is not None and get_origin(field.annotation) is Literal else None
    )


def models_of(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the settings classes that a field may have."""
    return _models_in((*field.metadata, field.annotation))


def _models_in(parts: tuple[Any, ...]) -> list[type[BaseModel]]:
    if tables := [part.tables.values() for part in parts if isinstance(part, OneOf)]:
        return [model for models in tables for model in models]
    models = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    return models + [model for part in parts for model in _models_in(get_args(part))]


@dataclass(frozen=True, slots=True)
class SettingDoc:
    """One key of a settings class, for reference tables.

    Attributes:
        path: TOML path; ``when`` has the kind of a union's table.
        default: default as in TOML, "required" or "" (none).
        when: the ``kind`` this key belongs to, or "".
    """

    path: str
    type: str
    default: str
    meaning: str
    when: str = ""


def settings_docs(model: type[BaseModel], prefix: str = "", when: str = "") -> Iterator[SettingDoc]:
    """Return all keys of a settings class and of the tables in it, depth first."""
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        path = join(prefix, name)
        models = models_of(field)
        if models and len(models) == 1 and kind_of(models[0]) is None:
            yield from settings_docs(models[0], path, when)
            continue
        if models:
            kinds = ", ".join(kind for m in models if (kind := kind_of(m)))
            words = [f'"{word}"' for rule in field.metadata if isinstance(rule, OrWords) for word in rule.words]
            options = " \\| ".join([*words, f"table; kind = {kinds}"])
            yield SettingDoc(path, options, _default(field), field.description or "", when)
            inner = (key for m in models for key in settings_docs(m, path, kind_of(m) or ""))
            # Tables of several kinds are listed once.
            yield from dict.fromkeys(key for key in inner if key.path != f"{path}.kind")
            continue
        yield SettingDoc(path, _type_name(field), _default(field), field.description or "", when)


def _type_name(field: FieldInfo) -> str:
    options = [a for a in (get_args(field.annotation) or (field.annotation,)) if a is not type(None)]
    if get_origin(field.annotation) is Literal:
        return " \\| ".join(f'"{word}"' for word in get_args(field.annotation))
    if get_origin(field.annotation) is dict:
        return "table"
    rules = [m for m in field.metadata if isinstance(m, Within | OneOrMany | OrWord)]
    if rules:
        rule = rules[0]
        if isinstance(rule, OrWord):
            return f'{rule.rule.what} {rule.rule.interval}, or "{rule.word}"'
        if isinstance(rule, OneOrMany):
            return f"{rule.rule.what} {rule.rule.interval}, or a list of one per node".replace("  ", " ")
        return f"{rule.what} {rule.interval}".strip()
    if get_origin(field.annotation) is tuple:
        inner = FieldInfo.from_annotation(get_args(field.annotation)[0])
        return f"list, each {_type_name(inner)}"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    words = []
    for option in options:
        if get_origin(option) is Literal:
            words += [f'"{word}"' for word in get_args(option)]
        elif get_origin(option) is Annotated:
            words.append(_type_name(FieldInfo.from_annotation(option)))
        else:
            words.append(names.get(option, "any"))
    return " \\| ".join(dict.fromkeys(words)) or "any"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    elif isinstance(value, tuple):
        value = list(value)
    return toml_text(value)
