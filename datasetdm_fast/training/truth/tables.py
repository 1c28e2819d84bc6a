"""Rows of a folder as Hugging Face lays them out: pictures with a metadata file, Parquet, or saved Arrow files."""

from __future__ import annotations

import csv
import io
import json
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    import pyarrow

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"  # a column of metadata files that names the picture; a file of another column has it as suffix
LARGEST_METADATA = 2**31  # bytes; of 80,000 samples with things it is 120 MB
LARGEST_GROUP = 2**31  # bytes of a row group, unpacked: one is in memory at a time
FEATURES = b"huggingface"  # where a schema tells what its columns are
PUBLISHED = {"val": "validation"}  # split -> what `datasets` calls it in the names of Parquet files
EXPECTED = "Expected pictures with metadata.jsonl, Parquet files, or what save_to_disk of `datasets` wrote."


class Rows(Protocol):
    """A table that is read row by row."""

    folder: Path  # in which files that it names lie
    columns: Sequence[str]

    def __len__(self) -> int: ...

    def row(self, number: int) -> dict[str, Any]: ...

    def features(self, column: str) -> Any:
        """What the table says of a column, None where it says nothing."""


def opened(path: Path, split: str) -> Rows:
    """The rows of a split of a folder."""
    reading.first_there(path)
    for folder in (path / split, path / "data" / split, path):
        for file in (folder / name for name in METADATA):
            if file.exists():
                return MetadataRows(file, path, split)
    if (path / "dataset_dict.json").exists():
        splits = documents.read_object(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or split not in splits or not documents.check_inside(split):
            raise reading.no_split(path, split)
        return SavedRows(path / split)
    if (path / "state.json").exists():
        if split != "train":
            raise reading.no_split(path, split)
        return SavedRows(path)
    for folder in (path, path / "data"):
        for name in dict.fromkeys((split, PUBLISHED.get(split, split))):
            for pattern in (f"{name}-*.parquet", f"{name}.parquet", f"{name}/*.parquet"):
                if files := sorted(folder.glob(pattern)):
                    return ParquetRows(path, files)
    whole = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    if whole and split == "train":
        return ParquetRows(path, whole)
    elsewhere = (file for folder in (path, path / "data") for name in METADATA for file in folder.glob(f"*/{name}"))
    if whole or any(elsewhere):
        raise reading.no_split(path, split)
    raise Refused(f"{path}: no data set of Hugging Face's kinds", EXPECTED)


class MetadataRows:
    """metadata.jsonl or metadata.csv beside its pictures; of one for several splits, the rows in a split's folder."""

    def __init__(self, file: Path, path: Path, split: str):
        self.file, self.folder = file, file.parent
        found = _csv_rows(file) if file.suffix == ".csv" else _json_rows(file)
        if file.parent == path:
            names = [row[FILE_NAME] for row in found if isinstance(row.get(FILE_NAME), str)]
            inside = f"{split}/"
            if any(name.startswith(inside) for name in names):
                found = [row for row in found if str(row.get(FILE_NAME)).startswith(inside)]
            elif split != "train":
                raise reading.no_split(path, split)
        self.rows = [{_column(name): value for name, value in row.items()} for row in found]
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> dict[str, Any]:
        return {name: self.rows[number].get(name) for name in self.columns}

    def features(self, column: str) -> Any:
        return None


def _column(name: str) -> str:
    return "image" if name == FILE_NAME else name.removesuffix(f"_{FILE_NAME}")


def _json_rows(file: Path) -> list[dict[str, Any]]:
    found = [documents.parse_json(line, f"{file}, line {k}") for k, line in enumerate(_lines(file), 1)]
    if strange := next((k for k, row in enumerate(found, 1) if not isinstance(row, dict)), 0):
        raise reading.bad(file, f"line {strange} is no JSON object")
    return found


def _lines(file: Path) -> list[str]:
    return reading.lines(file, most=LARGEST_METADATA)


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    text = "\n".join(_lines(file))
    try:
        found = list(csv.DictReader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise reading.bad(file, f"not readable as CSV ({error})") from error
    if strange := next((k for k, row in enumerate(found, 2) if None in row or None in row.values()), 0):
        raise reading.bad(file, f"row {strange} has another number of cells than the first")
    return found


class ArrowRows:
    """What Parquet and saved Arrow files share: a schema that tells features, and rows that are checked when read."""

    folder: Path
    schema: pyarrow.Schema
    count: int

    @property
    def columns(self) -> Sequence[str]:
        return self.schema.names

    def __len__(self) -> int:
        return self.count

    def table_of(self, number: int) -> tuple[pyarrow.Table, int]:
        """A table in memory that holds a row, and its place there."""
        raise NotImplementedError

    def row(self, number: int) -> dict[str, Any]:
        try:
            table, place = self.table_of(number)
            one = table.slice(place, 1)
            one.validate(full=True)
            return one.to_pylist()[0]
        except Refused:
            raise
        except Exception as error:  # Arrow raises nearly anything over a damaged file
            raise reading.bad(f"{self.folder}: row {number}", f"not readable ({type(error).__name__})") from error

    def features(self, column: str) -> Any:
        try:
            found = json.loads((self.schema.metadata or {}).get(FEATURES, b"{}"))
            return found["info"]["features"].get(column)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


class ParquetRows(ArrowRows):
    """Parquet files of one schema, a row group in memory at a time."""

    def __init__(self, folder: Path, files: Sequence[Path]):
        _arrow()
        from pyarrow import parquet

        self.folder, self.groups, counts = folder, [], []
        for file in files:
            if not file.is_file():
                raise reading.bad(file, "not a regular file")
            try:
                opened = parquet.ParquetFile(file, memory_map=True)
                groups = [opened.metadata.row_group(k) for k in range(opened.metadata.num_row_groups)]
                schema = opened.schema_arrow
            except Exception as error:
                raise Refused(f"{file}: not a Parquet file ({type(error).__name__})", EXPECTED) from error
            if any(not 0 <= group.total_byte_size <= LARGEST_GROUP for group in groups):
                raise reading.bad(file, f"a row group of more than {LARGEST_GROUP} bytes")
            if file == files[0]:
                self.schema = schema
            elif schema.names != self.schema.names:
                raise reading.bad(file, f"its columns are not those of {files[0].name}")
            self.groups += [(opened, k) for k in range(len(groups))]
            counts += [group.num_rows for group in groups]
        self.ends = list(accumulate(counts))
        self.count = self.ends[-1] if self.ends else 0
        self._held: tuple[int, pyarrow.Table] | None = None
        self._lock = threading.Lock()  # a training reads from two threads

    def table_of(self, number: int) -> tuple[pyarrow.Table, int]:
        place = bisect_right(self.ends, number)
        with self._lock:
            if self._held is None or self._held[0] != place:
                file, group = self.groups[place]
                self._held = (place, file.read_row_group(group))
            return self._held[1], number - (self.ends[place - 1] if place else 0)


class SavedRows(ArrowRows):
    """What save_to_disk wrote: state.json names Arrow files, which are mapped into memory."""

    def __init__(self, folder: Path):
        arrow = _arrow()
        self.folder = folder
        state = documents.read_object(reading.first_there(folder / "state.json"))
        try:
            documents.check_form(state, {"_data_files": [{"filename": str}]})
            names = [documents.check_inside(entry["filename"]) for entry in state["_data_files"]]
            if state.get("_indices_data_files") or not names:
                raise ValueError("its rows are chosen by a file of indices, or there is none")
        except ValueError as error:
            raise reading.bad(folder / "state.json", f"not what save_to_disk wrote ({error})") from error
        tables = []
        for file in (folder / name for name in names):
            with storage.refusing(file):
                file.stat()
            try:
                tables.append(arrow.ipc.open_stream(arrow.memory_map(str(file))).read_all())
            except Exception as error:
                raise Refused(f"{file}: not an Arrow file ({type(error).__name__})", EXPECTED) from error
        try:
            self.table = arrow.concat_tables(tables)
        except arrow.ArrowInvalid as error:
            raise reading.bad(folder / "state.json", "its files have different columns") from error
        self.schema, self.count = self.table.schema, self.table.num_rows

    def table_of(self, number: int) -> tuple[pyarrow.Table, int]:
        return self.table, number


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise Missing("hf: the library `pyarrow` is not installed", "Install datasetdm-fast[hf].") from error
    return pyarrow
