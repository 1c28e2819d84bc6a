"""The sixteen kinds of the hard world: each form as parts that lie over one another, in a frame of its own."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from bench.world.hard.scene import HardThing
from datasetdm_fast.engine.scenes import world

MAIN, SECOND, DARK, LIGHT, WOOD, SKIN, LEAF, GLOW, DEEP = range(9)  # colours of parts
FAR_OUTSIDE = 9.0
Array = np.ndarray


class Figure:
    """A thing at the points x (to the right), y (up; feet near 0, top near 1) while parts are laid over one another."""

    def __init__(self, thing: HardThing, x: Array, y: Array, light: float, rise: float, border: float):
        self.x, self.y, self.light, self.rise, self.border = x, y, light, rise, border
        self.style, self.pose = thing.style, thing.pose
        self.distance = np.full(x.shape, FAR_OUTSIDE, np.float32)
        self.part = np.zeros(x.shape, np.uint8)
        self.shade = np.ones(x.shape, np.float32)
        self.relief = 0.1  # of heights, how far it comes towards the camera

    def number(self, place: int, low: float, high: float) -> float:
        """One of the numbers that decide the form."""
        return low + (high - low) * (self.pose[place] + 1) / 2

    def chosen(self, place: int, share: float) -> bool:
        return self.pose[place] < 2 * share - 1

    def add(self, distance: Array, part: int, shade: Array | float = 1.0) -> None:
        """Lays a part over those before."""
        inside = distance < self.border
        self.part[inside] = part
        np.copyto(self.shade, shade, where=inside)
        np.minimum(self.distance, distance, out=self.distance)

    def mark(self, inside: Array, part: int, shade: float | None = None) -> None:
        """Gives pixels another colour without changing the outline."""
        self.part[inside] = part
        if shade is not None:
            self.shade[inside] = shade

    def round(self, across: Array) -> Array:
        """Shade of something round, over -1..1 from its left to its right."""
        across = np.clip(across, -1, 1)
        return 0.5 + 0.5 * np.clip(0.5 * self.light * across + 0.7 * np.sqrt(1 - across * across) + 0.1, 0, 1)

    def ellipse(self, x: float, y: float, across: float, along: float) -> Array:
        ratio = np.sqrt(((self.x - x) / across) ** 2 + ((self.y - y) / along) ** 2)
        return (ratio - 1) * min(across, along)

    def rectangle(self, x: float, y: float, across: float, along: float) -> Array:
        return np.maximum(np.abs(self.x - x) - across, np.abs(self.y - y) - along)

    def trapezoid(self, low: float, high: float, wide: float, narrow: float) -> Array:
        """Symmetric about 0, from its half width at the bottom to that at the top."""
        slope = (narrow - wide) / (high - low)
        side = (np.abs(self.x) - wide - slope * (self.y - low)) / math.hypot(1, slope)
        return np.maximum(np.maximum(side, low - self.y), self.y - high)

    def convex(self, corners: Sequence[tuple[float, float]]) -> Array:
        """A polygon without dents, its corners against the clock."""
        found = None
        for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0])):
            length = math.hypot(bx - ax, by - ay) or 1.0
            nx, ny = (by - ay) / length, (ax - bx) / length
            side = self.x * nx + (self.y * ny - (ax * nx + ay * ny))
            found = side if found is None else np.maximum(found, side)
        return found

    def capsule(self, ax: float, ay: float, bx: float, by: float, radius: float) -> Array:
        return world.capsule(self.x, self.y, np.float32([ax, ay]), np.float32([bx, by]), np.float32(radius))

    def turned(self, heights: Sequence[float], radii: Sequence[float], part: int) -> None:
        """A body turned about the vertical, its profile given from the bottom to the top."""
        radius = np.interp(self.y, heights, radii).astype(np.float32)
        side = np.maximum(np.maximum(np.abs(self.x) - radius, heights[0] - self.y), self.y - heights[-1])
        body = np.minimum(side, self.ellipse(0, heights[0], radii[0] + 1e-3, max(radii[0] * self.rise, 0.01)))
        self.add(body, part, self.round(self.x / np.maximum(radius, 0.03)))

    def opening(self, y: float, radius: float, part: int, shade: float = 1.0) -> None:
        self.add(self.ellipse(0, y, radius, max(radius * self.rise, 0.012)), part, shade)


def ball(f: Figure) -> None:
    wide = f.number(0, 0.62, 1.25) if f.style == 1 else 1.0
    distance, shade, _, _ = world.ball((), f.x / np.float32(wide), f.y, f.light)
    f.add((distance * min(wide, 1.0)).astype(np.float32), MAIN, shade.astype(np.float32))
    across, up = f.x / 0.5, (f.y - 0.5) / 0.5
    if f.style == 2:
        turn = np.arctan2(across + f.number(1, -0.6, 0.6), up + f.number(2, -0.6, 0.6)) / math.pi
        f.mark(np.floor(turn * round(f.number(3, 2, 5))) % 2 == 0, SECOND)
    elif f.style == 3:
        along = across * f.number(1, -1, 1) + up
        f.mark(np.abs(along - f.number(2, -0.3, 0.3)) < f.number(3, 0.1, 0.35), SECOND)
    elif f.style == 4:
        away = (across - f.number(1, -0.4, 0.4)) ** 2 + (up - f.number(2, -0.4, 0.4)) ** 2
        f.mark(away < f.number(3, 0.03, 0.2), LIGHT)
    f.relief = 0.3


def cube(f: Figure) -> None:
    """A box seen over a corner."""
    turn, rise = f.number(0, 0.1, 1.4), f.rise
    a, b, tall = 0.36 * f.number(1, 0.75, 1.2), 0.36 * f.number(2, 0.75, 1.2), f.number(3, 0.5, 0.78)
    if f.style == 3:
        tall *= 0.45  # a slab
    if f.style == 4:
        a, b, tall = a * 0.65, b * 0.65, 0.9  # a tower
    c, s = math.cos(turn), math.sin(turn)
    deep = a * s + b * c
    sides = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    corners = [(u * a * c - w * b * s, rise * (u * a * s + w * b * c + deep)) for u, w in sides]
    front, right, back, left = corners
    lift = [(x, y + tall) for x, y in corners]
    lit = 0.82 + 0.14 * f.light
    f.add(f.convex([front, right, lift[1], lift[0]]), MAIN, lit)
    f.add(f.convex([left, front, lift[0], lift[3]]), MAIN, 1.5 - lit)
    f.add(f.convex([lift[0], lift[1], lift[2], lift[3]]), MAIN, 1.06)
    edge = front[0]
    if f.style == 1:  # a ribbon
        width = f.number(4, 0.05, 0.1)
        f.mark(np.abs(f.x - (edge + right[0]) / 2) < width, SECOND)
        f.mark(np.abs(f.x - (edge + left[0]) / 2) < width * 0.7, SECOND)
    elif f.style == 2:  # planks
        boards = np.floor((f.y - rise * np.abs(f.x - edge)) * f.number(4, 5, 9))
        f.mark(boards % 2 == 0, DEEP)
    f.relief = 0.25


def cone(f: Figure) -> None:
    wide = f.number(0, 0.24, 0.48)
    tip = f.number(1, 0.25, 0.6) * wide if f.style == 2 else 0.015
    base = 0.0
    if f.style == 1:  # of the road
        f.add(f.rectangle(0, 0.03, min(wide + 0.14, 0.56), 0.05), DARK)
        base, wide = 0.06, wide * 0.85
    f.turned((base, 1.0), (wide, tip), MAIN)
    if f.style in (1, 3):
        low, thick = f.number(2, 0.25, 0.55), f.number(3, 0.1, 0.22)
        f.mark((f.part == MAIN) & (f.y > low) & (f.y < low + thick), LIGHT if f.style == 1 else SECOND)
    if f.style == 2:
        f.opening(1.0, tip, MAIN, 1.1)
    if f.style == 4:  # a hat with a ball
        f.add(f.ellipse(0, 0.96, 0.1, 0.1), SECOND)
        f.add(f.ellipse(0, 0.0, min(wide + 0.12, 0.56), (wide + 0.12) * f.rise), SECOND)
        f.turned((0.02, 0.9), (wide, 0.02), MAIN)
    f.relief = 0.2


def ring(f: Figure) -> None:
    tube = f.number(0, 0.07, 0.18)
    narrow = f.number(1, 0.55, 1.0)
    flat = f.number(2, 0.35, 0.55) if f.style == 1 else 1.0  # lying down
    centre = 0.5 * flat
    dx, dy = f.x / narrow, (f.y - centre) / flat
    radius = np.sqrt(dx * dx + dy * dy)
    across = np.clip((radius - (0.5 - tube)) / tube, -1, 1)
    outward = (f.light * dx + 0.8 * dy) / np.maximum(radius, 1e-3)
    shade = 0.5 + 0.5 * np.clip(0.45 * across * outward + 0.75 * np.sqrt(1 - across * across), 0, 1)
    f.add((np.abs(radius - (0.5 - tube)) - tube) * min(narrow, flat), MAIN, shade)
    if f.style == 2:
        turn = np.arctan2(dy, dx) * (round(f.number(3, 2, 4)) / math.pi) + f.number(4, 0, 1)
        f.mark(np.floor(turn * 2) % 2 == 0, SECOND)
    elif f.style == 3:  # with a stone
        f.add(f.ellipse(0, 0.98, 0.15, 0.13), SECOND, 1.2)


def star(f: Figure) -> None:
    arms, inner = (5, 4, 6, 8, 5)[f.style], f.number(0, 0.3, 0.55)
    narrow, centre = f.number(1, 0.65, 1.0), 0.5
    if f.style == 4:  # on a stick
        f.add(f.rectangle(0, 0.2, 0.035, 0.2), WOOD)
        centre = 0.66
    size = min(0.54, 1.06 - centre)
    dx, dy = f.x / narrow, f.y - centre
    half = math.pi / arms
    around = np.arctan2(dx, dy) + np.float32(f.number(2, -0.25, 0.25) + 4 * math.pi)
    radius = np.sqrt(dx * dx + dy * dy)
    away = np.abs(np.mod(around + np.float32(half), np.float32(2 * half)) - np.float32(half))
    along, aside = radius * np.cos(away), radius * np.sin(away)
    # to the edge from the tip (size, 0) to the dent, beside the middle of an arm
    ex, ey = size * inner * math.cos(half) - size, size * inner * math.sin(half)
    length = math.hypot(ex, ey)
    distance = ((along - size) * ey - aside * ex) / length
    facet = np.mod(around, np.float32(2 * half)) < half
    f.add(distance * narrow, MAIN, np.where(facet == (f.light > 0), 1.0, 0.72).astype(np.float32))
    if f.chosen(3, 0.3):
        f.mark((distance > -0.06) & (distance < f.border), SECOND)


def tree(f: Figure) -> None:
    trunk, low = f.number(0, 0.04, 0.09), f.number(1, 0.12, 0.34)
    f.add(f.rectangle(0, low / 2, trunk, low / 2), WOOD, 0.9)
    shade = 0.74 + 0.28 * np.clip(f.light * f.x / 0.35, -1, 1)
    wide = f.number(2, 0.2, 0.34)
    if f.style == 0:  # a fir
        tiers = round(f.number(3, 2, 4))
        step = (1 - low) / tiers
        for k in range(tiers):
            w, base = wide * (1.2 - 0.55 * k / tiers), low + step * k * 0.85
            f.add(f.trapezoid(base, min(base + 1.45 * step, 1.0), w, 0.015), MAIN, shade * (0.9 + 0.1 * k / tiers))
    elif f.style == 1:  # a crown
        f.add(f.ellipse(0, (low + 1) / 2, wide, (1 - low) / 2 + 0.03), MAIN, shade)
        if f.chosen(3, 0.5):
            f.mark((f.part == MAIN) & (np.sin(23 * f.x) * np.sin(21 * f.y) > 0.6), SECOND)  # fruit
    elif f.style == 2:  # balls on branches
        for k in range(3):
            side = (-1, 1, 0)[k] * wide * 0.6
            f.add(f.capsule(0, low * 0.8, side, 0.6, trunk * 0.5), WOOD)
        for k in range(3):
            x, y = (-1, 1, 0)[k] * wide * 0.75, (0.6, 0.68, 0.84)[k]
            f.add(f.ellipse(x, y, wide * 0.62, 0.19), MAIN, shade * (0.9, 1.0, 1.1)[k])
    elif f.style == 3:  # narrow, in a pot
        f.add(f.ellipse(0, 0.58, wide * 0.62, 0.44), MAIN, shade)
        f.add(f.trapezoid(0, 0.2, 0.12, 0.17), SECOND, f.round(f.x / 0.17))
    else:  # a palm
        f.add(f.capsule(0, 0, f.number(3, -0.15, 0.15), 0.72, trunk * 0.8), WOOD)
        for k in range(5):
            turn = math.pi * (0.05 + 0.225 * k)
            x = f.number(3, -0.15, 0.15)
            f.add(f.capsule(x, 0.74, x + 0.34 * math.cos(turn), 0.68 + 0.26 * math.sin(turn), 0.055), MAIN, shade)


def person(f: Figure) -> None:
    head, neck, pelvis, left_hand, right_hand, left_foot, right_foot = world.joints(f.pose[:5]).tolist()
    stout, cloth = f.number(6, 0.75, 1.25), SECOND if f.style != 3 else MAIN
    shade = 0.82 + 0.2 * np.clip(f.light * f.x / 0.2, -1, 1)
    for side, foot in ((0.05, left_foot), (-0.05, right_foot)):
        f.add(f.capsule(pelvis[0] + side, pelvis[1], *foot, 0.068 * stout), SKIN if f.style in (1, 3) else cloth, shade)
    if f.style in (1, 3):  # a skirt, a dress
        f.add(f.trapezoid(0.18, 0.5, f.number(7, 0.2, 0.28), 0.1), cloth, shade)
    f.add(f.capsule(neck[0], neck[1] - 0.08, *pelvis, 0.125 * stout), MAIN, shade)
    for hand in (left_hand, right_hand):
        f.add(f.capsule(neck[0], neck[1] - 0.05, *hand, 0.055 * stout), MAIN, shade)
        f.add(f.ellipse(*hand, 0.06, 0.06), SKIN, shade)
    size = f.number(8, 0.105, 0.14)
    f.add(f.ellipse(*head, size, size * 1.08), SKIN, shade)
    hair = f.ellipse(head[0], head[1] + 0.03, size * 1.08, size * 1.08)
    if f.chosen(9, 0.7):
        f.add(np.maximum(hair, head[1] + f.number(10, -0.03, 0.05) - f.y), DARK if f.chosen(11, 0.5) else WOOD)
    if f.style in (2, 4):  # a hat
        f.add(f.rectangle(head[0], head[1] + 0.07, size * 1.5, 0.02), cloth)
        f.add(f.rectangle(head[0], head[1] + 0.12, size * 0.85, 0.06), cloth)


def cup(f: Figure) -> None:
    wide, narrow, top = f.number(0, 0.28, 0.42), f.number(1, 0.5, 1.0), 0.88
    low = 0.0
    if f.style == 2:  # a goblet
        low = f.number(2, 0.3, 0.5)
        f.opening(0.0, wide * 0.75, MAIN, 0.9)
        f.add(f.rectangle(0, low / 2, 0.035, low / 2), MAIN, 0.9)
        narrow *= 0.6
    elif f.style == 3:  # on a saucer
        f.opening(0.0, min(wide + 0.22, 0.6), SECOND, 0.95)
    if f.style in (0, 3) or (f.style == 1 and f.chosen(3, 0.5)):
        size, y = f.number(4, 0.14, 0.24), f.number(5, 0.4, 0.55)
        radius = np.sqrt((f.x - wide * 0.95) ** 2 + (f.y - y) ** 2)
        f.add(np.abs(radius - size) - f.number(6, 0.03, 0.055), MAIN, 0.8)
    if f.style == 4:
        f.turned((0.0, 0.1, 0.5, top), (wide * 0.5, wide * 0.9, wide * 1.1, wide), MAIN)
    else:
        f.turned((low, low + 0.08, top), (wide * narrow * 0.9, wide * narrow, wide), MAIN)
    f.opening(top, wide, MAIN, 1.1)
    f.opening(top - 0.01, wide * 0.85, (DARK, WOOD, DEEP, LIGHT)[int(f.number(7, 0, 3.99))], 0.9)
    f.relief = 0.2


def bottle(f: Figure) -> None:
    wide, neck, shoulder = f.number(0, 0.13, 0.2), f.number(1, 0.04, 0.08), f.number(2, 0.45, 0.68)
    if f.style == 0:
        f.turned((0, shoulder, shoulder + 0.16, 1.0), (wide, wide, neck, neck), MAIN)
    elif f.style == 1:  # a flask
        f.turned((0, 0.12, 0.4, 0.62, 0.94), (wide * 1.1, wide * 1.6, wide * 1.2, neck, neck), MAIN)
    elif f.style == 2:  # a jar
        wide *= 1.5
        f.turned((0, 0.1, 0.62, 0.72, 0.8), (wide * 0.9, wide, wide, wide * 0.75, wide * 0.75), MAIN)
        f.turned((0.8, 0.9), (wide * 0.8, wide * 0.8), SECOND)
    elif f.style == 3:  # a jug
        radius = np.sqrt((f.x - wide) ** 2 + (f.y - 0.6) ** 2)
        f.add(np.abs(radius - 0.15) - 0.035, MAIN, 0.8)
        f.turned((0, 0.3, 0.7, 0.95), (wide * 1.1, wide * 1.5, neck * 1.4, neck * 2), MAIN)
    else:  # for squeezing
        f.turned((0, 0.6, 0.75), (wide, wide * 1.1, neck), MAIN)
        f.turned((0.75, 1.0), (neck * 1.3, 0.01), SECOND)
    if f.chosen(3, 0.55):
        low, tall = f.number(4, 0.1, 0.3), f.number(5, 0.1, 0.28)
        f.mark((f.part == MAIN) & (f.y > low) & (f.y < low + tall), LIGHT if f.chosen(6, 0.5) else SECOND)
    if f.style in (0, 1):
        f.add(f.rectangle(0, 0.97, neck * 1.25, 0.045), DARK if f.chosen(7, 0.5) else SECOND)


def lamp(f: Figure) -> None:
    low, wide, narrow = f.number(0, 0.5, 0.66), f.number(1, 0.24, 0.4), f.number(2, 0.35, 0.9)
    f.opening(0.03, f.number(3, 0.13, 0.24), SECOND, 0.9)
    if f.style == 1:  # with an arm
        x = f.number(4, 0.1, 0.25)
        f.add(f.capsule(0, 0.03, -x, 0.5, 0.025), SECOND)
        f.add(f.capsule(-x, 0.5, 0.05, 0.86, 0.025), SECOND)
        f.add(f.convex([(-0.02, 0.9), (0.12, 0.55), (0.42, 0.7), (0.1, 0.98)]), MAIN, 1.0)
        f.add(f.ellipse(0.27, 0.63, 0.13, 0.06), GLOW, 1.1)
        return
    if f.style == 2:  # a lantern
        f.add(f.rectangle(0, 0.4, wide * 0.8, 0.36), MAIN, f.round(f.x / wide))
        f.add(f.rectangle(0, 0.4, wide * 0.55, 0.26), GLOW, 1.1)
        f.add(f.rectangle(0, 0.4, 0.02, 0.3), MAIN)
        f.add(f.trapezoid(0.74, 0.95, wide, 0.06), SECOND)
        return
    if f.style == 3:
        f.turned((0.03, 0.15, 0.35, low), (0.08, f.number(4, 0.12, 0.2), 0.05, 0.03), SECOND)
    else:
        f.add(f.rectangle(0, low / 2, f.number(4, 0.02, 0.045), low / 2), SECOND, 0.9)
    if f.style == 4:  # a globe
        f.add(f.ellipse(0, 0.78, 0.24, 0.22), MAIN, f.round(f.x / 0.24) + 0.1)
        return
    f.turned((low, 1.0), (wide, wide * narrow), MAIN)
    if f.chosen(5, 0.5):
        f.opening(1.0, wide * narrow, GLOW, 1.1)


def chair(f: Figure) -> None:
    seat, wide, thick = f.number(0, 0.36, 0.5), f.number(1, 0.2, 0.3), f.number(2, 0.025, 0.05)
    shift, legs = f.number(3, 0.06, 0.16), MAIN if f.style in (0, 2) else WOOD
    if f.style == 4:  # an armchair
        f.add(f.rectangle(0.05, 0.55, wide * 1.1, 0.4), MAIN, 0.85)
        f.add(f.rectangle(0, 0.3, wide * 1.25, 0.17), SECOND, 1.0)
        for side in (-1, 1):
            f.add(f.rectangle(side * wide * 1.25, 0.28, 0.08, 0.26), MAIN, 1.0 + 0.1 * side * f.light)
        return
    for x in (-wide + shift, wide + shift):
        f.add(f.rectangle(x, seat / 2 + 0.05, thick, seat / 2 - 0.02), legs, 0.7)
    if f.style != 2:  # 2 is a stool
        for x in (-wide + shift, wide + shift):
            f.add(f.rectangle(x, (seat + 1) / 2, thick, (1 - seat) / 2), legs, 0.85)
        if f.style == 3:  # with rungs
            for y in (0.62, 0.78, 0.93):
                f.add(f.rectangle(shift, y, wide, 0.035), MAIN, 0.95)
        else:
            low = f.number(4, 0.58, 0.75)
            f.add(f.rectangle(shift, (low + 1) / 2, wide, (1 - low) / 2), MAIN, 0.95)
    y = seat - 0.04
    top = [(-wide - 0.05, y), (wide - 0.05, y), (wide + shift, y + 0.1), (-wide + shift, y + 0.1)]
    f.add(f.convex(top), SECOND if f.chosen(5, 0.4) else MAIN, 1.1)
    f.add(f.rectangle(-0.05, y - thick, wide, thick), MAIN, 0.8)
    for x in (-wide - 0.05 + thick, wide - 0.05 - thick):
        f.add(f.rectangle(x, seat / 2 - 0.04, thick, seat / 2), legs, 0.9)


def car(f: Figure) -> None:
    """From the side, 1.6 wide and 0.8 high."""
    long, sill, bonnet = 0.72, f.number(0, 0.12, 0.2), f.number(1, 0.38, 0.5)
    f.add(f.rectangle(0, (sill + bonnet) / 2, long, (bonnet - sill) / 2), MAIN, 0.95)
    roof = f.number(2, 0.68, 0.85)
    if f.style == 1:  # a van
        cabin = [(-0.68, bonnet - 0.02), (0.6, bonnet - 0.02), (0.5, roof), (-0.68, roof)]
        panes = [(0.2, bonnet), (0.55, bonnet), (0.46, roof - 0.07), (0.2, roof - 0.07)]
    elif f.style == 2:  # a truck
        f.add(f.rectangle(-0.25, (bonnet + roof + 0.1) / 2, 0.47, (roof + 0.1 - bonnet) / 2 + 0.03), SECOND, 0.95)
        cabin = [(0.28, bonnet - 0.02), (0.7, bonnet - 0.02), (0.62, roof), (0.28, roof)]
        panes = [(0.38, bonnet), (0.64, bonnet), (0.58, roof - 0.07), (0.38, roof - 0.07)]
    else:
        front, back = f.number(3, 0.2, 0.45), f.number(4, -0.65, -0.4)
        cabin = [(back, bonnet - 0.02), (front, bonnet - 0.02), (front - 0.2, roof), (back + 0.15, roof)]
        panes = [(back + 0.1, bonnet), (front - 0.08, bonnet), (front - 0.23, roof - 0.07), (back + 0.19, roof - 0.07)]
    if f.style == 3:  # a beetle
        f.add(f.ellipse(-0.05, bonnet - 0.05, 0.5, roof - bonnet + 0.06), MAIN, 1.0)
        f.add(f.ellipse(-0.05, bonnet, 0.36, roof - bonnet - 0.08), DARK if f.chosen(5, 0.4) else GLOW, 0.8)
    elif f.style != 4:  # 4 is open
        f.add(f.convex(cabin), MAIN, 1.0)
        f.add(f.convex(panes), DARK if f.chosen(5, 0.4) else GLOW, 0.8)
        middle = (panes[0][0] + panes[1][0]) / 2
        f.mark((f.part != MAIN) & (np.abs(f.x - middle) < 0.03) & (f.y > bonnet) & (f.y < roof), MAIN)
    radius = f.number(6, 0.12, 0.18)
    for x in (-0.42, 0.42):
        f.add(f.ellipse(x, radius - 0.02, radius, radius), DARK)
        f.mark((f.x - x) ** 2 + (f.y - radius + 0.02) ** 2 < (0.5 * radius) ** 2, LIGHT, 0.8)
    f.mark((f.part == MAIN) & (f.x > 0.64) & (f.y > sill + 0.1) & (f.y < bonnet - 0.04), LIGHT)


def house(f: Figure) -> None:
    wide, side = f.number(0, 0.2, 0.34), f.number(1, 0.06, 0.2)
    eaves = f.number(2, 0.42, 0.62)
    if f.style == 2:  # a tower
        wide, eaves = wide * 0.7, 0.72
    left, right = -wide - side / 2, wide - side / 2
    skew = side * f.rise
    f.add(f.convex([(right, 0), (right + side, skew), (right + side, eaves + skew), (right, eaves)]), MAIN, 0.7)
    f.add(f.rectangle((left + right) / 2, eaves / 2, wide, eaves / 2), MAIN, 0.95)
    x = (left + right) / 2
    door, windows = f.number(3, -0.5, 0.5) * wide, DARK if f.chosen(4, 0.4) else GLOW
    f.mark((np.abs(f.x - x - door) < 0.07) & (f.y < 0.24), DEEP if f.chosen(5, 0.5) else WOOD, 0.8)
    for place in (-0.55, 0.55):
        f.mark((np.abs(f.x - x - place * wide) < 0.065) & (np.abs(f.y - eaves * 0.68) < 0.07), windows)
    over = 0.05
    if f.style == 1:  # flat
        f.add(f.rectangle(x + side / 2, eaves + skew / 2 + 0.03, wide + side / 2 + over, 0.04 + skew / 2), SECOND, 0.9)
    elif f.style == 3:  # seen along the ridge
        top = [(left - over, eaves), (right + over, eaves), (right + side, 0.95), (left + side + over, 0.95)]
        f.add(f.convex(top), SECOND, 0.95)
    else:
        back = [(right + over, eaves - 0.03), (right + side + over, eaves + skew - 0.03), (x + side, 1.0), (x, 0.97)]
        f.add(f.convex(back), SECOND, 0.75)
        f.add(f.convex([(left - over, eaves - 0.02), (right + over, eaves - 0.02), (x, 0.98)]), SECOND, 1.0)
    if f.style == 4:  # a chimney
        f.add(f.rectangle(x + wide * 0.5, 0.86, 0.05, 0.12), WOOD)
    f.relief = 0.2


def flower(f: Figure) -> None:
    bend, size = f.number(0, -0.12, 0.12), f.number(1, 0.17, 0.26)
    y = 1.0 - size
    f.add(f.capsule(0, 0.05, bend, y, 0.022), LEAF, 0.9)
    for side in (-1, 1):
        if f.chosen(2 if side > 0 else 3, 0.6):
            f.add(f.capsule(0.02 * side, 0.3, 0.17 * side, 0.46, 0.04), LEAF, 1.0)
    if f.style == 1:  # a tulip
        low, high = y - 0.1, y + 0.12
        f.add(f.convex([(bend - 0.07, low), (bend + 0.07, low), (bend + 0.16, high), (bend - 0.16, high)]), MAIN)
        for x in (-0.11, 0.0, 0.11):
            f.add(f.ellipse(bend + x, y + 0.1, 0.06, 0.12), MAIN, 0.95 + x)
    elif f.style == 4:  # bells
        for k in range(3):
            f.add(f.ellipse(bend * k / 2 + (-0.1, 0.1, 0.0)[k], y - 0.2 + 0.14 * k, 0.09, 0.1), MAIN, 0.85 + 0.1 * k)
    else:
        petals = round(f.number(4, 5, 9))
        dx, dy = f.x - bend, f.y - y
        radius = np.sqrt(dx * dx + dy * dy)
        wave = np.cos(np.arctan2(dy, dx) * petals + f.number(5, 0, 3))
        f.add((radius - size * (0.78 + 0.24 * wave)) * 0.7, MAIN, 0.9 + 0.12 * wave)
        middle = size * (0.62 if f.style == 2 else f.number(6, 0.25, 0.45))
        f.add(radius - middle, (SECOND, GLOW, WOOD, DARK)[int(f.number(7, 0, 3.99))], 1.0)
    if f.style != 3:  # a pot
        wide = f.number(8, 0.13, 0.22)
        f.add(f.trapezoid(0, f.number(9, 0.18, 0.3), wide * 0.75, wide), SECOND, f.round(f.x / wide))


def dog(f: Figure) -> None:
    """From the side, its head to the right."""
    body, leg, stout = f.number(0, 0.26, 0.42), f.number(1, 0.2, 0.42), f.number(2, 0.12, 0.19)
    if f.style == 1:  # sitting
        f.add(f.capsule(-0.2, 0.16, 0.1, 0.56, stout * 1.2), MAIN, 0.95)
        f.add(f.ellipse(-0.18, 0.16, 0.2, 0.17), MAIN, 0.85)
        f.add(f.capsule(0.16, 0.05, 0.12, 0.45, 0.055), MAIN, 1.0)
        f.add(f.capsule(-0.34, 0.06, -0.5, 0.2, 0.04), MAIN, 0.9)
        x, y = 0.2, 0.76
    else:
        y = leg + stout
        for k, at in enumerate((-body + 0.03, body - 0.1, -body + 0.12, body)):
            f.add(f.capsule(at, 0.05, at * 0.92, y, 0.05), MAIN, 0.75 if k < 2 else 1.0)
        f.add(f.capsule(-body, y, body, y + 0.02, stout), MAIN, 0.85 + 0.3 * np.clip((f.y - y) / stout, -0.5, 0.5))
        f.add(f.capsule(-body - 0.05, y + 0.05, -body - 0.17, y + f.number(3, -0.1, 0.25), 0.035), MAIN, 0.9)
        x, y = body + 0.1, min(y + f.number(4, 0.14, 0.26), 0.82)
        f.add(f.capsule(body * 0.8, y - 0.15, x, y, 0.09), MAIN, 0.95)
    size = f.number(5, 0.12, 0.16)
    f.add(f.ellipse(x, y, size, size), MAIN, 1.0)
    f.add(f.capsule(x, y - 0.03, x + f.number(6, 0.12, 0.24), y - 0.05, 0.06), MAIN, 0.95)
    if f.style in (0, 2, 4):  # ears hang or stand
        f.add(f.ellipse(x - size * 0.5, y - 0.03, 0.06, 0.12), SECOND if f.chosen(7, 0.5) else DEEP)
    else:
        f.add(f.convex([(x - 0.12, y + 0.06), (x + 0.02, y + 0.08), (x - 0.06, y + 0.22)]), MAIN, 0.85)
    if f.style == 2:  # with spots
        spots = np.sin(13 * f.x + f.number(8, 0, 6)) * np.sin(14 * f.y + f.number(9, 0, 6)) > 0.45
        f.mark((f.part == MAIN) & spots, SECOND)
    f.mark((f.x - x - 0.03) ** 2 + (f.y - y - 0.04) ** 2 < 0.0009, DARK)
    if f.chosen(10, 0.4):
        f.mark((np.abs(f.x - x + 0.1) < 0.03) & (np.abs(f.y - y + 0.12) < 0.09) & (f.part == MAIN), SECOND)


def mushroom(f: Figure) -> None:
    stem, wide, low = f.number(0, 0.07, 0.15), f.number(1, 0.3, 0.46), f.number(2, 0.42, 0.6)
    f.turned((0, 0.2, low + 0.05), (stem * 1.3, stem, stem * 0.9), LIGHT if f.chosen(3, 0.7) else SECOND)
    tall = f.number(4, 0.22, 0.4) * (0.6 if f.style == 1 else 1.0)
    if f.style == 2:  # pointed
        cap = f.trapezoid(low, min(low + tall + 0.1, 1.0), wide * 0.8, 0.03)
    else:
        cap = np.maximum(f.ellipse(0, low, wide, tall), low - f.y)
    rim = f.ellipse(0, low, wide * (0.8 if f.style == 2 else 1.0), max(wide * f.rise * 0.4, 0.03))
    f.add(np.minimum(cap, rim), MAIN, f.round(f.x / wide))
    if f.style in (0, 3):
        turn, fine = f.number(5, 0, 6), f.number(6, 14, 22)
        spots = (np.sin(fine * f.x + turn) * np.sin(fine * f.y + turn) > 0.5) & (f.part == MAIN) & (f.y > low)
        f.mark(spots, LIGHT if f.style == 0 else SECOND, 1.0)
    f.relief = 0.2


KINDS: dict[str, Callable[[Figure], None]] = {
    "ball": ball, "cube": cube, "cone": cone, "ring": ring, "star": star, "tree": tree, "person": person, "cup": cup,
    "bottle": bottle, "lamp": lamp, "chair": chair, "car": car, "house": house, "flower": flower, "dog": dog,
    "mushroom": mushroom,
}  # fmt: skip


def figure(thing: HardThing, x: Array, y: Array, light: float, rise: float, border: float) -> Figure:
    """The form of a thing; `border` is half a pixel in its heights, `rise` the height of a circle seen from above."""
    made = Figure(thing, x, y, light, rise, border)
    KINDS[thing.kind](made)
    return made
