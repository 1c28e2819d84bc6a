"""How a student sees its images: as they are, mildly changed, or strongly, as a few labelled images have to serve for
many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.proof.students.student_data import CELLS, IGNORED, PERSON, StudentData
from datasetdm_fast.engine.labels.class_tables import mirrored_names

SHIFT = 4  # cells a mild view is moved sideways at most
ZOOM = 0.6, 1.7  # of a strong view, in half of them
MOVED = 8.0  # cells a strong view is moved at most
PASTED = 0.5  # share of strong views that get things of another image, and of its things that they get
CONTRAST, BRIGHTNESS, GAIN, SATURATION, NOISE = (0.6, 1.4), 0.2, (0.7, 1.3), (0.3, 1.4), 0.04
GREY = (0.299, 0.587, 0.114)


class StudentView(NamedTuple):
    """A batch as the student sees it."""

    images: Tensor  # [B, 3, SIDE, SIDE] fp32, -1..1
    semantic: Tensor  # [B, CELLS, CELLS] int64
    instance: Tensor  # [B, CELLS, CELLS] int64
    depth: Tensor  # [B, CELLS, CELLS] fp32
    joints: Tensor  # [B, J, 3] fp32, in cells


def unchanged(lessons: StudentData, count: int, random: torch.Generator) -> StudentView:
    """Images drawn at random, as they are."""
    chosen = torch.multinomial(lessons.weights, count, replacement=True, generator=random)
    images = lessons.images[chosen].float() / 127.5 - 1
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    labels = lessons.semantic[chosen].long(), lessons.instance[chosen].long(), lessons.depth[chosen]
    return StudentView(images, *labels, lessons.joints[chosen])


def mild(lessons: StudentData, count: int, random: torch.Generator) -> StudentView:
    """Images drawn at random, each mirrored or not, moved sideways and in other light."""
    chosen = torch.multinomial(lessons.weights, count, replacement=True, generator=random)
    flip = torch.rand(count, generator=random) < 0.5
    shift = torch.randint(-SHIFT, SHIFT + 1, (count,), generator=random)
    light = 1 + 0.25 * (2 * torch.rand(count, 1, 1, 3, generator=random) - 1)

    def moved(planes: Tensor) -> Tensor:
        column, scale = torch.arange(planes.shape[2]), planes.shape[2] // CELLS
        mirrored = torch.where(flip[:, None], planes.shape[2] - 1 - column, column)
        source = mirrored - scale * shift[:, None]  # of every column
        return planes[chosen[:, None, None], column[None, :, None], source.clamp(0, planes.shape[2] - 1)[:, None]]

    images = (moved(lessons.images).float() * light).clamp(0, 255) / 127.5 - 1
    joints = _mirrored_joints(lessons, chosen, flip)
    joints[..., 0] += torch.where(flip, -shift, shift)[:, None]
    joints[..., 2] *= (joints[..., 0] >= 0) & (joints[..., 0] < CELLS)
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    semantic = _mirrored_classes(lessons, moved(lessons.semantic).long(), flip)
    labels = semantic, moved(lessons.instance).long(), moved(lessons.depth)
    return StudentView(images, *labels, joints)


def strong(lessons: StudentData, count: int, random: torch.Generator) -> StudentView:
    """Images drawn at random, mirrored or not, zoomed and moved, with things of other images, in other colours."""
    view, other = framed(lessons, count, random), framed(lessons, count, random)
    view = _pasted(view, other, lessons, random)
    images = _recoloured(view.images, random) * 2 - 1
    return view._replace(images=images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last))


AUGMENTATIONS: dict[str, Callable[[StudentData, int, torch.Generator], StudentView]] = {
    "none": unchanged,
    "mild": mild,
    "strong": strong,
}


def _mirrored_joints(lessons: StudentData, chosen: Tensor, flip: Tensor) -> Tensor:
    """Joints [B, J, 3] of the images chosen, those of a mirrored one in their places and under their names there."""
    joints = lessons.joints[chosen].clone()
    mirrored = joints[:, lessons.vocabulary.mirror]
    mirrored[..., 0] = CELLS - mirrored[..., 0]
    return torch.where(flip[:, None, None], mirrored, joints)


def _mirrored_classes(lessons: StudentData, semantic: Tensor, flip: Tensor) -> Tensor:
    """Label maps [B, CELLS, CELLS] with the classes of mirrored images under their names there."""
    names = torch.arange(IGNORED + 1)
    names[: len(lessons.vocabulary.classes)] = torch.tensor(mirrored_names(lessons.vocabulary.classes))
    return torch.where(flip[:, None, None], names[semantic], semantic)


def _between(low: float, high: float, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=random)


def framed(lessons: StudentData, count: int, random: torch.Generator) -> StudentView:
    """Images [B, SIDE, SIDE, 3] in 0..1 under another frame; what it adds outside the image is ignored, and depth is
    known where nothing was zoomed.
    """
    chosen = torch.multinomial(lessons.weights, count, replacement=True, generator=random)
    flip, is_zoomed = (torch.rand(count, generator=random) < 0.5 for _ in range(2))
    low, high = torch.tensor(ZOOM).log().tolist()
    zoom = torch.where(is_zoomed, _between(low, high, (count,), random).exp(), 1.0)
    moves = _between(-MOVED, MOVED, (2, count), random).round()  # down, to the right

    def source(side: int, move: Tensor, mirrored: Tensor) -> Tensor:
        """Of each row or column [B, side], the one of the image that it shows."""
        centre, place = side / 2, torch.arange(side) + 0.5
        found = ((place - centre - move[:, None] * (side // CELLS)) / zoom[:, None] + centre).floor().long()
        return torch.where(mirrored[:, None], side - 1 - found, found)

    def read(planes: Tensor, outside: float | None) -> Tensor:
        side = planes.shape[2]
        rows, columns = source(side, moves[0], torch.zeros_like(flip)), source(side, moves[1], flip)
        last = side - 1
        found = planes[chosen[:, None, None], rows.clamp(0, last)[:, :, None], columns.clamp(0, last)[:, None]]
        if outside is None:
            return found
        is_inside = ((rows >= 0) & (rows <= last))[:, :, None] & ((columns >= 0) & (columns <= last))[:, None]
        return torch.where(is_inside, found, outside)

    joints = _mirrored_joints(lessons, chosen, flip)
    joints[..., :2] = (joints[..., :2] - CELLS / 2) * zoom[:, None, None] + CELLS / 2 + moves.flip(0).T[:, None]
    joints[..., 2] *= ((joints[..., :2] >= 0) & (joints[..., :2] < CELLS)).all(-1)
    depth = read(lessons.depth, 0.0) * (~is_zoomed)[:, None, None]
    semantic = _mirrored_classes(lessons, read(lessons.semantic.long(), IGNORED), flip)
    labels = semantic, read(lessons.instance.long(), IGNORED), depth
    return StudentView(read(lessons.images, None).float() / 255, *labels, joints)


def _pasted(view: StudentView, other: StudentView, lessons: StudentData, random: torch.Generator) -> StudentView:
    """Things of another view over this one; a person stays where its joints are."""
    count, vocabulary = len(view.images), lessons.vocabulary
    things = [vocabulary.classes.index(name) for name in vocabulary.things if name != PERSON]
    most = 1 + int(torch.where(other.instance == IGNORED, 0, other.instance).max())
    wanted = torch.rand(count, most, generator=random) < PASTED
    wanted[:, 0] = False
    wanted &= (torch.rand(count, generator=random) < PASTED)[:, None]
    number = torch.where(other.instance == IGNORED, 0, other.instance)
    is_over = wanted.gather(1, number.flatten(1)).view_as(number) & torch.isin(other.semantic, torch.tensor(things))
    first = int(torch.where(view.instance == IGNORED, 0, view.instance).max())
    scale = view.images.shape[1] // CELLS
    is_over_pixels = is_over.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[..., None]
    joints = view.joints.clone()
    column, row = (joints[..., axis].long().clamp(0, CELLS - 1) for axis in (0, 1))
    joints[..., 2] *= ~is_over[torch.arange(count)[:, None], row, column]
    return StudentView(
        torch.where(is_over_pixels, other.images, view.images),
        torch.where(is_over, other.semantic, view.semantic),
        torch.where(is_over, number + first, view.instance),
        torch.where(is_over, other.depth, view.depth),
        joints,
    )


def _recoloured(images: Tensor, random: torch.Generator) -> Tensor:
    """Images [B, S, S, 3] in 0..1 with other contrast, light, tint, saturation, and some noise."""
    one = (len(images), 1, 1, 1)
    grey = (images * torch.tensor(GREY)).sum(3, keepdim=True)
    images = grey + (images - grey) * _between(*SATURATION, one, random)
    images = images * _between(*GAIN, (len(images), 1, 1, 3), random)
    images = (images - 0.5) * _between(*CONTRAST, one, random) + 0.5 + _between(-BRIGHTNESS, BRIGHTNESS, one, random)
    noise = torch.randn(images.shape, generator=random) * _between(0, NOISE, one, random)
    return (images + noise).clamp(0, 1)
