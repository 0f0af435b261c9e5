"""Contrast of every colour of figures and of the page (WCAG 2.1, level AA), and how colours are told apart."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jwins.experiment import plugins
from jwins.report.colours import ALGORITHMS, KIND_COLOURS, ON_PAGE, THEME, contrast, styles_of

LIGHT, DARK = 0, 1
GROUNDS = pytest.mark.parametrize("ground", [LIGHT, DARK], ids=["light", "dark"])
FAINT = ("grid", "page")
"""Colours that are faint on purpose: the grid beside labelled ticks, and the page itself."""


def theme(ground: int) -> dict[str, str]:
    figures = {name: values[ground] for name, *values in THEME.values()}
    return figures | {name: values[ground] for name, values in ON_PAGE.items()}


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it, on its own."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def ratio(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS = st.integers(0, 0xFFFFFF).map(lambda number: f"#{number:06x}")


@given(COLOURS, COLOURS)
def test_contrast_is_that_of_the_standard(one: str, other: str) -> None:
    assert contrast(one, other) == pytest.approx(ratio(one, other))
    assert contrast(one, other) == contrast(other, one)
    assert 1.0 <= contrast(one, other) <= 21.0 + 1e-9


@GROUNDS
def test_all_that_figures_are_read_by_stands_out(ground: int) -> None:
    """Success criterion 1.4.11: 3:1 for lines, markers, bars and axes."""
    colours = theme(ground)
    for name, *values in THEME.values():
        if name not in FAINT:
            assert ratio(values[ground], colours["page"]) >= 3.0, name


@GROUNDS
def test_text_stands_out(ground: int) -> None:
    """Success criterion 1.4.3: 4.5:1 for text, wherever the style sheet puts it."""
    colours = theme(ground)
    for on in ("page", "card"):
        for name in ("text", "muted", "accent", "bad"):
            assert ratio(colours[name], colours[on]) >= 4.5, (name, on)
    assert ratio(colours["warn-text"], colours["warn"]) >= 4.5
    assert ratio(colours["page"], colours["kind-values"]) >= 4.5  # numbers on the nodes of a graph


def test_every_algorithm_and_part_is_in_the_table() -> None:
    names = {entry[0] for entry in THEME.values()}
    for kind in [*ALGORITHMS, "own"]:
        assert {f"{kind.replace('_', '-')}-{shade}" for shade in range(3)} <= names
    assert {f"kind-{kind}" for kind in KIND_COLOURS} <= names
    assert all(key == light for key, (_, light, _) in THEME.items())


def test_an_algorithm_looks_as_its_row_says() -> None:
    assert list(ALGORITHMS) == list(plugins.ALGORITHMS)
    for kind, row in ALGORITHMS.items():
        (style,) = styles_of([kind])
        assert (style.colour, style.marker) == row


def test_markers_and_colours_are_distinct() -> None:
    colours, markers = zip(*ALGORITHMS.values(), strict=True)
    assert len(set(colours)) == len(set(markers)) == len(ALGORITHMS)


@GROUNDS
def test_shades_of_a_colour_are_told_apart(ground: int) -> None:
    """By a quarter more or less contrast to the page, whatever the eye makes of the hue."""
    page = theme(ground)["page"]
    for kind in [*ALGORITHMS, "own"]:
        shades = [theme(ground)[f"{kind.replace('_', '-')}-{shade}"] for shade in range(3)]
        for one, other in itertools.combinations(shades, 2):
            apart = ratio(one, page) / ratio(other, page)
            assert max(apart, 1 / apart) >= 1.25, (kind, one, other)


# Colour vision without one kind of cone, on linear RGB. Source: Machado, Oliveira, Fernandes, "A
# Physiologically-based Model for Simulation of Color Vision Deficiency", IEEE TVCG 15(6), 2009, severity 1.
VISION = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array([[0.412456, 0.357576, 0.180438], [0.212673, 0.715152, 0.072175], [0.019334, 0.119192, 0.950304]])


def lab(colour: str, vision: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """CIE L*a*b* of a colour as seen, white D65."""
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(vision @ linear, 0, 1)
    x, y, z = np.cbrt(np.maximum(XYZ @ seen / XYZ.sum(axis=1), 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@GROUNDS
@pytest.mark.parametrize("vision", VISION)
def test_algorithms_are_told_apart_on_both(vision: str, ground: int) -> None:
    """By 15 units of CIELAB or more; about 2 are just noticed side by side."""
    colours = {kind: theme(ground)[f"{kind.replace('_', '-')}-0"] for kind in ALGORITHMS}
    seen = {kind: lab(colour, VISION[vision]) for kind, colour in colours.items()}
    for (a, one), (b, other) in itertools.combinations(seen.items(), 2):
        assert np.linalg.norm(one - other) >= 15, (a, b)
