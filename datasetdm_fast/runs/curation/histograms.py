"""Histograms of scores: samples by score, and what a threshold at each bin keeps."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from datasetdm_fast.runs.run_folder.scores import SCORES, ScoreTable

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
    """The histograms as a table for a terminal."""
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
