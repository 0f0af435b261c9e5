"""Colours of all figures and of the page, on light and on dark, and the style of each variant.

All parts that are needed to read a figure have a contrast of at least 3:1 to the page on both, and text 4.5:1
(WCAG 2.1, level AA). The shades of an algorithm's colour, and its colours on dark, are computed by contrast.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TEXT, MUTED, GRID, AXIS, PAGE = "#1f2328", "#57606a", "#e3e6ea", "#8a939d", "#ffffff"
"""Colours of figures on light. The grid only guides the eye and is faint on purpose."""

_DARK_PAGE = "#14171c"

KIND_COLOURS = {
    "values": "#27587f",
    "positions": "#4f93c8",
    "header": "#767678",
    "keyframe": "#7a5195",
    "control": "#a77bc0",
}
"""Kinds of bytes and their colours in figures."""

_KIND_COLOURS_ON_DARK = ("#5d9fd0", "#bcd9ee", "#7f8792", "#b58ad0", "#e0cdee")

ALGORITHMS = {
    "full": ("#4d4d4d", "o"),
    "random_k": ("#9333ea", "^"),
    "top_k": ("#009e73", "v"),
    "choco": ("#0072b2", "s"),
    "jwins": ("#d55e00", "D"),
    "closed_loop": ("#084508", "P"),
    "stateless": ("#400050", "X"),
    "beer": ("#0b3dbb", "p"),
    "sparse_loco": ("#e60037", "h"),
    "moniqua": ("#6c9a56", "*"),
    "power_gossip": ("#a86090", "d"),
    "noloco": ("#a878fc", "<"),
    "demo": ("#e61ac4", ">"),
}
"""Colour and marker of the curves of each ``sharing.kind``.

A colour has a contrast of at least 3:1 to white and differs from the others with any colour vision. They are
based on Okabe and Ito, whose orange is too pale on white. Markers are matplotlib's.
"""

_OWN_COLOUR, _OWN_MARKER = "#cc79a7", "P"
"""Colour and marker of an algorithm that is not built in."""

_SHADE_CONTRASTS = (3.2, 5.8, 10.5)
_MIN_CONTRAST_ON_DARK, _STRONG = 3.6, 7.0


def contrast(colour: str, other: str) -> float:
    """Return the contrast ratio of two colours ``#rrggbb``, from 1 to 21 (WCAG 2.1).

    >>> round(contrast("#ffffff", "#000000"), 1), round(contrast("#e69f00", "#ffffff"), 2)
    (21.0, 2.25)
    """
    low, high = sorted((_luminance(colour), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(colour))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _channels(colour: str) -> tuple[float, float, float]:
    r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return r, g, b


def _with_contrast(colour: str, page: str, wanted: float) -> str:
    """Return the same hue and saturation with the contrast ``wanted`` to ``page``."""
    hue, _, saturation = colorsys.rgb_to_hls(*_channels(colour))
    found = []
    for step in range(256):
        channels = colorsys.hls_to_rgb(hue, step / 255, saturation)
        found.append("#" + "".join(f"{round(channel * 255):02x}" for channel in channels))
    return min(found, key=lambda shade: abs(contrast(shade, page) - wanted))


def _shades(colour: str) -> tuple[str, str, str]:
    """Return the colour and two others of its hue, all as different as possible."""
    own = contrast(colour, PAGE)
    *_, nearest = sorted(_SHADE_CONTRASTS, key=lambda level: -abs(math.log(level / own)))
    light, strong = (_with_contrast(colour, PAGE, level) for level in _SHADE_CONTRASTS if level != nearest)
    return colour, strong, light


def _on_dark(colour: str) -> str:
    """Return the colour itself if it is visible on dark, too; else a lighter one.

    The strongest colour on light is the strongest on dark. All others stay as near to their colour as possible,
    because the palette was chosen for distinction: lightened violet and blue are the same to some eyes.
    """
    own = contrast(colour, PAGE)
    if own >= _STRONG:
        return _with_contrast(colour, _DARK_PAGE, own)
    if contrast(colour, _DARK_PAGE) >= _MIN_CONTRAST_ON_DARK:
        return colour
    return _with_contrast(colour, _DARK_PAGE, _MIN_CONTRAST_ON_DARK)


_BY_KEY = ALGORITHMS | {"own": (_OWN_COLOUR, _OWN_MARKER)}
_SHADES = {key: _shades(colour) for key, (colour, _) in _BY_KEY.items()}
_MORE_MARKERS = "oXs*<>dph"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 1.5, 1, 1.5)))

THEME: dict[str, tuple[str, str, str]] = {
    TEXT: ("text", TEXT, "#e6e9ed"),
    MUTED: ("muted", MUTED, "#a3acb8"),
    GRID: ("grid", GRID, "#2b313a"),
    AXIS: ("axis", AXIS, "#6b7480"),
    PAGE: ("page", PAGE, _DARK_PAGE),
    **{
        colour: (f"kind-{kind}", colour, dark)
        for (kind, colour), dark in zip(KIND_COLOURS.items(), _KIND_COLOURS_ON_DARK, strict=True)
    },
    **{
        colour: (f"{kind.replace('_', '-')}-{index}", colour, _on_dark(colour))
        for kind, shades in _SHADES.items()
        for index, colour in enumerate(shades)
    },
}
"""Colours in figures: for each the CSS variable in a page, and its value on light and on dark."""

ON_PAGE = {
    "card": ("#f6f7f9", "#1b1f26"),
    "line": ("#d8dce1", "#343b45"),
    "accent": ("#0b5394", "#8cc4ff"),
    "bad": ("#a4262c", "#ff9a94"),
    "warn": ("#fff4d6", "#3a2f10"),
    "warn-text": ("#553c00", "#ffe3a3"),
}
"""Colours of the page alone, by CSS variable, on light and on dark."""


@dataclass(frozen=True, slots=True)
class Style:
    """Style of a variant in all figures.

    Attributes:
        colour: colour on light, a key of ``THEME``.
        dash: matplotlib's dash pattern.
        marker: matplotlib's marker.
    """

    colour: str
    dash: Any
    marker: str

    @property
    def variable(self) -> str:
        """Return the colour as CSS."""
        return f"var(--{THEME[self.colour][0]})"


def colours_of(algorithms: Sequence[str]) -> list[tuple[str, int]]:
    """Return the algorithm whose colour each variant has, and the number of earlier variants with the same
    colour.

    A variant has its algorithm's colour. If an algorithm has more than three variants, as in an ablation, all
    but the first also use colours of algorithms that are absent.

    Args:
        algorithms: algorithms of the variants, in order; one that is not built in counts as ``own``.
    """
    keys = [algorithm if algorithm in ALGORITHMS else "own" for algorithm in algorithms]
    spare = [key for key in ("choco", "top_k", "own", "random_k") if key not in keys]
    colours: list[str] = []
    for index, key in enumerate(keys):
        palette = [key, *spare] if keys.count(key) > 3 else [key]
        colours.append(palette[keys[:index].count(key) % len(palette)])
    return [(colour, colours[:index].count(colour)) for index, colour in enumerate(colours)]


def styles_of(algorithms: Sequence[str]) -> list[Style]:
    """Return one style per variant: colours of ``colours_of``, with different shades, dashes and markers."""
    seen: dict[str, int] = {}
    styles = []
    for algorithm, (colour, nth) in zip(algorithms, colours_of(algorithms), strict=True):
        key = algorithm if algorithm in ALGORITHMS else "own"
        index = seen.get(key, 0)
        seen[key] = index + 1
        marker = _BY_KEY[key][1] if index == 0 else _MORE_MARKERS[(index - 1) % len(_MORE_MARKERS)]
        styles.append(Style(_SHADES[colour][nth % 3], _DASHES[nth % len(_DASHES)], marker))
    return styles
