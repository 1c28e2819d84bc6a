"""Samples are dropped from a run folder and restored: rows and files are moved, and no number changes."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from datasetdm_fast.cores import in_blocks
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import GateFailed, Refused, quote
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.document import DROPPED, LEDGER
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.scores import add_distances
from datasetdm_fast.runs.run_folder.selections import DROPPED_IDS, encode_dropped
from datasetdm_fast.runs.run_folder.shards import ShardLedger
from datasetdm_fast.untrusted import documents

BLOCK = 64  # samples moved together
LARGEST_LIST = 64 * 2**20  # bytes


def read_ids(ids: Sequence[str], file: str) -> set[int]:
    """Indices from ids, and from a file with one id per line."""
    places = [(id, "ID") for id in ids]
    if file:
        text = storage.read(Path(file), LARGEST_LIST).decode("utf-8-sig", errors="replace")
        lines = enumerate(map(str.strip, text.splitlines()), 1)
        places += [(line, f"{file} line {k}") for k, line in lines if line]
        if not places:
            raise Refused(f"--file {file}: it contains no id", "Write one id per line, such as 00000003.")
    for id, place in places:
        if not (id.isascii() and id.isdecimal() and len(id) <= 18):
            raise Refused(
                f"{place}: {documents.quote(id)} is not the id of a sample",
                "Use an id from samples.jsonl, for example 00000003.",
            )
    return {int(id) for id, _ in places}


def find_doubtful(run: Run) -> set[int]:
    """The indices of the samples beside the data set, which a list of a review may name as well."""
    return set(run.ledger.indices(DOUBTFUL))


def describe_doubtful(count: int) -> str:
    """The end of a message about requested samples that are beside the data set, empty without any."""
    return f"; {count} {'is' if count == 1 else 'are'} set aside and not in the data set" if count else ""


def drop(run: Run, requested: Collection[int], *, is_dry: bool = False) -> list[int]:
    """Moves the requested samples out of the data set; the indices of those that were in it."""
    present, _ = _find_known(run, requested, "Use an id from samples.jsonl, for example 00000003.")
    chosen = sorted(present.intersection(requested))
    if run.shards is not None and not is_dry:
        _replace_dropped(run, run.shards, lambda dropped: dropped.union(chosen), requested)
    elif not is_dry:
        with RunFolder(run.path, run.document) as folder:
            for block in in_blocks(chosen, BLOCK):
                folder.drop(block)
            _finish(folder, requested)
    return chosen


def restore(run: Run, requested: Collection[int] | None, *, is_dry: bool) -> list[int]:
    """Moves the requested dropped samples, or all of them, back into the data set; their indices."""
    remedy = f"See what was dropped with: python -m datasetdm_fast.restore {quote(run.path)} --all --dry-run"
    _, dropped = _find_known(run, requested or (), remedy)
    chosen = sorted(dropped if requested is None else dropped.keys() & set(requested))
    if run.shards is None:
        for index in chosen:
            row = dropped[index]
            for name, stored in row.files.values():
                places = [run.path / (DROPPED + name), run.path / name]  # a killed process may have restored it already
                if stored.sha256 not in map(storage.sha256_of, places):
                    raise GateFailed(
                        f"{run.path}: {DROPPED}{name} has changed since it was written; nothing was restored",
                        f"Restore the file from a copy, or leave {row.request.id} dropped.",
                    )
    if run.shards is not None and not is_dry:
        _replace_dropped(run, run.shards, lambda dropped: dropped.difference(chosen), requested)
    elif not is_dry:
        with RunFolder(run.path, run.document) as folder:
            for block in in_blocks(chosen, BLOCK):
                folder.bring_back([dropped[index] for index in block])
            _finish(folder, requested)
    return chosen


def _find_known(run: Run, requested: Iterable[int], remedy: str) -> tuple[set[int], dict[int, Any]]:
    """The samples of the data set and the dropped ones; a request for any other is refused."""
    present = set(run.indices)
    if run.shards is not None:
        dropped = dict.fromkeys(run.shards.dropped)  # whose rows nobody needs
    else:
        with Ledger(run.path / LEDGER, read_only=True) as ledger:
            dropped = {row.request.index: row for row in ledger.dropped_rows()}
    for index in sorted(set(requested) - present - dropped.keys() - find_doubtful(run)):
        raise Refused(f"{run.path}: no sample has the id {index:08d}", remedy)
    run.close()
    return present, dropped


def _replace_dropped(
    run: Run, shards: ShardLedger, change: Callable[[frozenset[int]], frozenset[int]], requested: Collection[int] | None
) -> None:
    """Changes which samples of a run in shards are dropped, and updates distances."""
    with shards.hold():
        shards.dropped = change(shards.dropped)
        run.replace_file(DROPPED_IDS, encode_dropped(shards.dropped))
        add_distances(shards, requested)


def _finish(folder: RunFolder, requested: Collection[int] | None) -> None:
    """Updates distances and index files; a killed process may have moved some of the requested samples, or all."""
    add_distances(folder.ledger, requested)
    finish_run(folder)
