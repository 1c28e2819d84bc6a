"""How the labels of each task are stored, drawn, compared and numbered: one class per kind, none needs torch."""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.config import ATTENTION, FROM_IMAGE, LABELLER_KINDS, LABELS, TASK_KINDS, UNDECODED
from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.class_tables import BORDERS, CUSTOM, NOTHING, OURS, ClassTable, builtin_table
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.plugins import PartTable
from datasetdm_fast.untrusted import documents

DECODER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True)
class LabelName:
    """A task and the name of its decoder's folder; without the latter, the label of the task's own decoder."""

    task: str
    decoder: str = ""

    @classmethod
    def parse(cls, text: str) -> "LabelName":
        """The name that flags, run.json and the ledger write as TASK or TASK:DECODER; a ValueError for another text.

        >>> LabelName.parse("semantic:cityscapes").stem
        'semantic.cityscapes'
        """
        task, colon, decoder = text.partition(":")
        if task not in LABELS:
            raise ValueError(f"not one of {', '.join(LABELS)}{nearest(task, LABELS)}")
        if colon and task in UNDECODED:
            raise ValueError(f"labels of the labeller {task} have no decoder")
        if colon and not DECODER_NAME.fullmatch(decoder):
            raise ValueError("the name of a decoder has up to 63 letters, digits, - or _")
        return cls(task, decoder)

    @classmethod
    def of_stem(cls, stem: str) -> "LabelName":
        return cls.parse(stem.replace(".", ":", 1))

    def __str__(self) -> str:
        return f"{self.task}:{self.decoder}" if self.decoder else self.task

    @property
    def stem(self) -> str:
        """The name inside a file's name, where some systems allow no colon."""
        return file_stem(self.task, self.decoder)


def file_stem(stem: str, decoder: str) -> str:
    """What a file or folder is called that belongs to a label, `stem` being its name for the task's own decoder."""
    return f"{stem}.{decoder}" if decoder else stem


def tasks_of(labels: Iterable[str]) -> tuple[str, ...]:
    """The tasks of labels, each once."""
    return tuple(dict.fromkeys(map(task_of_label, labels)))


def task_of_label(label: str) -> str:
    """The task of a label that is known to be one."""
    return label.partition(":")[0]


def check_label(label: str) -> None:
    """Refuses what is no label, such as one that is misspelt."""
    if not isinstance(label, str) or task_of_label(label) not in LABELS:
        raise Refused(f"{label!r} is no label{nearest(label, LABELS)}", f"Choose from {', '.join(LABELS)}.")


def by_task(labels: Iterable[str]) -> list[str]:
    """Labels in the order of their tasks, those of one task as they are given."""
    return sorted(labels, key=lambda label: LABELS.index(task_of_label(label)))


BACKGROUND = "background"
LARGEST_STEP = 65535  # of a depth map of 16 bits
SHOWN_SCORE = 0.4  # instances below it are left out of pictures
SAME = 0.5  # IoU at which two masks or boxes are taken for one thing
Limit = tuple[float, float]  # of the median, of the 99th percentile
Pixels = Mapping[str, np.ndarray]  # role -> pixels of the file
Table = Mapping[str, Any]  # what run.json says of a task's labels: names and ranges


@dataclass(frozen=True)
class Gates:
    """Limits on the distance of two engines' labels: given the same input, and each engine on its own."""

    exact: Limit  # fp32 against fp32
    free_exact: Limit
    rounded: Limit  # fp16 or bf16 against fp32
    free_rounded: Limit


@dataclass(frozen=True)
class GalleryLayer:
    """What the gallery draws over an image.

    `drawing` is one of: map (a picture file with sharp pixels; `values` are the shares of background, of ignored pixels
    and of the other classes by number), picture (a smooth one), uncertainty (a grey file, clear where it is white),
    outlines (`values` are [class word, score, path of an SVG]), skeletons (`values` are x, y, visibility of every
    joint).
    """

    name: str
    title: str
    drawing: str
    role: str = ""  # of the file that is drawn
    picture: Callable[[np.ndarray], Image.Image] | None = None  # drawn in its place: a palette picture of its pixels
    # what the page holds of a sample, from record, table and what was traced
    values: Callable[[Any, Table, Any], Any] | None = None
    trace: Callable[[Any], Any] | None = None  # made of a record when its sample is written, as it takes long
    unit: str = ""  # where the values are a range that the page tells


class LabelKind(ABC):
    """How the labels of one task are stored, read back, checked, drawn and compared.

    `record` is what the ledger holds of a label beside its files, `table` what run.json says of all labels of the task.
    """

    attribute: str  # of a stored sample
    contents: str  # what the data set card says of its files
    layers: tuple[GalleryLayer, ...]
    gates: Gates
    table_form: Mapping[str, Any]
    pixel_bytes: float  # of its files for a pixel, worst case seen
    title: str = ""  # of its section in the data set card
    roles: tuple[str, ...] = ()  # of the files of one label, each ROLE/ID.png
    is_map: bool = False  # whether its pixels are class numbers, whose colours the classes have everywhere
    can_mask: bool = False  # whether it has `mask_of`, the pixels of a class
    can_be_masked: bool = False  # whether `within` can cut a label to such a mask
    can_be_tiled: bool = False  # whether the labels of a picture's tiles join to one of all, see labels.tiles
    coco_file: str = ""  # an index file in COCO's form, whose annotations are the records
    first_number = 0  # of the classes of a table that stands for itself, outside of a run
    only_class: str = ""  # of all its things, for a kind whose table lists no classes

    def for_decoder(self, decoder: str) -> "LabelKind":
        """This kind for a decoder that `--task` gives by name: files, layers and sections carry that name."""
        kind = copy.copy(self)
        kind.title = f"{self.title}: {decoder}"
        kind.roles = tuple(file_stem(role, decoder) for role in self.roles)
        kind.layers = tuple(
            replace(
                layer,
                name=f"{layer.name}--{decoder}",
                title=f"{layer.title}: {decoder}",
                role=layer.role and file_stem(layer.role, decoder),
            )
            for layer in self.layers
        )
        if self.coco_file:
            stem, dot, ending = self.coco_file.rpartition(".")
            kind.coco_file = file_stem(stem, decoder) + dot + ending
        for before, after in zip((*self.roles, self.coco_file), (*kind.roles, kind.coco_file)):
            kind.contents = kind.contents.replace(f"`{before}", f"`{after}") if before else kind.contents
        return kind

    @abstractmethod
    def encode(self, label: Any, labels: Mapping[str, Any], table: Table) -> tuple[dict[str, bytes], Any]:
        """Files by role and the record of a label, as its table says; `labels` are those of all tasks."""

    @abstractmethod
    def decode(self, pixels: Pixels, record: Any, table: Table) -> Any:
        """The label itself."""

    @abstractmethod
    def arrays(self, label: Any, table: Table) -> np.ndarray | dict[str, np.ndarray]:
        """What a torch data set gives of a label; classes have the numbers that they have in files."""

    @abstractmethod
    def picture(self, label: Any, image: np.ndarray) -> Image.Image:
        """What a reader of a page sees."""

    @abstractmethod
    def table(self, config: Any, size: int, words: Sequence[str]) -> dict[str, Any]:
        """The table of a run, from a decoder's configuration, the pixels of a side and the query words."""

    @abstractmethod
    def check(self, record: Any, pixels: Pixels, table: Table, sides: tuple[int, int]) -> Iterator[str]:
        """What is wrong with a stored label of an image of this height and width."""

    @abstractmethod
    def distance(self, predicted: Any, truth: Any) -> float:
        """The distance of two labels, 0 if they are equal."""

    def follow_colours(self, label: Any, image: np.ndarray) -> Any:
        """The label with outlines that follow the colours of its image [H, W, 3] uint8, where it has outlines."""
        return label

    def overlap(self, predicted: Any, truth: Any) -> float | None:
        """Mean IoU of what `truth` shows with the same in `predicted`; None for labels without areas."""
        return None

    @abstractmethod
    def merge(self, old: Any, new: Any, region: np.ndarray) -> Any:
        """The label `old` with the content of `new` inside of a region [H, W] bool."""

    def certainty(self, record: Any) -> float | None:
        """Mean confidence of a record, 0..1; None if it has none."""
        return None

    def figures(self, record: Any) -> Mapping[str, float]:
        """What samples can be sorted by, each under its name."""
        return {}

    def things(
        self, record: Any, table: Table, sides: tuple[int, int]
    ) -> Iterable[tuple[str, float, float, float, float]]:
        """Class word, score, share of the pixels, and middle (x, y as shares of the sides) of every thing."""
        return ()

    def steps(self, table: Table) -> float:
        """What a pixel of its file is divided by to give the layer's unit; 0 where it has none."""
        return 0.0

    def mask_of(self, label: Any, word: str) -> tuple[np.ndarray, np.ndarray]:
        """Where a class is [H, W] bool, and how sure that is of each pixel [H, W] float32; where `can_mask`."""
        raise NotImplementedError(f"{type(self).__name__}: labels that can mask others need a method `mask_of`")

    def within(self, label: Any, inside: np.ndarray, confidence: np.ndarray) -> Any:
        """What is left of a label inside such a mask; where `can_be_masked`."""
        raise NotImplementedError(f"{type(self).__name__}: labels that can be masked need a method `within`")

    def numbers(self, table: Table) -> list[int]:
        """The number that each class of its table has in files."""
        return table.get("numbers") or [self.first_number + k for k in range(len(table.get("classes", ())))]

    def names(self, table: Table) -> dict[int, str]:
        """The classes of its table by their numbers in files."""
        return dict(zip(self.numbers(table), table.get("classes", ()), strict=True))

    def with_numbers(self, table: Table, order: Mapping[str, int]) -> dict[str, Any]:
        """The table with the number that its classes have in all labels of the run."""
        return {**table, "numbers": [order[name] for name in table["classes"]]} if "classes" in table else dict(table)

    def count(self, record: Any) -> Mapping[Any, float]:
        """What the data set card adds up over all records."""
        return {}

    def section(self, table: Table, counts: Mapping[Any, float]) -> Iterable[str]:
        """Lines of the card, from these sums."""
        return ()

    def words(self, record: Any, table: Table, least: float) -> Iterable[str]:
        """The classes a label shows, on `least` pixels where it is a map."""
        return ()

    def ignored_colour(self, table: Table) -> tuple[int, ...]:
        """Red, green and blue of the ignored pixels of a map; nothing where there are none."""
        return ()

    def categories(self, table: Table) -> list[dict[str, Any]]:
        """The categories of the index file in COCO's form."""
        return []


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two masks, 1 where both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def mean_score(record: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean score of the entries of a record, None where it has none."""
    return sum(item["score"] for item in record) / len(record) if record else None


def round_float(value: float, digits: int = 3) -> float:
    """A short decimal that survives JSON unchanged, and never -0.0."""
    return round(float(value), digits) + 0.0


def markdown_cell(name: str) -> str:
    """A class word inside a Markdown table: nothing in it can open a tag, a link or a column."""
    return "".join(letter if letter.isalnum() or letter in " -_." else f"&#{ord(letter)};" for letter in name)


# a gallery opens with the first of them that its run has
GALLERY_ORDER = ("instance", "semantic", "open-vocabulary", ATTENTION, "depth", "pose")
LABEL_KINDS = PartTable("label", LabelKind, TASK_KINDS, LABELLER_KINDS, order=GALLERY_ORDER, make=lambda kind: kind())


@lru_cache(1024)
def kind_of(label: str) -> LabelKind:
    """The kind of a label written as TASK or TASK:DECODER; a ValueError where it is neither."""
    name = LabelName.parse(label)
    kind: LabelKind = LABEL_KINDS[name.task]
    return kind.for_decoder(name.decoder) if name.decoder else kind


def by_kind(labels: Iterable[str]) -> list[str]:
    """Labels in the order of LABEL_KINDS, those of one task as they are given."""
    order = LABEL_KINDS.names
    return sorted(labels, key=lambda label: order.index(task_of_label(label)))


def task_of(attribute: str) -> str:
    """The task whose labels a sample offers under this name; an AttributeError where there is none."""
    for task, kind in LABEL_KINDS.items():
        if kind.attribute == attribute:
            return task
    if attribute in LABEL_KINDS:
        raise AttributeError(f"labels of {attribute} are called {LABEL_KINDS[attribute].attribute!r}")
    known = [kind.attribute for kind in LABEL_KINDS.values()]
    raise AttributeError(f"no label is called {attribute!r}{nearest(attribute, known)}")


def mean_certainty(records: Mapping[str, Any]) -> float | None:
    """The mean over the kinds of labels whose decoder reports a confidence."""
    values = [kind_of(task).certainty(record) for task, record in records.items()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def with_outlines(labels: Sequence[Any], images: Iterable[np.ndarray], config: Any) -> list[Any]:
    """A decoder's labels, whose outlines follow the colours of images [H, W, 3] where its config says so."""
    if config.outlines != FROM_IMAGE:
        return list(labels)
    kind = LABEL_KINDS[config.task]
    pairs = zip(labels, images, strict=True)
    return [kind.follow_colours(label, np.ascontiguousarray(image)) for label, image in pairs]


def number_classes(tables: Mapping[str, Table]) -> dict[str, Any]:
    """What run.json says of a run's classes, each at the place of its number, and of each label with these numbers.

    Label maps come first, as their pixels hold at most 255 numbers, and a semantic decoder's classes keep its own. The
    number 0 is never that of a thing, as readers of COCO files take it for the background.
    """
    maps: list[str] = []
    others: list[str] = []
    for label in by_kind(tables):
        (maps if kind_of(label).is_map else others).extend(tables[label].get("classes", ()))
    others += [kind_of(label).only_class for label in tables if kind_of(label).only_class]
    is_thing_first = not maps or maps[0] in others
    names = dict.fromkeys((BACKGROUND, *maps) if is_thing_first else maps)
    if len(names) > IGNORE:
        raise Refused(
            f"--task: the label maps of this run show {len(names)} classes in all, an 8-bit map holds {IGNORE}",
            "Make several runs, or ask for fewer --classes.",
        )
    classes = list(names | dict.fromkeys(others))
    order = {name: number for number, name in enumerate(classes)}
    labels = {label: kind_of(label).with_numbers(table, order) for label, table in tables.items()}
    return {"classes": classes, "labels": labels}


def with_palette(tables: Mapping[str, Table], palette: str, custom: ClassTable | None = None) -> dict[str, Table]:
    """The tables with the palette that their label maps are written in; one without all of their classes is refused.
    `custom` is the table of the user's own words, whose colours the palette CUSTOM takes.
    """
    if palette == OURS:
        return dict(tables)
    colours = custom if palette == CUSTOM else builtin_table(palette)
    if colours is None:
        raise Refused(f"--palette {palette}: this run has no table of class words", "Add --class-table FILE.")
    for label, table in tables.items():
        names = [name for name in table["classes"] if name != BACKGROUND] if kind_of(label).is_map else []
        if unknown := [name for name in names if colours.colour(name) is None]:
            raise Refused(
                f"--palette {palette}: has no colour for {documents.quote(unknown[0])} of {label}",
                "Choose a palette that has all classes of the label maps, or ours.",
            )
    additions: dict[str, Table] = {label: {"palette": palette} for label in tables if kind_of(label).is_map}
    if palette == CUSTOM:
        for label in additions:
            additions[label] = {
                "palette": palette,
                "colours": [list(colours.colour(name) or NOTHING) for name in tables[label]["classes"]],
            }
    return {label: {**table, **additions.get(label, {})} for label, table in tables.items()}


def check_palette(table: Table) -> None:
    """A ValueError where the colours of a label's table are not those of a palette."""
    if (palette := table.get("palette", OURS)) not in (OURS, CUSTOM, *BORDERS):
        raise ValueError(f"palette is {documents.quote(palette)}")
    if palette == CUSTOM:
        documents.check_form(table.get("colours"), [[int]], "colours")
        if [len(each) for each in table["colours"]] != [3] * len(table["classes"]) or not all(
            0 <= value < 256 for each in table["colours"] for value in each
        ):
            raise ValueError("colours are not three numbers from 0 to 255 for each of its classes")


def check_numbers(classes: Any, tables: Mapping[str, Table]) -> None:
    """A ValueError where run.json gives a class of a label another number than its table of all classes."""
    documents.check_form(classes, [str], "classes")
    order = {name: number for number, name in enumerate(classes)}
    if len(order) < len(classes):
        raise ValueError("classes names a class twice")
    for label, table in tables.items():
        try:
            expected = kind_of(label).with_numbers(table, order)
        except KeyError as error:
            raise ValueError(f"classes lacks {documents.quote(error.args[0])}, which labels.{label} names") from error
        if expected != table:
            raise ValueError(f"labels.{label} numbers its classes otherwise than classes")
