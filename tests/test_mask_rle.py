"""Run-length strings against pycocotools, byte for byte, and every malformed one refused."""

import threading

import numpy as np
import pytest
from pycocotools import mask as coco

from datasetdm_fast import _C
from datasetdm_fast.engine.labels import mask_rle

pytestmark = pytest.mark.core


def judge(masks):
    """What pycocotools says of the same masks: strings, areas, boxes."""
    rles = coco.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [rle["counts"].decode() for rle in rles], coco.area(rles), coco.toBbox(rles)


def agree(masks):
    encoded = mask_rle.encode(masks)
    strings, areas, boxes = judge(masks)
    assert [rle["counts"] for rle in encoded.rles] == strings
    assert all(rle["size"] == list(masks.shape[1:]) for rle in encoded.rles)
    np.testing.assert_array_equal(encoded.areas, areas)
    np.testing.assert_array_equal(encoded.boxes, boxes)
    for rle, mask in zip(encoded.rles, masks):
        np.testing.assert_array_equal(mask_rle.decode(rle), mask)
    return encoded


SHAPES = [
    (1, 1),  # smallest
    (1, 37),  # one row: every column is one pixel
    (41, 1),  # one column
    (8, 8),  # one strip of eight rows, exactly
    (63, 5),  # one row short of a word
    (64, 64),  # one word a column, exactly
    (65, 9),  # one row into the second word
    (127, 33),
    (130, 71),
    (512, 512),  # real image size
]


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_areas_and_boxes_equal_pycocotools(shape):
    height, width = shape
    generator = np.random.default_rng(height * 1000 + width)
    masks = [np.zeros(shape, bool), np.ones(shape, bool)]
    for y, x in {(0, 0), (height - 1, width - 1), (0, width - 1), (height - 1, 0), (height // 2, width // 2)}:
        one = np.zeros(shape, bool)
        one[y, x] = True
        masks += [one, ~one]
    for density in (0.01, 0.5, 0.99):
        masks.append(generator.random(shape) < density)
    for _ in range(4):
        box = np.zeros(shape, bool)
        top, left = generator.integers(0, height), generator.integers(0, width)
        box[top : top + generator.integers(1, height + 1), left : left + generator.integers(1, width + 1)] = True
        masks.append(box)
    agree(np.stack(masks))


def test_random_sizes_equal_pycocotools():
    generator = np.random.default_rng(0)
    for _ in range(300):
        height, width = generator.integers(1, 150, 2)
        agree(generator.random((2, height, width)) < generator.choice([0.02, 0.5, 0.98]))


def test_runs_of_any_length_are_painted_as_by_a_loop():
    """Also of no length, which no encoder writes: at the begin, in the middle and at the end."""
    generator = np.random.default_rng(6)
    for most in (3, 9, 140) * 100:
        height, width = generator.integers(1, most, 2).tolist()
        ends = np.array([0, height * (width // 2), height * width])  # also whole columns
        cuts = generator.choice([*ends, *generator.integers(0, height * width, 3)], generator.integers(0, 9))
        runs = np.diff([0, *sorted(cuts), height * width])
        columns = np.concatenate([np.full(length, k % 2 == 1) for k, length in enumerate(runs)])
        mask = mask_rle.decode({"size": [height, width], "counts": runs.tolist()})
        np.testing.assert_array_equal(mask, columns.reshape(width, height).T)


def test_any_non_zero_byte_is_set_and_layout_does_not_matter():
    masks = np.random.default_rng(1).integers(0, 3, (3, 20, 31)).astype(np.uint8) * 100
    expected = agree(masks > 0).rles
    assert mask_rle.encode(masks).rles == expected
    assert mask_rle.encode(np.asfortranarray(masks)).rles == expected
    assert mask_rle.encode(np.repeat(masks, 2, axis=2)[:, :, ::2]).rles == expected


def test_no_masks_give_empty_arrays():
    encoded = mask_rle.encode(np.zeros((0, 5, 7), bool))
    assert encoded.rles == [] and encoded.areas.shape == (0,) and encoded.boxes.shape == (0, 4)


def test_uncompressed_runs_there_and_back():
    mask = np.random.default_rng(2).random((1, 33, 20)) < 0.3
    rle = mask_rle.encode(mask).rles[0]
    runs = mask_rle.run_lengths(rle)
    assert runs.sum() == mask.size
    np.testing.assert_array_equal(mask_rle.decode({"size": [33, 20], "counts": runs.tolist()}), mask[0])
    expected = coco.frPyObjects({"size": [33, 20], "counts": runs.tolist()}, 33, 20)
    assert expected["counts"].decode() == rle["counts"]


def test_bytes_counts_are_read_as_pycocotools_gives_them():
    mask = np.random.default_rng(3).random((1, 9, 14)) < 0.5
    rle = coco.encode(np.asfortranarray(mask[0].astype(np.uint8)))
    np.testing.assert_array_equal(mask_rle.decode(rle), mask[0])


MALFORMED = [
    ({"size": [4, 4], "counts": ""}, "sum to 0 pixels, the size says 16"),
    ({"size": [4, 4], "counts": "4"}, "sum to 4 pixels"),  # too few
    ({"size": [4, 4], "counts": "a0"}, "run 0 has length 17, but 16 pixels remain"),  # too many
    ({"size": [4, 4], "counts": "P"}, "ends inside the number"),
    ({"size": [4, 4], "counts": "PPPPPPPPPPPP0"}, "longer than any run"),
    ({"size": [4, 4], "counts": "4\x01"}, "character 1 has code 1"),
    ({"size": [4, 4], "counts": "4\x00"}, "character 1 has code 0"),
    ({"size": [4, 4], "counts": "4p"}, "character 1 has code 112"),
    ({"size": [4, 4], "counts": b"4\xff"}, "outside ASCII"),
    ({"size": [4, 4], "counts": "4é"}, "outside ASCII"),
    ({"size": [4, 4], "counts": "O"}, "run 0 has length -1"),  # negative first run
    ({"size": [4, 4], "counts": [17]}, "16 pixels remain"),
    ({"size": [4, 4], "counts": [-1, 17]}, "length -1"),
    ({"size": [4, 4], "counts": [1.5, 14.5]}, "whole numbers"),
    ({"size": [4, 4], "counts": [2**63, 1]}, "whole numbers"),
    ({"size": [4, 4], "counts": [2**62, 2**62]}, "pixels remain"),  # would overflow if summed first
    ({"size": [4, 4], "counts": ["4", "12"]}, "whole numbers"),
    ({"size": [4, 4], "counts": [[4], [12]]}, "whole numbers"),
    ({"size": [4, 4], "counts": None}, "whole numbers"),
    ({"size": [0, 4], "counts": ""}, "at least 1"),
    ({"size": [-4, -4], "counts": "`0"}, "at least 1"),
    ({"size": [4], "counts": "`0"}, "two whole numbers"),
    ({"size": [4.0, 4], "counts": "`0"}, "two whole numbers"),
    ({"size": [2**20, 2**20], "counts": "`0"}, "at most 268435456"),  # asks for a tebibyte
    ({"size": [2**70, 1], "counts": "`0"}, "31 bits"),
    ({"size": [1, 2**31], "counts": "`0"}, "31 bits"),
    ({"size": [16384, 16384], "counts": "`0"}, "sum to"),  # refused before its 256 MiB are allocated
    ({"counts": "`0"}, "size and counts"),
    ("`0", "size and counts"),
]


@pytest.mark.parametrize(("rle", "said"), MALFORMED)
def test_malformed_strings_are_refused(rle, said):
    with pytest.raises(ValueError, match=said):
        mask_rle.decode(rle)


def test_the_largest_size_and_its_runs_are_read():
    """Runs of 29 bits, which take six characters; nothing is painted."""
    largest = {"size": [2**14, 2**14], "counts": [2**27 + 1, 2**27 - 1]}
    counts = coco.frPyObjects(largest, 2**14, 2**14)["counts"]
    for given in (largest, *(largest | {"counts": each} for each in (counts, np.uint32(largest["counts"])))):
        assert mask_rle.run_lengths(given).tolist() == largest["counts"]


def test_the_extension_checks_for_itself():
    for call, refusal in (
        (lambda: _C.rle_to_runs("", 0, 4), r"rle_to_runs: size is \[0, 4\], both sides must be at least 1"),
        (lambda: _C.rle_from_runs(np.zeros(0, np.int64), 0, 4), r"rle_from_runs: size is \[0, 4\]"),
        (lambda: _C.rle_from_runs(np.array([8, 7]), 4, 4), "sum to 15 pixels, the size says 16"),
    ):
        with pytest.raises(ValueError, match=refusal):
            call()


def test_random_strings_never_crash():
    generator = np.random.default_rng(4)
    for _ in range(2000):
        counts = bytes(generator.integers(40, 120, generator.integers(0, 30)).tolist())
        try:
            mask = mask_rle.decode({"size": [13, 17], "counts": counts})
        except ValueError:
            continue
        assert mask.shape == (13, 17)


@pytest.mark.parametrize("masks", [np.zeros((4, 4), bool), np.zeros((1, 4, 4), np.float32), np.zeros((1, 0, 4), bool)])
def test_encode_refuses_what_is_not_a_batch_of_masks(masks):
    with pytest.raises(ValueError, match=r"N, H, W|at least 1"):
        mask_rle.encode(masks)


def test_the_gil_is_released_while_encoding():
    masks = np.random.default_rng(5).integers(0, 2, (256, 512, 512), np.uint8).astype(bool)

    def turns_taken_meanwhile():
        worker = threading.Thread(target=mask_rle.encode, args=(masks,))
        turns = 0
        worker.start()
        while worker.is_alive():
            worker.join(0.001)
            turns += 1
        return turns

    # With the lock held the first join would return only at the end; a busy machine may need another try.
    assert any(turns_taken_meanwhile() > 3 for _ in range(10))


def test_a_count_beyond_64_bits_is_refused():
    for count, is_read in ((2**63 - 1, True), (2**63, False), (2**64, False)):
        if is_read:
            assert mask_rle._runs([count]).tolist() == [count]
        else:
            with pytest.raises(ValueError, match="expected a string or a list of whole numbers"):
                mask_rle._runs([count])
