"""Rows of a folder in Hugging Face's layouts: images with a metadata file, Parquet files, or Arrow files."""

from __future__ import annotations

import csv
import io
import json
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.shards import require_pyarrow
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    import pyarrow

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"  # a column of metadata files that names the image; a file of another column has it as suffix
LARGEST_METADATA = 2**31  # bytes; of 80,000 samples with things it is 120 MB
LARGEST_GROUP = 2**31  # bytes of a row group, unpacked: one is in memory at a time
STATE = "state.json"  # beside the Arrow files of `save_to_disk`, which it names
FEATURES = b"huggingface"  # key of a schema that describes the columns
EXPECTED = "Expected pictures with metadata.jsonl, Parquet files, or what save_to_disk of datasets wrote."


def open_rows(path: Path, split: str) -> MetadataRows | TableRows:
    reading.first_there(path)
    names = reading.SPLIT_NAMES.get(split, (split, split.replace("-", "_")))
    for name in names:
        if (path / name / STATE).exists():
            return TableRows(path / name, _saved_files(path / name))
    if (path / STATE).exists() and split == "train":
        return TableRows(path, _saved_files(path))
    for folder in (*(root / name for name in names for root in (path, path / "data")), path):
        for file in (folder / name for name in METADATA):
            if file.exists():
                return MetadataRows(file, path, names)
    for folder in (path, path / "data"):
        for name in names:
            for pattern in (f"{name}-*.parquet", f"{name}.parquet", f"{name}/*.parquet"):
                if files := sorted(folder.glob(pattern)):
                    return TableRows(path, files)
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    if files and split == "train":
        return TableRows(path, files)
    other_splits = (file for folder in (path, path / "data") for name in METADATA for file in folder.glob(f"*/{name}"))
    if files or any(other_splits) or any((*path.glob(STATE), *path.glob(f"*/{STATE}"))):
        raise reading.no_split(path, split)
    raise Refused(f"{path}: no data set of Hugging Face's kinds", EXPECTED)


class MetadataRows:
    """metadata.jsonl or metadata.csv beside its images; of several splits, the rows in folders of these `names`."""

    def __init__(self, file: Path, path: Path, names: Sequence[str]):
        self.folder = file.parent  # in which the files of the rows lie
        rows = _read_metadata(file)
        if file.parent == path:
            folders = tuple(f"{name}/" for name in names)
            inside = [row for row in rows if str(row.get(FILE_NAME)).startswith(folders)]
            if not inside and names[0] != "train":
                raise reading.no_split(path, names[0])
            rows = inside or rows
        columns = {FILE_NAME: "image"}
        self.rows = [
            {columns.get(name, name.removesuffix(f"_{FILE_NAME}")): value for name, value in row.items()}
            for row in rows
        ]
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> dict[str, Any]:
        return {name: self.rows[number].get(name) for name in self.columns}

    def features(self, column: str) -> Any:
        """None, as metadata files do not describe their columns."""
        return None


def _read_metadata(file: Path) -> list[dict[str, Any]]:
    if file.suffix != ".csv":
        lines = reading.numbered_lines(file, most=LARGEST_METADATA)
        return [documents.parse_object(line, f"{file}, line {number}") for number, line in lines]
    text = reading.read_text(file, LARGEST_METADATA)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise reading.bad(file, f"not readable as CSV ({error})") from error
    if strange := next((k for k, row in enumerate(rows, 2) if None in row or None in row.values()), 0):
        raise reading.bad(file, f"row {strange} has another number of cells than the first")
    return rows


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `save_to_disk` wrote."""
    state = documents.read_object(folder / STATE)
    try:
        documents.check_form(state, {"_data_files": [{"filename": str}]})
        if not state["_data_files"]:
            raise ValueError("it names no file")
    except ValueError as error:
        raise reading.bad(folder / STATE, f"not what save_to_disk writes ({error})") from error
    return [reading.inside(folder, file["filename"], folder / STATE) for file in state["_data_files"]]


class Group(NamedTuple):
    """Rows that are read together."""

    rows: int
    bytes: int  # unpacked
    read: Callable[[], pyarrow.Table]


def _read_groups(file: Path) -> tuple[pyarrow.Schema, list[Group]]:
    """The schema and the groups of a Parquet file, or of an Arrow file, which stays on the disk."""
    import pyarrow
    from pyarrow import ipc, parquet

    if file.suffix == ".arrow":
        stream = ipc.open_stream(pyarrow.memory_map(str(file)))
        tables = [pyarrow.Table.from_batches([batch]) for batch in stream]
        return stream.schema, [Group(table.num_rows, table.nbytes, partial(table.slice, 0)) for table in tables]
    reader = parquet.ParquetFile(file, memory_map=True)
    groups = [(k, reader.metadata.row_group(k)) for k in range(reader.metadata.num_row_groups)]
    return reader.schema_arrow, [
        Group(group.num_rows, group.total_byte_size, partial(reader.read_row_group, k)) for k, group in groups
    ]


class TableRows:
    """Parquet or Arrow files of one schema, a group of rows in memory at a time; rows are checked when read."""

    def __init__(self, folder: Path, files: Sequence[Path]):
        require_pyarrow("hf")
        self.folder, self.groups = folder, list[Group]()
        for file in files:
            if not file.is_file():
                raise reading.bad(file, "not a regular file")
            try:
                schema, groups = _read_groups(file)
            except Exception as error:
                kind = "an Arrow" if file.suffix == ".arrow" else "a Parquet"
                raise Refused(f"{file}: not {kind} file ({type(error).__name__})", EXPECTED) from error
            if any(not 0 <= group.bytes <= LARGEST_GROUP for group in groups):
                raise reading.bad(file, f"a row group of more than {LARGEST_GROUP} bytes")
            if file == files[0]:
                self.schema = schema
            elif schema.names != self.schema.names:
                raise reading.bad(file, f"its columns are not those of {files[0].name}")
            self.groups += groups
        self.columns: Sequence[str] = self.schema.names
        self.ends = list(accumulate(group.rows for group in self.groups)) or [0]
        self._cached: tuple[int, pyarrow.Table] | None = None
        self._lock = threading.Lock()  # a training reads from two threads

    def __len__(self) -> int:
        return self.ends[-1]

    def row(self, number: int) -> dict[str, Any]:
        try:
            table, place = self._group_of(number)
            row = table.slice(place, 1)
            row.validate(full=True)
            return row.to_pylist()[0]
        except Exception as error:  # Arrow raises nearly anything over a damaged file
            raise reading.bad(f"{self.folder}: row {number}", f"not readable ({type(error).__name__})") from error

    def _group_of(self, number: int) -> tuple[pyarrow.Table, int]:
        """The row group that holds a row, and its place there."""
        place = bisect_right(self.ends, number)
        with self._lock:
            if self._cached is None or self._cached[0] != place:
                self._cached = (place, self.groups[place].read())
            return self._cached[1], number - (self.ends[place - 1] if place else 0)

    def features(self, column: str) -> Any:
        """The description of a column in the schema, None where there is none."""
        try:
            description = json.loads((self.schema.metadata or {}).get(FEATURES, b"{}"))
            return description["info"]["features"].get(column)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
