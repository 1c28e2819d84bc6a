"""Result files: what was measured, where and with what, one file a run, complete after every part."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine.machine import ROOT
from datasetdm_fast.errors import Missing, Refused

FORMAT = 1
FOLDER = ROOT / "bench" / "results"
BUDGET = ROOT / "bench" / "gpu_budget.json"  # what calls cost, reckoned
BEGUN, DONE, BROKEN = "begun", "done", "broken"
SUITES = ("cpu", "gpu")
FEWER = "tuned-fewer"
REPEATED = "-repeated"  # ends the names of suites that are the same with other images, scenes and students
TUNED = ("tuned", FEWER, f"tuned{REPEATED}", FEWER + REPEATED)
WHOLE = ("claims", *TUNED, "training-free")  # suites of students
NEEDED = {"probe": "batches"}  # the part without which a file is none for the pages, where it is not the peers
PEERLESS = (*WHOLE, *NEEDED)


class ResultFile:
    """One run's file; parts that are there are not measured again."""

    def __init__(self, path: Path | None, document: dict[str, Any]):
        self.path, self.document = path, document

    @classmethod
    def open(cls, path: Path | None, head: Mapping[str, Any], *, goes_on: bool = False) -> ResultFile:
        """A new file, kept in memory alone where `path` is None, or one to go on with: of another device, commit or
        setting it is refused.

        What cannot be written is refused before anything is measured, and so is a file in its place that is no result
        file.
        """
        if path:
            with beside(path) as part:
                if path.is_dir():
                    raise Refused(f"{path}: is a folder, expected a file", "name a file with --out")
                part.write_bytes(b"")
        document = read(path) if path and path.exists() else None
        if not (goes_on and document):
            return cls(path, {"format": FORMAT, **head, "parts": {}})
        facts = [(name, document[name], head[name]) for name in ("suite", "setting")]
        machines = document["machine"], head["machine"]
        facts += [(name, *(machine[name] for machine in machines)) for name in ("device", "commit", "versions")]
        for name, there, here in facts:
            if there != json.loads(json.dumps(here)):
                raise Refused(f"{path}: was measured with {name} {there}, here it is {here}", "choose another --out")
        return cls(path, document)

    def begin(self, part: str) -> None:
        """Notes that a part was begun, so that one which takes the process with it is not tried for ever."""
        before = self.document["parts"].get(part, {})
        tries = before.get("tries", 0) if before.get("status") == BEGUN else 0
        self.document["parts"][part] = {**before, "status": BEGUN, "tries": tries + 1}
        self.save()

    def keep(self, part: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stores the rows so far of a part that was begun, unless an earlier try had come further."""
        begun = self.document["parts"][part]
        if timed(rows) >= timed(begun.get("rows", [])):
            begun["rows"] = list(rows)
            self.save()

    def leave(self, part: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stores the rows of a part that ran out of time: the same command measures it again."""
        self.keep(part, rows)
        self.forgive(part)

    def forgive(self, part: str) -> None:
        """Does not count the tries of a part that was begun: the last was ended from outside."""
        self.document["parts"][part]["tries"] = 0
        self.save()

    def give_up_broken(self) -> None:
        """Marks the parts that began twice and never ended."""
        for name, part in self.document["parts"].items():
            if part["status"] == BEGUN and part["tries"] > 1:
                self.document["parts"][name] = {"status": BROKEN, "rows": part.get("rows", [])}

    def store(self, part: str, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
        self.document["parts"][part] = {"status": DONE, "seconds": round(seconds, 1), "rows": list(rows)}
        self.save()

    def rows(self, part: str) -> list[dict[str, Any]]:
        return rows_of(self.document, part)

    def save(self) -> None:
        if self.path is None:
            return
        text = json.dumps(self.document, indent=1, allow_nan=False) + "\n"
        with beside(self.path) as part:
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name next to `path` for what is to become it; nothing is left there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except OSError as error:
        cause = f"{path}: cannot be written ({error.strerror or error})"
        raise Missing(cause, "make room there, or choose another --out") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = document["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"{path}: not a result file ({type(error).__name__}: {error})"
        raise Refused(cause, "name a file that the bench has written") from error
    if not known:
        cause = f"{path}: format {document['format']!r}, this version reads {FORMAT}"
        raise Refused(cause, "read it with the version that wrote it")
    return document


def timed(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many times the rows hold."""
    return sum(len(row.get("seconds_per_image", {}).get("rounds", [])) for row in rows)


def is_settled(document: Mapping[str, Any], part: str) -> bool:
    """Whether a part was measured, or began twice and never ended."""
    return document["parts"].get(part, {}).get("status") in (DONE, BROKEN)


def batches_of(document: Mapping[str, Any]) -> dict[str, int]:
    """The batch size every peer was measured at."""
    raced = (row for part in ("peers", "ladder") for row in rows_of(document, part))
    return {row["peer"]: row["batch"] for row in raced if row.get("batch")}


def rows_of(document: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The rows of a part, none where it was not measured; peers measured one by one on a GPU are rows of `peers`."""
    parts = document["parts"]
    names = [name for name in parts if name == part or name.startswith(f"{part} ")]
    rows: dict[str, dict[str, Any]] = {}
    for row in (row for name in names for row in parts[name].get("rows", [])):
        rows.setdefault(row.get("peer", str(len(rows))), row)
    return list(rows.values()) if len(names) != 1 else parts[names[0]].get("rows", [])


def cpu_suite(model: str) -> str:
    """The suite that results of a model on a CPU belong to: the pages compare those of the demo model."""
    return "cpu" if model == "demo" else f"cpu-{Path(model).name}"


def default_path(machine: Mapping[str, Any], kind: str = "") -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return FOLDER / f"{now()[:10]}-{kind}{device}-{machine['commit']}.json"


def unused(path: Path) -> Path:
    """The path itself, or where there is such a file the first free one with a number."""
    names = (path, *(path.with_stem(f"{path.stem}-{k}") for k in range(2, 1000)))
    return next(name for name in names if not name.exists())


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def newest(suite: str, folder: Path = FOLDER) -> Path | None:
    """The file of a suite that was measured last, if there is one."""
    return (measured(suite, folder) or [None])[-1]


def newest_of_each_machine(suite: str, folder: Path = FOLDER) -> list[Path]:
    """The same for every processor or GPU, the newest first."""
    found: dict[str, Path] = {}
    for path in reversed(measured(suite, folder)):
        found.setdefault(read(path)["machine"]["device"], path)
    return list(found.values())


def measured(suite: str, folder: Path = FOLDER) -> list[Path]:
    """The files of a suite in the order of their dates: those whose peers were measured, as a run of single parts is
    none for the pages.
    """
    documents = [(read(path), path) for path in sorted(folder.glob("*.json"))]
    found = [
        (document["date"], path)
        for document, path in documents
        if document["suite"] == suite and (suite in WHOLE or rows_of(document, NEEDED.get(suite, "peers")))
    ]
    return [path for _, path in sorted(found)]
