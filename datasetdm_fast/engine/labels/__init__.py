"""How the labels of each task are stored, drawn, compared and numbered: one class per kind, none needs torch."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from datasetdm_fast.config import ATTENTION, FROM_IMAGE, LABELLER_KINDS, TASK_KINDS
from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.class_tables import (
    BORDERS,
    CUSTOM,
    NOTHING,
    OURS,
    ClassTable,
    builtin_table,
)
from datasetdm_fast.engine.labels.kind import BACKGROUND, LabelKind, LabelName, Table, task_of_label
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.plugins import PartTable
from datasetdm_fast.untrusted import documents

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
