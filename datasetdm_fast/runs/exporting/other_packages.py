"""Formats of other packages: what they give is checked, and the package of one that fails is named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.config import EXPORT_FORMATS
from datasetdm_fast.errors import Missing
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.view import Linked, SampleView
from datasetdm_fast.untrusted import documents


def checked(name: str, format: Any) -> Format:
    """The format that a package registers under a name."""
    found: Format = EXPORT_FORMATS.check_type(name, format, Format)
    if any(isinstance(group, str) for group in found.needs):
        error = TypeError(f"needs is {found.needs!r}, expected groups of tasks such as (('semantic',), ('depth',))")
        raise EXPORT_FORMATS.failure(name, error, "does not load")
    return found


def converted(name: str, format: Format, view: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
    """The files and the entry of a sample."""

    def made() -> tuple[Files, Entry]:
        files, entry = format.converted(view, plan)
        for path, content in files.items():
            documents.check_inside(path)
            if not isinstance(content, bytes | Linked):
                raise TypeError(f"{path}: a {type(content).__name__}, expected bytes or a Linked")
        json.dumps(entry)
        return files, entry

    found: tuple[Files, Entry] = EXPORT_FORMATS.guard(name, made, f"fails on sample {view.stored.id}")
    return found


def shared(name: str, format: Format, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
    """The files of all samples together, in chunks that are made when they are asked for."""

    def made() -> dict[str, Iterable[bytes]]:
        files = dict(format.shared(plan, samples))
        return {documents.check_inside(path): _chunks(name, path, content) for path, content in files.items()}

    found: dict[str, Iterable[bytes]] = EXPORT_FORMATS.guard(name, made, "fails on the files of all samples")
    return found


def _chunks(name: str, path: str, content: bytes | Iterable[bytes]) -> Iterator[bytes]:
    waiting = iter([content] if isinstance(content, bytes) else content)

    def chunk() -> bytes | None:
        found = next(waiting, None)
        if not isinstance(found, bytes | None):
            raise TypeError(f"a chunk is a {type(found).__name__}, expected bytes")
        return found

    while (found := EXPORT_FORMATS.guard(name, chunk, f"fails on its file {path}")) is not None:
        yield found


def overwriting(name: str, path: str, folder: Path) -> Missing:
    """What is said of a format that wrote a file twice."""
    return Missing(
        f"writers: {name!r} of the package {EXPORT_FORMATS.package(name)} writes {path} more than once",
        f"Update that package, or remove it, and delete {folder}.",
    )
