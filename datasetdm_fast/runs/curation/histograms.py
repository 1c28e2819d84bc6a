"""Histograms of scores: samples by score, and what a threshold at each bin keeps."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from datasetdm_fast.runs.run_folder.scores import SCORES, ScoreTable

BINS = 8
BAR = 24  # letters of the longest bar
MOST_CLASSES = 8  # columns


@dataclass(frozen=True)
class Bin:
    """Samples whose score is at least `least`, up to the next bin, and what a threshold there leaves."""

    least: float
    samples: int
    left: int
    left_by_class: dict[str, int]


def compute_histogram(table: ScoreTable, name: str) -> list[Bin]:
    """Samples by a score, and how many of all and of each class a threshold at the start of each bin leaves."""
    column = table.values[name]
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
        bins.append(Bin(float(least), int(inside.sum()), int(above.sum()), dict(words)))
    return bins


def histogram_lines(table: ScoreTable, histograms: Mapping[str, Sequence[Bin]]) -> Iterator[str]:
    """The histograms as a table for a terminal."""
    counts = Counter(word for classes in table.classes for word in classes)
    widths = {word: max(len(word), 5) for word, _ in counts.most_common(MOST_CLASSES)}
    head = " ".join(f"{word:>{width}}" for word, width in widths.items())
    for name, bins in histograms.items():
        if not bins:
            continue
        yield f"{name}: {SCORES[name]}"
        yield f"{'from':>10} {'samples':>8} {'':{BAR}} {'at least':>9} {head}".rstrip()
        most = max(each.samples for each in bins)
        for each in bins:
            bar = "#" * -(-each.samples * BAR // most)
            left = " ".join(f"{each.left_by_class.get(word, 0):>{width}}" for word, width in widths.items())
            yield f"{each.least:>10.4g} {each.samples:>8} {bar:{BAR}} {each.left:>9} {left}".rstrip()
        yield ""
