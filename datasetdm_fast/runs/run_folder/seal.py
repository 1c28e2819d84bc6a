"""The seal of a finished run: digests of every file that is not a sample's own, by which an audit notices changes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.runs.run_folder.document import DOCUMENT, LEDGER, LOCK, pretty
from datasetdm_fast.runs.run_folder.indexes import writers
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.runs.run_folder.page_files import existing_files, expected_files, mark_left_out
from datasetdm_fast.runs.run_folder.selections import FILTER, SPLIT, read_filter
from datasetdm_fast.untrusted import documents

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
