"""A labelled image as its data set stores it, the same at the model's size, and what every data set offers."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.class_tables import ClassTable
from datasetdm_fast.errors import Missing, Refused, Unanswered

EVERY_CLASS = -1  # the class of a crowd in which nothing is right or wrong to find
Result = TypeVar("Result")
REPAIR = "Repair it, take it out of the data set, or pass --skip-bad to continue without it."


@dataclass(frozen=True)
class Labelled:
    """A real image with whatever truth its data set holds."""

    id: str
    image: np.ndarray  # [H, W, 3] uint8
    caption: str
    semantic: np.ndarray | None = None  # [H, W] uint8, 255 = ignore
    masks: np.ndarray | None = None  # [N, H, W] bool
    mask_classes: np.ndarray | None = None  # [N] index into the source's thing_classes
    depth: np.ndarray | None = None  # [H, W] float32 metres, 0 = unknown
    keypoints: np.ndarray | None = None  # [P, J, 3]: x, y, visibility 0..2
    keypoint_boxes: np.ndarray | None = None  # [P, 4]: x, y, width, height
    keypoint_areas: np.ndarray | None = None  # [P] pixels
    crowds: np.ndarray | None = None  # [C, H, W] bool: many things in one mask, neither right nor wrong to find
    crowd_classes: np.ndarray | None = None  # [C] index as above, or EVERY_CLASS
    searched: tuple[int, ...] | None = None  # the classes of things that were looked for, None = all
    not_exhausted: tuple[int, ...] = ()  # classes of which the image shows more things than there are masks
    named: tuple[str, ...] | None = None  # the classes that the caption is made of, None where it is stored


def present(array: np.ndarray | None) -> np.ndarray:
    """An array that the data set has for its task."""
    assert array is not None
    return array


def largest_first(masks: Sequence[np.ndarray] | np.ndarray) -> list[int]:
    """The places of masks in the order in which they are drawn into one map: small things lie on large ones."""
    return np.argsort([-mask.sum() for mask in masks], kind="stable").tolist()


@dataclass(frozen=True)
class Picture:
    """A labelled image at its own size, places in pixels; masks are made one at a time, as there may be thousands."""

    id: str
    image: np.ndarray  # [H, W, 3] uint8
    caption: str | tuple[str, ...]  # as it is stored, or the classes that it is to be made of
    semantic: np.ndarray | None = None  # [H, W] uint8, 255 = ignore
    masks: Sequence[Callable[[], np.ndarray]] | None = None  # each [H, W] bool
    mask_classes: Sequence[int] = ()
    crowds: Sequence[Callable[[], np.ndarray]] = ()
    crowd_classes: Sequence[int] = ()
    searched: tuple[int, ...] | None = None
    not_exhausted: tuple[int, ...] = ()
    depth: np.ndarray | None = None  # [H, W] float32 metres, 0 = unknown
    keypoints: np.ndarray | None = None  # [P, J, 3]
    keypoint_boxes: np.ndarray | None = None  # [P, 4]
    keypoint_areas: np.ndarray | None = None  # [P]
    person: tuple[float, float, float, float] | None = (
        None  # the box x, y, width, height to look at instead of the whole
    )

    def __post_init__(self) -> None:
        """Raises a ValueError in the reader where an array is not what these lines say."""
        sides = self.image.shape[:2]
        _check("image", self.image, (*sides, 3), np.uint8, "uint8")
        for name, array, kind, expected in (
            ("semantic", self.semantic, np.integer, "integers"),
            ("depth", self.depth, np.floating, "floating-point numbers"),
        ):
            if array is not None:
                _check(name, array, sides, kind, expected)

    @property
    def text(self) -> str:
        """The caption, empty where it is to be made."""
        return self.caption if isinstance(self.caption, str) else ""

    @property
    def named(self) -> tuple[str, ...] | None:
        """The classes that the caption is to be made of, None where it is stored. The order is drawn for each picture:
        a decoder that always reads them in the order of their numbers learns a class by its place in the caption.
        """
        names = self.caption
        return None if isinstance(names, str) else tuple(random.Random(ascii(self.id)).sample(names, len(names)))


class LabelledSource:
    """A data set: its vocabulary, its length and its items in a fixed order.

    With `skip_bad`, iteration leaves out what cannot be read and lists it in `skipped`; an index always raises.
    """

    classes: tuple[str, ...] = ()
    thing_classes: tuple[str, ...] = ()
    joints: tuple[str, ...] = ()
    limbs: tuple[tuple[int, int], ...] = ()
    max_depth: float = 0.0
    tasks: tuple[str, ...] = ()  # those it has truth for
    is_rendered: bool = False  # whether its address alone decides its items
    shows_persons: bool = False  # whether an item is one person of a picture, in the middle of a square
    captions_name_all: bool = False  # whether captions are made of the labels, or name every thing by their making
    class_table: ClassTable | None = None  # of the user's own words, for captions that are made of the labels
    called: Mapping[str, str] = {}  # class -> the name that such captions call it by instead of its own
    framing: str = "fit"
    layout: str = ""  # which of its files were taken, where several layouts are read or a file tells of some images
    skip_bad: bool = False
    least_mask: float = 1.0  # pixels at the model's size: smaller masks are dropped

    def __init__(self, size: int, count: int):
        self.size = size
        self.order: Sequence[int] = range(count)
        self.skipped: dict[str, str] = {}  # name -> reason
        self.digests: dict[int, str] = {}  # record -> that of its picture's pixels, where a training has read them

    def name(self, record: int) -> str:
        """How messages call a record: a file."""
        raise NotImplementedError

    def path_of(self, record: int) -> str:
        """How a list of images calls a record: the path of its file, or its id where it has none."""
        return self.name(record)

    def load(self, record: int, seed: int | None) -> Labelled:
        """A record at the model's size; with a seed, the part of it that upstream's rule draws."""
        raise NotImplementedError

    def areas(self, record: int) -> dict[str, int]:
        """Pixels of each class at the record's own size: all of them in a label map, the largest mask among things."""
        raise NotImplementedError

    def map_areas(self, record: int) -> dict[str, int]:
        """Pixels of all classes of a label map, if the data set has them."""
        return self.areas(record)

    def is_centred(self, record: int) -> bool:
        """Whether a person's joints lie around the centre of its box; data without persons have no say."""
        return True

    def origins(self, record: int) -> tuple[str, ...]:
        """The pictures that a record was made of: two records that share one are never held out from each other."""
        return ()

    def sequence(self, record: int) -> str:
        """The video that a record is a frame of, empty where the data set names none."""
        return ""

    def made_of(self, index: int) -> tuple[str, ...]:
        """The origins of item `index` and, where it is known, the digest of its pixels: copies are of one picture."""
        record = self.order[index]
        return (*self.origins(record), *([self.digests[record]] if record in self.digests else ()))

    def filmed_in(self, index: int) -> tuple[str, ...]:
        """The origins of item `index` and its sequence, whose frames are much alike."""
        sequence = self.sequence(self.order[index])
        return (*self.made_of(index), *([f"sequence {sequence}"] if sequence else ()))

    def with_caption(self, item: Labelled) -> Labelled:
        """The item with a caption of what it shows, where captions are made of the labels."""
        return item

    def things_of(self, item: Labelled) -> list[tuple[str, np.ndarray]]:
        """The things of an item with their masks: without masks, all pixels of a class that is one of things."""
        if item.masks is not None:
            return [(self.thing_classes[k], mask) for k, mask in zip(present(item.mask_classes), item.masks)]
        if item.semantic is None:
            return []
        masks = ((name, item.semantic == k) for k, name in enumerate(self.classes) if name in self.thing_classes)
        return [(name, mask) for name, mask in masks if mask.any()]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Labelled:
        if not 0 <= index < len(self.order):
            raise IndexError(index)
        return self.guard(self.load, self.order[index], index if self.framing == "upstream" else None)

    def __iter__(self) -> Iterator[Labelled]:
        are_all_bad = True
        for index in range(len(self)):
            if (item := self._read(index) if self.skip_bad else self[index]) is not None:
                are_all_bad = False
                yield item
        self._check_readable(are_all_bad)

    def draw_view(self, index: int, seed: int) -> Labelled:
        """Item `index` in another scale and crop, drawn by upstream's augmentation rule from the seed alone."""
        return self.guard(self.load, self.order[index], seed)

    def subset(self, indices: Sequence[int]) -> Self:
        """The data set with only these items, in this order."""
        fewer = copy.copy(self)
        fewer.order = [self.order[index] for index in indices]
        return fewer

    def readable(self) -> Self:
        """The data set with only the items that can be read, refused if none can; others are listed in `skipped`."""
        indices = [index for index in range(len(self.order)) if self.is_readable(index)]
        self._check_readable(not indices)
        return self.subset(indices)

    def is_readable(self, index: int) -> bool:
        """Whether an item can be read; one that cannot is listed in `skipped`."""
        return self._read(index) is not None

    def _read(self, index: int) -> Labelled | None:
        """An item; None where it cannot be read, which is listed in `skipped`."""
        try:
            return self[index]
        except Refused as stop:
            self.skipped[self.name(self.order[index])] = stop.cause
            return None

    def _check_readable(self, are_all_bad: bool) -> None:
        if len(self) and are_all_bad:
            raise Refused(
                f"none of {len(self)} images can be read; {next(iter(self.skipped.values()))}",
                "Repair the files, or name other data.",
            )

    def guard(self, read: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `read`; a file that is missing or may not be read is bad data like any other."""
        try:
            return read(*arguments)
        except OSError as error:
            raise Refused(storage.refusal(error, error.filename or "the data set").cause, REPAIR) from error
        except Unanswered:
            raise
        except Missing as stop:
            raise Refused(stop.cause, REPAIR if isinstance(stop.__cause__, OSError) else stop.remedy) from stop


def _check(name: str, array: np.ndarray, shape: tuple[int, ...], kind: type, expected: str) -> None:
    if array.shape != shape or not np.issubdtype(array.dtype, kind):
        value = f"{array.dtype} of shape {list(array.shape)}"
        raise ValueError(f"{name}: {value}, expected {expected} of shape {list(shape)}")
