"""Six domains that the demo model cannot draw, as labelled pictures: `write_domain(name, folder)`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 128
Place = tuple[int, int, int]  # x, y and half the side of a thing, in pixels
Draw = Callable[[ImageDraw.ImageDraw, Place, np.random.Generator, bool], None]


def _grain(rng: np.random.Generator, low: tuple[int, ...], high: tuple[int, ...], cells: int) -> Image.Image:
    """A ground of soft patches between two colours."""
    shares = Image.fromarray(rng.integers(0, 256, (cells, cells), np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
    share = np.asarray(shares, np.float32)[..., None] / 255
    return Image.fromarray(((1 - share) * low + share * high).astype(np.uint8))


def _ink(is_mask: bool, colour: tuple[int, ...]) -> tuple[int, ...] | int:
    return 1 if is_mask else colour


def _mug(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    pale = int(rng.integers(200, 250))
    draw.arc(
        (x + r // 3, y - r // 2, x + r, y + r // 2), -90, 90, _ink(is_mask, (pale, pale, pale - 20)), max(r // 5, 2)
    )
    draw.rounded_rectangle((x - r, y - r, x + r // 2, y + r), r // 4, _ink(is_mask, (pale, pale, pale - 20)))
    if not is_mask:
        draw.ellipse((x - r, y - r - r // 4, x + r // 2, y - r + r // 4), (60, 35, 20))


def _leaf(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    angle = np.linspace(0, np.pi, 24)
    width, turn = np.sin(angle) * r * 0.5, rng.uniform(0, np.pi)
    along = np.linspace(-r, r, 24)
    points = np.concatenate([np.stack([along, width], 1), np.stack([along, -width], 1)[::-1]])
    rotated = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + (x, y)
    draw.polygon([tuple(point) for point in rotated], _ink(is_mask, (70, 110, 40)))
    if not is_mask:
        draw.line([tuple(rotated[0]), tuple(rotated[23])], (150, 170, 90), 1)


def _bolt(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    grey = int(rng.integers(110, 170))
    draw.rectangle((x - r // 5, y - r, x + r // 5, y + r), _ink(is_mask, (grey, grey, grey + 10)))
    draw.regular_polygon((x, y - r, r // 2), 6, fill=_ink(is_mask, (grey - 30, grey - 30, grey - 20)))
    for step in range(-r + r // 2, r, 3) if not is_mask else ():
        draw.line((x - r // 5, y + step, x + r // 5, y + step + 2), (70, 70, 75), 1)


def _nucleus(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    if not is_mask:
        draw.ellipse((x - r, y - r, x + r, y + r), (235, 180, 205), (190, 130, 170))
    wide = r // 2
    draw.ellipse((x - wide, y - r // 3, x + wide, y + r // 2), _ink(is_mask, (95, 45, 130)))


def _rod(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    dx, dy = rng.integers(-r, r + 1, 2)
    draw.line((x - dx, y - dy, x + dx, y + dy + 3), _ink(is_mask, (40, 60, 140)), 5)


def _house(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    draw.rectangle((x - r // 2, y - r // 3, x + r // 2, y + r // 3), _ink(is_mask, (165, 75, 55)))
    if not is_mask:
        draw.line((x - r // 2, y, x + r // 2, y), (120, 50, 40), 1)
        draw.line((x - r // 2, y + r // 3 + 2, x + r // 2 + 2, y + r // 3 + 2), (30, 40, 25), 3)


def _pond(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    draw.ellipse((x - r, y - r // 2, x + r, y + r // 2), _ink(is_mask, (40, 70, 90)))
    draw.ellipse((x - r // 2, y - r, x + r // 3, y), _ink(is_mask, (40, 70, 90)))


def _word(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    if is_mask:
        draw.rectangle((x - r, y - r // 2, x + r, y + r // 2), 1)
        return
    for left in range(x - r, x + r - 4, 7):
        for _ in range(3):
            a, b = rng.integers(0, 6, 2), rng.integers(-r // 2, r // 2 + 1, 2)
            draw.line((left + a[0], y + b[0], left + a[1], y + b[1]), (25, 25, 35), 2)


def _stamp(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    draw.rectangle((x - r, y - r, x + r, y + r), _ink(is_mask, (150, 40, 60)))
    if not is_mask:
        draw.rectangle((x - r + 4, y - r + 4, x + r - 4, y + r - 4), (225, 205, 180))
        draw.ellipse((x - r // 2, y - r // 2, x + r // 2, y + r // 2), (60, 60, 110))


def _hole(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    spokes = r * rng.uniform(0.4, 1, 14)
    turns = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    draw.polygon([(x + s * np.cos(t), y + s * np.sin(t)) for s, t in zip(spokes, turns)], _ink(is_mask, (15, 12, 10)))


def _stain(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    for _ in range(6):
        a, b, s = rng.integers(-r // 2, r // 2 + 1, 2).tolist() + [int(rng.integers(r // 3, r // 2 + 1))]
        draw.ellipse((x + a - s, y + b - s, x + a + s, y + b + s), _ink(is_mask, (120, 85, 40)))


def _car(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    colour = tuple(int(c) for c in rng.integers(40, 220, 3))
    draw.rectangle((x - r, y - r // 4, x + r, y + r // 3), _ink(is_mask, colour))
    draw.polygon(
        [
            (x - r // 2, y - r // 4),
            (x - r // 3, y - r * 2 // 3),
            (x + r // 3, y - r * 2 // 3),
            (x + r * 2 // 3, y - r // 4),
        ],
        _ink(is_mask, colour),
    )
    for wheel in (x - r // 2, x + r // 2):
        draw.ellipse((wheel - r // 5, y + r // 6, wheel + r // 5, y + r // 2 + r // 12), _ink(is_mask, (20, 20, 22)))


def _sign(draw: ImageDraw.ImageDraw, place: Place, rng: np.random.Generator, is_mask: bool) -> None:
    x, y, r = place
    draw.line((x, y, x, y + 2 * r), _ink(is_mask, (90, 90, 95)), 3)
    draw.ellipse((x - r // 2, y - r // 2, x + r // 2, y + r // 2), _ink(is_mask, (200, 30, 30)))
    if not is_mask:
        draw.rectangle((x - r // 3, y - r // 8, x + r // 3, y + r // 8), (245, 245, 245))


def _desk(rng: np.random.Generator) -> Image.Image:
    ground = np.asarray(_grain(rng, (150, 105, 65), (190, 140, 90), 5)).astype(np.int16)
    ground += rng.integers(-14, 15, (SIDE, 1, 1), np.int16)  # the grain of the wood
    return Image.fromarray(ground.clip(0, 255).astype(np.uint8))


def _field(rng: np.random.Generator) -> Image.Image:
    image = _grain(rng, (80, 105, 50), (150, 150, 85), 4)
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        a, b = rng.integers(0, SIDE, 2).tolist()
        draw.line((a, 0, b, SIDE), (135, 130, 120), 4)
    return image


def _paper(rng: np.random.Generator) -> Image.Image:
    image = _grain(rng, (228, 220, 200), (244, 238, 222), 6)
    draw = ImageDraw.Draw(image)
    for y in range(int(rng.integers(4, 12)), SIDE, 12):
        draw.line((0, y, SIDE, y), (180, 190, 215), 1)
    return image


def _cloth(rng: np.random.Generator) -> Image.Image:
    x, period = np.arange(SIDE), int(rng.integers(4, 8))
    threads = 40 * ((x[:, None] // 2 % 2) ^ (x[None] // (period // 2) % 2))
    tint = rng.integers(60, 180, 3)
    return Image.fromarray((threads[..., None] + tint).clip(0, 255).astype(np.uint8))


def _street(rng: np.random.Generator) -> Image.Image:
    image = _grain(rng, (165, 195, 225), (205, 220, 235), 3)
    draw, left = ImageDraw.Draw(image), 0
    while left < SIDE:
        width, top = int(rng.integers(20, 40)), int(rng.integers(10, 50))
        draw.rectangle((left, top, left + width, 85), tuple(int(c) for c in rng.integers(90, 180, 3)))
        for x in range(left + 4, left + width - 5, 9):
            for y in range(top + 5, 78, 12):
                draw.rectangle((x, y, x + 4, y + 6), (45, 55, 75))
        left += width
    draw.rectangle((0, 85, SIDE, SIDE), (75, 75, 80))
    for x in range(0, SIDE, 24):
        draw.line((x, 107, x + 12, 107), (230, 230, 210), 2)
    return image


DOMAINS: dict[str, tuple[Callable[[np.random.Generator], Image.Image], dict[str, Draw]]] = {
    "desk": (_desk, {"mug": _mug, "leaf": _leaf, "bolt": _bolt}),
    "cells": (lambda rng: _grain(rng, (232, 205, 222), (246, 232, 240), 8), {"nucleus": _nucleus, "rod": _rod}),
    "aerial": (_field, {"house": _house, "pond": _pond}),
    "letters": (_paper, {"word": _word, "stamp": _stamp}),
    "cloth": (_cloth, {"hole": _hole, "stain": _stain}),
    "street": (_street, {"car": _car, "sign": _sign}),
}


def draw_picture(name: str, seed: int) -> tuple[Image.Image, np.ndarray]:
    """A picture of a domain, and the number of each pixel's class, 0 for the ground."""
    ground, things = DOMAINS[name]
    rng = np.random.default_rng([seed, *name.encode()])
    image, labels = ground(rng), np.zeros((SIDE, SIDE), np.uint8)
    kinds = rng.choice(len(things), int(rng.integers(1, 3)), replace=False)
    for slot, kind in enumerate(kinds):
        half = int(rng.integers(14, 24))
        x = (slot * 2 + 1) * SIDE // (2 * len(kinds)) + int(rng.integers(-6, 7))
        place = x, int(rng.integers(half + 6, SIDE - half - 6)), half
        draw, seed_of_thing = list(things.values())[kind], int(rng.integers(2**32))
        mask = Image.new("L", image.size)
        draw(ImageDraw.Draw(image), place, np.random.default_rng(seed_of_thing), False)
        draw(ImageDraw.Draw(mask), place, np.random.default_rng(seed_of_thing), True)
        labels[np.asarray(mask) > 0] = kind + 1
    noisy = np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), np.int16) + rng.normal(0, 3, (SIDE, SIDE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), labels


def write_domain(name: str, folder: Path, count: int = 40, first_seed: int = 0) -> Path:
    """So many labelled pictures of a domain, as `folder:` reads them."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(("background", *DOMAINS[name][1])) + "\n")
    for k in range(count):
        image, labels = draw_picture(name, first_seed + k)
        image.save(folder / "images" / f"{k:04d}.png")
        Image.fromarray(labels).save(folder / "masks" / f"{k:04d}.png")
    return folder
