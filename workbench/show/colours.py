"""Colours, the same in every figure and page, and how strongly they are laid on.

A value v behind a token or in a cell, against the strongest |v| that is shown:

    colour    POSITIVE where v > 0, else NEGATIVE
    opacity   log10(1 + 9 min(1, |v| / strongest)), so that weak values stay visible

Things that have no sign (SAEs, methods, curves) take `series_colour` in the order of their names; what stands in
several figures of a page has the same colour in all of them.
"""

import math

POSITIVE, NEGATIVE, NEUTRAL, MARK = "#2ea043", "#da3633", "#4269d0", "#efb118"
NODE, ON_NODE = "#5b6470", "#fff"
"""A node's ground and the text on it, on a light page and on a dark one."""
ON_STRONG = "#fff"
"""Text on what has the strongest colour of a scale, on a light page and on a dark one."""
GREY, GREY_LINE, GREY_GROUND = "#888", "#8884", "#8882"
"""Of what has no value, on a light page and on a dark one: points, lines, grounds."""
PALETTE = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e", "#efb118", "#6cc5b0")
FAINT = "rgba(128,128,128,0.08)"
UPWARDS, BOTH_WAYS = [[0, FAINT], [1, PALETTE[0]]], [[0, PALETTE[1]], [0.5, FAINT], [1, PALETTE[0]]]
"""Plotly's scales from zero on, and around zero: zero is the page's own ground, a light one's and a dark one's."""


def series_colour(number: int) -> str:
    """The colour of the series `number`, counted from 0; after the last of PALETTE it begins again."""
    return PALETTE[number % len(PALETTE)]


def sign_colour(value: float) -> str:
    """POSITIVE above zero, else NEGATIVE."""
    return POSITIVE if value > 0 else NEGATIVE


def opacity(value: float, strongest: float) -> float:
    """From 0 for nothing to 1 for `strongest` and above; see the module's description."""
    return math.log10(1 + 9 * min(1.0, abs(value) / strongest)) if strongest else 0.0


def background(value: float, strongest: float) -> str:
    """A CSS colour: that of the value's sign, as opaque as `opacity` says."""
    red, green, blue = bytes.fromhex(sign_colour(value)[1:])
    return f"rgba({red},{green},{blue},{opacity(value, strongest):.2f})"
