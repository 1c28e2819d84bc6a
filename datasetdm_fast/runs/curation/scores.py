"""Scores of a stored sample from its labels and its image."""

import numpy as np
from PIL import Image

from datasetdm_fast.runs.run_folder.reader import StoredSample
from datasetdm_fast.runs.run_folder.scores import HASH, SCORERS, Scored


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
