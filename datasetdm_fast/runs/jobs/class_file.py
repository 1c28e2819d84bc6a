"""Class tables of the user's own, and those inside annotation files."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.semantic import BACKGROUND
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.untrusted.json_stream import JsonStream

LARGEST_TABLE = 2**22  # bytes
NAME_A_TABLE = "Name the annotation file of LVIS or COCO, or a CSV file."


def listed_words(path: str, chosen: Sequence[str]) -> tuple[str, ...]:
    """The names of a table of the user's own in the order of their numbers, or those of them that are `chosen`."""
    table = own_table(path)
    if unknown := [name for name in chosen if name not in table.names]:
        raise Refused(
            f"--classes: {unknown[0]!r} is not in {path}{nearest(unknown[0], table.names)}",
            f"It has {', '.join(table.names[:20])}{' ...' if len(table.names) > 20 else ''}.",
        )
    numbered = sorted(table.classes, key=lambda word: len(table.classes) if word.number is None else word.number)
    return tuple(chosen) or tuple(word.name for word in numbered if word.name != BACKGROUND)


@cache  # an annotation file may have gigabytes
def own_table(path: str) -> class_tables.ClassTable:
    """The classes of a CSV file with the columns name, say and words, or of LVIS's or COCO's annotation file."""
    storage.check_given(Path(path), "--class-table", NAME_A_TABLE)
    try:
        if path.endswith(".json"):
            categories = [value for key, value, _, _ in JsonStream(Path(path)) if key == "categories"]
            return class_tables.of_categories(categories, path)
        return class_tables.parse(storage.read(Path(path), LARGEST_TABLE).decode("utf-8-sig"), path)
    except Refused as stop:  # of the file as a whole
        raise Refused(f"--class-table: {stop.cause}", stop.remedy) from stop
    except UnicodeDecodeError as error:
        raise Refused(f"--class-table {path}: not UTF-8 at byte {error.start}", "Save the file as UTF-8.") from error
    except ValueError as error:
        form = "The first line names the columns: number,name,say,colour,words."
        remedy = NAME_A_TABLE if path.endswith(".json") else form
        raise Refused(f"--class-table {path}: {error}", remedy) from error
