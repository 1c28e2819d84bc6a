"""Image and truth of the hard world's scenes, at any size."""

import math
from collections.abc import Sequence

import numpy as np

from bench.world.hard.kinds import figure
from bench.world.hard.scene import CLASSES, WIDTHS, HardScene, HardThing, Patch, Print, sample_scene
from bench.world.hard.surfaces import opacity, painted, patterned, plane
from datasetdm_fast.engine.scenes.world import View, joints, mark_visible, weather

HALF_WIDTHS = {"car": 0.8, "dog": 0.9}  # of drawings; of other kinds 0.68
NEAREST = 0.2  # metres
DROPS, FLAKES = 70, 110
Array = np.ndarray
Window = tuple[slice, slice]


class Frame:
    """The pixels of an image and where they lie in a scene, whose camera may be rolled."""

    def __init__(self, scene: HardScene, size: int):
        self.size, self.cos, self.sin = size, math.cos(scene.roll), math.sin(scene.roll)
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
        self.u = 0.5 + self.cos * axis + self.sin * axis[:, None]
        self.v = 0.5 - self.sin * axis + self.cos * axis[:, None]

    def pixels(self, u: float, v: float) -> tuple[float, float]:
        """Column and row of a place of the scene."""
        u, v = u - 0.5, v - 0.5
        return (0.5 + self.cos * u - self.sin * v) * self.size, (0.5 + self.sin * u + self.cos * v) * self.size

    def window(self, left: float, right: float, top: float, bottom: float) -> Window:
        """The pixels around a rectangle of the scene, as far as they are in the image."""
        corners = [self.pixels(u, v) for u in (left, right) for v in (top, bottom)]
        columns, rows = zip(*corners)
        return self._inside(rows), self._inside(columns)

    def _inside(self, places: Sequence[float]) -> slice:
        return slice(min(max(int(min(places)), 0), self.size), min(max(int(max(places)) + 1, 0), self.size))


def _wall(scene: HardScene, frame: Frame) -> Array:
    u, v = frame.u, frame.v
    shade = 0.84 + 0.16 * np.clip(1 - v / max(scene.edge, 0.2), 0, 1) + 0.10 * scene.light * (u - 0.5)
    second = tuple(0.75 * a + 0.25 * b for a, b in zip(*scene.walls))
    scale = scene.paper_scale
    paper = patterned(scene.paper, (scene.walls[0], second), u * scale, (v - scene.edge) * scale)
    return paper * shade


def _table(scene: HardScene, frame: Frame, depth: Array) -> Array:
    across = (frame.u - 0.5) * depth / scene.focal
    scale = scene.cloth_scale / scene.far * 1.5
    first, second = scene.cloth_colours
    if scene.cloth == "wooden":
        second = tuple(0.6 * part for part in first)
    second = tuple(0.5 * a + 0.5 * b for a, b in zip(first, second))
    cloth = patterned(scene.cloth, (first, second), across * scale, depth * scale)
    shade = 0.82 + 0.22 * (frame.v - scene.edge) + 0.12 * scene.light * (frame.u - 0.5)
    return cloth * shade


def _hang(image: Array, scene: HardScene, frame: Frame, of: Print) -> None:
    """Draws a picture on the wall."""
    bottom = of.v + of.height / 2
    at = frame.window(of.x - of.width / 2, of.x + of.width / 2, of.v - of.height / 2, bottom)
    u, v = frame.u[at] - of.x, frame.v[at]
    if not u.size:
        return
    inside = (np.abs(u) < of.width / 2) & (np.abs(v - of.v) < of.height / 2)
    inside &= v < scene.edge
    paper = np.broadcast_to(plane(of.paper), (3, *u.shape)).copy()
    if of.thing is None:
        paper[:, (np.abs(_zigzag(u / of.width * 3)) + v / of.height * 2) % 1 < 0.5] *= 0.6
    else:
        scale = of.height * 0.8
        x, y = u / scale, (bottom - 0.1 * of.height - v) / scale
        made = figure(of.thing, x, y, scene.light, 0.2, 0.5 / (scale * frame.size))
        shown = painted(of.thing, made, 0.0)
        np.copyto(paper, shown, where=made.distance < 0)
    if of.frame is not None:
        rim = (np.abs(u) > 0.44 * of.width) | (np.abs(v - of.v) > 0.44 * of.height)
        np.copyto(paper, plane(of.frame), where=rim)
    np.copyto(image[:, *at], paper, where=inside)


def _zigzag(values: Array) -> Array:
    return values - np.floor(values) - 0.5


def _lay(image: Array, scene: HardScene, frame: Frame, depth: Array, patch: Patch) -> None:
    """Draws something flat on the table."""
    reach = 1.5 * max(patch.across, patch.along)
    near, far = max(patch.z - reach, 0.1), patch.z + reach
    centre, width = 0.5 + scene.focal * patch.x / patch.z, scene.focal * reach / near * 1.1
    top, bottom = scene.horizon + scene.reach / far, scene.horizon + scene.reach / near
    at = frame.window(centre - width, centre + width, top, min(bottom, 1.2))
    v, ground = frame.v[at], depth[at]
    if not v.size:
        return
    x, z = (frame.u[at] - 0.5) * ground / scene.focal - patch.x, ground - patch.z
    c, s = math.cos(patch.turn), math.sin(patch.turn)
    a, b = (x * c + z * s) / patch.across, (z * c - x * s) / patch.along
    inside = a * a + b * b < 1 if patch.is_round else np.maximum(np.abs(a), np.abs(b)) < 1
    inside &= v > scene.edge
    shown = image[:, *at] * patch.light if patch.colour is None else plane(patch.colour)
    np.copyto(image[:, *at], shown, where=inside)


def _shade_ground(image: Array, scene: HardScene, frame: Frame, thing: HardThing, rise: float) -> None:
    """Darkens the table under and beside a thing."""
    foot, scale = scene.foot(thing), scene.scale(thing)
    wide, strength = 0.5 * WIDTHS.get(thing.kind, 0.85) * scale, 0.15 if scene.domain == "fog" else 0.5
    if thing.is_fallen:
        wide = 0.5 * scale
    for shift, reach, dark in ((0.05, 1.05, strength), (0.45 * scale / wide, 1.6, 0.6 * strength)):
        centre, across = thing.x - scene.light * shift * wide, wide * reach
        along = max(min(across, 0.4 * scale) * rise, 0.012)
        at = frame.window(centre - across, centre + across, foot - along, foot + along)
        spread = np.sqrt(((frame.u[at] - centre) / across) ** 2 + ((frame.v[at] - foot) / along) ** 2)
        fade = np.clip(1.6 * (1 - spread), 0, 1) * dark * (frame.v[at] > scene.edge)
        image[:, *at] *= 1 - fade


def _own_frame(thing: HardThing, across: Array, up: Array) -> tuple[Array, Array]:
    """Places of the scene, in heights of the thing from its foot, in the thing's own frame."""
    if thing.kind == "person":
        return across, up
    if thing.is_fallen:
        across, up = up - WIDTHS.get(thing.kind, 0.85) / 2, across + 0.5
    else:
        c, s = math.cos(thing.lean), math.sin(thing.lean)
        across, up = across * c - up * s, across * s + up * c
    return (-across if thing.is_mirrored else across), up


def _weather(scene: HardScene, image: Array, depth: Array, frame: Frame) -> Array:
    image = weather(scene.domain, image.transpose(1, 2, 0), depth, frame.v).transpose(2, 0, 1)
    if scene.domain not in ("rain", "snow"):
        return image
    size, rng = frame.size, np.random.default_rng([scene.grain, 0x5A17])
    grey = 0.33 * (image[0] + image[1] + image[2])
    if scene.domain == "rain":
        image = (0.6 * image + 0.4 * grey) * plane((0.74, 0.78, 0.84))
        places, steps = rng.random((DROPS, 2)), np.arange(max(size // 14, 3))
        rows = (places[:, :1] * size).astype(int) + steps
        columns = (places[:, 1:] * size).astype(int) + steps // 4
    else:
        image = 0.8 * image + 0.2 * grey + plane((0.06, 0.07, 0.09))
        places, steps = rng.random((FLAKES, 2)), np.arange(max(size // 48, 1) ** 2)
        wide = max(size // 48, 1)
        rows = (places[:, :1] * size).astype(int) + steps // wide
        columns = (places[:, 1:] * size).astype(int) + steps % wide
    rows, columns = rows.clip(0, size - 1), columns.clip(0, size - 1)
    image[:, rows, columns] = 0.5 * image[:, rows, columns] + (0.4 if scene.domain == "rain" else 0.5)
    return image


def render(scene: HardScene, size: int = 128) -> View:
    """Image and truth of a scene at size x size pixels; the same scene at any size."""
    frame = Frame(scene, size)
    ground = np.minimum(scene.reach / np.maximum(frame.v - scene.horizon, 1e-3), scene.far)
    blend = np.clip((frame.v - scene.edge) * size + 0.5, 0, 1)
    wall = _wall(scene, frame)
    for picture in scene.prints:
        _hang(wall, scene, frame, picture)
    table = _table(scene, frame, ground)
    for patch in scene.patches:
        _lay(table, scene, frame, ground, patch)
    table -= wall
    table *= blend
    image = wall + table
    on_table = frame.v >= scene.edge
    semantic, instance = on_table.astype(np.uint8), np.zeros((size, size), np.uint8)
    depth = np.where(on_table, ground, np.float32(scene.wall)).astype(np.float32)
    order = sorted(range(len(scene.things)), key=lambda k: -scene.things[k].z)
    rises = [min(max(0.75 * scene.height / math.hypot(scene.height, thing.z), 0.08), 0.5) for thing in scene.things]
    for k in order:
        _shade_ground(image, scene, frame, scene.things[k], rises[k])
    for k in order:
        _stand(image, semantic, instance, depth, scene, frame, k, rises[k])
    keypoints = {}
    for k, thing in enumerate(scene.things):
        if thing.kind == "person":
            scale, foot = scene.scale(thing), scene.foot(thing)
            places = [frame.pixels(thing.x + x * scale, foot - y * scale) for x, y in joints(thing.pose[:5]).tolist()]
            keypoints[k + 1] = np.array([(*place, 0.0) for place in places])
    mark_visible(keypoints, instance)
    image = _weather(scene, image, depth, frame) * (plane(scene.tint) * np.float32(255 * scene.exposure)) + 0.5
    pixels = np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    return View(scene, pixels, semantic, instance, depth, keypoints)


def view(seed: int, size: int = 128) -> View:
    return render(sample_scene(seed), size)


def _stand(
    image: Array,
    semantic: Array,
    instance: Array,
    depth: Array,
    scene: HardScene,
    frame: Frame,
    number: int,
    rise: float,
) -> None:
    """Draws a thing of the scene over what is behind it, in image and truth."""
    thing = scene.things[number]
    foot, scale = scene.foot(thing), scene.scale(thing)
    half, low, high = HALF_WIDTHS.get(thing.kind, 0.68), 0.6 * rise + 0.05, 1.12
    if thing.is_fallen:
        half, low, high = 0.7, 0.1, WIDTHS.get(thing.kind, 0.85) + 0.4
    elif thing.kind != "person":
        half += 0.16
    at = frame.window(thing.x - half * scale, thing.x + half * scale, foot - high * scale, foot + low * scale)
    across, up = (frame.u[at] - thing.x) / scale, (foot - frame.v[at]) / scale
    if not across.size:
        return
    x, y = _own_frame(thing, across, up)
    light = -scene.light if thing.is_mirrored and thing.kind != "person" else scene.light
    made = figure(thing, x, y, light, rise, 0.5 / (scale * frame.size))
    cover = np.clip(0.5 - made.distance * (scale * frame.size), 0, 1)
    solid = cover >= 0.5
    seen = cover * opacity(thing, made)
    shown = painted(thing, made, scene.contrast)
    image[:, *at] += (shown - image[:, *at]) * seen
    semantic[at][solid] = CLASSES.index(thing.kind)
    instance[at][solid] = number + 1
    bulge = np.clip(-4 * made.distance, 0, 1) * (made.relief * thing.size)
    depth[at][solid] = np.maximum(thing.z - bulge, NEAREST)[solid]
