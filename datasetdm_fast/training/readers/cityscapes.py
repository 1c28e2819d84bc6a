"""cityscapes:PATH[SPLIT]: leftImg8bit and gtFine, 19 classes by train id."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.class_tables import builtin_table
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth.picture_source import PictureSource
from datasetdm_fast.training.truth.shapes import Things

CITYSCAPES_CLASSES = builtin_table("cityscapes").names
# label id -> train id
TRAIN_IDS = dict(zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19)))
MOST_LABELS = 34  # label ids 0 to 33, and -1 for number plates, which a PNG cannot hold
FIRST_THING = 11
THOUSAND = 1000  # an instance is so many times its label id and a number


class Cityscapes(PictureSource):
    """Label maps by train id, else by label id as downloaded; instances where there are instanceIds files."""

    classes = CITYSCAPES_CLASSES
    thing_classes = CITYSCAPES_CLASSES[FIRST_THING:]
    rule = "cityscapes"
    captions_name_all = True

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path, folder = path, path / "leftImg8bit" / split
        self.images = [image for image in reading.listing(folder, "_leftimg8bit.png")]
        self.truth = path / "gtFine" / split
        has_things = self._label_file(self.images[0], "instanceIds").exists()
        self.tasks = ("semantic", *(("instance",) if has_things else ()), "open-vocabulary")
        super().__init__(size, len(self.images))

    def _label_file(self, image: Path, kind: str) -> Path:
        return self.truth / image.parent.name / f"{image.name.removesuffix('_leftImg8bit.png')}_gtFine_{kind}.png"

    def picture(self, record: int) -> Picture:
        path = self.images[record]
        image = reading.colour_image(path)
        labels = self._labels(path, image.shape)
        things = self._things(path, image.shape).fields if "instance" in self.tasks else {}
        names = tuple(self.classes[k] for k in np.unique(labels) if k != IGNORE)
        return Picture(path.stem, image, names, labels, **things)

    def photo_of(self, names: Sequence[str]) -> str:
        return f"a photo of a {','.join(self.called.get(name, name) for name in names)}, the urban street"

    def _labels(self, path: Path, shape: tuple[int, ...]) -> np.ndarray:
        train_ids = self._label_file(path, "labelTrainIds")
        if train_ids.exists() or not (label_ids := self._label_file(path, "labelIds")).exists():
            return reading.label_map(train_ids, shape, self.classes)
        numbers = reading.numbers(label_ids, shape)
        reading.check_numbers(label_ids, numbers, MOST_LABELS)
        table = np.full(256, IGNORE, np.uint8)
        table[list(TRAIN_IDS)] = list(TRAIN_IDS.values())
        return table[numbers]

    def _things(self, path: Path, shape: tuple[int, ...]) -> Things:
        """Things, and as crowds the groups of things that were not separated, which have a label id alone."""
        file, things = self._label_file(path, "instanceIds"), Things()
        numbers = reading.numbers(file, shape)
        for number in np.unique(numbers):
            is_group = number < THOUSAND
            label_id = int(number) if is_group else int(number) // THOUSAND
            if not is_group and label_id >= MOST_LABELS:
                raise reading.bad(file, f"the unknown class {label_id} of instance {number}")
            if (class_id := TRAIN_IDS.get(label_id, -1) - FIRST_THING) >= 0:
                things.add(partial(np.equal, numbers, number), class_id, is_group)
        return things
