"""Options that change the result: their speed, and beside it what they change in the labels; of seeded weights nothing
is said.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bench.machine.measure import interleaved, spread
from bench.peers import OURS, PEERS
from bench.peers.engine import EnginePeer
from bench.report.tables import Table, figure, spread_of, text
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.setting import PROFILE, TASKS, Setting
from datasetdm_fast.config import CACHED, EXACT, FAST, FAST_CACHED
from datasetdm_fast.data import Sample, SemanticMap
from datasetdm_fast.engine.engines.device import release
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.runs.agreement.observe import image_distance

BATCH, IMAGES = 8, 16
RECIPES: dict[str, dict[str, Any]] = {
    EXACT: {"sampler": "pndm", "share": 1.0},
    "half the steps": {"sampler": "pndm", "share": 0.5},
    "DDIM, half the steps": {"sampler": "ddim", "share": 0.5},
    **{f"--speed {speed}": {"speed": speed} for speed in (FAST, CACHED, FAST_CACHED)},
}


def rows(run: BenchRun) -> Rows:
    """One row an option: images per second against the exact way, and the drift of the same seeds' images and
    labels.
    """
    setting = run.setting
    if not setting.is_trained:
        return []
    ours = PEERS[OURS].build(setting, BATCH)
    peers = {name: with_recipe(ours, setting, **recipe) for name, recipe in RECIPES.items()}
    peers[EXACT].make(setting.batch(BATCH))
    made: dict[str, list[Sample]] = {name: [] for name in peers}

    def make(name: str) -> None:
        first = len(made[name])
        made[name] += peers[name].make(setting.batch(IMAGES)[first : first + BATCH])

    rounds = interleaved({name: lambda name=name: make(name) for name in peers}, 0.0, least=IMAGES // BATCH)
    seconds = {name: taken.seconds for name, taken in rounds.items()}
    calls = {name: len(peer.recipe.schedule) for name, peer in peers.items()}
    release()
    return [
        {"option": name, "calls": calls[name], "exact_calls": calls[EXACT], "batch": BATCH, "images": IMAGES}
        | {"images_per_second": round(BATCH / statistics.median(seconds[name]), 4)}
        | {"over_exact": spread([a / b for a, b in zip(seconds[EXACT], seconds[name])])}
        | drift(made[name], made[EXACT])
        for name in list(RECIPES)[1:]
    ]


def with_recipe(peer: EnginePeer, setting: Setting, share: float = 0.0, **options: Any) -> EnginePeer:
    """The peer with a share of the steps that the model was made for, and other options of make_recipe."""
    steps = max(round(setting.model.defaults.steps * share), 2) if share else 0
    guidance = setting.recipe.guidance
    recipe = make_recipe(peer.engine, TASKS, steps=steps, guidance=guidance, profile=PROFILE, **options)
    return EnginePeer(peer.engine, replace(setting, recipe=recipe), peer.batch)


def drift(found: Sequence[Sample], truth: Sequence[Sample]) -> dict[str, float]:
    """Medians over the images: PSNR in dB, mask IoU, AbsRel, joints in pixels, and one minus the IoU of instances."""
    images = image_distance(np.stack([one.image for one in found]), np.stack([one.image for one in truth]))
    pairs = [(a.annotations, b.annotations) for a, b in zip(found, truth, strict=True)]
    same_persons = [(a, b) for a, b in pairs if a["pose"].points.shape == b["pose"].points.shape]
    return {
        "psnr_db": round(float(-20 * np.log10(max(np.median(images), 1e-9))), 2),
        "mask_iou": median([mask_iou(a["semantic"], b["semantic"]) for a, b in pairs]),
        "instance_iou": median([1 - LABEL_KINDS["instance"].distance(a["instance"], b["instance"]) for a, b in pairs]),
        "depth_absrel": median([LABEL_KINDS["depth"].distance(a["depth"], b["depth"]) for a, b in pairs]),
        "keypoint_px": median([LABEL_KINDS["pose"].distance(a["pose"], b["pose"]) for a, b in same_persons]),
        "persons_lost": len(pairs) - len(same_persons),
    }


def median(values: Sequence[float]) -> float | None:
    return round(float(np.median(values)), 4) if len(values) else None


def mask_iou(found: SemanticMap, truth: SemanticMap) -> float:
    """Mean IoU over the classes that either map shows."""
    ious = []
    for number in np.union1d(found.labels, truth.labels):
        here, there = found.labels == number, truth.labels == number
        ious.append((here & there).sum() / (here | there).sum())
    return float(np.mean(ious))


COLUMNS = {"option": text("option"), "calls": text("calls"), "images/s": figure("images_per_second")}
COLUMNS |= {"speed-up": spread_of("over_exact", unit="×"), "PSNR": figure("psnr_db", unit=" dB")}
COLUMNS |= {"mask IoU": figure("mask_iou"), "instance IoU": figure("instance_iou")}
COLUMNS |= {"depth AbsRel": figure("depth_absrel"), "keypoints": figure("keypoint_px", unit=" px")}
COLUMNS |= {"persons lost": lambda row: f"{row['persons_lost']} of {row['images']}"}
MEASUREMENT = Measurement("quality", "Options that change the result", rows, (Table(COLUMNS),), least_seconds=60)
