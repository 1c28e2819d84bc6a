"""Files of `compat.showlab` as those read them who train on DatasetDM's output: contours, 8-bit depth and joints."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from test_showlab import answer, raw_of

from datasetdm_fast.compat.showlab import files
from datasetdm_fast.engine.decoders.config import COCO_JOINTS
from datasetdm_fast.kernels.upsample_concat import resize

SIDE = 128


def read_contours(text: str) -> list[tuple[np.ndarray, int, float]]:
    """Points, class and score of each line, as DatasetDM's vis script and splicer take it apart."""
    found = []
    for line in text.split("\n")[:-1]:
        *numbers, name, score = line.split(",")
        points = np.array([int(number) for number in numbers]).reshape(len(numbers) // 2, 2)
        found.append((points, int(name), float(score)))
    return found


def read_depth(content: bytes, farthest: float) -> np.ndarray:
    """Metres of an 8-bit map, of which 256 is the farthest."""
    picture = Image.open(io.BytesIO(content))
    assert picture.mode == "L"
    return np.array(picture).astype(np.float32) / 256 * farthest


def read_joints(text: str) -> np.ndarray:
    """Triples x, y, score of the joints in the one line of a file."""
    (line, last) = text.split("\n")
    assert not last
    return np.array([float(number) for number in line.split(",") if number]).reshape(-1, 3)


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The part with the largest bounding box, its holes filled."""
    parts, _ = ndimage.label(mask, np.ones((3, 3)))
    sizes = [(one.stop - one.start) * (two.stop - two.start) for one, two in ndimage.find_objects(parts)]
    return ndimage.binary_fill_holes(parts == 1 + int(np.argmax(sizes)))


def test_contours_enclose_the_largest_part_of_a_mask():
    raw = {name: value[0] for name, value in raw_of("coco", 3).items()}
    lines = read_contours(files.write_contours(answer(raw, side=SIDE)).decode())
    masks = (resize(raw["pred_masks"][None], SIDE)[0] > 0).numpy()
    parts = [largest_part(mask) for mask in masks if mask.any()]
    assert len(lines) > 3
    for points, name, score in lines:
        assert points.min() >= 0 and points.max() < SIDE and 0 <= name < 80 and 0.4 <= score <= 1
        (at, size) = points.min(0), np.ptp(points, axis=0) + 1
        same = [part for part in parts if bounds(part) == (*at, *size)]
        assert any(part[points[:, 1], points[:, 0]].all() for part in same)
        assert min(abs(area(points) - part.sum()) / part.sum() for part in same) < 0.01


def bounds(part: np.ndarray) -> tuple[int, ...]:
    rows, columns = (np.flatnonzero(part.any(axis)) for axis in (1, 0))
    return columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1


def area(points: np.ndarray) -> float:
    """Pixels inside of a contour and on it: its area, half of its border and one (Pick's theorem)."""
    x, y = points.T
    border = np.abs(np.roll(points, -1, 0) - points)
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2 + np.gcd(*border.T).sum() / 2 + 1


@pytest.mark.parametrize(("kind", "farthest"), [("nyu", 10.0), ("kitti", 80.0)])
def test_depth_is_read_back_within_half_a_step(kind, farthest):
    metres = raw_of(kind, 5)["depth"][0]
    found = read_depth(files.write_depth(answer({"depth": metres}, kind, side=512)), farthest)
    is_near = metres[0].numpy() < 255.5 / 256 * farthest
    assert np.abs(found - metres[0].numpy())[is_near].max() <= farthest / 512 + 1e-5
    assert (found[~is_near] == np.float32(255 / 256 * farthest)).all()


def test_joints_are_read_back_near_the_maxima_of_their_heatmaps():
    maps = torch.full((len(COCO_JOINTS), 64, 64), -1.0)
    places = [(3 * k + 5, 60 - 2 * k) for k in range(len(COCO_JOINTS))]
    for k, (x, y) in enumerate(places):
        maps[k, y, x] = 0.5 + k / 100
    maps[4] = -1  # not found: it is left out, as are those at the border
    found = read_joints(files.write_heatmap_joints(answer({"heatmaps": maps}, "pose", side=512)).decode())
    expected = [(8 * x + 3.5, 8 * y + 3.5) for k, (x, y) in enumerate(places) if k != 4]
    assert len(found) == len(expected) and np.abs(found[:, :2] - expected).max() <= 1
    assert (np.diff(found[:, 2]) > 0).all() and 0 < found[:, 2].min() < found[:, 2].max() <= 0.7
    nothing = files.write_heatmap_joints(answer({"heatmaps": -torch.ones(17, 8, 8)}, "pose", side=512))
    assert read_joints(nothing.decode()).shape == (0, 3)
