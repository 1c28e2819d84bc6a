"""Ways that change the result: their speed, and beside it what they change in the labels; of seeded weights nothing is said."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bench.measure import interleaved
from bench.peers import PEERS
from bench.peers.engine import EnginePeer
from bench.race import OURS, meter, release, spread
from bench.setting import PROFILE, TASKS, Setting
from datasetdm_fast.agreement import image_distance, label_distance
from datasetdm_fast.data import Sample, SemanticMap
from datasetdm_fast.job import make_recipe

# Name -> recipe.
BATCH, IMAGES = 8, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "half the steps": {"sampler": "pndm", "share": 0.5},
    "DPM-Solver++, 40 % of the steps": {"sampler": "dpm-solver++", "share": 0.4},
    "DDIM, half the steps": {"sampler": "ddim", "share": 0.5},
}


def rows(setting: Setting, seconds: float, batch: int = BATCH, count: int = IMAGES) -> list[dict[str, Any]]:
    """One row an option: images per second against the exact way, and the drift of the same seeds' images and labels."""
    if not setting.is_trained:
        return []
    exact = PEERS[OURS].build(setting, batch)
    peers = {name: with_recipe(exact, setting, **option) for name, option in OPTIONS.items()}
    truth = many(exact, setting, count)
    requests = setting.batch(batch)
    rounds = interleaved({"exact": lambda: exact.make(requests), **{name: caller(peer, requests) for name, peer in peers.items()}}, seconds, meter(setting))
    made = []
    for name, peer in peers.items():
        pairs = [a / b for a, b in zip(rounds["exact"].seconds, rounds[name].seconds)]
        speed = {"images_per_second": round(batch / statistics.median(rounds[name].seconds), 4), "over_exact": spread(pairs)}
        made.append({"option": name, "calls": len(peer.recipe.schedule), "batch": batch, "images": count, **speed, **drift(many(peer, setting, count), truth)})
    release(setting.device)
    return made


def caller(peer: EnginePeer, requests):
    return lambda: peer.make(requests)


def with_recipe(peer: EnginePeer, setting: Setting, sampler: str, share: float) -> EnginePeer:
    steps = max(round(setting.recipe.facts["steps"] * share), 2)
    recipe = make_recipe(peer.engine, TASKS, sampler=sampler, steps=steps, guidance=setting.recipe.guidance, profile=PROFILE)
    return EnginePeer(peer.engine, replace(setting, recipe=recipe), peer.batch)


def many(peer: EnginePeer, setting: Setting, count: int) -> list[Sample]:
    requests = setting.batch(count)
    return [sample for first in range(0, count, peer.batch) for sample in peer.make(requests[first : first + peer.batch])]


def drift(found: Sequence[Sample], truth: Sequence[Sample]) -> dict[str, float]:
    """Medians over the images: PSNR in dB, mask IoU, AbsRel, joints in pixels, and one minus the IoU of instances."""
    images = image_distance(np.stack([one.image for one in found]), np.stack([one.image for one in truth]))
    pairs = [(a.annotations, b.annotations) for a, b in zip(found, truth, strict=True)]
    return {
        "psnr_db": round(float(-20 * np.log10(max(np.median(images), 1e-9))), 2),
        "mask_iou": middle([mask_iou(a["semantic"], b["semantic"]) for a, b in pairs]),
        "instance_iou": middle([1 - label_distance(a["instance"], b["instance"]) for a, b in pairs]),
        "depth_absrel": middle([label_distance(a["depth"], b["depth"]) for a, b in pairs]),
        "keypoint_px": middle([label_distance(a["pose"], b["pose"]) for a, b in pairs if a["pose"].points.shape == b["pose"].points.shape]),
        "persons_lost": sum(a["pose"].points.shape != b["pose"].points.shape for a, b in pairs),
    }


def middle(values: Sequence[float]) -> float | None:
    return round(float(np.median(values)), 4) if len(values) else None


def mask_iou(found: SemanticMap, truth: SemanticMap) -> float:
    """Mean IoU over the classes that either map shows."""
    ious = []
    for number in np.union1d(found.labels, truth.labels):
        here, there = found.labels == number, truth.labels == number
        ious.append((here & there).sum() / (here | there).sum())
    return float(np.mean(ious))
