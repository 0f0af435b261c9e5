"""Settings by their TOML paths, such as ``sharing.gamma``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from jwins.experiment.toml import toml_text
from jwins.validation import MISSING, Within

Seed = Annotated[int, Within("a signed 64-bit number", -(2**63), 2**63 - 1)]
SettingPath = Annotated[str, Field(pattern=r"^[a-z_]+(\.[A-Za-z_]\w*)+$")]

_LONGEST = 255
"""Maximum length of a file's name on the usual file systems."""


def setting_texts(settings: Mapping[str, Any]) -> list[str]:
    """Return texts such as ``["lr = 0.1", "gamma = 0.4"]``."""
    return [f"{key.rpartition('.')[2]} = {setting_text(value)}" for key, value in settings.items()]


def setting_text(value: Any) -> str:
    """Return a setting's value as a text for people."""
    return toml_text(value).strip('"') if value is not None else "none"


def settings_slug(settings: Mapping[str, Any]) -> str:
    """Return the name of a folder for settings; one that is too long, as of objects, ends in its hash."""
    text = ",".join(setting_texts(settings)).replace(" = ", "=")
    slug = re.sub(r"[^A-Za-z0-9._=,-]+", "-", text)
    if len(slug) <= _LONGEST:
        return slug
    return f"{slug[:100]}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def is_object(value: object) -> bool:
    """Return whether a value of ``config.toml`` is the text of a Python object."""
    return isinstance(value, Mapping) and value.get("kind") == "object"


def look_up(tables: Mapping[str, Any], key: str) -> Any:
    """Return the value at a TOML path, MISSING without one; for a field of an object the object's table."""
    place: Any = tables
    for step in key.split("."):
        if is_object(place):
            return place
        place = place.get(step, MISSING) if isinstance(place, Mapping) else MISSING
    return place
