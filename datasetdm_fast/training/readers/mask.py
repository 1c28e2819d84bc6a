"""mask:PATH[SPLIT]: images with one binary mask each, 0 and 255, such as DIS5K's im and gt."""

from pathlib import Path

import numpy as np

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth.picture_source import PictureSource

FOLDERS = (("im", "gt"), ("images", "masks"), ("image", "mask"), ("imgs", "masks"), ("Image", "Mask"))
DIS5K = {"train": "DIS-TR", "val": "DIS-VD"}  # split -> its folder there; those of its tests are called as they are
MARK = "#"  # between the parts of a file name of DIS5K, of which the fourth is a class
OBJECT = "object"


class Masks(PictureSource):
    """im and gt, or images and masks, in PATH or PATH/SPLIT; the mask of an image has its name and is a PNG.

    What is not black is the object, which classes.txt may name, one line.
    """

    rule = "voc"
    tasks = ("semantic", "open-vocabulary")

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        whole = path
        path = next((inner for name in (split, DIS5K.get(split, split)) if (inner := path / name).is_dir()), path)
        if path == whole and split != "train":
            raise reading.no_split(path, split)
        pairs = [pair for pair in FOLDERS if all((path / name).is_dir() for name in pair)]
        if not pairs:
            expected = ", ".join(" and ".join(pair) for pair in FOLDERS)
            raise reading.bad(path, f"no folder of images beside one of masks, expected {expected}")
        self.folder, self.masks = (path / name for name in pairs[0])
        self.images = reading.listing(self.folder, *reading.PICTURES, *reading.OTHER_PICTURES)
        self.names = reading.names_of(self.folder, self.images)
        names = [path / "classes.txt", whole / "classes.txt"]
        class_lists = [reading.class_file(file) for file in names if file.exists()]
        self.thing_classes = reading.without_background(class_lists[0]) if class_lists else (OBJECT,)
        if len(self.thing_classes) != 1:
            raise reading.bad(path / "classes.txt", f"{len(self.thing_classes)} classes, a binary mask tells one")
        self.classes = ("background", *self.thing_classes)
        super().__init__(size, len(self.images))

    def picture(self, record: int) -> Picture:
        path, mask = self.images[record], reading.label_file(self.masks, self.names[record], ".png")
        image = reading.colour_image(path, reading.as_its_labels(mask))
        labels = reading.binary_mask(mask, image.shape).astype(np.uint8)
        parts = path.stem.split(MARK)
        shown = parts[3] if len(parts) > 4 else self.thing_classes[0]
        return Picture(path.stem, image, (shown,) if labels.any() else (), labels)
