"""Shapes of things as signed distances, shade, gloss and relief: x to the right, y up, feet near 0, top near 1."""

import math
from collections.abc import Sequence
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
