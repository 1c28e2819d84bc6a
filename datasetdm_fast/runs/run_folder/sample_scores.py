"""The scores that a sample's own labels and image give, without a network and without other samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from PIL import Image

from datasetdm_fast.data import Annotation, Sample, Trust
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.kind import Table
from datasetdm_fast.engine.labels.trust import NamedMap, named_map, pairs

LEAST_SHARE = 1 / 500  # of the pixels: a class that fills less of a map is not shown


@dataclass(frozen=True)
class Scored:
    """What is scored of a sample, stored or about to be."""

    image: np.ndarray  # [H, W, 3] uint8
    named: Sequence[str]  # classes of its prompt
    records: Mapping[str, Any]  # task -> what the ledger holds of its label
    label: Callable[[str], Annotation]
    tables: Mapping[str, Table]  # those of run.json
    trust: Trust

    @classmethod
    def of_sample(cls, sample: Sample, tables: Mapping[str, Table]) -> Self:
        labels = sample.annotations
        records = {task: kind_of(task).encode(label, labels, tables[task])[1] for task, label in labels.items()}
        trust = sample.trust or Trust()
        return cls(sample.image, sample.request.classes, records, labels.__getitem__, tables, trust)


def certainty(made: Scored) -> float | None:
    """The mean over the kinds of labels that tell how sure their decoder was."""
    values = [kind_of(task).certainty(record) for task, record in made.records.items()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def presence(made: Scored) -> float:
    """Of the classes a prompt names, the share that is shown by each kind of labels that can name them."""
    pixels = made.image.shape[0] * made.image.shape[1]
    shown = []
    for task, record in made.records.items():
        words = set(kind_of(task).words(record, made.tables[task], pixels * LEAST_SHARE))
        shown += [name in words for name in made.named if name in made.tables[task].get("classes", ())]
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


SCORERS: dict[str, Callable[[Scored], float | None]] = {
    "score": certainty,
    "trust": lambda made: float(made.trust.is_trusted),
    "agreement": lambda made: agreement([names for task in made.records if (names := named_map(made.label(task)))]),
    "presence": presence,
    "sharpness": lambda made: sharpness(Image.fromarray(made.image)),
}
