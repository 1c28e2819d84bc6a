"""The demo world: table-top scenes drawn from a seed, with every label a perception model could ask for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def joints(pose: Sequence[float]) -> np.ndarray:
    """[J, 2] joints of a person in its own frame: x to the right, y up, feet near 0, top of the head at 1."""
    sway, right_arm, left_arm, right_leg, left_leg = pose
    neck, pelvis = np.array([0.04 * sway, 0.72]), np.array([0.0, 0.42])
    head = neck + [0.02 * sway, 0.15]

    def limb(start: np.ndarray, angle: float, length: float, side: int) -> np.ndarray:
        return start + length * np.array([side * math.sin(angle), -math.cos(angle)])

    # The figure faces us: its right hand is on our left.
    right_hand = limb(neck, 1.45 + 0.95 * right_arm, 0.33, -1)
    left_hand = limb(neck, 1.45 + 0.95 * left_arm, 0.33, 1)
    right_foot = limb(pelvis, 0.36 + 0.16 * right_leg, 0.40, -1)
    left_foot = limb(pelvis, 0.36 + 0.16 * left_leg, 0.40, 1)
    return np.stack([head, neck, pelvis, left_hand, right_hand, left_foot, right_foot])


def capsule(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    along = b - a
    t = np.clip(((x - a[0]) * along[0] + (y - a[1]) * along[1]) / (along @ along), 0, 1)
    return np.asarray(np.hypot(x - a[0] - t * along[0], y - a[1] - t * along[1]) - radius)


def polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon, negative inside."""
    nearest, inside = np.full(x.shape, np.inf, np.float32), np.zeros(x.shape, bool)
    for a, b in zip(corners, np.roll(corners, -1, axis=0)):
        nearest = np.minimum(nearest, capsule(x, y, a, b, 0.0))
        crosses = (a[1] > y) != (b[1] > y)
        inside ^= crosses & (x < a[0] + (y - a[1]) * (b[0] - a[0]) / (b[1] - a[1] if b[1] != a[1] else 1e-9))
    return np.where(inside, -nearest, nearest)


def ball(pose: Sequence[float], x: np.ndarray, y: np.ndarray, light: float) -> tuple[Any, ...]:
    dx, dy = x / 0.5, (y - 0.5) / 0.5
    height = np.sqrt(np.clip(1 - dx * dx - dy * dy, 0, 1))
    shade = 0.45 + 0.55 * np.clip(0.5 * light * dx + 0.45 * dy + 0.74 * height, 0, 1)
    gloss = np.clip(1 - 6 * np.hypot(dx - 0.35 * light, dy - 0.4), 0, 1) * 0.6
    return np.hypot(x, y - 0.5) - 0.5, shade, gloss, 0.5 * height


def cube(pose: Sequence[float], x: np.ndarray, y: np.ndarray, light: float) -> tuple[Any, ...]:
    side = 1 if pose[0] > 0 else -1
    u = x * side
    front = np.array([[-0.46, 0.0], [0.26, 0.0], [0.26, 0.72], [-0.46, 0.72]])
    top = np.array([[-0.46, 0.72], [0.26, 0.72], [0.50, 0.94], [-0.22, 0.94]])
    flank = np.array([[0.26, 0.0], [0.50, 0.22], [0.50, 0.94], [0.26, 0.72]])
    faces = np.stack([polygon(u, y, face) for face in (front, top, flank)])
    face = faces.argmin(0)
    shade = np.choose(face, [0.82, 1.0, 0.62 + 0.2 * light * side]).astype(np.float32)
    relief = np.choose(face, [0.36 + 0 * u, 0.36 - 1.6 * (y - 0.72), 0.36 - 1.5 * (u - 0.26)])
    return faces.min(0), shade, 0.0, relief


def cone(pose: Sequence[float], x: np.ndarray, y: np.ndarray, light: float) -> tuple[Any, ...]:
    body = polygon(x, y, np.array([[-0.44, 0.09], [0.44, 0.09], [0.0, 1.0]]))
    foot = (np.hypot(x / 0.44, (y - 0.09) / 0.09) - 1) * 0.09
    across = np.clip(x / np.maximum(0.44 * (1 - y) / 0.91, 0.03), -1, 1)
    shade = 0.50 + 0.5 * np.clip(0.45 * light * across + 0.7 * np.sqrt(1 - across * across) + 0.1, 0, 1)
    return np.minimum(body, foot), shade, 0.0, 0.44 * np.clip(1 - y, 0, 1) * np.sqrt(1 - across * across)


def ring(pose: Sequence[float], x: np.ndarray, y: np.ndarray, light: float) -> tuple[Any, ...]:
    radius = np.hypot(x, y - 0.5)
    across = np.clip((radius - 0.36) / 0.14, -1, 1)
    lift = np.sqrt(1 - across * across)
    outward = (light * x + 0.8 * (y - 0.5)) / np.maximum(radius, 1e-3)
    shade = 0.48 + 0.52 * np.clip(0.45 * across * outward + 0.75 * lift, 0, 1)
    return np.abs(radius - 0.36) - 0.14, shade, np.clip(lift - 0.9, 0, 1) * 2 * (outward > 0.6), 0.14 * lift


def star(pose: Sequence[float], x: np.ndarray, y: np.ndarray, light: float) -> tuple[Any, ...]:
    angles = np.pi / 2 + np.arange(10) * np.pi / 5 + 0.12 * pose[0]
    radii = np.where(np.arange(10) % 2 == 0, 0.54, 0.29)
    corners = np.stack([radii * np.cos(angles), 0.46 + radii * np.sin(angles)], 1)
    facet = np.floor((np.arctan2(y - 0.46, x) - angles[0]) / (np.pi / 5)).astype(int) % 2
    shade = np.where(facet == (light > 0), 0.98, 0.70).astype(np.float32)
    return polygon(x, y, corners), shade, 0.0, 0.12 * np.clip(1 - np.hypot(x, y - 0.46) / 0.5, 0, 1)


def tree(pose: Sequence[float], x: np.ndarray, y: np.ndarray, light: float) -> tuple[Any, ...]:
    trunk = np.maximum(np.abs(x) - 0.085, np.abs(y - 0.16) - 0.16)
    tiers = [
        np.array([[-w, low], [w, low], [0.0, high]])
        for w, low, high in ((0.42, 0.26, 0.70), (0.34, 0.48, 0.86), (0.24, 0.70, 1.0))
    ]
    crown = np.stack([polygon(x, y, tier) for tier in tiers]).min(0)
    shade = 0.72 + 0.28 * np.clip(light * x / 0.35, -1, 1)
    return np.minimum(trunk, crown), shade, 0.0, 0.15 + 0 * x, (crown > 0) & (trunk <= crown)


def person(pose: Sequence[float], x: np.ndarray, y: np.ndarray, light: float) -> tuple[Any, ...]:
    head, neck, pelvis, left_hand, right_hand, left_foot, right_foot = joints(pose)
    skin = np.hypot(x - head[0], y - head[1]) - 0.125
    arms = np.minimum(
        capsule(x, y, neck - [0, 0.05], left_hand, 0.062), capsule(x, y, neck - [0, 0.05], right_hand, 0.062)
    )
    torso = capsule(x, y, neck - [0, 0.08], pelvis, 0.13)
    legs = np.minimum(
        capsule(x, y, pelvis + [0.05, 0], left_foot, 0.072), capsule(x, y, pelvis - [0.05, 0], right_foot, 0.072)
    )
    parts = np.stack([skin, arms, torso, legs])
    shade = (0.80 + 0.2 * np.clip(light * x / 0.2, -1, 1)).astype(np.float32)
    return parts.min(0), shade, 0.0, 0.08 + 0 * x, parts.argmin(0)


SHAPES = {"ball": ball, "cube": cube, "cone": cone, "ring": ring, "star": star, "tree": tree, "person": person}


CLASSES = ("wall", "table", "ball", "cube", "cone", "ring", "star", "tree", "person")
THINGS = CLASSES[2:]
JOINTS = ("head", "neck", "pelvis", "left_hand", "right_hand", "left_foot", "right_foot")
LIMBS = ((0, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6))
DOMAINS = ("day", "night", "fog", "sunset")
MAX_DEPTH = 4.0  # metres; the farthest wall stands at 3.4

COLOURS = {
    "red": (0.85, 0.13, 0.12),
    "blue": (0.13, 0.30, 0.88),
    "green": (0.16, 0.66, 0.22),
    "yellow": (0.95, 0.82, 0.14),
    "purple": (0.56, 0.20, 0.74),
    "orange": (0.97, 0.50, 0.10),
    "white": (0.94, 0.94, 0.94),
}
TABLES = {
    "brown": (0.55, 0.36, 0.20),
    "grey": (0.52, 0.53, 0.56),
    "black": (0.20, 0.19, 0.22),
    "pink": (0.88, 0.60, 0.66),
}
WALLS = ((0.80, 0.78, 0.70), (0.66, 0.76, 0.82), (0.76, 0.70, 0.80), (0.70, 0.80, 0.70), (0.84, 0.74, 0.64))
WALL_PATTERNS = ("plain", "striped", "tiled")
WHERE = {"day": "", "night": " at night", "fog": " in fog", "sunset": " at sunset"}
FREQUENCY = {"ball": 1.0, "cube": 1.0, "cone": 1.0, "tree": 1.0, "person": 1.2, "ring": 0.35, "star": 0.35}


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    x: float  # centre in image widths
    z: float  # metres from the camera to where it stands
    size: float  # metres, base to top
    pose: tuple[float, ...] = ()  # person: arm and leg angles in radians; others: one turn

    @property
    def name(self) -> str:
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.kind}"


def join_names(names: list[str], between: str = " and ") -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + between + names[-1]


@dataclass(frozen=True)
class TableTop:
    """The part of a scene that a caption describes."""

    things: tuple[Thing, ...]  # left to right, the order of the caption
    table: str
    domain: str

    @property
    def where(self) -> str:
        """The domain as a caption ends with it."""
        return WHERE[self.domain]

    @property
    def caption(self) -> str:
        return f"{join_names([thing.name for thing in self.things])} on a {self.table} table{self.where}"


@dataclass(frozen=True)
class Scene(TableTop):
    wall: int
    pattern: str
    horizon: float  # image heights from the top
    far: float  # metres to the wall
    light: float  # -1 from the left .. 1 from the right


@dataclass(frozen=True)
class View:
    """One rendered scene and its truth; instance i of `instance` (i >= 1) is scene.things[i - 1]."""

    scene: TableTop
    image: np.ndarray  # [H, W, 3] uint8
    semantic: np.ndarray  # [H, W] uint8, index into CLASSES
    instance: np.ndarray  # [H, W] uint8, 0 = wall or table
    depth: np.ndarray  # [H, W] float32, metres
    keypoints: dict[int, np.ndarray]  # instance -> [J, 3]: x, y in pixels, 2 visible / 1 hidden / 0 outside

    @property
    def caption(self) -> str:
        return self.scene.caption


def sample_scene(
    seed: int,
    count: int | None = None,
    kinds: tuple[str, ...] = THINGS,
    domain: str | None = None,
    frequency: dict[str, float] = FREQUENCY,
) -> Scene:
    """A scene that is a pure function of its arguments; at most one person, things left to right."""
    rng = np.random.default_rng([seed, 0xDA7A])
    count = count or int(rng.choice([1, 2, 3], p=[0.45, 0.40, 0.15]))
    far = rng.uniform(2.7, 3.4)
    small = {1: 1.15, 2: 1.0, 3: 0.8, 4: 0.65}[count]
    things: list[Thing] = []
    for slot in range(count):
        weights = np.array(
            [0.0 if kind == "person" and any(t.kind == kind for t in things) else frequency[kind] for kind in kinds]
        )
        if not weights.any():
            break
        kind = str(rng.choice(kinds, p=weights / weights.sum()))
        z = rng.uniform(1.25, 2.0)
        size = small * rng.uniform(0.60, 0.80) * (1.2 if kind in ("person", "tree") else 1.0)
        x = (slot + 0.5) / count + rng.uniform(-0.5, 0.5) * (0.44 if count == 1 else 0.5 / count)
        pose = tuple(rng.uniform(-1, 1, 5 if kind == "person" else 1))
        things.append(Thing(kind, str(rng.choice(list(COLOURS))), float(x), float(z), float(size), pose))
    return Scene(
        things=tuple(things),
        table=str(rng.choice(list(TABLES))),
        domain=domain or str(rng.choice(DOMAINS, p=[0.4, 0.2, 0.2, 0.2])),
        wall=int(rng.integers(len(WALLS))),
        pattern=str(rng.choice(WALL_PATTERNS, p=[0.5, 0.25, 0.25])),
        horizon=float(rng.uniform(0.16, 0.26)),
        far=float(far),
        light=float(rng.choice([-1, 1]) * rng.uniform(0.4, 1.0)),
    )


_SKIN, _TROUSERS, _TRUNK = (
    np.array([0.93, 0.74, 0.60], np.float32),
    np.array([0.18, 0.20, 0.34], np.float32),
    np.array([0.42, 0.27, 0.14], np.float32),
)


def _paint(thing: Thing, parts: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    colour = np.broadcast_to(np.array(COLOURS[thing.colour], np.float32), (*shape, 3)).copy()
    if thing.kind == "tree":
        colour[parts] = _TRUNK
    if thing.kind == "person":
        colour[parts == 0] = _SKIN
        colour[parts == 3] = _TROUSERS
    return colour


def _backdrop(scene: Scene, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    """Colour, class and depth of the wall and the table."""
    reach = 1 - scene.horizon  # the table fills the picture down to one metre
    edge = scene.horizon + reach / scene.far
    wall = np.array(WALLS[scene.wall], np.float32) * (0.86 + 0.14 * (1 - v / edge)[..., None])
    if scene.pattern == "striped":
        wall = wall * (1 - 0.10 * (np.floor(u * 10) % 2))[..., None]
    elif scene.pattern == "tiled":
        wall = wall * (1 - 0.10 * ((np.floor(u * 8) + np.floor((v - edge) * 8)) % 2))[..., None]
    ground = reach / np.maximum(v - scene.horizon, 1e-3)
    grain = 0.96 + 0.04 * np.sin(38 * (v - edge) / (v - scene.horizon + 0.2) + 2 * np.sin(5 * u))
    table = np.array(TABLES[scene.table], np.float32) * ((0.80 + 0.25 * (v - edge)) * grain)[..., None]
    blend = np.clip((v - edge) * u.shape[0] + 0.5, 0, 1)[..., None]
    on_table = v >= edge
    return (
        wall * (1 - blend) + table * blend,
        on_table.astype(np.uint8),
        np.where(on_table, np.minimum(ground, scene.far), scene.far).astype(np.float32),
    )


def _shadow(scene: Scene, thing: Thing, foot: float, scale: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    long = 1.5 if scene.domain == "sunset" else 1.0
    width = scale * (0.22 if thing.kind in ("person", "tree") else 0.40)
    centre = thing.x - scene.light * scale * 0.28 * long
    spread = np.hypot((u - centre) / (width * (0.9 + 0.45 * long)), (v - foot + 0.01) / (0.11 * scale))
    return np.asarray(np.clip(1.25 - spread, 0, 1) * (0.15 if scene.domain == "fog" else 0.45))


def weather(domain: str, image: np.ndarray, depth: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The image by day as it is in another domain."""
    if domain == "night":
        image = image * np.array([0.46, 0.50, 0.66], np.float32) + np.array([0.01, 0.02, 0.07], np.float32)
    elif domain == "fog":
        veil = (1 - np.exp(-0.42 * np.maximum(depth - 0.6, 0)))[..., None]
        image = image * (1 - veil) + np.array([0.80, 0.82, 0.84], np.float32) * veil
    elif domain == "sunset":
        warm, glow = np.array([0.98, 0.80, 0.62], np.float32), np.array([0.18, 0.07, 0.02], np.float32)
        image = image * warm + glow * (1 - v)[..., None]
    return image


def mark_visible(keypoints: dict[int, np.ndarray], instance: np.ndarray) -> None:
    """Writes into the joints of every person whether they are visible, hidden or outside."""
    size = len(instance)
    for k, points in keypoints.items():
        column, row = np.floor(points[:, :2]).astype(int).T
        inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        seen = instance[row.clip(0, size - 1), column.clip(0, size - 1)] == k
        points[:, 2] = np.where(inside, np.where(seen, 2, 1), 0)


def render(scene: Scene, size: int = 128) -> View:
    """Image and truth of a scene at size x size pixels; the same scene at any size."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    u, v = np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))
    image, semantic, depth = _backdrop(scene, u, v)
    instance, reach = np.zeros((size, size), np.uint8), 1 - scene.horizon
    keypoints: dict[int, np.ndarray] = {}
    order = sorted(range(len(scene.things)), key=lambda k: -scene.things[k].z)
    feet = {k: scene.horizon + reach / scene.things[k].z for k in order}
    for k in order:
        thing = scene.things[k]
        dark = _shadow(scene, thing, feet[k], thing.size / thing.z, u, v) * (instance == 0) * (semantic == 1)
        image = image * (1 - dark)[..., None]
    for k in order:
        thing, scale = scene.things[k], scene.things[k].size / scene.things[k].z
        rows = slice(max(int((feet[k] - 1.08 * scale) * size), 0), min(int((feet[k] + 0.10 * scale) * size) + 1, size))
        columns = slice(
            max(int((thing.x - 0.66 * scale) * size), 0), max(min(int((thing.x + 0.66 * scale) * size) + 1, size), 0)
        )
        x, y = (u[rows, columns] - thing.x) / scale, (feet[k] - v[rows, columns]) / scale + 0.02
        if not x.size:
            continue
        distance, shade, gloss, relief, *parts = SHAPES[thing.kind](thing.pose, x, y, scene.light)
        cover = np.clip(0.5 - distance * scale * size, 0, 1).astype(np.float32)[..., None]
        colour = (
            _paint(thing, parts[0] if parts else None, x.shape) * np.asarray(shade)[..., None]
            + np.asarray(gloss)[..., None]
        )
        image[rows, columns] = image[rows, columns] * (1 - cover) + colour * cover
        solid = cover[..., 0] >= 0.5
        semantic[rows, columns][solid] = CLASSES.index(thing.kind)
        instance[rows, columns][solid] = k + 1
        depth[rows, columns][solid] = np.maximum(thing.z - 0.8 * thing.size * relief, 0.5)[solid]
        if thing.kind == "person":
            frame = joints(thing.pose)
            keypoints[k + 1] = np.stack(
                [
                    (thing.x + frame[:, 0] * scale) * size,
                    (feet[k] - (frame[:, 1] - 0.02) * scale) * size,
                    np.zeros(len(JOINTS)),
                ],
                1,
            )
    mark_visible(keypoints, instance)
    image = weather(scene.domain, image, depth, v)
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return View(scene, pixels, semantic, instance, depth.astype(np.float32), keypoints)


def view(seed: int, size: int = 128, **options: Any) -> View:
    return render(sample_scene(seed, **options), size)
