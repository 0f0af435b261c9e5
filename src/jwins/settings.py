"""Typed settings: what a TOML table may say, and errors that name the place, the value and the remedy.

Nothing here knows what an experiment is. :class:`Settings` is a strict, frozen pydantic model whose errors are
:class:`~jwins.errors.ConfigError`; the functions read, merge and write plain TOML tables.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, PydanticUndefined, core_schema

from jwins.errors import ConfigError

__all__ = [
    "MISSING",
    "Key",
    "OneOrMany",
    "OrObject",
    "OrWord",
    "Settings",
    "TomlPath",
    "Within",
    "keys_of",
    "merge",
    "nearest",
    "parse_overrides",
    "read_toml",
    "refuse",
    "write_toml",
]


class _Missing:
    def __repr__(self) -> str:
        return "<missing>"


MISSING = _Missing()
"""Stands for the value in the error about a required key that is not there."""


# --- Models whose errors are ConfigErrors -----------------------------------------------------------------

if TYPE_CHECKING:
    _Base = BaseModel
else:

    class _Checked(type(BaseModel)):
        """Only the outermost call passes here: nested tables are validated inside pydantic's core."""

        def __call__(cls, /, *args, **values):
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise _explain(error, cls, values) from None

    class _Base(BaseModel, metaclass=_Checked):
        pass


class Settings(_Base):
    """A table of settings: every key is known and typed, nothing is converted, nothing changes afterwards.

    Raises:
        ConfigError: from the constructor, with a message that lists every problem.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True)


@dataclass(frozen=True, slots=True)
class Within:
    """A range, for ``Annotated[float, Within("a fraction", 0, 1, open_low=True)]``.

    Attributes:
        what: noun with article, as in "expected a fraction in (0, 1]".
        low: smallest value, None for no limit.
        high: largest value, None for no limit.
        open_low: whether ``low`` itself is out of range.
    """

    what: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check after the type has been checked."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    @property
    def interval(self) -> str:
        """In words, e.g. ``in (0, 1]`` or ``of at least 1``."""
        if self.low is not None and self.high is not None:
            return f"in {'(' if self.open_low else '['}{_short(self.low)}, {_short(self.high)}]"
        if self.low is not None:
            return f"{'above' if self.open_low else 'of at least'} {self.low:g}"
        return "" if self.high is None else f"of at most {self.high:g}"

    def _check(self, value: float) -> float:
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        below = self.high is None or value <= self.high
        if above and below and abs(value) != float("inf"):  # NaN fails one of the comparisons
            return value
        hint = ""
        if self.high == 1 and 1 < value <= 100:
            hint = f"; did you mean {value / (10 if value < 10 else 100):.6g}?"
        raise _problem(f"expected {self.what} {self.interval}".rstrip() + hint)


@dataclass(frozen=True, slots=True)
class OrObject:
    """Besides the tables of a union, Python may hand over an object that has certain members.

    Attributes:
        methods: names of the methods the object must have; empty for anything callable.
        attributes: names of what else it must have.
        base: the class that says what they are, for the error if one is missing.
    """

    methods: tuple[str, ...]
    attributes: tuple[str, ...] = ()
    base: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let objects through, and everything else to the union."""
        return core_schema.no_info_wrap_validator_function(
            self._accept,
            handler(source),
            serialization=core_schema.wrap_serializer_function_ser_schema(self._serialize),
        )

    def matches(self, value: object) -> bool:
        """Whether ``value`` is such an object, and not a table."""
        if isinstance(value, BaseModel | Mapping | str):
            return False
        if not self.methods:
            return callable(value)
        return not isinstance(value, type) and not self._missing(value)

    def _missing(self, value: object) -> list[str]:
        methods = [name for name in self.methods if not callable(getattr(value, name, None))]
        return methods + [name for name in self.attributes if not hasattr(value, name)]

    def _accept(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(value, Mapping) and value.get("kind") == "object":
            raise _problem("was a Python object in the run that wrote this; hand it over from Python again")
        if self.matches(value):
            return value
        missing = self._missing(value)
        if len(missing) < len(self.methods + self.attributes) and not isinstance(
            value, BaseModel | Mapping | str
        ):
            raise _problem(
                f"an object without {', '.join(missing)}; derive its class from {self.base}"
                if missing
                else "a class; hand over an object of it"
            )
        return handler(value)

    def _serialize(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        return {"kind": "object", "object": _described(value)} if self.matches(value) else handler(value)


def _described(value: object) -> str:
    """An object in words that are the same in every process: without its address in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


@dataclass(frozen=True, slots=True)
class OneOrMany:
    """A number, or a list of one per node: ``Annotated[float | tuple[float, ...], OneOrMany(rule)]``."""

    rule: Within

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Choose by whether it is a list, so that an error names the number in it."""
        number = core_schema.no_info_after_validator_function(
            self.rule._check, core_schema.float_schema(strict=True)
        )
        many = core_schema.tuple_schema([number], variadic_item_index=0, min_length=1, strict=False)
        return core_schema.tagged_union_schema(
            {"number": number, "list": many},
            discriminator=lambda value: "list" if isinstance(value, list | tuple) else "number",
        )


@dataclass(frozen=True, slots=True)
class OrWord:
    """A number, or one word: ``Annotated[int | Literal["all"], OrWord(rule, "all")]``."""

    rule: Within
    word: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """One message for both."""
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> int | str:
        if value == self.word:
            return self.word
        if type(value) is int:
            return int(self.rule._check(value))
        raise _problem(f'expected {self.rule.what} {self.rule.interval}, or "{self.word}"')


TomlPath = Annotated[Path, Field(strict=False)]
"""A path; TOML writes it as a string."""


def _short(number: float) -> str:
    return f"{number:g}" if abs(number) < 1e6 else f"{'-' if number < 0 else ''}2^{math.log2(abs(number)):g}"


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("settings", "{text}", {"text": text})


def refuse(path: str, value: object, problem: str) -> ConfigError:
    """The error for a validator that compares several keys; ``path`` is relative to the validator's table."""
    return ConfigError(path, value, problem)


# --- Errors -----------------------------------------------------------------------------------------------


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean "..."?`` for the known word most like ``word``, or nothing.

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
}


def _explain(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]) -> ConfigError:
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
    if isinstance(cause, ConfigError):  # from a validator that compares several keys
        return _join(path, cause.path), cause.value, cause.problem
    name = re.sub(r"\[\d+\]", "", path.rpartition(".")[2])
    if kind == "missing":
        field = next((m.model_fields[name] for m in models if name in m.model_fields), None)
        meaning = f": {field.description}" if field is not None and field.description else ""
        return path, MISSING, f"required{meaning}"
    if kind == "extra_forbidden":
        return path, value, _unknown_key(path, name, models, model)
    if kind == "union_tag_not_found":
        return _join(path, "kind"), MISSING, f"required, one of: {', '.join(_tags(models, name))}"
    if kind == "union_tag_invalid":
        kinds_known = re.findall(r"'([^']+)'", context["expected_tags"])
        tag = value.get("kind") if isinstance(value, Mapping) else value
        hint = nearest(str(tag), kinds_known)
        return _join(path, "kind"), tag, f"unknown kind{hint or ';'} kinds: {', '.join(kinds_known)}"
    if kind == "literal_error":
        known = re.findall(r"'([^']+)'", context["expected"])
        return path, value, f"expected {_alternatives(known)}{nearest(str(value), known)}"
    if kind in ("model_type", "model_attributes_type"):
        return path, value, "expected a table" + _as_table(name, value, models)
    if kind in _EXPECTED:
        return path, value, _EXPECTED[kind] + _unquote(kind, value)
    return path, value, details["msg"]


def _as_table(name: str, value: object, models: list[type[BaseModel]]) -> str:
    """The remedy for something else in place of the table ``name``."""
    fields = [m.model_fields[name] for m in models if name in m.model_fields]
    keys = list(dict.fromkeys(key for f in fields for m in _models_in(f.annotation) for key in m.model_fields))
    if isinstance(value, str) and "kind" in keys:
        return f'; write {name} = {{ kind = "{value}" }}'
    return f"; its keys: {', '.join(keys)}" if keys else ""


def _locate(
    loc: tuple[int | str, ...], model: type[BaseModel], values: Mapping[str, Any]
) -> tuple[str, list[type[BaseModel]]]:
    """TOML path of a pydantic location, and the models that may describe its last table.

    Locations contain the names of the unions' branches; a branch is recognised by not being a key.
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
        if fields or present or (at_end and isinstance(here, Mapping)):
            path, last = _join(path, step), models
            here = here.get(step) if isinstance(here, Mapping) else None
            models = [m for field in fields for m in _models_in(field.annotation)]
        else:  # the branch of a union
            models = last = [m for m in models if _tag(m) == step] or models
    return path, last


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return (
        get_args(field.annotation)[0] if field is not None and get_origin(field.annotation) is Literal else None
    )


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _tags(models: list[type[BaseModel]], name: str) -> list[str]:
    fields = [m.model_fields[name] for m in models if name in m.model_fields]
    return [tag for field in fields for m in _models_in(field.annotation) if (tag := _tag(m))]


def _unknown_key(path: str, name: str, models: list[type[BaseModel]], root: type[BaseModel]) -> str:
    known = [key for model in models for key in model.model_fields]
    if difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        return f"unknown key{nearest(name, known)}"
    same = [key for key in keys_of(root) if key.path.rpartition(".")[2] == name]
    if kinds := sorted({key.when for key in same if key.path == path}):
        return f"this key is for kind = {_alternatives(kinds)}; known here: {', '.join(known)}"
    if same:
        return f"unknown key here; did you mean {_alternatives(sorted({key.path for key in same}))}?"
    if hint := nearest(name, known):
        return f"unknown key{hint}"
    return f"unknown key; known here: {', '.join(known) or 'none'}"


def _alternatives(words: Sequence[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _unquote(kind: str, value: object) -> str:
    """The remedy for a value of the right look and the wrong type."""
    if isinstance(value, str):
        parsed = _toml_value(value)
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


# --- Every key a settings class knows ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a settings class, for reference tables.

    Attributes:
        path: TOML path; tables of a union are written ``sharing.<kind>``-wise in ``when``.
        type: in words.
        default: as TOML writes it, "required" or "" (none).
        meaning: one sentence.
        when: the ``kind`` this key belongs to, or "".
    """

    path: str
    type: str
    default: str
    meaning: str
    when: str = ""


def keys_of(model: type[BaseModel], prefix: str = "", when: str = "") -> Iterator[Key]:
    """All keys of a settings class and of the tables in it, depth first."""
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        path = _join(prefix, name)
        models = _models_in(field.annotation)
        if models and len(models) == 1 and _tag(models[0]) is None:
            yield from keys_of(models[0], path, when)
            continue
        if models:
            kinds = ", ".join(tag for m in models if (tag := _tag(m)))
            yield Key(path, f"table; kind = {kinds}", _default(field), field.description or "", when)
            for inner in models:
                tag = _tag(inner) or ""
                for key in keys_of(inner, path, tag):
                    if not key.path.endswith(".kind") or key.path != f"{path}.kind":
                        yield key
            continue
        yield Key(path, _type_name(field), _default(field), field.description or "", when)


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
    return _toml(value)


# --- TOML -------------------------------------------------------------------------------------------------


def read_toml(text: str, origin: str) -> dict[str, Any]:
    """Parse TOML.

    Args:
        text: the document.
        origin: the file's name, for errors.

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
    """Tables from ``key=value`` assignments.

    Args:
        assignments: dotted keys and TOML values; what is not a TOML value is a text.

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
                raise ConfigError("--set", assignment, f"{step} was set to {inner!r} before, so it has no keys")
            table = inner
        table[steps[-1]] = _toml_value(text.strip())
    return tables


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``over`` laid over it, table by table.

    A table whose ``kind`` changes is replaced, because its keys mean nothing to the other kind.

    >>> merge({"a": {"kind": "x", "p": 1}, "b": 1}, {"a": {"kind": "y"}})
    {'a': {'kind': 'y'}, 'b': 1}
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            replaced = "kind" in value and value["kind"] != old.get("kind", value["kind"])
            merged[key] = dict(value) if replaced else merge(old, value)
        else:
            merged[key] = value
    return merged


def write_toml(tables: Mapping[str, Any]) -> str:
    """TOML of plain values: one ``[section]`` per table, tables inside it in one line, None left out.

    >>> print(write_toml({"name": "x", "run": {"rounds": 5, "at": [1, 2]}}), end="")
    name = "x"
    <BLANKLINE>
    [run]
    rounds = 5
    at = [1, 2]
    """
    present = {key: value for key, value in tables.items() if value is not None}
    lines = [f"{_key(key)} = {_toml(value)}" for key, value in present.items() if not _is_section(value)]
    for key, value in present.items():
        if not _is_section(value):
            continue
        for header, table in (
            [(f"[{_key(key)}]", value)]
            if isinstance(value, Mapping)
            else [(f"[[{_key(key)}]]", entry) for entry in value]
        ):
            lines += ["", header]
            lines += [f"{_key(k)} = {_toml(v)}" for k, v in table.items() if v is not None]
    return "\n".join(lines).lstrip("\n") + "\n"


def _is_section(value: object) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Path):
        return _toml(value.as_posix())
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(entry) for entry in value)}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inner} }}" if inner else "{}"
    raise TypeError(f"{value!r} cannot be written as TOML")
