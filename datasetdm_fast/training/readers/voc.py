"""voc:PATH[SPLIT]: PASCAL VOC 2012, with SegmentationClassAug where it exists."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth import windows
from datasetdm_fast.training.truth.picture_source import PictureSource
from datasetdm_fast.training.truth.selection import VOC_CLASSES


class Voc(PictureSource):
    """JPEGImages, label maps (grey or palette), SegmentationObject for instances. In PATH or PATH/VOCdevkit/VOC2012;
    labelmap.txt may name other classes than VOC's, NAME:... a line.
    """

    classes = VOC_CLASSES
    thing_classes = VOC_CLASSES[1:]
    rule = windows.RULES["voc"]
    captions_name_all = True

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        path = inner if (inner := path / "VOCdevkit" / "VOC2012").is_dir() else path
        self.path, self.objects = path, path / "SegmentationObject"
        if (path / "labelmap.txt").exists():
            names = _read_label_map(path / "labelmap.txt")
            if not set(names) <= set(VOC_CLASSES):
                self.classes, self.thing_classes = names, names[1:]
        lists = [
            path / "splits" / f"{split}_aug.txt",
            path / "splits" / f"{split}.txt",
            path / "ImageSets" / "Segmentation" / f"{split}.txt",
        ]
        maps = ["SegmentationClassAug", "SegmentationClass"]
        if "instance" in tasks and self.objects.is_dir():  # only the images of the original set have objects
            lists, maps = lists[::-1], maps[::-1]
        self.list = reading.first_there(*lists)
        self.ids = [_image_id(line) for line in reading.lines(self.list)]
        if repeated := [name for name, count in Counter(self.ids).items() if count > 1]:
            raise reading.bad(self.list, f"{repeated[0]!r} occurs twice")
        self.maps = reading.first_there(*(path / name for name in maps))
        self.has_objects = self.maps.name == "SegmentationClass" and self.objects.is_dir()
        self.tasks = ("semantic", *(("instance",) if self.has_objects else ()), "open-vocabulary")
        self.images = [path / "JPEGImages" / f"{name}.jpg" for name in self.ids]
        super().__init__(size, len(self.ids))

    def picture(self, record: int) -> Picture:
        name = self.ids[record]
        path, maps = reading.inside(self.path / "JPEGImages", f"{name}.jpg", self.list), self.maps / f"{name}.png"
        image = reading.colour_image(path, reading.as_its_labels(maps))
        labels = reading.label_map(maps, image.shape, self.classes)
        masks, classes = self._objects(name, labels) if self.has_objects else (None, ())
        names = tuple(self.classes[k] for k in np.unique(labels) if k not in (0, IGNORE))
        return Picture(name, image, names, labels, masks, classes)

    def _objects(self, name: str, labels: np.ndarray) -> tuple[list, list[int]]:
        """The masks of the objects, and the class that most of each one's pixels have."""
        path = self.objects / f"{name}.png"
        objects, masks, classes = reading.numbers(path, labels.shape), [], []
        for number in np.unique(objects):
            if number in (0, IGNORE):
                continue
            pixels = labels[objects == number]
            counts = np.bincount(pixels[(pixels != 0) & (pixels != IGNORE)], minlength=1)
            if not counts.any():
                raise reading.bad(path, f"object {number} lies on no class of {self.maps.name}")
            masks.append(partial(np.equal, objects, number))
            classes.append(int(counts.argmax()) - 1)
        return masks, classes


def _read_label_map(path: Path) -> tuple[str, ...]:
    """The classes of a file of lines NAME:COLOUR:PARTS:ACTIONS, in the order of their numbers."""
    names = tuple(line.partition(":")[0] for line in reading.lines(path) if not line.startswith("#"))
    if len(set(names)) < len(names) or len(names) < 2 or not all(names) or len(names) > IGNORE:
        raise reading.bad(path, "its names are not different ones, the background's first")
    return reading.with_background(names)


def _image_id(line: str) -> str:
    """The image of a line: its id, or the paths of image and label map as the augmented lists have them."""
    first = line.split()[0]
    return Path(first).stem if first.startswith("/") and first.endswith(".jpg") else line
