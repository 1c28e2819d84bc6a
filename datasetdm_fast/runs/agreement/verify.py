"""Two engines compared on the same samples, and the verdict stored."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datasetdm_fast.engine.engines.fast import DTYPES, state_distance
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.engine.sampling.walk import SamplerState
from datasetdm_fast.runs.agreement.distances import (
    averaged_distance,
    encoded_distance,
    free_running_distances,
    rounding_distances,
    teacher_forced_distances,
)
from datasetdm_fast.runs.agreement.gates import EXACT, ROUNDED, GateRow, evaluate_gates
from datasetdm_fast.runs.agreement.observe import SHAKES, Observation, Rounded, observe
from datasetdm_fast.version import __version__


@dataclass(frozen=True)
class Verdict:
    """What came out, and the material of the page."""

    rows: list[GateRow]
    engine: dict[str, str]
    against: dict[str, str]
    facts: dict[str, Any]
    truth: list[Observation]  # per batch, each engine on its own
    found: list[Observation]
    prompts: list[str]

    @property
    def agrees(self) -> bool:
        return all(row.is_passed for row in self.rows)

    def document(self) -> dict[str, Any]:
        rows = [asdict(row) | {"passed": row.is_passed} for row in self.rows]
        return {"agrees": self.agrees, "engine": self.engine, "against": self.against, **self.facts, "measures": rows}


def verify(
    engine,
    reference,
    requests: Sequence,
    recipe: Recipe,
    batch_size: int,
    on_unet_call: Callable[[], None] = lambda: None,
    *,
    is_whole: bool = False,
) -> Verdict:
    """Every request through both engines, led by the reference and on its own, judged by the precision's gates; with
    `is_whole` also what these requests may not need: the encoder of images, on the reference's images, and averages of
    attention, unless a graph would have to be exported for them.
    """

    def further(one, truth: Observation) -> dict[str, np.ndarray]:
        if not is_whole:
            return {}
        has_averages = recipe.attention is not None or getattr(engine, "exports_averages", False)
        own = {} if has_averages else averaged_distance(one, reference, truth, recipe)
        return own | encoded_distance(one, reference, truth.images)

    dtype = engine.fingerprint()["dtype"]
    storage = DTYPES.get("fp16" if dtype == "tf32" else dtype, DTYPES["fp16"])  # TF32 keeps as many bits as fp16
    rounded = Rounded(reference, storage) if dtype != "fp32" and reference.name == "torch" else None
    collected: dict[str, list[np.ndarray]] = {}
    drift: dict[str, list[np.ndarray]] = {}
    truths, founds = [], []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        is_told = dtype == "fp32" and not first  # what rounding alone does to the reference, of one batch
        truth = observe(reference, batch, recipe, on_unet_call=on_unet_call, shakes=SHAKES if is_told else 0)
        found = observe(engine, batch, recipe, on_unet_call=on_unet_call, sampler=SamplerState)
        _gather(
            collected,
            teacher_forced_distances(observe(engine, batch, recipe, truth, on_unet_call, SamplerState), truth)
            | free_running_distances(found, truth)
            | further(engine, truth),
            len(batch),
        )
        if is_told:
            _gather(drift, rounding_distances(truth), len(batch))
        if rounded and not first:  # one batch tells what the precision costs; the reference is slow
            _gather(
                drift,
                teacher_forced_distances(observe(rounded, batch, recipe, truth), truth)
                | free_running_distances(observe(rounded, batch, recipe), truth)
                | further(rounded, truth),
                len(batch),
            )
        truths.append(truth)
        founds.append(found)
    joined, floors = ({name: np.concatenate(parts, 1) for name, parts in kind.items()} for kind in (collected, drift))
    rows = evaluate_gates(joined, EXACT if dtype == "fp32" else ROUNDED, floors)
    rows.insert(0, weights_row(engine, reference))
    facts = {
        "model": engine.model.name,
        "decoders": sorted(engine.decoders),
        "number": len(requests),
        "calls": len(recipe.schedule),
        "versions": {"datasetdm_fast": __version__, "python": platform.python_version()},
    }
    return Verdict(
        rows,
        engine.fingerprint(),
        reference.fingerprint(),
        facts,
        truths,
        founds,
        [request.prompt for request in requests],
    )


def weights_row(engine, reference) -> GateRow:
    """Whether both hold the same weights, up to how the engine's precision stores them."""
    pairs = [
        (engine.decoders[task], reference.decoders[task]) for task in engine.decoders if task in reference.decoders
    ]
    if engine.model is not reference.model:
        pairs += [
            (getattr(engine.model, part), getattr(reference.model, part)) for part in ("text_encoder", "unet", "vae")
        ]
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
