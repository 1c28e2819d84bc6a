"""Tiles cover a picture and overlap; their labels are joined, and a thing of several tiles is one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasetdm_fast.data import IGNORE, Instances, Quarantined, Request, Sample, SemanticMap
from datasetdm_fast.engine.labels import tiles
from datasetdm_fast.engine.labels.tiles import Tiling, joined_instances, joined_map
from datasetdm_fast.engine.loop.inverting import TilingGenerator
from datasetdm_fast.engine.pictures.framing import PicturesInMemory
from datasetdm_fast.engine.tasks.attention import joined_label

pytestmark = pytest.mark.core

SIZE = 32


@pytest.mark.parametrize("sides", [(32, 32), (33, 32), (57, 100), (20, 90), (320, 31)])
def test_tiles_cover_a_picture_and_overlap(sides):
    tiling = Tiling.of(sides, SIZE)
    covered = np.zeros(sides, int)
    for part in tiling.parts:
        assert covered[part].shape == (tiling.side, tiling.side) == (min(SIZE, *sides),) * 2
        covered[part] += 1
    assert covered.min() >= 1
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in tiling.corners})
        assert starts[0] == 0 and starts[-1] == sides[axis] - tiling.side
        assert all(4 * (b - a) <= 3 * tiling.side for a, b in zip(starts, starts[1:]))


def test_tiles_lie_evenly_to_the_nearest_pixel():
    assert [left for _, left in Tiling.of((32, 100), SIZE).corners] == [0, 23, 45, 68]  # thirds of 68
    for width, count in ((56, 2), (57, 3)):  # of which two share a quarter of their side, and no less
        assert len(Tiling.of((32, width), SIZE).corners) == count


def test_tiles_of_a_picture_smaller_than_the_model_takes_are_enlarged():
    ramp = np.broadcast_to(np.uint8(6 * np.arange(40))[:, None], (24, 40, 3))
    generator, squares = object.__new__(TilingGenerator), []
    generator.pictures, generator.together = PicturesInMemory([ramp]), 9
    generator.recipe = SimpleNamespace(size=SIZE)
    generator._label_tiles = lambda request, tiles: (squares.extend(tiles) or [Quarantined(request, "")], [])
    generator._label_picture(Request(0, "", 0))
    for left, square in zip((0, 16), squares, strict=True):  # each new pixel is 3/4 of one
        wanted = 6 * (left + (np.arange(SIZE) + 0.5) * 0.75 - 0.5)
        assert np.abs(square[:, 1:-1, 0] - wanted[1:-1]).max() <= 2


def cut(tiling, truth):
    """A map of a picture as its tiles show it, in the model's pixels."""
    places = np.arange(SIZE) * tiling.side // SIZE
    return [truth[part][np.ix_(places, places)] for part in tiling.parts]


@pytest.mark.parametrize("sides", [(70, 100), (16, 50)])
def test_a_map_in_tiles_is_the_map(sides):
    tiling = Tiling.of(sides, SIZE)
    rows, columns = np.mgrid[: sides[0], : sides[1]]
    truth = ((rows // 8 + columns // 8) % 3).astype(np.uint8)
    tiles = [SemanticMap(one, np.full(one.shape, 0.5, np.float32), ("a", "b", "c")) for one in cut(tiling, truth)]
    found = joined_map(tiling, tiles)
    assert np.array_equal(found.labels, truth) and (found.confidence == 0.5).all()
    two = [SemanticMap(np.full((8, 8), number, np.uint8), np.ones((8, 8), np.float32), ("a", "b")) for number in (0, 1)]
    joined = joined_map(Tiling.of((8, 12), 8), two)
    assert joined.labels[0].tolist() == [0] * 8 + [1] * 4  # of two as deep inside the first
    assert joined.labels[4].tolist() == [0] * 6 + [1] * 6
    assert joined_map(Tiling.of((8, 8), 8), two[1:]).labels.all()  # of a picture that one tile covers


def test_a_picture_in_tiles_tells_how_many_and_takes_some_at_a_time():
    generator, together = object.__new__(TilingGenerator), []
    image = np.repeat(np.arange(80, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    generator.pictures, generator.together = PicturesInMemory([image]), 2
    settings = {"attention": None, "table": None, "ignores_doubtful": False, "least_confidence": 0.0, "draws": ()}
    generator.recipe = SimpleNamespace(size=SIZE, tasks=("semantic",), **settings)

    def label_tiles(request, tiles):
        together.append(len(tiles))
        maps = [SemanticMap(tile[..., 0], np.ones((SIZE, SIZE), np.float32), ("a",) * 80) for tile in tiles]
        return [Sample(request, tile, {"semantic": label}, {"a": 1}) for tile, label in zip(tiles, maps)], []

    generator._label_tiles = label_tiles
    sample = generator._label_picture(Request(0, "", 0))
    assert together == [2, 1] and sample.provenance == {"a": 1, "picture": "0", "sides": [32, 80], "tiles": 3}
    assert (sample.image == image).all() and (sample.annotations["semantic"].labels == image[..., 0]).all()


def test_a_map_is_scaled_to_a_tile_by_its_nearest_values():
    pixels = np.arange(36).reshape(6, 6)
    assert (Tiling.of((3, 3), 6).scale(pixels) == pixels[1::2, 1::2]).all()
    assert (Tiling.of((6, 6), 6).scale(pixels) == pixels).all()


def test_what_a_tile_says_near_its_border_gives_way():
    tiling = Tiling.of((32, 56), SIZE)
    tiles = [SemanticMap(np.zeros((SIZE, SIZE), np.uint8), np.ones((SIZE, SIZE), np.float32), ("a", "b"))] * 2
    wrong = tiles[1].labels.copy()
    wrong[:, :3] = 1  # at its left border, which is inside of the other tile
    found = joined_map(tiling, [tiles[0], SemanticMap(wrong, tiles[1].confidence, ("a", "b"))])
    assert not found.labels[4:-4].any()


def test_a_pixel_is_as_sure_as_the_tile_in_which_it_lies_farthest_inside():
    tiling, labels = Tiling.of((32, 56), SIZE), np.zeros((SIZE, SIZE), np.uint8)
    tiles = [SemanticMap(labels, np.full((SIZE, SIZE), sure, np.float32), ("a",)) for sure in (0.25, 0.75)]
    assert joined_map(tiling, tiles).confidence[16].tolist() == [0.25] * 28 + [0.75] * 28


def test_a_thing_of_several_tiles_is_one():
    tiling = Tiling.of((60, 100), SIZE)
    masks = np.zeros((3, 60, 100), bool)
    masks[0, 10:50, 20:90] = True  # over many tiles
    masks[1, 2:8, 2:8] = True
    masks[2, 52:58, 90:98] = True  # of the class of the first, apart from it
    kinds, scores = (0, 1, 0), (0.9, 0.6, 0.7)
    shown = [cut(tiling, mask) for mask in masks]
    tiles = []
    for tile in range(len(tiling.corners)):
        there = [k for k in range(3) if shown[k][tile].any()]
        tiles.append(
            Instances(
                np.array([shown[k][tile] for k in there], bool).reshape(-1, SIZE, SIZE),
                np.array([kinds[k] for k in there], np.int64),
                np.array([scores[k] - 0.01 * (tile % 3) for k in there], np.float32),
                ("ball", "cube"),
            )
        )
    found = joined_instances(tiling, tiles)
    assert found.class_ids.tolist() == [0, 0, 1] and (np.diff(found.scores) <= 0).all()
    assert all(np.array_equal(found.masks[k], masks[own]) for k, own in enumerate((0, 2, 1)))
    empty = joined_instances(
        tiling, [Instances(one.masks[:0], one.class_ids[:0], one.scores[:0], ("a",)) for one in tiles]
    )
    assert empty.masks.shape == (0, 60, 100)


def test_two_things_that_two_tiles_show_stay_two():
    tiling = Tiling.of((32, 56), SIZE)
    masks = np.zeros((2, 32, 56), bool)
    masks[0, 4:9, 26:30] = masks[1, 16:21, 26:30] = True  # both within the columns that the tiles share
    tiles = [
        Instances(np.array([first, second]), np.array([0, 0]), np.float32(scores), ("ball",))
        for first, second, scores in zip(*(cut(tiling, mask) for mask in masks), ([0.9, 0.8], [0.5, 0.85]), strict=True)
    ]
    assert len(tiles) == 2 and all(one.masks.any((1, 2)).all() for one in tiles)
    assert np.array_equal(joined_instances(tiling, tiles).masks, masks)


@pytest.mark.parametrize(("top", "high", "count"), [(6, 4, 1), (7, 4, 2), (6, 10, 1)])
def test_things_that_two_tiles_show_are_one_from_half_of_the_smaller_ones_pixels(top, high, count):
    tiling, masks = Tiling.of((32, 56), SIZE), np.zeros((2, 32, 56), bool)
    masks[0, 4:8, 26:30] = masks[1, top : top + high, 26:30] = True
    shown = cut(tiling, masks[0])[0], cut(tiling, masks[1])[1]
    tiles = [Instances(mask[None], np.array([0]), np.float32([0.9]), ("ball",)) for mask in shown]
    assert len(joined_instances(tiling, tiles).masks) == count


def test_a_tile_without_a_class_shows_none_of_it():
    """Attention is scaled over the picture: what is largest in a tile may be little beside another tile's."""
    tiling = Tiling.of((32, 80), SIZE)
    maps = [torch.full((1, 8, 8), 0.01) for _ in tiling.corners]
    maps[0][0, 2:6, 2:6] = 1.0
    maps[-1][0, 5, 5] = 0.02
    found = joined_label(tiling, maps, [3], ("background", "a", "b", "c"), 0.6, 0.5)
    assert set(np.unique(found.labels)) <= {0, 3, IGNORE}
    assert (found.labels[10:22, 10:22] == 3).all() and not found.labels[:, 40:].any()
    nothing = joined_label(tiling, [one[:0] for one in maps], [], ("background",), 0.6, 0.5)
    assert not nothing.labels.any() and not nothing.confidence.any()


def test_what_several_tiles_show_is_their_mean_and_not_their_sum():
    tiling = Tiling.of((8, 12), 8)
    maps = [torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 0.5)]
    found = joined_label(tiling, maps, [1], ("background", "a"), 0.6, 0.5)
    assert found.confidence[:, 0].tolist() == pytest.approx([1] * 8) and (found.labels[:, :4] == 1).all()
    assert found.confidence[:, 8:] == pytest.approx(0) and (np.diff(found.confidence[4]) <= 1e-6).all()


def test_maps_grow_to_the_pixels_of_a_tile_as_to_those_of_a_whole_picture():
    maps = torch.rand((2, 4, 4), generator=torch.Generator().manual_seed(1))
    found = joined_label(Tiling.of((16, 16), 16), [maps], [1, 2], ("background", *"ab"), 0.6, 0.5)
    large = torch.nn.functional.interpolate(maps[None], (16, 16), mode="bicubic")[0]
    low, high = (limit(large, (1, 2)).view(2, 1, 1) for limit in (torch.amin, torch.amax))
    np.testing.assert_allclose(found.confidence, ((large - low) / (high - low)).amax(0), atol=1e-6)


def test_of_two_classes_a_pixel_has_the_likelier():
    maps = torch.zeros(2, 8, 8)
    maps[0, :, :4], maps[1, :, 4:] = 1.0, 0.5  # each is scaled to 0 .. 1
    found = joined_label(Tiling.of((8, 8), 8), [maps], [3, 5], ("background", *"abcde"), 0.6, 0.5)
    assert found.labels[0].tolist() == [3] * 4 + [5] * 4 and (found.confidence == 1).all()
    alike = joined_label(Tiling.of((8, 8), 8), [maps[[0, 0]]], [3, 5], ("background", *"abcde"), 0.6, 0.5)
    assert alike.labels[0].tolist() == [3] * 4 + [0] * 4  # of two alike the first


def test_a_pixel_of_a_picture_in_tiles_reaches_a_limit_that_it_equals():
    maps = torch.tensor([0, 0.24, 0.25, 0.49, 0.5, 0.51, 0.75, 1]).expand(1, 8, 8)
    found = joined_label(Tiling.of((8, 8), 8), [maps], [3], ("background", *"abc"), 0.5, 0.25)
    assert found.labels[0].tolist() == [0, 0, IGNORE, IGNORE, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("first", "second", "scores"), [(0.5, 0.9, [0.9]), (0.9, 0.5, [0.9]), (0.3, 0.9, [0.9, 0.3]), (0.4, 0.9, [0.9])]
)
def test_a_thing_has_the_best_score_of_its_tiles_which_show_it_all_or_none(first, second, scores):
    tiling = Tiling.of((8, 12), 8)
    masks = np.zeros((2, 1, 8, 8), bool)
    masks[0, 0, 2:5, 3:], masks[1, 0, 2:5, :5] = True, True
    labels = [
        Instances(mask, np.array([0]), np.float32([score]), ("ball",)) for mask, score in zip(masks, (first, second))
    ]
    joined = joined_instances(tiling, labels)
    assert joined.scores.tolist() == pytest.approx(scores) and joined.class_ids.tolist() == [0] * len(scores)
    assert joined.masks.any(0)[2:5, 3:9].all() and joined.masks.any(0).sum() == 18


def test_a_piece_of_a_thing_is_read_where_its_tile_lies():
    mask = np.arange(16).reshape(4, 4) % 3 == 0
    piece = tiles._Piece((slice(10, 14), slice(20, 24)), mask, 0, 0.9)
    assert np.array_equal(piece.on(slice(11, 13), slice(22, 24)), mask[1:3, 2:4])
    assert np.array_equal(piece.on(slice(10, 14), slice(20, 24)), mask)
