"""What readers of image files share: a picture is loaded, framed, and the labels that follow from others are made."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.class_tables import photo_of, spoken
from datasetdm_fast.engine.pictures import framing
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, Picture, largest_first, present
from datasetdm_fast.training.truth import windows

MOST_SEMANTIC = 255  # classes of an 8-bit label map


class PictureSource(LabelledSource):
    rule = ""  # of windows.RULES, by which a training draws windows of its pictures
    images: Sequence[Path]  # where it is the file that names a record

    def name(self, record: int) -> str:
        return str(self.images[record])

    def picture(self, record: int) -> Picture:
        raise NotImplementedError

    def load(self, record: int, seed: int | None) -> Labelled:
        picture = self.picture(record)
        height, width = picture.image.shape[:2]
        if seed is not None:
            window = windows.draw_window(windows.RULES[self.rule], picture, self.size, seed)
        elif picture.person:
            window = windows.around(picture.person, self.size)
        else:
            window = framing.fit_window(height, width, self.size)
        return self.complete(framing.frame_picture(picture, window, self.size, self.least_mask))

    def with_caption(self, item: Labelled) -> Labelled:
        """The item with a caption of what it shows, where captions are made of the labels: a crop shows less. A word
        that is no class is said of any thing.
        """
        if item.named is None:
            return item
        numbers = () if item.semantic is None else np.flatnonzero(np.bincount(item.semantic.ravel()))
        shown = {self.classes[k] for k in numbers if k != IGNORE}
        shown |= {self.thing_classes[k] for k in (() if item.mask_classes is None else item.mask_classes)}
        known, has_things = {*self.classes, *self.thing_classes}, not shown.isdisjoint(self.thing_classes)
        left = tuple(name for name in item.named if (name in shown if name in known else has_things))
        return replace(item, caption=whole_characters(self.photo_of(left)), named=left)

    def complete(self, item: Labelled) -> Labelled:
        """Class masks from a label map, or a label map from masks, where the data set stores one of the two; the
        caption of what is shown.
        """
        item = self.with_caption(replace(item, caption=whole_characters(item.caption)))
        if item.masks is None and item.semantic is not None and self.thing_classes:
            things = self.things_of(item)
            masks = np.array([mask for _, mask in things], bool).reshape(-1, *item.semantic.shape)
            numbers = np.array([self.thing_classes.index(name) for name, _ in things], np.int64)
            return replace(item, masks=masks, mask_classes=numbers)
        if item.semantic is None and item.masks is not None and "semantic" in self.tasks:
            labels = np.zeros(item.image.shape[:2], np.uint8)
            for crowd in present(item.crowds):
                labels[crowd] = IGNORE
            for k in largest_first(item.masks):
                labels[item.masks[k]] = present(item.mask_classes)[k] + 1
            return replace(item, semantic=labels)
        return item

    def things_in(self, labels: np.ndarray | None) -> tuple[str, ...]:
        """The things in a label map, for a caption where the data set stores none."""
        named = enumerate(self.classes)
        return tuple(name for k, name in named if name in self.thing_classes and np.any(labels == k))

    def photo_of(self, names: Sequence[str]) -> str:
        """A caption of these classes, as a person says them."""
        known = tuple(dict.fromkeys((*self.classes, *self.thing_classes, *names)))
        words = dict(zip(known, spoken([self.called.get(name, name) for name in known], self.class_table), strict=True))
        return photo_of([words[name] for name in names])

    def areas(self, record: int) -> dict[str, int]:
        picture = self.picture(record)
        if picture.masks is not None:
            return largest(
                (self.thing_classes[k], int(make().sum())) for make, k in zip(picture.masks, picture.mask_classes)
            )
        areas = _count_pixels(picture, self.classes)
        return {name: area for name, area in areas.items() if name in self.thing_classes or not self.thing_classes}

    def map_areas(self, record: int) -> dict[str, int]:
        return _count_pixels(self.picture(record), self.classes)


def whole_characters(text: str) -> str:
    """The text without halves of characters, in which one that was cut may end."""
    return text.encode(errors="replace").decode()


def _count_pixels(picture: Picture, classes: Sequence[str]) -> dict[str, int]:
    """Pixels of each class that a label map shows."""
    if picture.semantic is None:
        return {}
    counts = np.bincount(picture.semantic.ravel(), minlength=256)
    return {name: int(counts[k]) for k, name in enumerate(classes) if counts[k]}


def largest(areas: Iterable[tuple[str, int]]) -> dict[str, int]:
    result: dict[str, int] = {}
    for name, pixels in areas:
        result[name] = max(result.get(name, 0), pixels)
    return result
