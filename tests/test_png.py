"""The PNG writer of the extension, read back by Pillow and by zlib."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from datasetdm_fast import _C

pytestmark = pytest.mark.core

COLOURS = bytes(range(256)) * 3
KINDS = {
    "noise": lambda rng, shape: rng.integers(0, 256, shape),  # does not compress: stored blocks
    "one value": lambda rng, shape: np.full(shape, 7),  # one endless run
    "two values": lambda rng, shape: rng.integers(0, 2, shape) * 200,
    "ramp": lambda rng, shape: np.arange(np.prod(shape)).reshape(shape) % 256,  # repeats far apart
    "grain": lambda rng, shape: np.clip(rng.normal(128, 3, shape), 0, 255),  # what a decoder's images look like
    "rare values": lambda rng, shape: np.clip(rng.geometric(0.02, shape), 0, 255),  # Huffman codes as long as they get
}
# Smallest, odd sides, one long row, one column, a row that fills blocks exactly, several blocks.
SHAPES = [(1, 1), (5, 7), (1, 5000), (300, 1), (64, 2047), (700, 400)]


def made(kind, *shape):
    return KINDS[kind](np.random.default_rng(0), shape).astype(np.uint8)


def read(file):
    image = Image.open(io.BytesIO(file), formats=["PNG"])
    image.load()  # checks every checksum
    return image


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_come_back(kind, shape):
    colour, grey = made(kind, *shape, 3), made(kind, *shape)
    assert (np.array(read(_C.png_encode(colour))) == colour).all()
    assert (np.array(read(_C.png_encode(grey))) == grey).all()
    words = grey.astype(np.uint16) * 251
    back = np.array(read(_C.png_encode_words(words)))
    assert back.dtype == np.uint16 and (back == words).all()
    image = read(_C.png_encode(grey, COLOURS))
    assert image.mode == "P" and bytes(image.getpalette()) == COLOURS and (np.array(image) == grey).all()


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_as_small_as_those_of_the_slow_way(kind):
    pixels, slow = made(kind, 400, 300, 3), io.BytesIO()
    Image.fromarray(pixels).save(slow, "PNG", compress_level=6)
    file = _C.png_encode(pixels)
    assert len(file) < 1.05 * len(slow.getvalue()) and len(file) < pixels.size + 1000


def test_the_bytes_are_the_same_everywhere():
    numbers = np.arange(300 * 200 * 3, dtype=np.uint64)
    grain = (
        ((numbers * np.uint64(2654435761) >> np.uint64(20)) % np.uint64(5) + numbers % np.uint64(900) // np.uint64(4))
        .astype(np.uint8)
        .reshape(200, 300, 3)
    )
    files = [
        _C.png_encode(grain),
        _C.png_encode(np.ascontiguousarray(grain[..., 0]), COLOURS),
        _C.png_encode_words(grain[..., 1].astype(np.uint16) * 250),
    ]
    assert [hashlib.sha256(file).hexdigest()[:16] for file in files] == [
        "35eb7bd64eb1d1d0",
        "0febf20cbbb6292b",
        "0b52560024a198fc",
    ]


def read_back(pixels):
    """A label map is compressed as it is, without filters."""
    return np.array(read(_C.png_encode(pixels, COLOURS)))


@pytest.mark.parametrize("apart", [32768, 32769])
def test_a_repeat_is_taken_up_to_the_window_and_not_beyond(apart):
    pixels, mark = np.zeros((1, 40000), np.uint8), np.arange(9, 225, 9)
    pixels[0, 100:124] = pixels[0, 100 + apart : 124 + apart] = mark
    assert (read_back(pixels) == pixels).all()


def test_lengths_of_codes_that_are_themselves_as_unequal_as_can_be():
    """Bytes with codes of 2 to 11 bits; how many have each length would take codes of more than the seven bits there
    are for them (RFC 1951, 3.2.7).
    """
    lengths, rng = np.repeat(np.arange(2, 12), [1, 1, 3, 4, 6, 8, 14, 21, 34, 56]), np.random.default_rng(0)
    bytes_of = rng.permutation(255)[: len(lengths)] + 1
    pixels = rng.permutation(np.repeat(bytes_of, 2 ** (11 - lengths))).astype(np.uint8)[None]
    assert pixels.size == 2**11 and (read_back(pixels) == pixels).all()


def test_counting():
    pixels = made("rare values", 33, 50)
    assert (_C.count_bytes(pixels) == np.bincount(pixels.ravel(), minlength=256)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 2, 4), np.uint8),), r"\[H, W\]"),
        ((np.zeros(4, np.uint8),), r"\[H, W\]"),
        ((np.zeros((0, 4), np.uint8),), "at least 1"),
        ((np.zeros((2, 2), np.uint8), b"ab"), "3 for each"),
        ((np.zeros((2, 2), np.uint8), bytes(771)), "3 for each"),
        ((np.zeros((2, 2, 3), np.uint8), bytes(6)), "only pixels"),
        ((np.full((2, 2), 2, np.uint8), bytes(6)), "pixel value 2 has no colour"),
    ],
)
def test_what_is_no_image_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.png_encode(*arguments)


def test_other_types_are_refused():
    with pytest.raises(TypeError):
        _C.png_encode(np.zeros((2, 2), np.float32))
    with pytest.raises(TypeError):
        _C.png_encode_words(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="pixels have 3 dimensions, expected 2"):
        _C.png_encode_words(np.zeros((2, 2, 3), np.uint16))
