"""Limits on those distances, and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.engine.labels.kind import Limit

SAME: Limit = (1e-5, 4e-5)  # what is fp32 in every precision


class LabelGates(dict[str, Limit]):
    """Limits by measure, those of labels as their kinds have them."""

    def __init__(self, limits: Mapping[str, Limit], labels: str, free: str):
        super().__init__(limits)
        self.fields = {"": labels, "free ": free}
        for task in LABEL_KINDS:
            self |= {f"{start}{task}": self[f"{start}{task}"] for start in self.fields}

    def __missing__(self, measure: str) -> Limit:
        task = measure.removeprefix("free ")
        return getattr(LABEL_KINDS[task].gates, self.fields[measure.removesuffix(task)])


OWN_EXACT: dict[str, Limit] = {  # fp32 against fp32
    "text": SAME,
    "sampler": SAME,
    "call": (1e-5, 4e-5),
    "level": (1e-5, 4e-5),
    "averages": (1e-5, 4e-5),
    "outputs": (1e-4, 1e-2),  # a mask that flips one cell of what a query may see moves its whole answer
    "image": (2e-4, 5e-4),  # 74 dB, 66 dB: one grey level at a few pixels
    "encoded image": (1e-5, 4e-5),
    "free latents": (1e-4, 4e-4),
    "free image": (5.6e-3, 1e-2),  # 45 dB, 40 dB
}
OWN_ROUNDED: dict[str, Limit] = {  # fp16 or bf16 against fp32
    "text": SAME,
    "sampler": SAME,
    "call": (1e-2, 4e-2),
    "level": (5e-3, 2e-2),
    "averages": (5e-3, 2e-2),
    "outputs": (5e-2, 0.2),
    "image": (1e-2, 2e-2),  # 40 dB, 34 dB
    "encoded image": (1e-2, 4e-2),
    "free latents": (0.1, 0.3),
    "free image": (4e-2, 8e-2),  # 28 dB, 22 dB
}
EXACT, ROUNDED = LabelGates(OWN_EXACT, "exact", "free_exact"), LabelGates(OWN_ROUNDED, "rounded", "free_rounded")
FARTHEST = 1e300  # the distance of what is no number; a sum of two is still a number
MARGIN = 1.5  # times the drift of the reference against itself at the same precision


@dataclass(frozen=True)
class GateRow:
    measure: str
    median: float
    p99: float
    limit: Limit
    floor: Limit | None  # median and 99th percentile of the reference's own drift
    worst: int  # place of the worst sample

    @property
    def is_passed(self) -> bool:
        return self.median <= self.limit[0] and self.p99 <= self.limit[1]


def evaluate_gates(
    distances: Mapping[str, np.ndarray], gates: Mapping[str, Limit], floors: Mapping[str, np.ndarray]
) -> list[GateRow]:
    """A row for every measure of distances [calls or 1, images]; a gate gives way where the reference itself drifts
    more at that precision, but not where it leaves its range there.
    """
    rows = []
    for name, values in distances.items():
        limit, floor = gates[_gate_of(name)], None
        if name in floors:
            floor = summary(floors[name])
            limit = tuple(max(gate, MARGIN * drift) if drift < FARTHEST else gate for gate, drift in zip(limit, floor))
        rows.append(GateRow(name, *summary(values), limit, floor, worst=int(values.max(0).argmax())))
    return rows


def _gate_of(measure: str) -> str:
    """The gate of a measure: one for all levels, one for all raw outputs, one for all labels of a task."""
    return measure.split()[0] if measure.startswith(("level ", "outputs ", "averages ")) else measure.partition(":")[0]


def summary(values: np.ndarray) -> Limit:
    """Median and 99th percentile; of fewer than a hundred numbers the latter is the largest."""
    finite = np.nan_to_num(values, nan=FARTHEST, posinf=FARTHEST)
    return float(np.median(finite)), float(np.quantile(finite, 0.99, method="higher"))
