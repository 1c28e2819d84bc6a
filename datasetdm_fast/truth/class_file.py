"""Class tables of the user's own, and those inside annotation files."""

from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.foreign.json_stream import JsonStream
from datasetdm_fast.labels import class_tables

LARGEST_TABLE = 2**22  # bytes


def own_table(path: str) -> class_tables.ClassTable:
    """The classes of a CSV file with the columns name, say and words, or of LVIS's or COCO's annotation file."""
    try:
        if path.endswith(".json"):
            categories = [value for key, value, _, _ in JsonStream(Path(path)) if key == "categories"]
            return class_tables.of_categories(categories, path)
        return class_tables.parse(storage.read(Path(path), LARGEST_TABLE).decode("utf-8-sig"), path)
    except ValueError as error:
        raise Refused(
            f"--class-table {path}: {error}", "The first line names the columns: number,name,say,colour,words."
        ) from error
