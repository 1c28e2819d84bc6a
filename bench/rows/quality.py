"""Ways that change the result: their speed, and beside it what they change in the labels; of seeded weights nothing is
said.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bench.peers import PEERS
from bench.peers.engine import EnginePeer
from bench.rows.race import OURS, release, spread
from bench.setting import PROFILE, TASKS, Setting
from datasetdm_fast.agreement.distances import image_distance
from datasetdm_fast.data import Request, Sample, SemanticMap
from datasetdm_fast.generation.recipe import make_recipe
from datasetdm_fast.labels import LABEL_KINDS

# Name -> recipe.
BATCH, IMAGES = 8, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "half the steps": {"sampler": "pndm", "share": 0.5},
    "DPM-Solver++, 40 % of the steps": {"sampler": "dpm-solver++", "share": 0.4},
    "DDIM, half the steps": {"sampler": "ddim", "share": 0.5},
}


def rows(setting: Setting) -> list[dict[str, Any]]:
    """One row an option: images per second against the exact way, and the drift of the same seeds' images and
    labels.
    """
    if not setting.is_trained:
        return []
    exact = with_recipe(PEERS[OURS].build(setting, BATCH), setting)
    peers = {"exact": exact, **{name: with_recipe(exact, setting, **option) for name, option in OPTIONS.items()}}
    exact.make(setting.batch(BATCH))
    found, rounds = in_turn(peers, setting.batch(IMAGES))
    made = []
    for name in OPTIONS:
        pairs = [a / b for a, b in zip(rounds["exact"], rounds[name])]
        speed = {"images_per_second": round(BATCH / statistics.median(rounds[name]), 4), "over_exact": spread(pairs)}
        calls = {"calls": len(peers[name].recipe.schedule), "exact_calls": len(exact.recipe.schedule)}
        made.append(
            {"option": name, **calls, "batch": BATCH, "images": IMAGES, **speed, **drift(found[name], found["exact"])}
        )
    release(setting.device)
    return made


def with_recipe(peer: EnginePeer, setting: Setting, sampler: str = "pndm", share: float = 1.0) -> EnginePeer:
    """The peer with as many steps as the model was made for, or a share of them."""
    steps = max(round(setting.model.defaults.steps * share), 2)
    recipe = make_recipe(
        peer.engine, TASKS, sampler=sampler, steps=steps, guidance=setting.recipe.guidance, profile=PROFILE
    )
    return EnginePeer(peer.engine, replace(setting, recipe=recipe), peer.batch)


def in_turn(
    peers: Mapping[str, EnginePeer], requests: Sequence[Request]
) -> tuple[dict[str, list[Sample]], dict[str, list[float]]]:
    """The samples of every peer, and the seconds of each batch, made in turn with the others'."""
    found, rounds = {name: [] for name in peers}, {name: [] for name in peers}
    for first in range(0, len(requests), BATCH):
        for name, peer in peers.items():
            begin = time.perf_counter()
            found[name] += peer.make(requests[first : first + BATCH])
            rounds[name].append(time.perf_counter() - begin)
    return found, rounds


def drift(found: Sequence[Sample], truth: Sequence[Sample]) -> dict[str, float]:
    """Medians over the images: PSNR in dB, mask IoU, AbsRel, joints in pixels, and one minus the IoU of instances."""
    images = image_distance(np.stack([one.image for one in found]), np.stack([one.image for one in truth]))
    pairs = [(a.annotations, b.annotations) for a, b in zip(found, truth, strict=True)]
    return {
        "psnr_db": round(float(-20 * np.log10(max(np.median(images), 1e-9))), 2),
        "mask_iou": middle([mask_iou(a["semantic"], b["semantic"]) for a, b in pairs]),
        "instance_iou": middle([1 - LABEL_KINDS["instance"].distance(a["instance"], b["instance"]) for a, b in pairs]),
        "depth_absrel": middle([LABEL_KINDS["depth"].distance(a["depth"], b["depth"]) for a, b in pairs]),
        "keypoint_px": middle(
            [
                LABEL_KINDS["pose"].distance(a["pose"], b["pose"])
                for a, b in pairs
                if a["pose"].points.shape == b["pose"].points.shape
            ]
        ),
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
