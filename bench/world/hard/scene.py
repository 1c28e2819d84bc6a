"""Scenes of the hard world, drawn from a seed: camera, light, surroundings and one to eight things."""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.scenes.world import TableTop, Thing

NEW_THINGS = ("cup", "bottle", "lamp", "chair", "car", "house", "flower", "dog", "mushroom")
CLASSES = (*world.CLASSES, *NEW_THINGS)
THINGS = CLASSES[2:]
MAX_DEPTH = 6.0  # metres; no wall stands farther
FARTHEST = 5.6
COLOURS = {
    **world.COLOURS,
    "black": (0.12, 0.12, 0.13),
    "grey": (0.50, 0.50, 0.52),
    "brown": (0.45, 0.28, 0.15),
    "pink": (0.95, 0.58, 0.70),
    "cyan": (0.20, 0.78, 0.82),
}
TABLES = {**world.TABLES, "white": (0.86, 0.85, 0.82), "green": (0.30, 0.48, 0.34), "blue": (0.30, 0.40, 0.62)}
WHERE = {**world.WHERE, "rain": " in the rain", "snow": " in the snow"}
DOMAINS = tuple(WHERE)
LOOKS = ("", "striped", "checked", "dotted", "marbled")
FINISHES = ("matte", "shiny", "metal", "glass")
CLOTHS = ("plain", "wooden", "checked", "striped", "dotted")
PAPERS = ("plain", "striped", "tiled", "brick", "dotted", "diamonds")
FREQUENCY = {
    "ball": 1.0, "cube": 1.0, "person": 0.9, "cup": 0.8, "bottle": 0.7, "tree": 0.6, "cone": 0.5, "car": 0.4,
    "chair": 0.35, "house": 0.3, "lamp": 0.25, "flower": 0.22, "ring": 0.2, "dog": 0.18, "star": 0.15, "mushroom": 0.15,
}  # fmt: skip
HEIGHTS = {
    "person": 1.3, "tree": 1.3, "lamp": 1.2, "house": 1.15, "chair": 1.1, "bottle": 1.1, "dog": 0.85, "cup": 0.75,
    "ring": 0.85, "car": 0.8, "mushroom": 0.75,
}  # of other things 1  # fmt: skip
WIDTHS = {
    "person": 0.5, "tree": 0.6, "bottle": 0.4, "lamp": 0.55, "flower": 0.5, "cone": 0.7, "cup": 0.85, "car": 1.6,
    "dog": 1.2,
}  # of other things 0.85  # fmt: skip
FALLING = ("cup", "bottle", "cone", "lamp", "chair", "mushroom", "tree", "flower")
COUNTS = (0.16, 0.20, 0.20, 0.15, 0.11, 0.08, 0.06, 0.04)  # of scenes with one to eight things
CROWD = (1.25, 1.12, 1.02, 0.94, 0.87, 0.82, 0.77, 0.73)  # size of things among so many
DOMAIN_SHARES = (0.34, 0.17, 0.13, 0.13, 0.12, 0.11)
STYLES = 5  # forms of a kind, each half as frequent as the one before
HIDDEN = 0.55  # share of a thing's box that nearer ones may cover
TRIES = 8  # of a place where that holds
NUMBERS = 12  # of a form
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class HardThing(Thing):
    """A thing with a form and a surface of its own; `pose` holds NUMBERS numbers in -1..1 that decide its form."""

    style: int = 0
    look: str = ""
    finish: str = "matte"
    paint: Colour = (0.5, 0.5, 0.5)
    second: Colour = (0.5, 0.5, 0.5)
    lean: float = 0.0  # radians
    is_fallen: bool = False
    is_mirrored: bool = False

    @property
    def name(self) -> str:
        first = f"{'an' if self.colour == 'orange' else 'a'} {self.colour}"
        return f"{first} {self.look} {self.kind}" if self.look else f"{first} {self.kind}"


@dataclass(frozen=True)
class Print:
    """A picture on the wall: in a frame or not, of a thing or of stripes."""

    x: float
    v: float
    width: float
    height: float
    frame: Colour | None
    paper: Colour
    thing: HardThing | None


@dataclass(frozen=True)
class Patch:
    """A flat thing on the table that belongs to it: paper, a coin, a patch of light or shadow."""

    x: float  # metres from the middle
    z: float
    across: float
    along: float
    turn: float
    is_round: bool
    colour: Colour | None  # None: lighter or darker by `light`
    light: float


@dataclass(frozen=True)
class HardScene(TableTop):
    focal: float  # image heights
    height: float  # metres of the camera above the table
    horizon: float  # image heights from the top
    roll: float  # radians
    far: float  # metres to the end of the table
    wall: float  # metres to the wall
    walls: tuple[Colour, Colour]
    paper: str
    paper_scale: float
    cloth: str
    cloth_scale: float
    cloth_colours: tuple[Colour, Colour]
    light: float  # -1 from the left .. 1 from the right
    contrast: float  # of lit and unlit sides
    exposure: float
    tint: Colour
    prints: tuple[Print, ...]
    patches: tuple[Patch, ...]
    grain: int  # seed of drops and flakes

    @property
    def where(self) -> str:
        return WHERE[self.domain]

    @property
    def reach(self) -> float:
        return self.focal * self.height

    @property
    def edge(self) -> float:
        """Where the table ends, in image heights from the top."""
        return self.horizon + self.reach / self.far

    def foot(self, thing: Thing) -> float:
        return self.horizon + self.reach / thing.z

    def scale(self, thing: Thing) -> float:
        """Image heights of a thing."""
        return self.focal * thing.size / thing.z


class Draws:
    """Random choices, their uniform numbers drawn together."""

    def __init__(self, rng: np.random.Generator, count: int):
        self.numbers = iter(rng.random(count).tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.numbers)

    def happens(self, share: float) -> bool:
        return next(self.numbers) < share

    def one(self, values: Sequence, shares: Sequence[float] | None = None):
        if shares is None:
            return values[int(next(self.numbers) * len(values))]
        sums = list(accumulate(shares))
        return values[min(bisect(sums, next(self.numbers) * sums[-1]), len(values) - 1)]

    def near(self, colour: Colour, by: float) -> Colour:
        """A colour with each part moved, and lighter or darker."""
        gain = 1 + self.between(-by, by)
        return tuple(min(max(part * gain + self.between(-by, by) * 0.5, 0.0), 1.0) for part in colour)

    def any_colour(self, low: float = 0.08, high: float = 0.95) -> Colour:
        return tuple(self.between(low, high) for _ in range(3))

    def pale(self) -> Colour:
        base = self.between(0.5, 0.92)
        return tuple(min(max(base + self.between(-0.16, 0.16), 0.0), 1.0) for _ in range(3))


def _thing(draws: Draws, kind: str, x: float, z: float, size: float) -> HardThing:
    colour = draws.one(tuple(COLOURS))
    return HardThing(
        kind, colour, x, z, size,
        pose=tuple(draws.between(-1, 1) for _ in range(NUMBERS)),
        style=draws.one(range(STYLES), [0.5**k for k in range(STYLES)]),
        look=draws.one(LOOKS, (0.62, 0.11, 0.10, 0.10, 0.07)),
        finish=draws.one(FINISHES, (0.5, 0.25, 0.13, 0.12)),
        paint=draws.near(COLOURS[colour], 0.18),
        second=draws.near(COLOURS[draws.one(tuple(COLOURS))], 0.2),
        lean=draws.between(-0.16, 0.16),
        is_fallen=draws.happens(0.1) and kind in FALLING,
        is_mirrored=draws.happens(0.5),
    )  # fmt: skip


def _box(thing: HardThing, foot: float, scale: float) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a thing in image heights."""
    tall, wide = scale, WIDTHS.get(thing.kind, 0.85) * scale
    if thing.is_fallen:
        tall, wide = wide, tall
    return thing.x - wide / 2, thing.x + wide / 2, foot - tall, foot


def _covered(box: tuple[float, ...], nearer: Sequence[tuple[float, ...]]) -> float:
    """At most, the share of a box that others cover."""
    area = (box[1] - box[0]) * (box[3] - box[2])
    shared = (
        max(min(box[1], other[1]) - max(box[0], other[0]), 0) * max(min(box[3], other[3]) - max(box[2], other[2]), 0)
        for other in nearer
    )
    return sum(shared) / area


def _placed(
    draws: Draws,
    count: int,
    kinds: Sequence[str],
    frequency: Mapping[str, float],
    focal: float,
    near: float,
    far: float,
    horizon: float,
    reach: float,
) -> list[HardThing]:
    """Things of which each can be seen."""
    things: list[HardThing] = []
    boxes: list[tuple[float, ...]] = []
    for _ in range(count):
        weights = [0.0 if k == "person" and any(t.kind == k for t in things) else frequency[k] for k in kinds]
        if not any(weights):
            break
        kind = draws.one(kinds, weights)
        tall = draws.between(0.30, 0.50) * CROWD[count - 1] * HEIGHTS.get(kind, 1.0)
        thing = _thing(draws, kind, 0.0, 1.0, tall * near * 1.45 / focal)
        for _ in range(TRIES):
            z = draws.between(near * 1.06, near * 1.06 + (far - near) * 0.85)
            x, scale, foot = draws.between(0.06, 0.94), min(max(focal * thing.size / z, 0.17), 0.8), horizon + reach / z
            moved = replace(thing, x=x, z=z, size=scale * z / focal)
            box = _box(moved, foot, scale)
            inside = min(box[1], 1.0) - max(box[0], 0.0), box[3] - max(box[2], 0.0)
            if inside[0] < 0.7 * (box[1] - box[0]) or inside[1] < 0.7 * (box[3] - box[2]):
                continue
            order = sorted([*zip(things, boxes), (moved, box)], key=lambda pair: pair[0].z)
            if all(_covered(one, [b for _, b in order[:k]]) <= HIDDEN for k, (_, one) in enumerate(order)):
                things.append(moved)
                boxes.append(box)
                break
    if not things:
        z = near * 1.3
        things = [replace(thing, x=0.5, z=z, size=0.8 * (horizon + reach / z) * z / focal)]
    return sorted(things, key=lambda thing: thing.x)


def sample_scene(
    seed: int,
    count: int | None = None,
    kinds: Sequence[str] = THINGS,
    domain: str | None = None,
    frequency: Mapping[str, float] = FREQUENCY,
) -> HardScene:
    """A scene that is a pure function of its arguments; at most one person, things left to right."""
    draws = Draws(np.random.default_rng([seed, 0x4A2D]), 1024)
    count = count or draws.one(range(1, 9), COUNTS)
    focal, height = draws.between(0.95, 1.5), draws.between(0.5, 1.1)
    horizon = draws.between(-0.25, 0.30)
    reach = focal * height
    near = reach / (1 - horizon)
    far = min(near * draws.between(1.8, 3.2), 4.6)
    things = _placed(draws, count, kinds, frequency, focal, near, far, horizon, reach)
    table, edge = draws.one(tuple(TABLES)), horizon + reach / far
    return HardScene(
        things=tuple(things),
        table=table,
        domain=domain or draws.one(DOMAINS, DOMAIN_SHARES),
        focal=focal,
        height=height,
        horizon=horizon,
        roll=draws.between(-0.14, 0.14) if draws.happens(0.5) else 0.0,
        far=far,
        wall=min(far + draws.between(0.1, 1.2), FARTHEST),
        walls=(draws.pale(), draws.near(draws.any_colour(), 0.1)),
        paper=draws.one(PAPERS, (0.3, 0.15, 0.15, 0.12, 0.15, 0.13)),
        paper_scale=draws.between(3, 14),
        cloth=draws.one(CLOTHS, (0.3, 0.25, 0.17, 0.14, 0.14)),
        cloth_scale=draws.between(4, 14),
        cloth_colours=(draws.near(TABLES[table], 0.15), draws.any_colour()),
        light=draws.between(0.3, 1.0) * draws.one((-1, 1)),
        contrast=draws.between(0.6, 1.15),
        exposure=draws.between(0.85, 1.2),
        tint=tuple(draws.between(0.86, 1.06) for _ in range(3)),
        prints=tuple(_print(draws, edge) for _ in range(draws.one(range(4), (0.3, 0.3, 0.25, 0.15)))),
        patches=tuple(_patch(draws, near, far) for _ in range(draws.one(range(6), (0.2, 0.25, 0.2, 0.15, 0.1, 0.1)))),
        grain=seed,
    )


def _print(draws: Draws, edge: float) -> Print:
    height = draws.between(0.14, 0.34)
    shows = draws.happens(0.75)
    return Print(
        x=draws.between(0.0, 1.0),
        v=draws.between(0.0, max(edge - 0.1, 0.05)),
        width=height * draws.between(0.7, 1.4),
        height=height,
        frame=draws.any_colour() if draws.happens(0.6) else None,
        paper=draws.pale() if draws.happens(0.6) else draws.any_colour(),
        thing=_thing(draws, draws.one(THINGS), 0.0, 1.0, 1.0) if shows else None,
    )


def _patch(draws: Draws, near: float, far: float) -> Patch:
    z = draws.between(near, far)
    width = draws.between(0.03, 0.16) * near
    tone = draws.happens(0.3)
    return Patch(
        x=draws.between(-0.5, 0.5) * z,
        z=z,
        across=width * (2.5 if tone else 1.0),
        along=width * draws.between(0.6, 1.6),
        turn=draws.between(0, math.pi),
        is_round=draws.happens(0.5),
        colour=None if tone else draws.any_colour(),
        light=draws.one((0.7, 1.25)),
    )
