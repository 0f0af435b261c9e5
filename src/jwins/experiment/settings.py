"""Typed settings of a TOML table, and errors with place, value and remedy.

This module does not depend on experiments. :class:`Settings` is a strict, frozen pydantic model whose errors
are :class:`~jwins.errors.ConfigError`, with texts of :mod:`jwins.experiment.error_messages`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from jwins.experiment.error_messages import explain

if TYPE_CHECKING:
    _Base = BaseModel
else:

    class _Checked(type(BaseModel)):
        """Metaclass whose call is only the outermost one: pydantic's core validates nested tables."""

        def __call__(cls, /, *args, **values):
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise explain(error, cls, values) from None

    class _Base(BaseModel, metaclass=_Checked):
        pass


class Settings(_Base):
    """A table of settings with known and typed keys, without conversion, and immutable.

    Raises:
        ConfigError: raised by the constructor, with a message that lists every problem.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True)
