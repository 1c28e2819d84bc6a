"""The run folder: files first, then their rows; all but the samples' files is rebuilt from the ledger. A finished run
is sealed with digests, by which an audit notices changes. The files of its page, which runs.gallery writes, are named
here.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasetdm_fast.data import Quarantined, Sample
from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels import LABEL_KINDS, GalleryLayer, kind_of, label_files
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.run_folder.document import (
    CLAIMS,
    DOCUMENT,
    DROPPED,
    EXPORTS,
    GROWING,
    LEDGER,
    LOCK,
    QUARANTINE,
    RESTORE_DOCUMENT,
    grows,
    pretty,
    read_document,
    refuse_shards,
    require_document,
    to_see_damage,
)
from datasetdm_fast.runs.run_folder.indexes import writers
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, QUARANTINED, Ledger, Row, RowFile
from datasetdm_fast.runs.run_folder.selections import FILTER, SPLIT, Filter, read_filter
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.images import LARGEST_IMAGE_FILE

PAGE = "gallery/index.html"
PAGE_FIXED = ("gallery.css", "logic.js", "gallery.js", "index.html")  # the same for every run, the page itself last
RUN_SCRIPT, LEFT_OUT_SCRIPT = "gallery/run.js", "gallery/left-out.js"
SHEETS = "gallery/sheets.json"  # sheet -> digest of the images that it shows
PAGE_LOCK = "gallery/lock"  # held while the page is written, by the process that finishes a run or one that shows it
SINGLE_FILES = (*(f"gallery/{name}" for name in PAGE_FIXED), RUN_SCRIPT, LEFT_OUT_SCRIPT, PAGE_LOCK, SHEETS)
PAGE_SAMPLES = 1000  # of a page: those of the indices PAGE_SAMPLES * k to PAGE_SAMPLES * (k + 1) - 1
SHEET_SAMPLES = 50  # of a sheet of thumbnails, and of a file of details
PAGE_NAME, DETAILS_NAME = "gallery/pages/{:06d}.js", "gallery/details/{:06d}.js"  # by number
SHEET_NAME = "gallery/sheets/{:06d}.jpg"


def picture_name(role: str, id: str) -> str:
    """Where the picture lies that the page shows in place of a sample's file of this role."""
    return f"gallery/{role}/{id}.png"


def layer_with_picture(role: str) -> GalleryLayer | None:
    """The layer whose picture the page shows in place of files of a role, None where it shows the files themselves."""
    layers = (layer for kind in LABEL_KINDS.values() for layer in kind.layers)
    return next((layer for layer in layers if layer.picture and layer.role == role.partition(".")[0]), None)


def picture_roles(document: Mapping[str, Any]) -> list[str]:
    """The roles of a run's files in whose place the page shows pictures."""
    return [
        role
        for label in document["config"]["task"]
        for role in kind_of(label).roles
        if any(layer.picture and layer.role == role for layer in kind_of(label).layers)
    ]


def page_folders(roles: list[str]) -> list[str]:
    """The folders with a number of files that grows with the samples."""
    return ["gallery/pages", "gallery/details", "gallery/sheets", *(f"gallery/{role}" for role in roles)]


def expected_files(document: Mapping[str, Any], ledger: Ledger) -> set[str]:
    """The files of a complete page."""
    indices = ledger.indices(DONE, DOUBTFUL)
    sheets = {index // SHEET_SAMPLES for index in indices}
    names = {PAGE_NAME.format(index // PAGE_SAMPLES) for index in indices}
    names |= {name.format(sheet) for sheet in sheets for name in (DETAILS_NAME, SHEET_NAME)}
    pictures = {picture_name(role, f"{index:08d}") for role in picture_roles(document) for index in indices}
    return names | set(SINGLE_FILES) | pictures


def existing_files(folder: Path, document: Mapping[str, Any]) -> list[str]:
    """The files of the page that exist."""
    names = [name for name in SINGLE_FILES if (folder / name).exists()]
    for name in page_folders(picture_roles(document)):
        if (folder / name).is_dir():
            names += [f"{name}/{path.name}" for path in (folder / name).iterdir() if not storage.is_temporary(path)]
    return sorted(names)


def script(kind: str, number: int, value: Any) -> bytes:
    """A script that hands a value to the page; no string in it can end the script or be taken for a tag."""
    text = documents.encodable(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    escaped = re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
    return f'receive("{kind}",{number},{escaped});\n'.encode()


def left_out_script(decided: Filter | None) -> bytes:
    """Index and reason of every sample that a filter left out."""
    return script("leftOut", 0, list(decided.left_out.items()) if decided else [])


def mark_left_out(folder: Path, decided: Filter | None) -> None:
    """Tells the page, if it exists, which samples a filter left out."""
    if (folder / RUN_SCRIPT).exists():
        storage.publish({folder / LEFT_OUT_SCRIPT: left_out_script(decided)})


THIS = "this"  # the line of the seal that is about the other lines
SEAL = "state/seal.json"  # empty from before the first change until everything is in place
LARGEST_SEAL = 2**28  # bytes, about 80 of them a sample


def has_indexes(folder: Path, document: Mapping[str, Any], ledger: Ledger) -> bool:
    """Whether every index file and the page exist and show the rows of the ledger."""
    if ledger.read_note("indexed") is None or not all((folder / name).exists() for name in writers(document)):
        return False
    return expected_files(document, ledger) <= set(existing_files(folder, document))


def is_indexed(folder: Path, document: Mapping[str, Any], ledger: Ledger) -> bool:
    """Whether nothing is left to be done for a folder whose samples are complete."""
    return has_indexes(folder, document, ledger) and is_sealed(folder) and (folder / LOCK).exists()


def read_seal(folder: Path) -> dict[str, Any]:
    """The digests that the seal of a folder holds, its own line among them; empty while the run is in progress."""
    return documents.read_object(folder / SEAL, most=LARGEST_SEAL)


def encode_seal(digests: Mapping[str, str]) -> bytes:
    """The seal of these digests, with a digest of its own."""
    return pretty({**digests, THIS: hashlib.sha256(pretty(digests)).hexdigest()})


def is_sealed(folder: Path) -> bool:
    return (folder / SEAL).exists() and (folder / SEAL).stat().st_size > len(pretty({}))


def seal(
    folder: Path, document: Mapping[str, Any], known: Mapping[str, str] = MappingProxyType({}), removed: str = ""
) -> None:
    """Writes the digests of run.json, ledger and index files; those in `known` are taken over, and a file that is to be
    `removed` has none.
    """
    selections = [name for name in (FILTER, SPLIT) if name != removed and (folder / name).exists()]
    names = [DOCUMENT, LEDGER, LOCK, *writers(document), *existing_files(folder, document), *selections]
    digests = {name: storage.sha256_of(folder / name) for name in names}
    storage.publish({folder / SEAL: encode_seal({**digests, **known})})


def unseal(folder: Path) -> None:
    """Takes the digests back before the first change, so that a run killed during it does not count as damaged."""
    if is_sealed(folder):
        storage.publish({folder / SEAL: pretty({})})


def replace_file(folder: Path, document: Mapping[str, Any], name: str, content: bytes | None) -> None:
    """Replaces a file of a run folder or, without content, removes it; a folder that was sealed is sealed again, with
    the former digests of files that were damaged before: an audit still notices. A finished run whose seal a killed
    process took back is sealed as well. A file is removed last, so that a killed process can be repeated.
    """
    removed = name if content is None else ""
    with storage.hold_lock(folder / LOCK):
        clean(folder)
        was_sealed = is_sealed(folder)
        is_late = not was_sealed and _is_settled(folder, document)
        damaged = {}  # sealed files that are not as they were written, each with its digest then and now
        for sealed, digest in read_seal(folder).items() if was_sealed else ():
            if sealed != THIS and (current := storage.sha256_of(folder / sealed)) != digest:
                damaged[sealed] = digest, current
        unseal(folder)
        if content is not None:
            storage.publish({folder / name: content})
        if name == FILTER or is_late:  # a filter may have been killed before it marked the page
            mark_left_out(folder, None if removed == FILTER else read_filter(folder))
        damaged.pop(removed, None)
        known = {name: old for name, (old, new) in damaged.items() if storage.sha256_of(folder / name) == new}
        if was_sealed or is_late:
            seal(folder, document, known, removed)
        if removed:
            storage.remove(folder / removed)


def _is_settled(folder: Path, document: Mapping[str, Any]) -> bool:
    """Whether only the seal of a run is missing, while no process works on it."""
    if not (folder / LEDGER).exists():
        return False
    with Ledger(folder / LEDGER) as ledger:
        return has_indexes(folder, document, ledger) and ledger.settle()


ENTRY_SECONDS = 60.0  # another process may hold the folder while this one wants to enter
# files by their path inside the run folder -> what was written
Publish = Callable[[Mapping[str, bytes]], Mapping[str, StoredFile]]


class RunFolder(AbstractContextManager):
    """A run folder open for writing, held for this process until the block ends.

    A member joins a folder that another process has locked for all; `journal` is the journal mode of their ledger.
    """

    def __init__(
        self, path: Path, document: Mapping[str, Any], *, is_member: bool = False, journal: str = sqlite.WRITE_AHEAD
    ):
        refuse_shards(path)
        self.path = path
        self.document: dict[str, Any] = json.loads(pretty(document))  # in the order of the file
        self._closing = ExitStack()
        storage.make_folder(path / "state")
        if not is_member:
            self._closing.enter_context(storage.hold_lock(path / LOCK))
        try:
            if not is_member:
                clean(path)
            if is_new := not (path / DOCUMENT).exists():
                storage.publish({path / DOCUMENT: pretty(document)})
            stored = self.document if is_new else read_document(path) or self.document
            _check_current(path, stored, self.document)
            if not (path / SEAL).exists():
                storage.publish({path / SEAL: pretty({})})
            if journal != sqlite.WRITE_AHEAD:  # a finished ledger has that one, and is changed when it is opened
                _unseal_intact(path)
            self.ledger = self._closing.enter_context(Ledger(path / LEDGER, journal=journal))
            content = documents.encodable(json.dumps(document, ensure_ascii=False, sort_keys=True))
            if self.ledger.read_note("run") != content:
                _unseal_intact(path)
                self.ledger.note("run", content)
            if any(stored[part] != self.document[part] for part in ("config", "plan")):  # the run is to grow
                unseal(path)
                storage.publish({path / DOCUMENT: pretty({**stored, **document})})
        except BaseException:
            self._closing.close()
            raise

    def add(self, results: Sequence[Sample | Quarantined], recipe: Mapping[str, Any]) -> None:
        """Makes the results part of the data set, all or none."""
        unseal(self.path)
        self.ledger.commit(self.write(results, recipe))

    def write(self, results: Sequence[Sample | Quarantined], recipe: Mapping[str, Any]) -> list[Row]:
        """Publishes the files of the results, which are samples once their rows are committed; threads may share it."""
        return write_samples(results, recipe, self.document, partial(publish_inside, self.path))

    def renew(self, row: Row, sample: Sample) -> list[str]:
        """Writes missing or damaged files of a sample again, and gives their paths; other bytes are never written."""
        folder = QUARANTINE if row.status == DOUBTFUL else ""
        form = self.document["config"]["image_format"]
        made, records = label_files.encode(sample, form, self.document["labels"], folder)
        contents = {name: content for name, content in made.values()}
        expected = {name: stored.sha256 for name, stored in row.files.values()}
        other = sorted(
            name
            for name in contents.keys() | expected.keys()
            if name not in contents or hashlib.sha256(contents[name]).hexdigest() != expected.get(name)
        )
        if json.loads(json.dumps(records)) != row.labels:
            other.append("labels in the ledger")
        if other:
            raise GateFailed(
                f"sample {row.request.id}: made again, it differs from the run folder in {', '.join(other)}; nothing "
                "was written",
                "Compare versions and device with run.json: only the same ones give the same bytes.",
            )
        damaged = {
            name: content for name, content in contents.items() if storage.sha256_of(self.path / name) != expected[name]
        }
        publish_inside(self.path, damaged)
        return sorted(damaged)

    def drop(self, indices: Sequence[int]) -> None:
        """Takes samples out of the data set: their files get other names, then their rows move, then these lose the
        first ones.
        """
        rows = [row for index in indices if (row := self.ledger.row(index))]  # others may be dropped since
        self._move(rows, "", DROPPED)

    def bring_back(self, rows: Sequence[Row]) -> None:
        """Brings dropped samples back in the same way."""
        self._move(rows, DROPPED, "")

    def _move(self, rows: Sequence[Row], source: str, target: str) -> None:
        unseal(self.path)
        names = [name for row in rows for name, _ in row.files.values() if (self.path / (source + name)).exists()]
        copied = [name for name in names if not storage.link(self.path / (source + name), self.path / (target + name))]
        contents = {name: storage.read(self.path / (source + name), LARGEST_IMAGE_FILE) for name in copied}
        publish_inside(self.path, {target + name: content for name, content in contents.items()})
        for place in sorted({(self.path / (target + name)).parent for name in names}):
            with storage.refusing(place):
                storage.sync(place)
        self.ledger.move([row.request.index for row in rows], is_back=not target)
        for name in names:
            storage.remove(self.path / (source + name))

    def remove_leftovers(self) -> None:
        """Removes files of dropped samples that a killed process left in the data set, and the other way round."""
        names = [file.path for row in self.ledger.dropped_rows() for file in row.files.values()]
        for name in names:
            storage.remove(self.path / name)
        known = {self.path / (DROPPED + name) for name in names}
        for path in (self.path / DROPPED).rglob("*"):
            if path.is_file() and path not in known:
                storage.remove(path)

    def __exit__(self, *_: object) -> None:
        self._closing.close()


def _check_current(path: Path, stored: Mapping[str, Any], document: Mapping[str, Any]) -> None:
    """Refuses a run that another process has begun or let grow since this one read what it is."""
    names = GROWING if grows(stored["config"], document["config"]) else ()
    parts = ("engine",) if names else ("engine", "plan")  # two first starts may find other memory and other cores
    before, now = (
        [{**run["config"], **dict.fromkeys(names)}, *(run.get(part) for part in parts)] for run in (stored, document)
    )
    if before != now:
        raise Refused(f"{path}: another process has changed the run meanwhile", "Run the same command again.")


def _unseal_intact(path: Path) -> None:
    """Removes the seal of a finished run, whose run.json has to be the one that was sealed."""
    if is_sealed(path) and read_seal(path).get(DOCUMENT) != storage.sha256_of(path / DOCUMENT):
        raise Refused(f"{path / DOCUMENT}: its bytes are not those that were written", RESTORE_DOCUMENT)
    unseal(path)


def write_samples(
    results: Sequence[Sample | Quarantined], recipe: Mapping[str, Any], document: Mapping[str, Any], publish: Publish
) -> list[Row]:
    """The rows of the results, once `publish` has taken all of their files; `document` is the content of run.json."""
    config = document["config"]
    made: list[tuple[Row, label_files.Files]] = []
    for result in results:
        if isinstance(result, Quarantined):
            made.append((Row(result.request, dict(recipe), status=QUARANTINED, reason=result.reason), {}))
            continue
        place = QUARANTINE if result.rejection else ""
        files, records = label_files.encode(result, config["image_format"], document["labels"], place)
        row = Row(result.request, {**recipe, **result.provenance}, labels=records, trust=result.trust)
        if result.rejection:
            row = replace(row, status=DOUBTFUL, reason=result.rejection)
        made.append((row, files))
    return publish_samples(made, publish)


def publish_samples(made: Sequence[tuple[Row, label_files.Files]], publish: Publish) -> list[Row]:
    """The rows, once `publish` has taken their files."""
    stored = publish({name: content for _, files in made for name, content in files.values()})
    for row, files in made:
        row.files.update({role: RowFile(name, stored[name]) for role, (name, _) in files.items()})
        row.tracings.update(trace_labels(row.labels))
    return [row for row, _ in made]


def trace_labels(records: Mapping[str, Any]) -> dict[str, Any]:
    """Outlines that the page draws, by layer; tracing those of all samples when the page is written would take long."""
    return {
        layer.name: layer.trace(records[task])
        for task in records
        for layer in kind_of(task).layers
        if layer.trace and records[task]
    }


def publish_inside(folder: Path, files: Mapping[str, bytes]) -> dict[str, StoredFile]:
    """Publishes files by their paths inside a folder."""
    stored = storage.publish({folder / name: content for name, content in files.items()})
    return {name: stored[folder / name] for name in files}


def clean(folder: Path) -> None:
    """Removes claims and half-written files of killed processes; no other process may work in the folder."""
    storage.remove_temporaries(folder, apart=folder / EXPORTS)
    shutil.rmtree(folder / "state" / CLAIMS, ignore_errors=True)


@contextmanager
def refusing_rows(folder: Path) -> Iterator[None]:
    """Within the block, errors over rows that do not fit run.json become a refusal."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Refused(
            f"{folder / LEDGER}: its rows do not fit {DOCUMENT} ({type(error).__name__}: {error})",
            to_see_damage(folder),
        ) from error


@contextmanager
def share_folder(folder: Path) -> Iterator[None]:
    """Holds the folder with other processes; the first of them cleans it."""
    # refused if others share it already, or one of them checks whether it is held
    with suppress(Refused), storage.hold_lock(folder / LOCK, patience=0.0):
        clean(folder)
    with storage.hold_lock(folder / LOCK, is_shared=True, patience=ENTRY_SECONDS):
        yield


def note(folder: Path, name: str, value: Any) -> None:
    """Adds a later result about a run, such as a verdict, to its run.json."""
    document = require_document(folder)
    replace_file(folder, document, DOCUMENT, pretty(document | {name: value}))
