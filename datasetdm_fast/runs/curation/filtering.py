"""The scores of a run are completed, shown, and used to decide which of its samples are kept."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from datasetdm_fast.disk import locks
from datasetdm_fast.errors import Refused, quote
from datasetdm_fast.runs.curation.clip import Clip
from datasetdm_fast.runs.curation.scores import scored
from datasetdm_fast.runs.curation.stability import Stability
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.run_folder.document import LEDGER, LOCK, table_of
from datasetdm_fast.runs.run_folder.folder import RunFolder, keep
from datasetdm_fast.runs.run_folder.kept import KEPT, Kept, read_kept
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.runs.run_folder.object_store import refuse_stored
from datasetdm_fast.runs.run_folder.reader import Run, StoredSample
from datasetdm_fast.runs.run_folder.score_table import HASH, OF_NETWORKS, ScoreTable, absent, add_distances, passing
from datasetdm_fast.runs.run_folder.seal import is_indexed

BLOCK = 64  # samples whose scores are committed together
BINS = 8  # of a histogram
CLIP = "clip"  # the score, and the note of the digest of the CLIP that gave it


@dataclass(frozen=True)
class Bin:
    """Samples whose score is at least `least`, up to the next bin, and what a threshold there leaves."""

    least: float
    samples: int
    left: int
    left_by_class: dict[str, int]


def check(path: Path) -> Run:
    """The run whose samples are to be scored."""
    run = Run(path)
    refuse_stored(path)
    if not len(run):
        raise Refused(f"{path}: holds no sample", "Name a run folder with samples.")
    return run


def check_made(run: Run, names: Sequence[str], extra: Sequence[str]) -> None:
    """Refuses scores of networks that are neither there nor among `extra`, those about to be made."""
    with Ledger(run.path / LEDGER, read_only=True) as ledger:
        for name in names:
            if name in OF_NETWORKS and name not in extra and not ledger.scores(name):
                raise absent(run.path, name)


def count_missing(run: Run, extra: Sequence[str], clip: str = "") -> int:
    """Scores that samples lack, all that need no network counted as one; `extra` are those that do, and `clip` is the
    digest of the CLIP that scores.
    """
    with Ledger(run.path / LEDGER, read_only=True) as ledger:

        def there(name: str) -> set[int]:
            is_of_another = name == CLIP and ledger.read_note(CLIP) != clip
            return set() if is_of_another else {index for index, _ in ledger.scores(name)}

        return sum(len(set(ledger.indices()) - there(name)) for name in ("distance", *extra))


def check_all_scored(run: Run) -> None:
    """Refuses a condition on scores where samples have none yet, as those made after the run was scored."""
    if count_missing(run, ()):
        raise Refused(
            f"--where: samples of {run.path} are not scored",
            f"Score them with: python -m datasetdm_fast.filter {quote(run.path)}",
        )


def complete(
    run: Run,
    networks: Mapping[str, Clip | Stability],
    threads: int,
    on_commit: Callable[[int], None],
    is_stopping: Callable[[], bool],
) -> None:
    """Gives every sample the scores that it lacks, those of `networks` among them; what was scored before stays as it
    is, but for the scores of another CLIP.
    """
    run.close()  # its ledger is about to change
    table = table_of(run.document)
    read_kept(run.path)  # the gallery is written anew with it: where it is damaged, that is said before any scoring
    with RunFolder(run.path, run.document) as folder, ThreadPoolExecutor(threads) as pool:
        folder.unseal()
        ledger = folder.ledger
        if CLIP in networks and ledger.read_note(CLIP) != networks[CLIP].digest:
            ledger.forget_scores(CLIP, (CLIP, networks[CLIP].digest))

        def lacking(name: str) -> Iterator[list[StoredSample]]:
            there = {index for index, _ in ledger.scores(name)}
            indices = iter([index for index in ledger.indices() if index not in there])
            while (block := list(islice(indices, BLOCK))) and not is_stopping():
                yield [StoredSample(ledger.row(index), run.path, run.document, class_table=table) for index in block]

        for name, network in networks.items():
            for samples in lacking(name):
                found = zip(samples, network.scores(samples), strict=True)
                ledger.add_scores((sample.row.request.index, name, value) for sample, value in found)
                on_commit(len(samples))
        for samples in lacking(HASH):
            found = zip(samples, pool.map(scored, samples), strict=True)
            ledger.add_scores(
                (sample.row.request.index, name, _short(value))
                for sample, values in found
                for name, value in values.items()
            )
            on_commit(len(samples))
        if not is_stopping():
            add_distances(ledger)
        finish_run(folder)


def close(run: Run) -> None:
    """Writes index files, page and seal of a run with all its scores where a process that was killed has left them; a
    run that others are at work on is left alone.
    """
    with Ledger(run.path / LEDGER, read_only=True) as ledger:
        is_closed = is_indexed(run.path, run.document, ledger)
    if not is_closed and not locks.is_locked(run.path / LOCK):
        complete(run, {}, 1, lambda count: None, lambda: False)


def _short(value: float | int | None) -> float | int | None:
    return round(value, 6) if isinstance(value, float) else value


def histogram(table: ScoreTable, name: str) -> list[Bin]:
    """Samples by a score, and how many of all and of each class a threshold at the begin of each bin leaves."""
    column = table.values[name]
    told = column[~np.isnan(column)]
    if not len(told):
        return []
    kinds = np.unique(told)
    edges = kinds if len(kinds) <= BINS else np.linspace(told.min(), told.max(), BINS + 1)[:-1]
    bins = []
    for k, least in enumerate(edges):
        above = column >= least
        here = above & ~(column >= edges[k + 1]) if k + 1 < len(edges) else above
        words = Counter(word for place in np.flatnonzero(above) for word in table.classes[place])
        bins.append(Bin(float(least), int(here.sum()), int(above.sum()), dict(words)))
    return bins


def undo(run: Run, *, is_dry: bool = False) -> int:
    """Keeps all samples again; how many were left out, or made after the filter. A dry run only tells."""
    if not (run.path / KEPT).exists():
        raise Refused(f"--undo: {run.path} has not been filtered", "Filter it first with --where.")
    try:
        with Run(run.path, kept=True) as kept:
            count = len(run) - len(kept)
    except Refused:  # damaged: what it left out is not known, and without it all samples are kept
        count = 0
    run.close()
    if not is_dry:
        keep(run.path, run.document, None)
    return count


def decide(run: Run, where: str, *, is_dry: bool = False) -> Kept:
    """Writes down which samples of a run the condition keeps, and why not the others; a dry run only tells."""
    decided = passing(run.path, where)
    run.close()
    if not is_dry:
        keep(run.path, run.document, decided)
    return decided
