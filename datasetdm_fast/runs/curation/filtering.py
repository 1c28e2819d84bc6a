"""The scores of a run are completed, shown as histograms, and decide which of its samples are kept."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused, quote
from datasetdm_fast.runs.curation.clip import Clip
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.document import LEDGER, LOCK, shard_size
from datasetdm_fast.runs.run_folder.folder import RunFolder, is_indexed, unseal
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.runs.run_folder.reader import Run, StoredSample
from datasetdm_fast.runs.run_folder.scores import (
    HASH,
    SCORERS,
    SCORES,
    Scored,
    ScoreTable,
    absent,
    add_distances,
    parse_where,
    passing,
    read_scores,
)
from datasetdm_fast.runs.run_folder.selections import FILTER, Filter, read_filter
from datasetdm_fast.runs.run_folder.shards import ShardLedger

BLOCK = 64  # samples whose scores are committed together
CLIP = "clip"  # the score, and the note of the digest of the CLIP that gave it
DIGITS = 6  # of a score


def open_run(place: str) -> Run:
    """A run with samples that can be filtered."""
    run = Run(place)
    if not len(run):
        raise Refused(f"{place}: holds no sample", "Name a run with samples.")
    return run


def check_condition(run: Run, where: str, *, has_clip: bool) -> None:
    """Refuses a condition on the score of a CLIP that no sample has and that is not about to be computed."""
    if CLIP in parse_where(where, tuple(SCORES))[1] and not has_clip and not run.ledger.scores(CLIP):
        raise absent(run.path, CLIP)


def _find_scored(ledger: Ledger | ShardLedger, name: str) -> set[int]:
    """The samples that have a score; a shard holds null for the others."""
    return {index for index, value in ledger.scores(name) if value is not None}


def count_missing(run: Run, clip: str = "") -> int:
    """Missing scores, all that need no network counted as one; `clip` is the digest of the requested CLIP."""
    ledger = run.ledger
    samples = set(ledger.indices())
    missing = len(samples - _find_scored(ledger, "distance"))
    if clip:
        missing += len(samples - (_find_scored(ledger, CLIP) if ledger.read_note(CLIP) == clip else set()))
    return missing


def select(run: Run, where: str) -> list[int]:
    """The indices of the samples of a run for which a condition on their scores holds; refused where some have none,
    such as those made after the run was scored.
    """
    indices = list(passing(run.path, run.ledger, where).remaining)
    if count_missing(run):
        raise Refused(
            f"--where: samples of {run.path} are not scored",
            f"Score them with: python -m datasetdm_fast.filter {quote(run.path)}",
        )
    return indices


def score_sample(sample: StoredSample) -> dict[str, float | int | None]:
    """The scores that labels and image give; None where a sample has nothing to score."""
    scored = Scored(
        sample.image, sample.classes, sample.row.labels, sample.label, sample.document["labels"], sample.trust
    )
    scores: dict[str, float | int | None] = {name: score(scored) for name, score in SCORERS.items()}
    return {**scores, HASH: difference_hash(Image.fromarray(scored.image))}


def difference_hash(image: Image.Image) -> int:
    """64 bits, as a signed number: whether each of 8 x 8 cells is darker than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = np.packbits(grey[:, :-1] < grey[:, 1:])
    return int(bits.view(">i8")[0])


def score_missing(
    run: Run,
    clip: Clip | None,
    threads: int,
    on_commit: Callable[[int], None] = lambda count: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Gives every sample its missing scores, that of a CLIP among them; scores of another CLIP are replaced."""
    run.close()  # its ledger is about to change
    read_filter(run.path)  # the gallery is written anew with it: a damaged file is refused before any scoring
    size = BLOCK if run.shards is None else shard_size(run.document["config"])
    folder = RunFolder(run.path, run.document) if run.shards is None else None
    held: AbstractContextManager[Any] = run.shards.hold() if run.shards else folder or nullcontext()
    with held, ThreadPoolExecutor(threads) as pool:
        if folder:
            unseal(run.path)
        ledger = folder.ledger if folder else run.ledger

        def missing(name: str) -> Iterator[list[StoredSample]]:
            present = _find_scored(ledger, name)
            indices = iter([index for index in ledger.indices() if index not in present])
            while (block := list(islice(indices, size))) and not is_stopping():
                yield [run.sample_of(row) for index in block if (row := ledger.row(index))]

        if clip:
            if ledger.read_note(CLIP) != clip.digest:
                ledger.forget_scores(CLIP, (CLIP, clip.digest))
            for samples in missing(CLIP):
                scores = zip(samples, clip.scores(samples), strict=True)
                ledger.add_scores((sample.row.request.index, CLIP, value) for sample, value in scores)
                on_commit(len(samples))
        for samples in missing(HASH):
            rows = zip(samples, pool.map(score_sample, samples), strict=True)
            ledger.add_scores(
                (sample.row.request.index, name, round(value, DIGITS) if isinstance(value, float) else value)
                for sample, scores in rows
                for name, value in scores.items()
            )
            on_commit(len(samples))
        if not is_stopping():
            add_distances(ledger)
        if folder:
            finish_run(folder)


def finish_scored(run: Run) -> None:
    """Finishes a scored run that a killed process has left unfinished, unless another process holds it."""
    if run.shards is not None:
        return
    with Ledger(run.path / LEDGER, read_only=True) as ledger:
        is_finished = is_indexed(run.path, run.document, ledger)
    if not is_finished and not storage.is_locked(run.path / LOCK):
        score_missing(run, None, 1)


def keep_all(run: Run, *, is_dry: bool) -> int:
    """Removes the filter; how many samples it left out, or were made after it. A dry run only counts."""
    if not (run.path / FILTER).exists():
        raise Refused(f"--undo: {run.path} has not been filtered", "Filter it first with --where.")
    try:
        decided = read_filter(run.path)
        count = len(run) - len(run.keep(decided)) if decided else 0
    except Refused:  # a damaged filter: its count is unknown
        count = 0
    if not is_dry:
        run.replace_file(FILTER, None)
    return count


def summarize(run: Run, decision: Filter, verb: str) -> tuple[dict[str, Any], list[str]]:
    """How many samples a filter keeps, in all and of each class: facts, and lines with `verb` (are, would be)."""
    table, indices = read_scores(run.ledger, ()), set(decision.remaining)
    total = Counter(word for words in table.classes for word in words)
    rows = zip(table.indices, table.classes, strict=True)
    left = Counter(word for index, words in rows if index in indices for word in words)
    count, left_out = len(decision.remaining), len(decision.left_out)
    more = f"; {run.path}/state/kept.json says why the others are not" if left_out and verb == "are" else ""
    lines = [f"{count} of {count + left_out} samples {verb} kept{more}"]
    if total:
        shares = ", ".join(f"{word} {left[word]} of {total[word]}" for word, _ in total.most_common())
        lines.append(f"of each class: {shares}")
    classes = {word: [left[word], total[word]] for word in total}
    return {"where": decision.where, "kept": count, "left_out": left_out, "classes": classes}, lines


BINS = 8
BAR = 24  # letters of the longest bar
MOST_CLASSES = 8  # columns
LOW_IS_GOOD = ("domain", "duplicate")  # scores


def compute_histogram(table: ScoreTable, name: str) -> list[dict[str, Any]]:
    """Samples by a score, and how many of all and of each class a threshold at the start of each bin leaves. A score
    whose low values are good has upper thresholds, `most` in the place of `least`, the highest first.
    """
    bound, sign = ("most", -1.0) if name in LOW_IS_GOOD else ("least", 1.0)
    column = sign * table.values[name]
    present = column[~np.isnan(column)]
    if not len(present):
        return []
    values = np.unique(present)
    edges = values if len(values) <= BINS else np.linspace(present.min(), present.max(), BINS + 1)[:-1]
    bins = []
    for k, least in enumerate(edges):
        above = column >= least
        inside = above & ~(column >= edges[k + 1]) if k + 1 < len(edges) else above
        words = Counter(word for row in np.flatnonzero(above) for word in table.classes[row])
        counts = {"samples": int(inside.sum()), "left": int(above.sum()), "left_by_class": dict(words)}
        bins.append({bound: sign * float(least), **counts})
    return bins


def histogram_lines(table: ScoreTable, histograms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    counts = Counter(word for classes in table.classes for word in classes)
    widths = {word: max(len(word), 5) for word, _ in counts.most_common(MOST_CLASSES)}
    head = " ".join(f"{word:>{width}}" for word, width in widths.items())
    for name, bins in histograms.items():
        if not bins:
            continue
        yield f"{name}: {SCORES[name]}"
        bound = "most" if name in LOW_IS_GOOD else "least"
        yield f"{'from':>10} {'samples':>8} {'':{BAR}} {f'at {bound}':>9} {head}".rstrip()
        most = max(each["samples"] for each in bins)
        for each in bins:
            bar = "#" * -(-each["samples"] * BAR // most)
            left = " ".join(f"{each['left_by_class'].get(word, 0):>{width}}" for word, width in widths.items())
            yield f"{each[bound]:>10.4g} {each['samples']:>8} {bar:{BAR}} {each['left']:>9} {left}".rstrip()
        yield ""
