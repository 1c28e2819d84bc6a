"""Patterns and finishes of the hard world's things, walls and tables, as [3, H, W]: numpy is quicker with planes."""

from collections.abc import Callable

import numpy as np

from bench.world.hard.kinds import MAIN, Figure
from bench.world.hard.scene import Colour, HardThing

Array = np.ndarray
GLASS = 0.6  # of a glass thing's own colour; the rest shows through


def _rest(values: Array) -> Array:
    return values - np.floor(values)


def _checked(a: Array, b: Array) -> Array:
    return (_rest(a) < 0.5) ^ (_rest(b) < 0.5)


def _brick(a: Array, b: Array) -> Array:
    row = np.floor(b)
    return (b - row < 0.1) | (_rest(0.5 * a + 0.25 * (row % 2)) < 0.05)


# pattern -> how much of the second colour there is at (a, b), in periods
PATTERNS: dict[str, Callable[[Array, Array], Array]] = {
    "striped": lambda a, b: _rest(a) < 0.5,
    "checked": _checked,
    "tiled": lambda a, b: (_rest(a) < 0.08) | (_rest(b) < 0.08),
    "brick": _brick,
    "dotted": lambda a, b: (_rest(a) - 0.5) ** 2 + (_rest(b) - 0.5) ** 2 < 0.09,
    "diamonds": lambda a, b: np.abs(_rest(a) - 0.5) + np.abs(_rest(b) - 0.5) < 0.28,
    "marbled": lambda a, b: 0.5 + 0.5 * np.sin(5 * a + 2.5 * np.sin(3 * b + a)),
    "wooden": lambda a, b: 0.18 + 0.18 * np.sin(9 * a + 1.5 * np.sin(1.3 * b)),
}


def plane(colour: Colour) -> Array:
    """[3, 1, 1] of a colour."""
    return np.float32(colour)[:, None, None]


def patterned(name: str, colours: tuple[Colour, Colour], a: Array, b: Array) -> Array:
    """[3, H, W] of a surface at (a, b), in periods of its pattern."""
    first, second = map(plane, colours)
    if name not in PATTERNS:
        return np.broadcast_to(first, (3, *a.shape))
    return first + PATTERNS[name](a, b).astype(np.float32) * (second - first)


def _palette(thing: HardThing) -> Array:
    """[3, P] colours of parts, in the order that `kinds` numbers them."""
    paint, (tan, hue) = np.float32(thing.paint), thing.pose[-2:]
    wood = np.float32([0.44, 0.28, 0.15]) * np.float32(1 + 0.35 * hue)
    skin = np.float32([0.80, 0.60, 0.47]) * np.float32(1 + 0.3 * tan)
    leaf = np.float32([0.20 + 0.08 * hue, 0.46 + 0.1 * tan, 0.18])
    fixed = ([0.10, 0.10, 0.11], [0.92, 0.92, 0.90]), ([1.0, 0.90, 0.58],)
    return np.float32([paint, thing.second, *fixed[0], wood, skin, leaf, *fixed[1], 0.55 * paint]).T


def painted(thing: HardThing, made: Figure, contrast: float) -> Array:
    """[3, H, W] what a figure looks like; contrast 0 is flat, as in a picture."""
    colours = np.take(_palette(thing), made.part, axis=1)
    main = made.part == MAIN
    if thing.look:
        fine, turn = 3.5 + 2 * thing.pose[-3], 1.6 * thing.pose[-4]
        c, s = np.float32(fine * np.cos(turn)), np.float32(fine * np.sin(turn))
        second = tuple(0.35 * a + 0.65 * b for a, b in zip(thing.paint, thing.second))
        cloth = patterned(thing.look, (thing.paint, second), made.x * c + made.y * s, made.y * c - made.x * s)
        np.copyto(colours, cloth, where=main)
    if not contrast:
        return colours
    shade = 1 - contrast * (1 - made.shade)
    if thing.finish == "metal":
        bands = 0.85 + 0.4 * np.sin(9 * made.x + 5 * made.y * thing.pose[-1] + 3)
        shade = np.where(main, shade * bands, shade)
    colours *= shade
    if thing.finish in ("shiny", "metal", "glass"):
        spot = np.sqrt((made.x - 0.16 * made.light) ** 2 + ((made.y - 0.68) * 0.7) ** 2)
        colours += 0.7 * np.clip(1 - spot * 9, 0, 1) * main
    return colours


def opacity(thing: HardThing, made: Figure) -> Array | float:
    """How much of a figure hides what is behind it."""
    return np.where(made.part == MAIN, np.float32(GLASS), np.float32(1)) if thing.finish == "glass" else 1.0
