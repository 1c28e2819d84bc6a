"""The one table of a run's classes: the number that a class has in label maps and in files of COCO's form alike."""

from collections.abc import Mapping
from typing import Any

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels import by_kind, kind_of
from datasetdm_fast.engine.labels.class_tables import ClassTable, builtin_table
from datasetdm_fast.engine.labels.colours import BORDERS, CUSTOM, NOTHING, OURS, strangers
from datasetdm_fast.engine.labels.kind import Table
from datasetdm_fast.engine.labels.semantic import BACKGROUND
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents


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
        if kind_of(label).is_map and (unknown := strangers(colours, table["classes"])):
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
