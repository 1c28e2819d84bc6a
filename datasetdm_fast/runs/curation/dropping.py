"""Samples are dropped from a run folder and brought back: rows and files are moved, and no number changes."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import GateFailed, Refused, quote
from datasetdm_fast.runs.curation.filtering import check_all_scored
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.run_folder.document import DROPPED, EXPORTS, LEDGER
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger, Row
from datasetdm_fast.runs.run_folder.object_store import refuse_stored
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.score_table import add_distances
from datasetdm_fast.untrusted import documents

BLOCK = 64  # samples moved together
LARGEST_LIST = 64 * 2**20  # bytes


def open_folder(path: Path) -> Run:
    """The run whose samples are to be dropped or brought back."""
    run = Run(path)
    refuse_stored(path)
    return run


def read_ids(given: Sequence[str], file: str) -> list[int]:
    """Indices from ids, and from a file with one id per line."""
    ids = [(id, "ID") for id in given]
    if file:
        text = storage.read(Path(file), LARGEST_LIST).decode("utf-8-sig", errors="replace")
        ids += [(line.strip(), f"{file} line {k}") for k, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not ids:
            raise Refused(f"--file {file}: it contains no id", "Write one id per line, such as 00000003.")
    for id, where in ids:
        if not (id.isascii() and id.isdecimal() and len(id) <= 18):
            raise Refused(
                f"{where}: {documents.quote(id)} is not the id of a sample",
                "Use an id from samples.jsonl, for example 00000003.",
            )
    return sorted({int(id) for id, _ in ids})


def matching(run: Run, where: str) -> list[int]:
    """The indices of the samples for which a condition on their scores holds."""
    found = [row.request.index for row in run.where(where).rows(())]
    check_all_scored(run)
    return found


def set_aside(run: Run) -> set[int]:
    """The indices of the samples that lie beside the data set, which a list of a review may name as well."""
    with Ledger(run.path / LEDGER, read_only=True) as ledger:
        return set(ledger.indices(DOUBTFUL))


def exports_of(run: Run) -> Path | None:
    """The folder of exports in a run folder, if it holds any."""
    folder = run.path / EXPORTS
    return folder if folder.is_dir() and any(folder.iterdir()) else None


def told_aside(count: int) -> str:
    """What a message adds of wanted samples that are set aside, nothing where there are none."""
    return f"; {count} {'is' if count == 1 else 'are'} set aside and not in the data set" if count else ""


def drop(run: Run, wanted: Sequence[int], *, is_dry: bool = False) -> list[int]:
    """Takes the wanted samples out of the data set, as far as they are in it; their indices."""
    there = {int(row.request.id) for row in run.rows(())}
    with Ledger(run.path / LEDGER, read_only=True) as ledger:
        dropped = {row.request.index for row in ledger.dropped_rows()}
    _check_known(
        run.path, wanted, there | dropped | set_aside(run), "Use an id from samples.jsonl, for example 00000003."
    )
    chosen = [index for index in wanted if index in there]
    run.close()
    if not is_dry:
        with RunFolder(run.path, run.document) as folder:
            _in_blocks(chosen, folder.drop)
            add_distances(folder.ledger, since=min(wanted, default=inf))
            finish_run(folder)
    return chosen


def restore(run: Run, wanted: Sequence[int] | None, *, is_dry: bool = False) -> list[int]:
    """Brings the wanted samples back into the data set, or all that were dropped; their indices."""
    there = {row.request.index for row in run.rows(())} | set_aside(run)
    run.close()
    with Ledger(run.path / LEDGER, read_only=True) as ledger:
        dropped = {row.request.index: row for row in ledger.dropped_rows()}
    chosen = sorted(dropped) if wanted is None else [index for index in wanted if index in dropped]
    remedy = f"See what was dropped with: python -m datasetdm_fast.restore {quote(run.path)} --all --dry-run"
    _check_known(run.path, wanted or (), there | dropped.keys(), remedy)
    for index in chosen:
        _check_files(run.path, dropped[index])
    if is_dry:
        return chosen
    with RunFolder(run.path, run.document) as folder:
        _in_blocks([dropped[index] for index in chosen], folder.bring_back)
        add_distances(folder.ledger, since=min(wanted or (0,)))
        finish_run(folder)
    return chosen


def _in_blocks(items: Iterable[Any], move: Callable[[Sequence[Any]], None]) -> None:
    rest = iter(items)
    while block := list(islice(rest, BLOCK)):
        move(block)


def _check_known(path: Path, wanted: Iterable[int], known: set[int], remedy: str) -> None:
    for index in wanted:
        if index not in known:
            raise Refused(f"{path}: no sample has the id {index:08d}", remedy)


def _check_files(path: Path, row: Row) -> None:
    """Refuses to bring a sample back whose files are not those that were written."""
    for name, stored in row.files.values():
        places = [path / (DROPPED + name), path / name]  # a killed process may have brought it back already
        if stored.sha256 not in map(storage.sha256_of, places):
            raise GateFailed(
                f"{path}: {DROPPED}{name} has changed since it was written; nothing was restored",
                f"Restore the file from a copy, or leave {row.request.id} dropped.",
            )
