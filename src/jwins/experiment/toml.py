"""Reading and writing TOML as plain tables."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jwins.errors import ConfigError


def read_toml(text: str, origin: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ConfigError: a syntax error, with file and line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        found = re.search(r"\(at line (\d+), column \d+\)", message)
        lines = text.splitlines()
        number = int(found[1]) if found else len(lines)
        line = lines[number - 1].strip() if 0 < number <= len(lines) else ""
        problem = message.partition(" (at ")[0]
        raise ConfigError(f"{origin}, line {number}", line, f"not TOML: {problem}") from None


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Make tables from assignments of TOML values, or else texts, to dotted keys.

    Raises:
        ConfigError: an assignment without a key or without ``=``.

    >>> parse_overrides(["run.rounds=5", "sharing.kind=full", "run.eval_at=[1, 2]"])
    {'run': {'rounds': 5, 'eval_at': [1, 2]}, 'sharing': {'kind': 'full'}}
    """
    tables: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        steps = [step.strip() for step in key.split(".")]
        if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", step) for step in steps):
            raise ConfigError("--set", assignment, "expected KEY=VALUE, such as run.rounds=100")
        table = tables
        for step in steps[:-1]:
            inner = table.setdefault(step, {})
            if not isinstance(inner, dict):
                problem = f"{step} already has the value {inner!r}, so it has no keys; remove one of the two"
                raise ConfigError("--set", assignment, problem)
            table = inner
        table[steps[-1]] = toml_value(text.strip())
    return tables


def toml_value(text: str) -> Any:
    """Parse ``text`` as a TOML value; return the text itself if it is not one."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def merge(base: Mapping[str, Any], over: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Merge the keys of ``over`` over those of ``base``, table by table.

    A table whose ``kind`` changes is replaced, because its keys mean nothing to the other kind. A dataclass in
    place of a table gets other fields.

    Raises:
        ConfigError: with the path from ``path`` on, if another object is in place of a table, or the dataclass
            refuses the fields.

    >>> merge({"a": {"kind": "x", "p": 1}, "b": 1}, {"a": {"kind": "y"}})
    {'a': {'kind': 'y'}, 'b': 1}
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            replaced = "kind" in value and value["kind"] != old.get("kind", value["kind"])
            merged[key] = dict(value) if replaced else merge(old, value, f"{path}{key}.")
        elif isinstance(value, Mapping) and "kind" not in value and not isinstance(old, _PLAIN):
            merged[key] = _with_fields(old, value, f"{path}{key}")
        else:
            merged[key] = value
    return merged


_PLAIN = (type(None), str, int, float, list, tuple, Path)


def _with_fields(old: Any, given: Mapping[str, Any], path: str) -> Any:
    name = type(old).__name__
    if not dataclasses.is_dataclass(old) or isinstance(old, type):
        problem = f"is an object ({name}) and no dataclass, so its fields cannot be set; pass a new object"
        raise ConfigError(path, old, problem)
    now = {own.name: getattr(old, own.name) for own in dataclasses.fields(old) if own.init}
    if strange := [key for key in given if key not in now]:
        problem = f"{name} has no such field; its fields: {', '.join(now) or 'none'}"
        raise ConfigError(f"{path}.{strange[0]}", given[strange[0]], problem)
    try:
        return dataclasses.replace(old, **merge(now, given, f"{path}."))
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(path, dict(given), f"{name}: {error}") from error


def nested(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Convert dotted keys to nested tables.

    Raises:
        ConfigError: a dotted key continues a value that is not a table, or two keys set the same.

    >>> nested({"run.rounds": 3, "run": {"seed": 2}})
    {'run': {'rounds': 3, 'seed': 2}}
    """
    found: dict[str, Any] = {}
    for key, value in tables.items():
        steps, inner = str(key).split("."), value
        if not all(steps):
            raise ConfigError(key, value, "expected a key such as run.rounds")
        at: Any = found
        for step in steps[:-1]:
            at = at.get(step, {})
            if not isinstance(at, Mapping):
                raise ConfigError(
                    key, value, f"{step} was set to {at!r} before, so it has no keys; remove one of the two"
                )
        if steps[-1] in at and _overlap(at[steps[-1]], value):
            raise ConfigError(key, value, "another key sets the same; remove one of the two")
        for step in reversed(steps[1:]):
            inner = {step: inner}
        found = merge(found, {steps[0]: inner})
    return found


def _overlap(a: object, b: object) -> bool:
    """Return whether two values of one key conflict: they are not tables with different keys."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return any(_overlap(a[key], b[key]) for key in a.keys() & b.keys())
    return True


def write_toml(tables: Mapping[str, Any]) -> str:
    """Write plain values as TOML: one ``[section]`` per table, nested tables in one line, None left out.

    >>> print(write_toml({"name": "x", "run": {"rounds": 5, "at": [1, 2]}}), end="")
    name = "x"
    <BLANKLINE>
    [run]
    rounds = 5
    at = [1, 2]
    """
    present = {key: value for key, value in tables.items() if value is not None}
    lines = [f"{_key(key)} = {toml_text(value)}" for key, value in present.items() if not _is_section(value)]
    for key, value in present.items():
        if not _is_section(value):
            continue
        for header, table in (
            [(f"[{_key(key)}]", value)]
            if isinstance(value, Mapping)
            else [(f"[[{_key(key)}]]", entry) for entry in value]
        ):
            lines += ["", header]
            lines += [f"{_key(k)} = {toml_text(v)}" for k, v in table.items() if v is not None]
    return "\n".join(lines).lstrip("\n") + "\n"


def _is_section(value: object) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_text(key)


def toml_text(value: object) -> str:
    """Write a plain value as one line of TOML.

    Raises:
        TypeError: TOML cannot express the value.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Path):
        return toml_text(value.as_posix())
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_text(entry) for entry in value)}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(k)} = {toml_text(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inner} }}" if inner else "{}"
    raise TypeError(f"{value!r} cannot be written as TOML")


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to one with dotted keys; :func:`nested` is the way back.

    >>> flat({"run": {"rounds": 3, "seed": 2}})
    {'run.rounds': 3, 'run.seed': 2}
    """
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
