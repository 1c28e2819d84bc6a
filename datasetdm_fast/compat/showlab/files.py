"""The files that DatasetDM's generators write of an image, by its sums, so that equal outputs give equal files."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from datasetdm_fast.engine.labels.label_files import encode_picture

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.decoders.config import DecoderConfig


# Steps to the eight neighbours, counter-clockwise from the one on the right, as (down, right).
AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def outer_border(mask: np.ndarray) -> np.ndarray:
    """The corners [n, 2] of x, y of the outer border of a mask of one part, from its first pixel on."""
    plane = np.pad(mask, 1)
    pixels, wide = plane.tobytes(), plane.shape[1]
    steps = [down * wide + right for down, right in AROUND]
    start = pixels.index(True)
    # of the first neighbour inside, turning clockwise from the left, which is outside
    first = next((k % 8 for k in range(3, -4, -1) if pixels[start + steps[k % 8]]), None)
    corners, at, came, before = [], start, first, None
    while first is not None:
        # counter-clockwise around the pixel, from the one after where the border came from
        ahead = next(k % 8 for k in range(came + 1, came + 9) if pixels[at + steps[k % 8]])
        if ahead != before:
            corners.append(at)
        following = at + steps[ahead]
        if following == start and at == start + steps[first]:
            break
        at, came, before = following, (ahead + 4) % 8, ahead
    places = np.array(corners or [start])
    return np.stack([places % wide - 1, places // wide - 1], 1).astype(np.int32)


def largest_contour(mask: np.ndarray) -> np.ndarray | None:
    """The outer border of the part of a mask [H, W] with the largest bounding box, of equal ones that of the one that
    begins lowest; None of an empty mask.
    """
    from scipy import ndimage

    parts, count = ndimage.label(mask, np.ones((3, 3)))
    areas = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in ndimage.find_objects(parts)]
    return outer_border(parts == max(range(count), key=lambda k: (areas[k], k)) + 1) if count else None


SMALLEST_AREA = 5000  # evidence of a class at 512 x 512 pixels below which it is left out
CANDIDATES = {"voc": 3, "coco": 100}  # most probable pairs of query and class that are considered
MOST_WRITTEN, LEAST_SCORE = 20, 0.4  # instances of an image
STEPS = 256  # of 8-bit depth from 0 to the farthest
SOFTEST = 0.25  # of a pixel, by which a joint is moved uphill


@dataclass(frozen=True)
class DecodedImage:
    """Pixels and decoder outputs of one image, from which its files are made."""

    pixels: np.ndarray  # [H, W, 3] uint8
    raw: Mapping[str, Tensor]  # of the image's decoder, without the batch
    config: DecoderConfig
    class_id: int = 0  # of the requested class, as the masks number it

    @property
    def size(self) -> int:
        return self.pixels.shape[0]


Write = Callable[[DecodedImage], bytes]  # the file of an image's label


def jpeg(pixels: np.ndarray) -> bytes:
    """A picture as DatasetDM saves it: PIL's default quality of 75, colours at half the resolution."""
    return encode_picture(Image.fromarray(pixels), "JPEG")


def png(plane: np.ndarray) -> bytes:
    """A map [H, W] of 8 or 16 bits."""
    return encode_picture(Image.fromarray(plane), "PNG")


def resize_masks(masks: Tensor, size: int) -> Tensor:
    """Mask logits or heatmaps [N, m, m] at the size of the image."""
    import torch.nn.functional as F

    return F.interpolate(masks.float()[None], size=(size, size), mode="bilinear", align_corners=False)[0]


def write_class_map(output: DecodedImage) -> bytes:
    """The class with the most evidence; classes of less than the smallest area are left out, except class 0."""
    import torch

    from datasetdm_fast.engine.tasks.semantic import scaled_area

    logits, masks = output.raw["pred_logits"].float(), resize_masks(output.raw["pred_masks"], output.size)
    evidence = torch.einsum("qc,qhw->chw", logits.softmax(-1)[..., :-1], masks.sigmoid())
    for plane in evidence[1:]:
        if (plane * (plane > 0.5)).sum() < scaled_area(SMALLEST_AREA, output.size):
            plane.zero_()
    return png(evidence.argmax(0).to(torch.uint8).cpu().numpy())


def candidates(output: DecodedImage, count: int) -> tuple[np.ndarray, list[int], Tensor]:
    """Masks [k, H, W] bool, classes and scores of the most probable pairs of query and class, in PyTorch's order."""
    masks = resize_masks(output.raw["pred_masks"], output.size)
    probability = output.raw["pred_logits"].float().softmax(-1)[:, :-1]
    best, places = probability.flatten().topk(min(count, probability.numel()), sorted=False)
    logits = masks[places // probability.shape[1]]
    inside = (logits > 0).float()
    mean = (logits.sigmoid().flatten(1) * inside.flatten(1)).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    return inside.cpu().numpy() > 0, (places % probability.shape[1]).tolist(), best * mean


def best_indices(scores: Tensor, count: int) -> list[int]:
    return heapq.nlargest(count, range(len(scores)), scores.__getitem__)


def write_class_mask(output: DecodedImage) -> bytes:
    """The best of three masks, filled with the requested class; 0 elsewhere."""
    masks, _, scores = candidates(output, CANDIDATES["voc"])
    return png(masks[best_indices(scores, 1)[0]].astype(np.uint8) * np.uint8(output.class_id))


def write_contours(output: DecodedImage) -> bytes:
    """A line of each instance: its contour, class and score."""
    masks, classes, scores = candidates(output, CANDIDATES["coco"])
    among, lines = best_indices(scores, MOST_WRITTEN), []
    for k, (mask, number) in enumerate(zip(masks, classes)):
        if k not in among or scores[k] < LEAST_SCORE:
            continue
        if (contour := largest_contour(mask)) is not None:
            score = str(scores[k].cpu().numpy())  # an f-string has the digits of fp64
            lines.append(f"{','.join(map(str, contour.reshape(-1)))},{number},{score}\n")
    return "".join(lines).encode()


def write_depth(output: DecodedImage) -> bytes:
    """Depth in 256 steps up to the farthest, rounded half to even."""
    metres = output.raw["depth"][0].float().cpu().numpy()
    return png(np.rint(metres / output.config.max_depth * STEPS).clip(0, 255).astype(np.uint8))


def joints(output: DecodedImage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places [J, 2] and heights [J] of a heatmap's joints, and which of them are not within a pixel of the border."""
    maps = resize_masks(output.raw["heatmaps"], output.size).cpu().numpy()
    flat = maps.reshape(len(maps), -1)
    heights, first = flat.max(1), flat.argmax(1)
    places = np.stack([first % output.size, first // output.size], 1).astype(np.float32)
    places *= (heights > 0)[:, None]
    is_inside = np.zeros(len(maps), bool)
    for k, (plane, (x, y)) in enumerate(zip(maps, places)):
        column, row = math.floor(x + 0.5), math.floor(y + 0.5)
        is_inside[k] = 1 < column < output.size - 1 and 1 < row < output.size - 1
        if is_inside[k]:
            right, down = (
                plane[row, column + 1] - plane[row, column - 1],
                plane[row + 1, column] - plane[row - 1, column],
            )
            places[k] += np.sign(np.array([right, down])) * SOFTEST
    return places, heights, is_inside


def write_heatmap_joints(output: DecodedImage) -> bytes:
    """x, y and height of every joint that is not at the border."""
    places, heights, is_inside = joints(output)
    numbers = [
        str(value)
        for (x, y), height, is_written in zip(places, heights, is_inside)
        if is_written
        for value in (x, y, height)
    ]
    return f"{','.join(numbers)}\n".encode()


def write_bin_joints(output: DecodedImage) -> bytes:
    """The picture with its joints, all that DatasetDM stores of them."""
    from datasetdm_fast.engine.labels.pictures import draw_skeletons

    places = np.stack([output.raw[axis].float().softmax(-1).argmax(-1).cpu().numpy() for axis in "xy"], 1)
    picture = draw_skeletons(output.pixels, [(places, np.ones(len(places), bool))], output.config.limbs)
    return encode_picture(picture, "PNG")
