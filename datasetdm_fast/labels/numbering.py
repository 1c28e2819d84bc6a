"""The one table of a run's classes: the number that a class has in label maps and in files of COCO's form alike."""

from collections.abc import Mapping
from typing import Any

from datasetdm_fast.errors import Refused
from datasetdm_fast.foreign import documents
from datasetdm_fast.labels import by_kind, kind_of
from datasetdm_fast.labels.colours import OURS, strangers
from datasetdm_fast.labels.kind import Table
from datasetdm_fast.labels.names import task_of_label
from datasetdm_fast.labels.pose import PERSON
from datasetdm_fast.labels.semantic import BACKGROUND, IGNORE


def numbered(tables: Mapping[str, Table]) -> dict[str, Any]:
    """What run.json says of a run's classes, each at the place of its number, and of each label with these numbers.

    Label maps come first, as their pixels hold at most 255 numbers, and a semantic decoder's classes keep its own. The
    number 0 is never that of a thing, as readers of COCO files take it for the background.
    """
    maps, others = [], []
    for label in by_kind(tables):
        (maps if kind_of(label).is_map else others).extend(tables[label].get("classes", ()))
    if any(task_of_label(label) == "pose" for label in tables):
        others.append(PERSON)
    names = dict.fromkeys(maps)
    if len(names) > IGNORE:
        raise Refused(
            f"--task: the label maps of this run show {len(names)} classes in all, an 8-bit map holds {IGNORE}",
            "Make several runs, or ask for fewer --classes.",
        )
    if not maps or maps[0] in others:
        names = dict.fromkeys((BACKGROUND, *maps))
    classes = list(names | dict.fromkeys(others))
    order = {name: number for number, name in enumerate(classes)}
    return {"classes": classes, "labels": {label: kind_of(label).numbered(tables[label], order) for label in tables}}


def coloured(tables: Mapping[str, Table], palette: str) -> dict[str, Table]:
    """The tables with the palette that their label maps are written in; one without all of their classes is refused."""
    if palette == OURS:
        return dict(tables)
    for label, table in tables.items():
        if kind_of(label).is_map and (unknown := strangers(palette, table["classes"])):
            raise Refused(
                f"--palette {palette}: has no colour for {documents.quoted(unknown[0])} of {label}",
                "Choose a palette that has all classes of the label maps, or ours.",
            )
    return {label: {**table, "palette": palette} if kind_of(label).is_map else table for label, table in tables.items()}


def check_numbers(classes: Any, tables: Mapping[str, Table]) -> None:
    """A ValueError where run.json gives a class of a label another number than its table of all classes."""
    if classes is None:
        return
    documents.check_form(classes, [str], "classes")
    order = {name: number for number, name in enumerate(classes)}
    if len(order) < len(classes):
        raise ValueError("classes names a class twice")
    for label, table in tables.items():
        try:
            wanted = kind_of(label).numbered(table, order)
        except KeyError as error:
            raise ValueError(f"classes lacks {documents.quoted(error.args[0])}, which labels.{label} names") from error
        if wanted != table:
            raise ValueError(f"labels.{label} numbers its classes otherwise than classes")


def laid_out(wanted: Mapping[str, Table], stored: Mapping[str, Table]) -> dict[str, Table]:
    """The tables of a run as they would be in a run folder that an earlier version began: without what it did not know
    of how files are written.
    """
    return {
        label: {
            name: value
            for name, value in table.items()
            if name not in kind_of(label).layout or name in stored.get(label, {})
        }
        for label, table in wanted.items()
    }
