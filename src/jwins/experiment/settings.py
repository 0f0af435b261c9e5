"""Typed settings: what a TOML table may say, and errors that name the place, the value and the remedy.

Nothing here knows what an experiment is. :class:`Settings` is a strict, frozen pydantic model whose errors are
:class:`~jwins.errors.ConfigError`, in the words of :mod:`jwins.experiment.error_messages`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from jwins.experiment.error_messages import explain

__all__ = ["Settings"]

if TYPE_CHECKING:
    _Base = BaseModel
else:

    class _Checked(type(BaseModel)):
        """Only the outermost call passes here: nested tables are validated inside pydantic's core."""

        def __call__(cls, /, *args, **values):
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise explain(error, cls, values) from None

    class _Base(BaseModel, metaclass=_Checked):
        pass


class Settings(_Base):
    """A table of settings: every key is known and typed, nothing is converted, nothing changes afterwards.

    Raises:
        ConfigError: from the constructor, with a message that lists every problem.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True)
