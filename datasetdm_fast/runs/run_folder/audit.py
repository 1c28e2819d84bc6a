"""Whether every file of a run folder is what its ledger says, and what is damaged."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import LABEL_KINDS, kind_of
from datasetdm_fast.errors import Missing, Refused, quote
from datasetdm_fast.runs.run_folder import page_files, seal
from datasetdm_fast.runs.run_folder.document import (
    ASIDE,
    DOCUMENT,
    DROPPED,
    GROWING,
    LEDGER,
    LOCK,
    RESTORE_DOCUMENT,
    NotInstalled,
    check_document,
    differences,
    maker,
    most_samples,
    read_document,
    sides,
)
from datasetdm_fast.runs.run_folder.events import EVENTS
from datasetdm_fast.runs.run_folder.kept import KEPT
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, QUARANTINED, Ledger, Row
from datasetdm_fast.untrusted import documents, images

# What of run.json a process that was killed while a run began to grow has told to the ledger alone; the same line again
# writes it there.
BEGUN_ANEW = {"config.keep", "plan.number", "plan.prompts", "plan.batch_size", *(f"config.{name}" for name in GROWING)}
REWRITE = "Run the line that made it once more: it is written anew."


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it was written."""

    place: str  # path inside the run folder
    what: str
    remedy: str


@dataclass(frozen=True)
class Report:
    path: str
    number: int  # samples of the plan
    done: int
    set_aside: int
    files: int
    bytes: int
    findings: list[Finding]
    dropped: int = 0

    @property
    def is_complete(self) -> bool:
        return self.done + self.set_aside + self.dropped >= self.number


def audit(
    folder: Path, *, threads: int = 0, on_progress: Callable[[int, int], None] = lambda done, number: None
) -> Report:
    """The report on a run folder, finished or not; nothing in it is changed. `on_progress` gets the
    number of checked samples and that of all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        alike = "" if folder.exists() else storage.named_alike(folder)
        raise Refused(
            f"{documents.quote(str(folder))}: {'not a' if folder.exists() else 'no such'} folder{alike}",
            "Name a run folder, or an export of convert.",
        )
    if not (folder / DOCUMENT).exists() and not (folder / LEDGER).exists():
        raise Refused(
            f"{folder}: holds neither {DOCUMENT} nor {LEDGER}, so it is not a run folder",
            "Name a run folder, or an export of convert.",
        )
    if (folder / seal.ELSEWHERE).exists():
        raise Refused(
            f"{folder}: its samples are in an object store",
            f"Give its URL, which {seal.ELSEWHERE} has, to python -m datasetdm_fast.audit.",
        )
    findings: list[Finding] = []
    document = _document(folder, findings)
    report = Report(str(folder), document["plan"]["number"] if document else 0, 0, 0, 0, 0, findings)
    if document and not any((folder / name).exists() for name in (LEDGER, seal.SEAL)):
        return report  # killed before its first sample

    def damaged(error: Exception) -> Report:
        findings.append(Finding(LEDGER, _told_of(error, folder, LEDGER), _restore(folder)))
        return report

    try:
        ledger = Ledger(folder / LEDGER, read_only=True)
    except (Refused, Missing) as error:
        if storage.FULL in str(error):  # which says nothing of the ledger
            raise
        return damaged(error)
    with ledger:
        try:
            return _audit(folder, document, ledger, findings, threads or os.cpu_count() or 1, on_progress)
        except Refused as error:  # a page of the ledger that only reading it shows to be damaged
            return damaged(error)


def _audit(
    folder: Path,
    document: dict[str, Any] | None,
    ledger: Ledger,
    findings: list[Finding],
    threads: int,
    on_progress: Callable[[int, int], None],
) -> Report:
    findings += [Finding(LEDGER, f"SQLite finds {line}", _restore(folder)) for line in ledger.damage()]
    noted = _noted(folder, ledger, findings)
    if (document := document or noted) is None:
        return Report(str(folder), 0, ledger.count(), ledger.count(QUARANTINED), 0, 0, findings)
    findings += [
        Finding(DOCUMENT, f"{line.replace(' asked for', ' in the ledger')}", "Restore run.json from a copy.")
        for part in noted or {}
        for line in differences(document.get(part), noted[part], part)
        if seal.is_sealed(folder) or line.partition(":")[0] not in BEGUN_ANEW
    ]
    is_indexed = ledger.read_note("indexed") is not None
    findings += _check_seal(folder)
    known: set[str] = set()
    files = total = 0
    done, quarantined = ledger.count(), ledger.indices(QUARANTINED)
    samples = done + ledger.count(DOUBTFUL)
    number, most = document["plan"]["number"], most_samples(document["config"], document["plan"]["number"])
    findings += [_beyond(folder, index, most) for index in quarantined if not 0 <= index < most]
    for k, (row, faults, read) in enumerate(_check_rows(folder, document, ledger.rows(DONE, DOUBTFUL), threads), 1):
        findings += faults
        known |= {path for path, _ in row.files.values()}
        files, total = files + len(row.files), total + read
        on_progress(k, samples)
    page = page_files.expected_files(document, ledger)
    if is_indexed:
        findings += _check_pictures(folder, page)
    findings += _check_strangers(folder, _product_folders(document), known | page)
    return Report(str(folder), number, done, len(quarantined), files, total, findings, ledger.count_dropped())


def _document(folder: Path, findings: list[Finding]) -> dict[str, Any] | None:
    try:
        document = read_document(folder)
        what = "is not there"
    except NotInstalled:  # which is no damage
        raise
    except (Refused, Missing) as error:
        document, what = None, _told_of(error, folder, DOCUMENT)
    if document is None:
        findings.append(Finding(DOCUMENT, what, RESTORE_DOCUMENT))
    return document


def _noted(folder: Path, ledger: Ledger, findings: list[Finding]) -> dict[str, Any] | None:
    """The content of run.json as the ledger remembers it."""
    text = ledger.read_note("run")
    if text is None:  # killed before its first sample
        return None
    try:
        document = documents.parse_json(text, "its note of run.json")
        check_document(document)
    except ValueError as error:
        findings.append(
            Finding(LEDGER, f"its note of run.json is damaged ({_told_of(error, folder, LEDGER)})", _restore(folder))
        )
        return None
    return document


def _told_of(error: Exception, folder: Path, name: str) -> str:
    """An error's sentence without the path it starts with, which the finding names already."""
    cause = error.cause if isinstance(error, (Refused, Missing)) else str(error)
    return cause.removeprefix(f"{folder / name}: ").removeprefix(f"{name}: ")


def _restore(folder: Path) -> str:
    return (
        f"Restore {LEDGER} from a copy, or make the run again in another folder: the same command gives the same bytes."
    )


def _again(folder: Path, document: Mapping[str, Any], id: str) -> str:
    return f"Make it again: {maker(document)} --out {quote(folder)} --only {id}"


def _beyond(folder: Path, index: int, number: int) -> Finding:
    return Finding(LEDGER, f"has a sample {index}, but the plan has {number}", _restore(folder))


def _check_seal(folder: Path) -> Iterator[Finding]:
    """What differs from the digests that were written down when the run was finished."""
    if not (folder / seal.SEAL).exists():
        yield Finding(seal.SEAL, "is not there, so nothing tells whether ledger and index files were changed", REWRITE)
        return
    try:
        digests = seal.read_seal(folder)
    except (Refused, Missing) as error:
        yield Finding(seal.SEAL, _told_of(error, folder, seal.SEAL), f"Delete it. {REWRITE}")
        return
    if not digests:  # the run goes on, or was killed
        return
    digests.pop(seal.OWN, None)
    if (folder / seal.SEAL).read_bytes() != seal.sealed(digests):
        yield Finding(seal.SEAL, "its bytes are not those that were written", f"Delete it. {REWRITE}")
    log = folder / f"{LEDGER}-wal"
    if log.exists() and log.stat().st_size:
        yield Finding(
            f"{LEDGER}-wal", "something was written to the ledger after the run was finished", _restore(folder)
        )
    for name, digest in digests.items():
        found = storage.sha256_of(folder / name)
        if found != digest:
            what = "its bytes are not those that were written" if found else "is not there"
            again = f"Delete it. {REWRITE}" if found else REWRITE
            yield Finding(name, what, {DOCUMENT: RESTORE_DOCUMENT, LEDGER: _restore(folder)}.get(name, again))


def _product_folders(document: Mapping[str, Any]) -> list[str]:
    """The folders whose every file is the product's, those of labels that the run did not make among them."""
    labels = (*LABEL_KINDS, *document["config"]["task"])
    roles = list(dict.fromkeys(role for label in labels for role in kind_of(label).roles))
    folders = [f"{place}{role}" for place in ("", ASIDE) for role in ("images", *roles)]
    return [
        *folders,
        *page_files.page_folders([role for role in roles if page_files.layer_with_picture(role)]),
        "state",
    ]


def _check_pictures(folder: Path, page: Iterable[str]) -> Iterator[Finding]:
    """Missing pictures of the page, which the seals of earlier versions do not name."""
    if (folder / page_files.SHEETS).exists():  # else the page was written without the samples' files
        digests = seal.read_seal(folder) if (folder / seal.SEAL).exists() else {}
        for name in sorted(set(page) - digests.keys()):
            if not (folder / name).exists():
                yield Finding(name, "is not there", REWRITE)


def _check_strangers(folder: Path, own: Iterable[str], known: set[str]) -> Iterator[Finding]:
    """Files in our folders that no sample has; a run that is going on or was killed has some that the same line again
    writes over.
    """
    state = {LEDGER, LOCK, seal.SEAL, KEPT, EVENTS, *(f"{LEDGER}-{kind}" for kind in ("wal", "shm", "journal"))}
    state |= {DROPPED.rstrip("/"), seal.QUEUE, f"{seal.QUEUE}-journal"}  # the queue of a process that was killed
    if not seal.is_sealed(folder):
        return
    for name in own:
        if not (folder / name).is_dir():
            continue
        for path in sorted((folder / name).iterdir()):
            inside = path.relative_to(folder).as_posix()
            # a process that is killed leaves a half-written file, which the next one removes
            if inside not in known and inside not in state and not storage.is_temporary(path):
                yield Finding(
                    inside, "no sample of the ledger has this file", "Delete it, or move it out of the run folder."
                )


def _check_rows(
    folder: Path, document: Mapping[str, Any], rows: Iterable[Row], threads: int
) -> Iterator[tuple[Row, list[Finding], int]]:
    """Every row with what is wrong with its sample and the bytes read for it, a few at a time."""
    waiting: deque[tuple[Row, Future[tuple[list[Finding], int]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for row in rows:
            waiting.append((row, pool.submit(check_sample, folder, document, row)))
            if len(waiting) > 4 * threads:
                first, future = waiting.popleft()
                yield first, *future.result()
        for first, future in waiting:
            yield first, *future.result()


def check_sample(folder: Path, document: Mapping[str, Any], row: Row) -> tuple[list[Finding], int]:
    """What is wrong with the files and labels of one row, and the bytes read."""
    id, config = row.request.id, document["config"]
    most = most_samples(config, document["plan"]["number"])
    if not 0 <= row.request.index < most:
        return [_beyond(folder, row.request.index, most)], 0
    findings, arrays, total = [], {}, 0
    has_plain_seeds = "seeds" not in document["plan"]
    if has_plain_seeds and row.request.seed != config["seed"] + row.request.index:
        findings.append(
            Finding(
                LEDGER,
                f"sample {id} has the seed {row.request.seed}, the plan says {config['seed'] + row.request.index}",
                _restore(folder),
            )
        )
    place = ASIDE if row.status == DOUBTFUL else ""
    expected = {"image": f"{place}images/{id}.{config['image_format']}"} | {
        role: f"{place}{role}/{id}.png"
        for task in config["task"]
        for role in kind_of(task).files(document["labels"][task])
    }
    if {role: name for role, (name, _) in row.files.items()} != expected:
        findings.append(
            Finding(
                LEDGER, f"sample {id} has the files {sorted(row.files)}, expected {sorted(expected)}", _restore(folder)
            )
        )
        return findings, 0
    for role, (name, stored) in row.files.items():
        try:
            data = storage.read(folder / name, images.LARGEST_IMAGE_FILE) if (folder / name).exists() else None
            if data is None:
                raise ValueError("is not there")
            total += len(data)
            if len(data) != stored.size:
                raise ValueError(f"has {len(data)} bytes, {stored.size} were written")
            if (digest := hashlib.sha256(data).hexdigest()) != stored.sha256:
                said = f"SHA-256 {digest[:12]}, expected {stored.sha256[:12]}"
                raise ValueError(f"its bytes are not those that were written ({said})")
            arrays[role] = np.array(images.decode_image(data, name))
        except (ValueError, Missing) as error:
            findings.append(Finding(name, _told_of(error, folder, name), _again(folder, document, id)))
    for task in config["task"]:
        findings += [
            Finding(LEDGER, f"sample {id}, {task}: {what}", _again(folder, document, id))
            for what in _label(task, row, arrays, document)
        ]
    return findings, total


def _label(task: str, row: Row, arrays: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the labels of one task, where its files could be read."""
    table = document["labels"][task]
    roles = ("image", *kind_of(task).files(table))
    if any(role not in arrays for role in roles):
        return
    try:
        height, width = sides(document, row.recipe)
        if any(arrays[role].shape[:2] != (height, width) for role in roles) or arrays["image"].shape[2:] != (3,):
            yield f"its files are not {width} x {height} pixels"
            return
        yield from kind_of(task).check(row.labels[task], arrays, table, (height, width))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        yield f"its labels have not the form they were written in ({type(error).__name__}: {str(error)[:100]})"
