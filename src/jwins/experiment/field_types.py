"""Rules for single values: ranges, words, lists and objects in place of tables."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import BaseModel, BeforeValidator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from jwins.errors import ConfigError
from jwins.validation import COUNT, FRACTION, Within


@dataclass(frozen=True, slots=True, eq=False)
class OneOf:
    """One of several tables, distinguished by ``kind``: ``Annotated[Table, OneOf(TABLES)]``."""

    tables: Mapping[str, type[BaseModel]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by the tables, whatever the annotation is for readers of types."""
        union: Any = Union[tuple(self.tables.values())]  # noqa: UP007
        return handler.generate_schema(Annotated[union, Field(discriminator="kind")])


@dataclass(frozen=True, slots=True)
class OrObject:
    """Union of tables that also accepts, from Python, an object with certain members.

    Attributes:
        methods: names of required methods; empty for any callable.
        attributes: names of other required members.
        base: class that documents them, for the error if one is missing.
    """

    methods: tuple[str, ...]
    attributes: tuple[str, ...] = ()
    base: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept objects, and pass everything else to the union."""
        return core_schema.no_info_wrap_validator_function(
            self._accept,
            handler(source),
            serialization=core_schema.wrap_serializer_function_ser_schema(self._serialize),
        )

    def matches(self, value: object) -> bool:
        """Return whether ``value`` is such an object, and not a table."""
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
            raise _problem("this run was made with a Python object here; pass the object from Python again")
        if self.matches(value):
            if cls := nameless(value):
                raise _problem(NAMELESS.format(cls=cls))
            return value
        missing = self._missing(value)
        if len(missing) < len(self.methods + self.attributes) and not isinstance(
            value, BaseModel | Mapping | str
        ):
            raise _problem(
                f"has no {', '.join(missing)}; derive its class from {self.base}"
                if missing
                else "is a class; pass an instance"
            )
        return handler(value)

    def _serialize(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        return {"kind": "object", "object": identity_text(value)} if self.matches(value) else handler(value)


NAMELESS = (
    "the repr of {cls} does not name its arguments, so runs with different ones would count as the same; make "
    "{cls} a dataclass, or give it a __repr__ with its arguments"
)


def nameless(value: object) -> str:
    """Return the class, of an object or of an argument in its repr, whose repr hides its arguments; or ""."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            argument = getattr(value, field.name) if field.init else None
            if (found := nameless(argument)) and repr(argument) in repr(value):
                return found
    for cls in type(value).__mro__:
        if "__repr__" in vars(cls):
            return ""
        own = vars(cls).get("__init__", object.__init__)
        if own is not object.__init__ and not getattr(cls, "_is_protocol", False):
            return type(value).__name__ if len(inspect.signature(own).parameters) > 1 else ""
    return ""


def identity_text(value: object) -> str:
    """Describe an object by a text that is the same in every process.

    It has no memory address, and names the user's script as the process does that the user started:
    multiprocessing calls it ``__mp_main__`` in the processes that it spawns.
    """
    text = f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else repr(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text).replace("__mp_main__.", "__main__.")


@dataclass(frozen=True, slots=True)
class OneOrMany:
    """A number, or a list with one for each node: ``Annotated[float | tuple[float, ...], OneOrMany(rule)]``."""

    rule: Within
    whole: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Choose the branch by the type, so that an error names the number in a list."""
        kind = core_schema.int_schema(strict=True) if self.whole else core_schema.float_schema(strict=True)
        number = core_schema.no_info_after_validator_function(self.rule.validated, kind)
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
        """Give one message for both branches."""
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> int | str:
        if value == self.word:
            return self.word
        if type(value) is int:
            return int(self.rule.validated(value))
        raise _problem(f'expected {self.rule.what} {self.rule.interval}, or "{self.word}"')


@dataclass(frozen=True, slots=True)
class OrWords:
    """One of several tables, or one of these words: ``Annotated[Table | str, OneOf(TABLES), OrWords("a")]``."""

    words: tuple[str, ...]

    def __init__(self, *words: str) -> None:
        object.__setattr__(self, "words", words)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept the words, and pass everything but a text to the union."""
        return core_schema.no_info_wrap_validator_function(
            self._accept,
            handler(source),
            serialization=core_schema.wrap_serializer_function_ser_schema(
                lambda value, inner: value if isinstance(value, str) else inner(value)
            ),
        )

    def _accept(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        if not isinstance(value, str):
            return handler(value)
        if value not in self.words:
            raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, self.words))})
        return value


def from_home(path: str) -> str:
    """Replace ``~`` or ``~name`` at the start of a path by the home folder.

    Raises:
        ValueError: no such home folder exists.
    """
    found = Path(os.path.expanduser(Path(path)))
    if found.parts and found.parts[0].startswith("~"):
        raise ValueError(f"there is no home folder {found.parts[0]}; write the whole path, which begins with /")
    return str(found)


def _from_home(path: Any) -> Any:
    if not isinstance(path, str | Path):
        return path
    if not str(path) or "\0" in str(path):
        raise _problem("expected a path")
    try:
        return Path(from_home(str(path)))
    except ValueError as error:
        raise _problem(str(error)) from None


TomlPath = Annotated[Path, Field(strict=False), BeforeValidator(_from_home)]
"""A path, which may begin with ``~``; a string in TOML."""

Fraction = Annotated[float, FRACTION]
Count = Annotated[int, COUNT]
Index = Annotated[int, Within("a whole number", 0)]


def _problem(text: str) -> PydanticCustomError:
    """Return the error of a validator about its value; the path is added later."""
    return PydanticCustomError("settings", "{text}", {"text": text})


def refuse(path: str, value: object, problem: str) -> ConfigError:
    """Return the error of a validator that compares several keys; ``path`` starts at the validator's table."""
    return ConfigError(path, value, problem)
