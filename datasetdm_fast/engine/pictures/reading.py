"""Images, label maps, depth maps and lists of a data set; what is wrong with one is said with its name."""

import os
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps

from datasetdm_fast.data import IGNORE
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import LARGEST_STEP
from datasetdm_fast.engine.pictures.labelled import REPAIR
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents, images

LEAST_SIDE, MOST_SIDE = 16, 16384  # pixels
MOST_PIXELS = 2**26  # of a camera's picture: 8192 x 8192
LARGEST_LIST = 64 * 2**20  # bytes
PICTURES = (".jpg", ".jpeg", ".png")
# listed to be refused by name, not passed over
OTHER_PICTURES = (".bmp", ".webp", ".tif", ".tiff", ".gif", ".heic", ".avif")
COLOURS = ("RGB", "RGBA", "L", "LA", "P", "CMYK", "1")  # modes of Pillow that are an 8-bit picture
EIGHT_BITS = ("L", "P", "1")  # modes of Pillow; as depth they would be a picture of it, not metres
ORIENTATION = 0x0112  # EXIF's tag; 2 to 8 turn a picture, 1 and what else cameras write there does not
# split -> the names of folders and files that tools have for it
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
Turning = Callable[[Path | str, Image.Image, Image.Image], Image.Image]  # of a path, a picture as stored and as shown
CAPTIONS = 'Write {"a.jpg": "a dog on a sofa"}.'
AS_PUBLISHED = "Give the data set's own folder, laid out as it was published."
OF_DATA = "Give the folder of the data set itself."
REPAIR_FIRST = "Correct this first: no image can be read without it."


def bad(path: Path | str, reason: str) -> Refused:
    """The refusal of one file."""
    return Refused(f"{path}: {reason}", REPAIR)


def colour_image(path: Path, turned: Turning | None = None) -> np.ndarray:
    """[H, W, 3] uint8 of a PNG or JPEG file with sides of 16 to 16,384 pixels, as it is stored.

    Where EXIF says to turn it, `turned` chooses between the picture as stored and as shown.
    """
    return colours(path, images.read_image(path, most_pixels=MOST_PIXELS), turned)


def colours(path: Path | str, image: Image.Image, turned: Turning | None = None) -> np.ndarray:
    """The pixels [H, W, 3] uint8 of a decoded picture, which messages call by its path."""
    check_sides(path, image.size)
    if image.mode not in COLOURS:
        raise bad(path, f"its pixels are {image.mode}, expected an 8-bit picture: scale its values to 0 to 255")
    if turned:
        try:
            upright = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION) in range(2, 9) else None
        except Exception as error:  # Pillow's readers raise nearly anything
            raise bad(path, f"its EXIF data cannot be read ({type(error).__name__})") from error
        image = image if upright is None else turned(path, image, upright)
    return np.asarray(image.convert("RGB"))


def as_shown(path: Path | str, stored: Image.Image, upright: Image.Image) -> Image.Image:
    """For labels that were drawn on pictures as viewers show them."""
    return upright


def as_its_labels(labels: Path) -> Turning:
    """For labels that may lie on either: the one of their size; where both have it the picture is refused."""
    return as_sized(labels.name, lambda: images.read_image(labels, most_pixels=MOST_PIXELS).size)


def as_sized(labels: str, size: Callable[[], Sequence[int]]) -> Turning:
    """For labels of a name, whose size is only looked at if EXIF says to turn their picture."""

    def turn(path: Path | str, stored: Image.Image, upright: Image.Image) -> Image.Image:
        if stored.size == upright.size:
            raise Refused(
                f"{path}: its EXIF data turns it, and whether {labels} is turned too cannot be told from its size",
                "Save the picture in the orientation of its labels, or pass --skip-bad to continue without it.",
            )
        return upright if tuple(size()) == upright.size else stored

    return turn


def as_drawn(size: tuple[int, int]) -> Turning:
    """For labels of a program that turns pictures itself: as shown, unless only as stored it has the size they say."""
    return lambda path, stored, upright: stored if stored.size == size != upright.size else upright


def check_sides(path: Path | str, size: tuple[int, int]) -> None:
    if not all(LEAST_SIDE <= side <= MOST_SIDE for side in size):
        raise bad(path, f"{size[0]} x {size[1]} pixels, expected sides of {LEAST_SIDE} to {MOST_SIDE}")


def numbers(path: Path, shape: Sequence[int], is_deep: bool = False) -> np.ndarray:
    """[H, W] whole numbers of a PNG of one channel or a palette, over 8 bits where deep, as large as its image."""
    image = images.read_image(path, most_pixels=MOST_PIXELS, holds_numbers=True)
    if image.mode not in ("I", "I;16", *(() if is_deep else EIGHT_BITS)):
        raise bad(path, f"its pixels are {image.mode}, expected one number{' of 16 bits' if is_deep else ''} each")
    pixels = np.asarray(image).astype(np.int32)
    if pixels.shape != tuple(shape[:2]):
        raise bad(path, f"{pixels.shape[1]} x {pixels.shape[0]} pixels, but its image has {shape[1]} x {shape[0]}")
    return pixels


def binary_mask(path: Path, shape: Sequence[int], may_be_smaller: bool = False) -> np.ndarray:
    """[H, W] bool where a grey picture of two shades is neither black nor transparent, at its image's size."""
    image = images.read_image(path, most_pixels=MOST_PIXELS, holds_numbers=True)
    if image.mode not in (*EIGHT_BITS, "LA", "RGB", "RGBA"):
        raise bad(path, f"its pixels are {image.mode}, expected 0 and 255")
    pixels = np.asarray(image)
    if image.mode in ("RGB", "RGBA") and (pixels[..., :3] != pixels[..., :1]).any():
        raise bad(path, "its pixels have colours, expected 0 and 255")
    grey = pixels if pixels.ndim == 2 else pixels[..., 0]
    if image.mode == "P":  # in whose palette white may come before black; of one with colours, its numbers
        shown = np.asarray(image.convert("RGB"))
        if (shown == shown[..., :1]).all() and any(image.getpalette() or ()):
            grey = shown[..., 0]
    if image.mode in ("LA", "RGBA"):  # black where it is transparent; of one shade alone, what is opaque is white
        alpha = pixels[..., -1]
        if alpha.min() < alpha.max():
            grey = np.where(alpha > alpha.max() // 2, grey if grey.min() < grey.max() else 255, 0)
    mask = grey > (127 if grey.max() > 15 else grey.max() // 2)  # a file of 2 or 4 bits has 3 or 15 for white
    times = shape[0] // len(mask) if may_be_smaller else 1
    mask = mask.repeat(times, 0).repeat(times, 1) if times > 1 else mask
    if mask.shape != tuple(shape[:2]):
        raise bad(path, f"{grey.shape[1]} x {grey.shape[0]} pixels, but its image has {shape[1]} x {shape[0]}")
    return mask


def label_map(path: Path, shape: Sequence[int], classes: Sequence[str]) -> np.ndarray:
    """[H, W] uint8 class numbers, 255 = ignore; a number that names no class is refused."""
    pixels = numbers(path, shape)
    check_numbers(path, pixels, len(classes))
    return pixels.astype(np.uint8)


def check_numbers(path: Path | str, pixels: np.ndarray, classes: int) -> None:
    unknown = pixels[(pixels < 0) | ((pixels >= classes) & (pixels != IGNORE))]  # faster than sorting a photo's pixels
    if len(unknown):
        raise bad(
            path, f"the unknown class {unknown.min()}, expected 0 to {classes - 1}, or {IGNORE} for pixels to ignore"
        )


def depth_map(path: Path, shape: Sequence[int], units: float, farthest: float) -> np.ndarray:
    """[H, W] float32 metres of a 16-bit PNG with `units` to the metre; 0 where it is unknown or beyond `farthest`."""
    metres = numbers(path, shape, is_deep=True).astype(np.float32) / units
    return np.where(metres <= farthest, metres, 0).astype(np.float32)


def read_text(path: Path, most: int) -> str:
    try:
        return storage.read(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad(path, f"not UTF-8 at byte {error.start}") from error


def numbered_lines(path: Path, *, may_be_none: bool = False, most: int = LARGEST_LIST) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file of at most `most` bytes that are not empty, by number; none if `may_be_none`."""
    # other marks that Python takes for the end of a line may stand in a name or in a JSON text
    numbered = enumerate(map(str.strip, re.split("\r\n|\n|\r", read_text(path, most))), 1)
    filled = [(number, line) for number, line in numbered if line]
    if not filled and not may_be_none:
        raise bad(path, "no line in it")
    return filled


def lines(path: Path) -> list[str]:
    return [line for _, line in numbered_lines(path)]


def pairs(path: Path) -> list[tuple[str, str]]:
    """The image and the depth that each line of a list names; lines without depth are left out."""
    rows = [(number, line.split()) for number, line in numbered_lines(path)]
    for number, row in rows:
        if len(row) < 2:
            raise bad(path, f"line {number} names no image and depth")
    named = [(row[0], row[1]) for _, row in rows if row[1] != "None"]
    if not named:
        raise bad(path, "no line names a depth")
    return named


def inside(root: Path, name: str, listed_in: Path | str) -> Path:
    """The file of that name below a folder, whoever wrote the name."""
    try:
        return root / documents.check_inside(name)
    except ValueError as error:
        raise bad(listed_in, str(error)) from error


def listing(folder: Path, *endings: str, remedy: str = OF_DATA) -> list[Path]:
    """The files of a folder and its sub-folders with one of the endings, sorted by name."""
    if not storage.is_there(folder):
        raise Refused(f"{folder}: no such folder{storage.named_alike(folder)}", remedy)
    files, seen = [], set()

    def refuse(error: OSError) -> NoReturn:
        raise storage.refusal(error, error.filename) from error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link may lead back up
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        files += [Path(place, name) for name in names if name.lower().endswith(endings) and not name.startswith(".")]
    if not files:
        raise Refused(f"{folder}: no file that ends in {' or '.join(endings)}", remedy)
    return sorted(files)


def no_split(path: Path, split: str) -> Refused:
    """The refusal of a split in a data set that has none of that name."""
    return Refused(
        f"{path}: no split {split!r}", "Leave the brackets out for all images, or name the folder that holds the split."
    )


def split_folder(path: Path, split: str) -> Path:
    """The folder of a split in a data set, or the data set itself where it has none."""
    if (path / split).is_dir():
        return path / split
    if split != "train":
        raise no_split(path, split)
    return path


def names_of(folder: Path, paths: Sequence[Path]) -> list[str]:
    """What labels are found by, paths in the folder without an ending; the same name twice is refused."""
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    if twice := [name for name, next_name in pairwise(sorted(names)) if name == next_name]:
        raise bad(folder, f"{twice[0]!r} is the name of two images, and labels go by name")
    return names


def label_file(folder: Path, name: str, ending: str) -> Path:
    """The label file of a name, whose ending may be in capitals."""
    path, other = folder / f"{name}{ending}", folder / f"{name}{ending.upper()}"
    return other if other.exists() and not path.exists() else path


def first_there(*paths: Path, remedy: str = AS_PUBLISHED) -> Path:
    for path in paths:
        if path.exists():
            return path
    alike = storage.named_alike(paths[0])
    *first, last = map(str, paths)
    cause = f"found neither {', '.join(first)} nor {last}" if first else f"{last}: not there"
    raise Refused(f"{cause}{alike}", remedy)


def class_file(path: Path) -> tuple[str, ...]:
    """Class names, one a line in the order of their numbers."""
    names = lines(path)
    if len(set(names)) < len(names) or max(map(len, names)) > 200:
        raise bad(path, "its names are not short and different, one a line")
    return with_background(names)


def with_background(classes: Sequence[str]) -> tuple[str, ...]:
    """Class names whose first is called background where a data set writes it as Background or _background_."""
    first, *others = classes
    return ("background" if is_background(first) and "background" not in others else first, *others)


def is_background(name: str) -> bool:
    """Whether a class is what lies behind the things, however a data set writes it."""
    return name.strip("_ ").lower() == "background"


BACKGROUNDS = ("background", "none")  # names that decoders and data sets give to pixels of no class


def without_background(classes: Sequence[str]) -> tuple[str, ...]:
    """The classes that are things: all but a first one of that name."""
    return tuple(name for k, name in enumerate(classes) if k or name not in BACKGROUNDS)


def farthest_depth(path: Path) -> float:
    """The farthest depth that counts; 10 m, as indoors, where the file is not there."""
    if not path.exists():
        return 10.0
    try:
        metres = float(lines(path)[0])
    except ValueError:
        metres = 0.0
    if not 0 < metres <= LARGEST_STEP:
        raise bad(path, f"no number of metres up to {LARGEST_STEP}, what 16 bits hold")
    return metres
