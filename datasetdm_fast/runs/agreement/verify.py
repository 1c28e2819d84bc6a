"""Two engines compared on the same samples."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datasetdm_fast.config import SPEEDS
from datasetdm_fast.cores import in_blocks
from datasetdm_fast.data import Request
from datasetdm_fast.engine.engines.fast import DTYPES, state_distance
from datasetdm_fast.engine.labels import LABEL_KINDS, Limit
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.engine.sampling.schedule import SamplerState
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.agreement.observe import (
    PERTURBATIONS,
    Observation,
    Rounded,
    averaged_distance,
    encoded_distance,
    free_running_distances,
    observe,
    rounding_distances,
    teacher_forced_distances,
)
from datasetdm_fast.version import __version__

SAME: Limit = (1e-5, 4e-5)  # median and 99th percentile of what differs by rounding in fp32


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
    "call": SAME,
    "level": SAME,
    "averages": SAME,
    "outputs": (1e-4, 1e-2),  # one flipped cell of an attention mask changes all outputs of its query
    "image": (2e-4, 5e-4),  # 74 dB, 66 dB: one grey level at a few pixels
    "encoded image": SAME,
    "free latents": (1e-4, 4e-4),
    "free image": (5.6e-3, 1e-2),  # 45 dB, 40 dB
}
OWN_ROUNDED: dict[str, Limit] = {  # fp16 or bf16 against fp32
    "text": SAME,  # fp32 in every precision, as is the sampler
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
    """One measure of the comparison: distances of all images, and the limits they have to keep."""

    measure: str
    median: float
    p99: float
    limit: Limit
    floor: Limit | None  # median and 99th percentile of the reference's own drift
    worst: int  # index of the worst image

    @property
    def is_passed(self) -> bool:
        return self.median <= self.limit[0] and self.p99 <= self.limit[1]


def evaluate_gates(
    distances: Mapping[str, np.ndarray], gates: Mapping[str, Limit], floors: Mapping[str, np.ndarray]
) -> list[GateRow]:
    """A row for each measure of distances [calls or 1, images]; its limit is at least MARGIN times the own drift."""
    rows = []
    for name, values in distances.items():
        # one gate for all levels, one for all raw outputs, one for all labels of a task
        is_shared = name.startswith(("level ", "outputs ", "averages "))
        limit, floor = gates[name.split()[0] if is_shared else name.partition(":")[0]], None
        if name in floors:
            # each row of outputs is a run of its own, and one cell that flips moves the median of few images
            runs = floors[name] if name.startswith("outputs ") else [floors[name]]
            floor = max(median for median, _ in map(summary, runs)), max(p99 for _, p99 in map(summary, runs))
            limit = tuple(max(gate, MARGIN * drift) if drift < FARTHEST else gate for gate, drift in zip(limit, floor))
        rows.append(GateRow(name, *summary(values), limit, floor, worst=int(values.max(0).argmax())))
    return rows


def summary(values: np.ndarray) -> Limit:
    """Median and 99th percentile; of fewer than a hundred numbers the latter is the largest."""
    finite = np.nan_to_num(values, nan=FARTHEST, posinf=FARTHEST)
    return float(np.median(finite)), float(np.quantile(finite, 0.99, method="higher"))


@dataclass(frozen=True)
class Verdict:
    """Whether two engines agree, by the rows of all measures."""

    rows: list[GateRow]
    engine: dict[str, str]
    against: dict[str, str]
    facts: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        """The measures that are beyond their limits."""
        return [row.measure for row in self.rows if not row.is_passed]

    @property
    def agrees(self) -> bool:
        return not self.failed

    @property
    def remedy(self) -> str:
        """What may help where they do not agree."""
        return "Choose another --engine." if self.engine["dtype"] == "fp32" else "Try --dtype fp32 or another --engine."

    def document(self) -> dict[str, Any]:
        rows = [asdict(row) | {"passed": row.is_passed} for row in self.rows]
        return {"agrees": self.agrees, "engine": self.engine, "against": self.against, **self.facts, "measures": rows}

    def table(self) -> str:
        """The figures in lines, for a reader."""
        width = max(22, *(len(row.measure) + 2 for row in self.rows))
        lines = [f"{'measure':{width}}{'median':>10}{'p99':>10}{'limits':>20}{'own drift':>20}  worst"]
        for row in self.rows:
            limit, floor = (f"{pair[0]:.1e} {pair[1]:.1e}" if pair else "" for pair in (row.limit, row.floor))
            lines.append(
                f"{row.measure:{width}}{row.median:10.1e}{row.p99:10.1e}{limit:>20}{floor:>20}  "
                f"{row.worst:5}{'' if row.is_passed else '  FAILED'}"
            )
        sides = [f"{side['engine']} ({side['dtype']}, {side['device_name']})" for side in (self.engine, self.against)]
        images = count_noun(self.facts["number"], "image")
        speed = "" if self.facts["speed"] == SPEEDS[0] else f" at the speed {self.facts['speed']}"
        return "\n".join(lines) + (
            f"\n{' and '.join(sides)} {'agree' if self.agrees else 'DISAGREE'} on {images} of {self.facts['model']}, "
            f"{count_noun(self.facts['calls'], 'call')} each{speed}"
        )


def verify(
    engine,
    reference,
    requests: Sequence[Request],
    recipe: Recipe,
    batch_size: int,
    on_unet_call: Callable[[], None] = lambda: None,
    *,
    is_whole: bool = False,
) -> Verdict:
    """Every request through both engines, teacher-forced and free-running; `is_whole` adds stages they may not need."""

    def whole_distances(compared, truth: Observation) -> dict[str, np.ndarray]:
        if not is_whole:
            return {}
        is_known = recipe.attention is not None or getattr(compared, "exports_averages", False)
        family = reference.model.backbone
        is_averaged = (family.has_averages or family.has_text_maps) and not is_known
        averages = averaged_distance(compared, reference, truth, recipe) if is_averaged else {}
        return averages | encoded_distance(compared, reference, truth.images)

    dtype = engine.fingerprint()["dtype"]
    storage = DTYPES.get("fp16" if dtype == "tf32" else dtype, DTYPES["fp16"])  # TF32 keeps as many bits as fp16
    rounded = Rounded(reference, storage) if dtype != "fp32" and reference.name == "torch" else None
    collected: dict[str, list[np.ndarray]] = {}
    drift: dict[str, list[np.ndarray]] = {}
    for k, batch in enumerate(in_blocks(requests, batch_size)):
        is_perturbed = dtype == "fp32" and not k  # what rounding alone does to the reference, of one batch
        truth = observe(
            reference, batch, recipe, on_unet_call=on_unet_call, perturbations=PERTURBATIONS if is_perturbed else 0
        )
        free = observe(engine, batch, recipe, on_unet_call=on_unet_call, sampler=SamplerState)
        forced = observe(engine, batch, recipe, truth, on_unet_call, SamplerState)
        distances = teacher_forced_distances(forced, truth) | free_running_distances(free, truth)
        _gather(collected, distances | whole_distances(engine, truth), len(batch))
        if is_perturbed:
            _gather(drift, rounding_distances(truth), len(batch))
        if rounded and not k:  # one batch shows what the precision costs; the reference is slow
            distances = teacher_forced_distances(observe(rounded, batch, recipe, truth), truth)
            distances |= free_running_distances(observe(rounded, batch, recipe), truth)
            _gather(drift, distances | whole_distances(rounded, truth), len(batch))
    joined, floors = ({name: np.concatenate(parts, 1) for name, parts in kind.items()} for kind in (collected, drift))
    rows = evaluate_gates(joined, EXACT if dtype == "fp32" else ROUNDED, floors)
    rows.insert(0, weights_row(engine, reference))
    facts = {
        "model": engine.model.name,
        "decoders": sorted(engine.decoders),
        "number": len(requests),
        "calls": len(recipe.schedule),
        "speed": recipe.facts.get("speed", SPEEDS[0]),
        "versions": {"datasetdm_fast": __version__, "python": platform.python_version()},
    }
    return Verdict(rows, engine.fingerprint(), reference.fingerprint(), facts)


def weights_row(engine, reference) -> GateRow:
    """Whether both hold the same weights, up to how the engine's precision stores them."""
    pairs = [
        (engine.decoders[task], reference.decoders[task]) for task in engine.decoders if task in reference.decoders
    ]
    if engine.model is not reference.model:
        theirs = reference.model.modules
        pairs += [(module, theirs[part]) for part, module in engine.model.modules.items()]
    farthest = engine.weight_distance() if hasattr(engine, "weight_distance") else 0.0
    for ours, theirs in pairs:
        held = ours.state_dict()
        farthest = max(
            [farthest, *(state_distance(held[key].cpu(), value.cpu()) for key, value in theirs.state_dict().items())]
        )
    return GateRow("weights", farthest, farthest, (0.0, 0.0), None, 0)


def _gather(collected: dict, distances: dict, batch: int) -> None:
    """Adds distances as [calls or 1, images]."""
    for name, values in distances.items():
        collected.setdefault(name, []).append(values.reshape(-1, batch))
