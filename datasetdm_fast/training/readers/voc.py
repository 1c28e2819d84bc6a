"""voc:PATH[SPLIT]: PASCAL VOC 2012, with SegmentationClassAug where it exists, and other classes laid out as VOC's."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.class_tables import BORDERS, voc_palette
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth.picture_source import PictureSource
from datasetdm_fast.training.truth.selection import VOC_CLASSES
from datasetdm_fast.untrusted import images

Colour = tuple[int, int, int]


def pack(colour: Sequence[int]) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def packed_colours(path: Path, shape: Sequence[int]) -> np.ndarray | None:
    """[H, W] int32 of the colours of a map as large as its image; None of one that holds numbers."""
    image = images.read_image(path, most_pixels=reading.MOST_PIXELS, holds_numbers=True)
    if image.mode not in ("RGB", "RGBA"):
        return None
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    if pixels.shape[:2] != tuple(shape[:2]):
        raise reading.bad(
            path, f"{pixels.shape[1]} x {pixels.shape[0]} pixels, but its image has {shape[1]} x {shape[0]}"
        )
    return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]


def read_label_map(path: Path) -> dict[str, Colour | None]:
    """The classes of a file of lines NAME:COLOUR:PARTS:ACTIONS with their colours, the background's first."""
    classes: dict[str, Colour | None] = {}
    lines = [line.split(":") for line in reading.lines(path) if not line.startswith("#")]
    for name, *rest in lines:
        parts = rest[0].split(",") if rest and rest[0] else []
        if not all(part.strip().isdecimal() and int(part) < 256 for part in parts) or len(parts) not in (0, 3):
            raise reading.bad(path, f"{rest[0]!r} is no colour, expected three numbers from 0 to 255")
        classes[name] = (int(parts[0]), int(parts[1]), int(parts[2])) if parts else None
    if len(classes) < len(lines) or len(classes) < 2 or not all(classes) or len(classes) > IGNORE:
        raise reading.bad(path, "its names are not different ones, the background's first")
    first = next((name for name in classes if reading.is_background(name)), None)
    return classes if first is None else {first: classes.pop(first), **classes}


def numbers_of(colours: Sequence[Colour | None]) -> np.ndarray | None:
    """[256] int32: the class of each number of a map where the colours of all classes are those of numbers in VOC's
    palette, as tools leave numbers out; else a number is a place in the list.
    """
    known = {pack(colour): number for number, colour in enumerate(voc_palette())}
    numbers = [known[pack(colour)] for colour in colours if colour and pack(colour) in known]
    if len({*numbers}) < len(colours):
        return None
    classes = np.full(256, -1, np.int32)
    classes[IGNORE] = IGNORE
    classes[numbers] = range(len(numbers))
    return classes


BORDER = pack(BORDERS["voc"])
NAME_FILES = ("class_names.txt", "classes.txt")  # a name a line, in the order of the numbers
ROBOFLOW_CLASSES, ROBOFLOW_MASK = "_classes.csv", "_mask.png"
LABEL_MAP = "labelmap.txt"
WHOLE = "default"  # what CVAT calls its only split


class Voc(PictureSource):
    """JPEGImages, label maps (grey, palette or colours), SegmentationObject for instances. In PATH or
    PATH/VOCdevkit/VOC2012; labelmap.txt, class_names.txt or _classes.csv may name other classes than VOC's.
    """

    classes = VOC_CLASSES
    thing_classes = VOC_CLASSES[1:]
    rule = "voc"
    captions_name_all = True

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        path = inner if (inner := path / "VOCdevkit" / "VOC2012").is_dir() else path
        self.path, self.objects = path, path / "SegmentationObject"
        self.map_ending = ".png"  # after an image's name
        self.colours: Mapping[int, int] = dict(zip(map(pack, voc_palette()), range(len(VOC_CLASSES))))
        self.numbers: np.ndarray | None = None  # class of each number in grey and palette maps, where they differ
        if (path / split / ROBOFLOW_CLASSES).exists() or (path / ROBOFLOW_CLASSES).exists():
            folder = path / split if (path / split).is_dir() else path  # NAME_mask.png beside each, as Roboflow exports
            names_file = folder / ROBOFLOW_CLASSES
            rows = [[cell.strip() for cell in row] for row in csv.reader(reading.lines(names_file))][1:]
            if not rows or any(len(row) != 2 or row[0] != str(number) for number, row in enumerate(rows)):
                raise reading.bad(names_file, "no table of pixel values from 0 on and class names")
            names = reading.with_background([name for _, name in rows])
            self.classes, self.thing_classes = names, names[1:]
            self.maps = self.pictures = self.list = folder
            self.map_ending = ROBOFLOW_MASK
            self.ids = sorted(file.name.removesuffix(ROBOFLOW_MASK) for file in folder.glob(f"*{ROBOFLOW_MASK}"))
            self.images = [folder / f"{name}.jpg" for name in self.ids]
        else:
            self._find_lists(split, tasks)
        self.has_objects = self.maps.name == "SegmentationClass" and self.objects.is_dir()
        self.tasks = ("semantic", *(("instance",) if self.has_objects else ()), "open-vocabulary")
        super().__init__(size, len(self.ids))

    def _find_lists(self, split: str, tasks: Sequence[str]) -> None:
        """Images and maps as VOC has them; without a list of a split, all that have a map are the split train."""
        path = self.path
        self._read_classes()
        lists = [
            path / "splits" / f"{split}_aug.txt",
            path / "splits" / f"{split}.txt",
            path / "ImageSets" / "Segmentation" / f"{split}.txt",
        ]
        maps = ["SegmentationClassAug", "SegmentationClass", "SegmentationClassPNG"]
        if "instance" in tasks and self.objects.is_dir():  # only the images of the original set have objects
            lists, maps = lists[::-1], [maps[1], maps[0], maps[2]]
        self.maps = reading.first_there(*(path / name for name in maps))
        if split == "train":
            lists.append(path / "ImageSets" / "Segmentation" / f"{WHOLE}.txt")
        if not any(file.exists() for file in lists) and split == "train" and not (path / "ImageSets").is_dir():
            self.list, self.ids = self.maps, sorted(file.stem for file in self.maps.glob("*.png"))
        else:
            self.list = reading.first_there(*lists)
            self.ids = [_image_id(line) for line in reading.lines(self.list)]
            if (path / LABEL_MAP).exists():  # CVAT lists pictures without a shape, too
                self.ids = [name for name in self.ids if (self.maps / f"{name}.png").exists()]
        if repeated := [name for name, count in Counter(self.ids).items() if count > 1]:
            raise reading.bad(self.list, f"{repeated[0]!r} occurs twice")
        self.pictures = path / "JPEGImages"
        self.images = [self.pictures / f"{name}.jpg" for name in self.ids]

    def _read_classes(self) -> None:
        self.named = "of VOC, and no labelmap.txt beside JPEGImages names others"
        if (file := self.path / LABEL_MAP).exists():
            self.named = f"in {LABEL_MAP}"
            colours = read_label_map(file)
            names = reading.with_background(tuple(colours))
            if names != VOC_CLASSES:
                self.classes, self.thing_classes = names, names[1:]
                known = {pack(colour): number for number, colour in enumerate(colours.values()) if colour}
                self.colours = known or dict(zip(map(pack, voc_palette()), range(len(colours))))
                self.numbers = numbers_of(tuple(colours.values()))
        elif file := next((self.path / name for name in NAME_FILES if (self.path / name).exists()), None):
            self.classes = reading.class_file(file)
            self.thing_classes = reading.without_background(self.classes)

    def picture(self, record: int) -> Picture:
        name = self.ids[record]
        endings = [*reading.PICTURES, *map(str.upper, reading.PICTURES)]
        files = [reading.inside(self.pictures, f"{name}{ending}", self.list) for ending in endings]
        path = next((file for file in files if file.exists()), files[0])
        maps = self.maps / f"{name}{self.map_ending}"
        image = reading.colour_image(path, reading.as_its_labels(maps))
        labels = self._label_map(maps, image.shape)
        masks, classes = self._objects(name, labels) if self.has_objects else (None, ())
        names = tuple(self.classes[k] for k in np.unique(labels) if k not in (0, IGNORE))
        return Picture(name, image, names, labels, masks, classes)

    def _label_map(self, path: Path, shape: Sequence[int]) -> np.ndarray:
        """[H, W] uint8 class numbers, by colours where the file has those."""
        if (packed := packed_colours(path, shape)) is None:
            pixels = reading.numbers(path, shape)
            if self.numbers is not None and pixels.min() >= 0 and pixels.max() < len(self.numbers):
                pixels = self.numbers[pixels]
            reading.check_numbers(path, pixels, len(self.classes))
            return pixels.astype(np.uint8)
        known = {**self.colours, BORDER: IGNORE}
        shown, places = np.unique(packed, return_inverse=True)
        if unknown := [value for value in shown.tolist() if value not in known]:
            colour = ",".join(str(unknown[0] >> shift & 255) for shift in (16, 8, 0))
            raise reading.bad(path, f"the colour {colour} is of no class {self.named}")
        return np.array([known[value] for value in shown.tolist()], np.uint8)[places].reshape(packed.shape)

    def _objects(self, name: str, labels: np.ndarray) -> tuple[list[Any], list[int]]:
        """The masks of the objects, and the class that most of each one's pixels have."""
        path = self.objects / f"{name}.png"
        packed, masks, classes = packed_colours(path, labels.shape), [], []
        objects = reading.numbers(path, labels.shape) if packed is None else packed
        for number in np.unique(objects):
            if number in (0, IGNORE if packed is None else BORDER):
                continue
            pixels = labels[objects == number]
            counts = np.bincount(pixels[(pixels != 0) & (pixels != IGNORE)], minlength=1)
            if not counts.any():
                raise reading.bad(path, f"object {number} lies on no class of {self.maps.name}")
            masks.append(partial(np.equal, objects, number))
            classes.append(int(counts.argmax()) - 1)
        return masks, classes


def _image_id(line: str) -> str:
    """The image of a line: its id, or the paths of image and label map as the augmented lists have them."""
    first = line.split()[0]
    return Path(first).stem if first.startswith("/") and first.endswith(".jpg") else line
