"""Whether every file of a run folder, or of its shards, is what its ledger says, and what is damaged; damaged shards
can be taken out.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.cores import count_cores, in_threads
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import LABEL_KINDS, kind_of
from datasetdm_fast.engine.loop.prompts import TURN
from datasetdm_fast.errors import Missing, Refused, Unanswered, quote
from datasetdm_fast.runs.run_folder.document import (
    CLAIMS,
    COMMANDS,
    DOCUMENT,
    DROPPED,
    GROWING,
    LEDGER,
    LOCK,
    QUARANTINE,
    RESTORE_DOCUMENT,
    NotInstalled,
    check_document,
    differences,
    is_sharded,
    made_by,
    maker,
    most_samples,
    quarantines,
    read_document,
    require_document,
    shard_size,
    sides,
)
from datasetdm_fast.runs.run_folder.folder import (
    SEAL,
    THIS,
    RunFolder,
    encode_seal,
    expected_files,
    is_sealed,
    layer_with_picture,
    page_folders,
    read_seal,
    unseal,
)
from datasetdm_fast.runs.run_folder.goal import goal_of
from datasetdm_fast.runs.run_folder.ledger import BLOCK, DONE, DOUBTFUL, QUARANTINED, Ledger, Row
from datasetdm_fast.runs.run_folder.selections import DROPPED_IDS, FILTER, parse_part, read_dropped
from datasetdm_fast.runs.run_folder.shard_places import ShardBucket, ShardPlace, folder_of, is_url, shard_place
from datasetdm_fast.runs.run_folder.shards import (
    RECORD,
    ShardEntry,
    ShardLedger,
    digest_of_shard,
    entry_name,
    index_name,
    list_shards,
    read_stored,
    sample_record,
    tar_name,
)
from datasetdm_fast.untrusted import documents, images

# Entries of run.json that only the ledger has if a process was killed while a run began to grow; the same command
# writes them to the file.
BEGUN_ANEW = {"plan.number", "plan.prompts", "plan.batch_size", *(f"config.{name}" for name in GROWING)}
REWRITE = "Run the line that made it once more: it is written anew."
RESTORE_LEDGER = (
    f"Restore {LEDGER} from a copy, or make the run again in another folder: the same command gives the same bytes."
)
CHANGED, MISSING = "its bytes are not those that were written", "is not there"
LOG_OF_0_1, QUEUE_OF_0_2 = "state/events.jsonl", "state/leases.sqlite"  # which earlier versions wrote
NAME_A_RUN = "Name a run folder. Of an export: sha256sum --check SHA256SUMS."


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it was written."""

    place: str  # path inside the run folder
    what: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """The result of an audit."""

    path: str
    number: int  # samples of the plan
    done: int
    quarantined: int
    files: int
    bytes: int
    findings: list[Finding]
    dropped: int = 0
    damaged: tuple[int, ...] = ()  # indices of samples that can be made again
    part: str = ""  # k/n where it is about a part of the shards
    used_up: bool = False  # whether --most-tries allows no further samples

    @property
    def is_complete(self) -> bool:
        return self.used_up or self.done + self.quarantined + self.dropped >= self.number


def audit(
    folder: Path, *, threads: int = 0, on_progress: Callable[[int, int], None] = lambda done, number: None
) -> Report:
    """The report on a run folder, finished or not; `on_progress` gets the number of checked samples and of all."""
    folder = Path(folder)
    if not folder.is_dir():
        alike = "" if folder.exists() else storage.named_alike(folder)
        fault = f"{'not a' if folder.exists() else 'no such'} folder{alike}"
        raise Refused(f"{folder}: {fault}", NAME_A_RUN)
    if not (folder / DOCUMENT).exists() and not (folder / LEDGER).exists():
        raise Refused(f"{folder}: holds neither {DOCUMENT} nor {LEDGER}, so it is not a run folder", NAME_A_RUN)
    document, findings = _check_document(folder)
    report = Report(str(folder), document["plan"]["number"] if document else 0, 0, 0, 0, 0, findings)
    has_ledger = (folder / LEDGER).exists() and (folder / LEDGER).stat().st_size > 0  # which SQLite creates empty
    if not (is_sealed(folder) or has_ledger or any((folder / name).exists() for name in ("samples.jsonl", "images"))):
        return report  # killed before its first sample, or in shards with a damaged run.json
    try:
        with Ledger(folder / LEDGER, read_only=True) as ledger:
            return _audit(folder, document, ledger, findings, threads or count_cores(), on_progress)
    except (Refused, Missing) as error:  # also a page of the ledger that only reading it shows to be damaged
        if isinstance(error, Missing) and (storage.FULL in str(error) or (folder / LEDGER).exists()):
            raise  # a disk or a file of a sample that cannot be read, which is no damage of the ledger
        cause = _cause(error, folder, LEDGER) if (folder / LEDGER).exists() else MISSING
        findings.append(Finding(LEDGER, cause, RESTORE_LEDGER))
        return report


def _audit(
    folder: Path,
    document: dict[str, Any] | None,
    ledger: Ledger,
    findings: list[Finding],
    threads: int,
    on_progress: Callable[[int, int], None],
) -> Report:
    """The report, once `findings` has what is wrong; a ledger that cannot be read to its end leaves it what was found
    before.
    """
    findings += [_ledger_fault(f"SQLite finds {line}") for line in ledger.damage()]
    noted, wrong = _check_noted(folder, ledger)
    findings += wrong
    if (document := document or noted) is None:
        return Report(str(folder), 0, ledger.count(), ledger.count(QUARANTINED), 0, 0, findings)
    findings += [
        Finding(DOCUMENT, f"{line.replace(' asked for', ' in the ledger')}", "Restore run.json from a copy.")
        for part in noted or {}
        for line in differences(document.get(part), noted[part], part)
        if is_sealed(folder) or line.partition(":")[0] not in BEGUN_ANEW
    ]
    findings += _check_seal(folder)
    known = expected_files(document, ledger)
    files, total, damaged = 0, 0, []
    done, quarantined = ledger.count(), ledger.indices(QUARANTINED)
    samples = done + ledger.count(DOUBTFUL)
    number, most = document["plan"]["number"], most_samples(document["config"], document["plan"]["number"])
    findings += [_beyond(index, most) for index in quarantined if not 0 <= index < most]
    check = partial(_check_samples, folder, document)
    checked = in_threads(check, ledger.rows(DONE, DOUBTFUL), max(BLOCK // 4, 1), threads, lambda: False)
    for k, (row, faults) in enumerate((pair for block in checked for pair in block), 1):
        findings += faults
        damaged += [row.request.index] if faults else []
        known |= {file.path for file in row.files.values()}
        files, total = files + len(row.files), total + sum(file.stored.size for file in row.files.values())
        on_progress(k, samples)
    findings += _check_strangers(folder, _product_folders(document), known)
    findings += _check_dropped(folder, ledger)
    counts = (number, done, len(quarantined), files, total)
    used_up = False
    if quarantines(document["config"]):
        goal = goal_of(document["config"], number)
        used_up = goal.is_reached(ledger.tally(goal.number, len(goal.names)))
    return Report(str(folder), *counts, findings, ledger.count_dropped(), tuple(damaged), used_up=used_up)


def _check_document(folder: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The content of run.json, None where it is damaged or missing, and what is wrong with it."""
    try:
        document, fault = read_document(folder), MISSING
    except NotInstalled:  # which is no damage
        raise
    except (Refused, Missing) as error:
        document, fault = None, _cause(error, folder, DOCUMENT)
    return document, [] if document else [Finding(DOCUMENT, fault, RESTORE_DOCUMENT)]


def _check_noted(folder: Path, ledger: Ledger) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The content of run.json as the ledger has it, None where that is damaged or missing, and what is wrong there."""
    text = ledger.read_note("run")
    if text is None:  # killed before its first sample
        return None, []
    try:
        document = documents.parse_json(text, "it")
        check_document(document)
    except ValueError as error:
        return None, [_ledger_fault(f"its note of run.json is damaged ({_cause(error, folder, LEDGER)})")]
    return document, []


def _cause(error: Exception, folder: Path, name: str) -> str:
    """An error's sentence without the path it starts with, which the finding names already."""
    cause = error.cause if isinstance(error, (Refused, Missing)) else str(error)
    return cause.removeprefix(f"{folder / name}: ").removeprefix(f"{name}: ")


def _ledger_fault(what: str) -> Finding:
    return Finding(LEDGER, what, RESTORE_LEDGER)


def _beyond(index: int, number: int) -> Finding:
    return _ledger_fault(f"has a sample {index}, but the plan has {number}")


def _check_seal(folder: Path) -> Iterator[Finding]:
    """What differs from the digests that were written down when the run was finished."""
    if not (folder / SEAL).exists():
        yield Finding(SEAL, "is not there, so nothing tells whether ledger and index files were changed", REWRITE)
        return
    try:
        digests = read_seal(folder)
    except (Refused, Missing) as error:
        yield Finding(SEAL, _cause(error, folder, SEAL), f"Delete it. {REWRITE}")
        return
    if not digests:  # the run is in progress, or was killed
        return
    digests.pop(THIS, None)
    if (folder / SEAL).read_bytes() != encode_seal(digests):
        yield Finding(SEAL, CHANGED, f"Delete it. {REWRITE}")
    with suppress(FileNotFoundError):  # as usual, unless another process has just opened the ledger
        if (folder / f"{LEDGER}-wal").stat().st_size:
            what = "something was written to the ledger after the run was finished"
            yield Finding(f"{LEDGER}-wal", what, RESTORE_LEDGER)
    for name, digest in digests.items():
        current = storage.sha256_of(folder / name)
        if current != digest:
            remedy = {DOCUMENT: RESTORE_DOCUMENT, LEDGER: RESTORE_LEDGER}.get(name)
            yield Finding(name, CHANGED if current else MISSING, remedy or ("Delete it. " if current else "") + REWRITE)


def _product_folders(document: Mapping[str, Any]) -> list[str]:
    """The folders whose every file is the product's, those of labels that the run did not make among them."""
    labels = (*LABEL_KINDS, *document["config"]["task"])
    roles = list(dict.fromkeys(role for label in labels for role in kind_of(label).roles))
    folders = [f"{place}{role}" for place in ("", QUARANTINE) for role in ("images", *roles)]
    return [*folders, *page_folders([role for role in roles if layer_with_picture(role)]), "state"]


def _check_strangers(folder: Path, folders: Iterable[str], known: set[str]) -> Iterator[Finding]:
    """Files in our folders that no sample has; a run in progress has some that the same line writes over."""
    state = {LEDGER, LOCK, SEAL, FILTER, LOG_OF_0_1, *(f"{LEDGER}-{kind}" for kind in ("wal", "shm", "journal"))}
    state |= {DROPPED.rstrip("/"), f"state/{CLAIMS}", QUEUE_OF_0_2, f"{QUEUE_OF_0_2}-journal"}  # of killed processes
    allowed = known | state
    paths = (path for name in folders if (folder / name).is_dir() for path in sorted((folder / name).iterdir()))
    for path in paths if is_sealed(folder) else ():
        inside = path.relative_to(folder).as_posix()
        # a process that is killed leaves a half-written file, which the next one removes
        if inside not in allowed and not storage.is_temporary(path):
            yield Finding(
                inside, "no sample of the ledger has this file", "Delete it, or move it out of the run folder."
            )


def _check_dropped(folder: Path, ledger: Ledger) -> Iterator[Finding]:
    """Files of dropped samples that `restore` would not bring back, but for samples of which somebody deleted all."""
    for row in ledger.dropped_rows() if (folder / DROPPED).is_dir() else ():
        digests = {name: storage.sha256_of(folder / DROPPED / name) for name, _ in row.files.values()}
        for name, stored in row.files.values() if any(digests.values()) else ():
            if (current := digests[name]) != stored.sha256:
                remedy = f"Restore the file from a copy, or leave {row.request.id} dropped and delete its files there."
                yield Finding(DROPPED + name, CHANGED if current else MISSING, remedy)


def _check_samples(folder: Path, document: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[Row, list[Finding]]]:
    def read(row: Row, role: str) -> bytes:
        content = storage.read_if_there(folder / row.files[role].path, images.LARGEST_IMAGE_FILE)
        if content is None:
            raise ValueError(MISSING)
        return content

    return [(row, list(check_sample(folder, document, row, read))) for row in rows]


def check_sample(
    folder: Path, document: Mapping[str, Any], row: Row, read: Callable[[Row, str], bytes]
) -> Iterator[Finding]:
    """What is wrong with files and labels of one row; `read` gives the bytes of a file of a role."""
    id, config = row.request.id, document["config"]
    most = most_samples(config, document["plan"]["number"])
    if not 0 <= row.request.index < most:
        yield _beyond(row.request.index, most)
        return
    arrays = {}
    turn = row.recipe.get("turn", 0)
    seed = config["seed"] + row.request.index + TURN * (turn if isinstance(turn, int) else 0)
    if "seeds" not in document["plan"] and row.request.seed != seed:
        yield _ledger_fault(f"sample {id} has the seed {row.request.seed}, the plan says {seed}")
    place = QUARANTINE if row.status == DOUBTFUL else ""
    roles = [role for task in config["task"] for role in kind_of(task).roles]
    expected = {role: f"{place}{role}/{id}.png" for role in roles}
    expected["image"] = f"{place}images/{id}.{config['image_format']}"
    if {role: file.path for role, file in row.files.items()} != expected:
        yield _ledger_fault(f"sample {id} has the files {sorted(row.files)}, expected {sorted(expected)}")
        return
    remedy = f"Make it again: {maker(document)} --out {quote(folder)} --only {id}"
    if made_by(document) != COMMANDS[0] or is_sharded(document):
        remedy = "Take it out with --repair; the line that made the run then makes it again."
    for role, (name, stored) in row.files.items():
        try:
            data = read(row, role)
            if len(data) != stored.size:
                raise ValueError(f"has {len(data)} bytes, {stored.size} were written")
            if (digest := hashlib.sha256(data).hexdigest()) != stored.sha256:
                raise ValueError(f"{CHANGED} (SHA-256 {digest[:12]}, expected {stored.sha256[:12]})")
            arrays[role] = np.array(images.decode_image(data, name))
        except Unanswered:
            raise
        except (ValueError, Missing) as error:
            yield Finding(name, _cause(error, folder, name), remedy)
    for task in config["task"]:
        for line in _check_label(task, row, arrays, document):
            yield Finding(LEDGER, f"sample {id}, {task}: {line}", remedy)


def _check_label(task: str, row: Row, arrays: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the labels of one task, where its files could be read."""
    table = document["labels"][task]
    roles = ("image", *kind_of(task).roles)
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


REMAKE = "Take the shard out with --repair; the line that made the run then makes it again."
REPAIR_SOURCE = "Bring that run back, or repair it (audit it); if it has grown since, merge into another --out."


def find_sharded(place: str | Path) -> dict[str, Any] | None:
    """run.json of a run in shards, None where the place holds another run, or none."""
    is_nothing = not is_url(place) and not Path(place).is_dir()  # refuses names that no disk takes, too
    try:
        document = None if is_nothing else read_stored(shard_place(place))
    except Refused:  # what is wrong with one on a disk, the audit of a run folder says
        if is_url(place) and isinstance(shard_place(place), ShardBucket):
            raise
        return None
    return document if document and is_sharded(document) else None


def audit_place(place: str, threads: int, on_progress: Callable[[int, int], None], part: str) -> Report:
    """The report on a run at a path or URL, or a part of its shards; `on_progress` gets the samples checked and all."""
    if (document := find_sharded(place)) is not None:
        return audit_shards(place, document, threads, on_progress, part)
    if part:
        raise Refused(f"--part {part}: {place} is no run in shards, and is checked as a whole", "Drop --part.")
    folder = folder_of(shard_place(place)) if is_url(place) else Path(place)
    return audit(folder, threads=threads, on_progress=on_progress)


def audit_shards(
    where: str, document: Mapping[str, Any], threads: int, on_progress: Callable[[int, int], None], part: str
) -> Report:
    """The report on a run in shards, finished or not; nothing in it is changed. Of a part, on every n-th shard."""
    place, (k, n) = shard_place(where), parse_part(part or "1/1")
    number, size = document["plan"]["number"], shard_size(document["config"])

    def range_of(shard: int) -> range:
        return range(shard * size, max(min((shard + 1) * size, number), shard * size + 1))

    counts = {shard: len(range_of(shard)) for shard in range(k - 1, -(-number // size), n)}  # of samples
    shards, findings, damaged = [shard for shard in list_shards(place) if shard % n == k - 1], [], []
    absent: frozenset[int] = frozenset()
    try:
        absent = read_dropped(place)
    except Refused as error:
        findings.append(Finding(DROPPED_IDS, error.cause.removeprefix(f"{place.name}/{DROPPED_IDS}: "), error.remedy))
    done = dropped = quarantined = checked = files = total = 0
    with ThreadPoolExecutor(threads or count_cores()) as pool:
        for shard, (entry, faults) in zip(shards, pool.map(partial(_audit_shard, place, document), shards)):
            findings += faults
            if faults and not (entry and entry.source):  # what is wrong with another run's, merge would bring back
                damaged += range_of(shard)
            if entry is not None:
                counts[shard] = entry.stop - entry.first
                left = len(absent.intersection(entry.indices))
                done, dropped = done + len(entry.indices) - left, dropped + left
                quarantined, checked = quarantined + counts[shard] - len(entry.indices), checked + counts[shard]
                files, total = files + 2, total + sum(file.size for file in entry.files.values())
            on_progress(checked, number // n)
    number = sum(counts.values()) if part else number
    return Report(where, number, done, quarantined, files, total, findings, dropped, tuple(damaged), part)


def _audit_shard(place: ShardPlace, document: Mapping[str, Any], shard: int) -> tuple[ShardEntry | None, list[Finding]]:
    """The entry of a shard, None where it is damaged, and what is not as it was written."""
    number, size = document["plan"]["number"], shard_size(document["config"])
    try:
        ledger = ShardLedger(place, size, [shard])
        if (entry := ledger.entries.get(shard)) is None:  # the run grows, and makes its last shard again
            return None, []
        source, _ = ledger.source_of(shard)
        if entry.source:  # the last shards of its runs leave gaps
            document = {**document, "plan": document["plan"] | {"number": entry.stop}}
        elif entry.stop != min((shard + 1) * size, number):
            raise Refused(f"{entry_name(shard)}: it ends with sample {entry.stop - 1}", REMAKE)
        for name, written in entry.files.items():
            if (current := digest_of_shard(source, name)) != written:
                named, remedy = (f"{source.name}/{name}", REPAIR_SOURCE) if entry.source else (name, REMAKE)
                return entry, [Finding(named, CHANGED if current else MISSING, remedy)]
        rows = ledger.index_of(shard).rows
        if list(rows) != list(range(entry.first, entry.stop)):
            raise Refused(f"{index_name(shard)}: its samples are not those of the manifest", REMAKE)
        findings = []
        for row in ledger.rows(DONE):
            findings += check_sample(Path(place.name), document, row, ledger.read_file)
            if sample_record(row, ledger.stored_id(row)) != ledger.read_file(row, RECORD):
                what = f"the record of {row.request.id} is not that of its row"
                findings.append(Finding(tar_name(shard), what, REMAKE))
        ledger.close()
    except Unanswered:
        raise
    except (Refused, Missing) as error:
        name = entry_name(shard)
        return None, [Finding(name, error.cause.removeprefix(f"{place.name}/").removeprefix(f"{name}: "), REMAKE)]
    return entry, findings


def repair(report: Report) -> None:
    """Takes damaged samples, or their shards, out of a run, so that the line that made it makes them again."""
    if (document := find_sharded(report.path)) is None:
        folder = Path(report.path)
        with RunFolder(folder, require_document(folder)) as run:
            unseal(folder)
            run.ledger.forget(report.damaged)
        return
    place = shard_place(report.path)
    for shard in sorted({index // shard_size(document["config"]) for index in report.damaged}):
        place.remove(entry_name(shard))
