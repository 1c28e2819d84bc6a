"""voc:PATH[SPLIT]: PASCAL VOC 2012, with SegmentationClassAug where it is there."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.pictures import framing, reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.engine.pictures.pictures import PictureSource
from datasetdm_fast.training.truth.selection import VOC_CLASSES
from datasetdm_fast.untrusted import documents


class Voc(PictureSource):
    """JPEGImages, label maps (grey or palette), SegmentationObject for instances; Annotations must agree with them. In
    PATH or PATH/VOCdevkit/VOC2012; labelmap.txt may name other classes than VOC's, NAME:... a line.
    """

    classes = VOC_CLASSES
    thing_classes = VOC_CLASSES[1:]
    rule = framing.RULES["voc"]
    captions_name_all = True

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        path = inner if (inner := path / "VOCdevkit" / "VOC2012").is_dir() else path
        self.path, self.objects = path, path / "SegmentationObject"
        if (path / "labelmap.txt").exists() and not set(names := _label_map(path / "labelmap.txt")) <= set(VOC_CLASSES):
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
        self.ids = [_id(line) for line in reading.lines(self.list)]
        if len(set(self.ids)) < len(self.ids):
            raise reading.bad(
                self.list, f"{next(name for name, count in Counter(self.ids).items() if count > 1)!r} occurs twice"
            )
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
        self._check_annotation(name, image.shape)
        masks, kinds = self._things(name, labels) if self.has_objects else (None, ())
        named = tuple(self.classes[k] for k in np.unique(labels) if k not in (0, IGNORE))
        return Picture(name, image, named, labels, masks, kinds)

    def _things(self, name: str, labels: np.ndarray) -> tuple[list, list[int]]:
        path = self.objects / f"{name}.png"
        things = reading.numbers(path, labels.shape)
        masks, kinds = [], []
        for k in np.unique(things):
            if k in (0, IGNORE):
                continue
            below = labels[things == k]
            counts = np.bincount(below[(below != 0) & (below != IGNORE)], minlength=1)
            if not counts.any():
                raise reading.bad(path, f"object {k} lies on no class of {self.maps.name}")
            masks.append(partial(np.equal, things, k))
            kinds.append(int(counts.argmax()) - 1)
        return masks, kinds

    def _check_annotation(self, name: str, shape: tuple[int, ...]) -> None:
        path = self.path / "Annotations" / f"{name}.xml"
        if not path.exists():
            return
        root = documents.read_xml(path)
        said = [(root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
        if said != [str(shape[1]), str(shape[0])]:
            raise reading.bad(
                path, f"says {documents.quote(' x '.join(said))} pixels, but its image has {shape[1]} x {shape[0]}"
            )
        for thing in root.iterfind("object"):
            if (kind := (thing.findtext("name") or "").strip()) not in self.thing_classes:
                raise reading.bad(path, f"the unknown class {documents.quote(kind)}")


def _label_map(path: Path) -> tuple[str, ...]:
    """The classes of a file of lines NAME:COLOUR:PARTS:ACTIONS, in the order of their numbers."""
    names = tuple(line.partition(":")[0] for line in reading.lines(path) if not line.startswith("#"))
    if len(set(names)) < len(names) or len(names) < 2 or not all(names) or len(names) > IGNORE:
        raise reading.bad(path, "its names are not different ones, the background's first")
    return reading.with_background(names)


def _id(line: str) -> str:
    """The image of a line: its id, or the paths of image and label map as the augmented lists have them."""
    first = line.split()[0]
    return Path(first).stem if first.startswith("/") and first.endswith(".jpg") else line
