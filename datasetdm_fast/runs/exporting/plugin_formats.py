"""Formats of other packages: their files are checked, and the package of one that fails is named."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasetdm_fast.config import EXPORT_FORMATS
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.view import Linked, SampleView
from datasetdm_fast.untrusted import documents


def check_format(name: str, entry: Any) -> Format:
    """The format that a package registers under a name."""
    format: Format = EXPORT_FORMATS.check_type(name, entry, Format)
    if any(isinstance(group, str) for group in format.needs):
        error = TypeError(f"needs is {format.needs!r}, expected groups of tasks such as (('semantic',), ('depth',))")
        raise EXPORT_FORMATS.failure(name, error, "does not load")
    return format


def convert_sample(name: str, format: Format, view: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
    """The files and the entry of a sample."""

    def convert() -> tuple[Files, Entry]:
        files, entry = format.convert_sample(view, plan)
        for path, content in files.items():
            documents.check_inside(path)
            if not isinstance(content, bytes | Linked):
                raise TypeError(f"{path}: a {type(content).__name__}, expected bytes or a Linked")
        json.dumps(entry)
        return files, entry

    return EXPORT_FORMATS.guard(name, convert, f"fails on sample {view.stored.id}")


def shared_files(name: str, format: Format, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
    """The files of all samples together, in chunks that are made on reading."""

    def list_files() -> dict[str, Iterable[bytes]]:
        files = dict(format.shared_files(plan, samples))
        return {documents.check_inside(path): _read_chunks(name, path, content) for path, content in files.items()}

    return EXPORT_FORMATS.guard(name, list_files, "fails on the files of all samples")


def _read_chunks(name: str, path: str, content: bytes | Iterable[bytes]) -> Iterator[bytes]:
    chunks = iter([content] if isinstance(content, bytes) else content)

    def read_next() -> bytes | None:
        chunk = next(chunks, None)
        if not isinstance(chunk, bytes | None):
            raise TypeError(f"a chunk is a {type(chunk).__name__}, expected bytes")
        return chunk

    while (chunk := EXPORT_FORMATS.guard(name, read_next, f"fails on its file {path}")) is not None:
        yield chunk
