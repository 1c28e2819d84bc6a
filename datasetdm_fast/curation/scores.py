"""What a stored sample is scored by: its labels, its image, and how near it is to a sample before it."""

from math import inf

import numpy as np
from PIL import Image

from datasetdm_fast.run_folder.ledger import Ledger
from datasetdm_fast.run_folder.reader import StoredSample
from datasetdm_fast.run_folder.sample_scores import SCORERS, Scored
from datasetdm_fast.run_folder.score_table import BITS, HASH


def scored(sample: StoredSample) -> dict[str, float | int | None]:
    """The scores that labels and image give; None where a sample has nothing to score."""
    made = Scored(
        sample.image, sample.classes, sample.row.labels, sample.label, sample.document["labels"], sample.trust
    )
    scores: dict[str, float | int | None] = {name: score(made) for name, score in SCORERS.items()}
    return {**scores, HASH: difference_hash(Image.fromarray(made.image))}


def difference_hash(image: Image.Image) -> int:
    """64 bits, as a signed number: whether each of 8 x 8 cells is darker than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = np.packbits(grey[:, :-1] < grey[:, 1:])
    return int(bits.view(">i8")[0])


def add_distances(ledger: Ledger, since: float = inf) -> None:
    """Gives samples the distances that they lack, and renews those from the index `since` on, where samples have left
    the data set or come back.
    """
    there, shown = dict(ledger.scores("distance")), set(ledger.indices())
    hashes = [(index, value) for index, value in ledger.scores(HASH) if index in shown]  # not of dropped samples
    first = next((k for k, (index, _) in enumerate(hashes) if index not in there or index >= since), len(hashes))
    bits = nearest(np.array([value for _, value in hashes], np.int64), first)
    found = [(index, distance) for (index, _), distance in zip(hashes[first:], bits.tolist(), strict=True)]
    if changed := [(index, "distance", distance) for index, distance in found if there.get(index) != distance]:
        ledger.add_scores(changed, replaces=True)


def nearest(hashes: np.ndarray, first: int) -> np.ndarray:
    """Bits by which each hash [N] int64 from the place `first` on differs from the nearest before it."""
    found, block = [], 64
    for start in range(first, len(hashes), block):
        stop = min(start + block, len(hashes))
        bits = np.bitwise_count((hashes[start:stop, None] ^ hashes[None, :stop]).view(np.uint64))
        bits[np.arange(stop)[None] >= np.arange(start, stop)[:, None]] = BITS
        found.append(bits.min(1))
    return np.concatenate(found) if found else np.zeros(0, np.uint8)
