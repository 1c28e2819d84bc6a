"""What a sample is scored by: its labels, its image, and how near it is to a sample before it."""

import numpy as np
from PIL import Image

from datasetdm_fast.labels import kind_of
from datasetdm_fast.labels.trust import NamedMap, named_map, pairs
from datasetdm_fast.run_folder.reader import StoredSample
from datasetdm_fast.run_folder.score_table import BITS, HASH

LEAST_SHARE = 1 / 500  # of the pixels: a class that fills less of a map is not shown


def scored(sample: StoredSample) -> dict[str, float | int | None]:
    """The scores that labels and image give; None where a sample has nothing to score."""
    image = Image.fromarray(sample.image)
    return {
        "score": certainty(sample),
        "trust": float(sample.trust.is_trusted),
        "agreement": agreement([found for task in sample.row.labels if (found := named_map(sample.label(task)))]),
        "presence": presence(sample),
        "sharpness": sharpness(image),
        HASH: difference_hash(image),
    }


def certainty(sample: StoredSample) -> float | None:
    """The mean over the kinds of labels that tell how sure their decoder was."""
    found = [kind_of(task).certainty(record) for task, record in sample.row.labels.items()]
    told = [value for value in found if value is not None]
    return sum(told) / len(told) if told else None


def presence(sample: StoredSample) -> float:
    """Of the classes a prompt names, the share that is shown by each kind of labels that can name them."""
    tables, pixels = sample.document["labels"], sample.image.shape[0] * sample.image.shape[1]
    shown = []
    for task, record in sample.row.labels.items():
        words = set(kind_of(task).words(record, tables[task], pixels * LEAST_SHARE))
        shown += [name in words for name in sample.classes if name in tables[task].get("classes", ())]
    return sum(shown) / len(shown) if shown else 1.0


def agreement(maps: list[NamedMap]) -> float | None:
    """Over all pairs of maps, the share of pixels with one name in both among those that either gives a name both know;
    None where no two maps share a name.
    """
    same = named = count = 0
    for first, second in pairs(maps):
        count += 1
        named += int(np.count_nonzero(first | second))
        same += int(np.count_nonzero((first == second) & (first > 0)))
    return (same / named if named else 1.0) if count else None


def sharpness(image: Image.Image) -> float:
    grey = np.asarray(image.convert("L"), np.float32)
    inner = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).var())


def difference_hash(image: Image.Image) -> int:
    """64 bits, as a signed number: whether each of 8 x 8 cells is darker than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = np.packbits(grey[:, :-1] < grey[:, 1:])
    return int(bits.view(">i8")[0])


def nearest(hashes: np.ndarray, first: int) -> np.ndarray:
    """Bits by which each hash [N] int64 from the place `first` on differs from the nearest before it."""
    found, block = [], 64
    for start in range(first, len(hashes), block):
        stop = min(start + block, len(hashes))
        bits = np.bitwise_count((hashes[start:stop, None] ^ hashes[None, :stop]).view(np.uint64))
        bits[np.arange(stop)[None] >= np.arange(start, stop)[:, None]] = BITS
        found.append(bits.min(1))
    return np.concatenate(found) if found else np.zeros(0, np.uint8)
