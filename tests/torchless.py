"""The generate command with arithmetic in the place of its networks and without torch, so that a thousand runs take no
longer than one real one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from datasetdm_fast.config import Defaults
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Quarantined, Request, Sample, SemanticMap, Trust
from datasetdm_fast.engine.decoders.config import SD1_LEVELS, DecoderConfig
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.runs.jobs import job, remake

SIDE = 64  # pixels
CONFIGS = {
    "semantic": DecoderConfig("segmentation", "semantic", SD1_LEVELS, classes=world.CLASSES),
    "instance": DecoderConfig("segmentation", "instance", SD1_LEVELS, classes=world.THINGS),
    "depth": DecoderConfig("depth", "depth", SD1_LEVELS, max_depth=4.0),
    "pose": DecoderConfig("heatmap", "pose", SD1_LEVELS, joints=world.JOINTS, limbs=world.LIMBS),
    "open-vocabulary": DecoderConfig("open-vocabulary", "open-vocabulary", SD1_LEVELS, classes=world.THINGS),
}

DOUBT = Trust(missing=("star",), confidence=0.9, reasons=("star is in the prompt, but not in semantic",))


@dataclass(frozen=True)
class Schedule:
    timesteps: tuple[int, ...] = (999, 1)

    def __len__(self) -> int:
        return len(self.timesteps)


class Engine:
    """What the job asks of an engine before the first batch."""

    name, device = "torchless", SimpleNamespace(type="cpu")

    def __init__(self, tasks):
        tokenizer = SimpleNamespace(model_max_length=77)
        self.model = SimpleNamespace(
            name="torchless",
            backbone=SimpleNamespace(title="arithmetic", package="", text_network=None, flow=None),
            networks={},
            guidance_at=lambda guidance: "cfg",
            source="",
            tokenizer=lambda prompt, truncation=False: SimpleNamespace(input_ids=[0, *prompt.split(), 1]),
            defaults=Defaults(size=SIDE, steps=2, guidance=2.0),
            scale=0.0,
            size=SIDE,
            digests={"unet": "arithmetic"},
            licence="none",
        )
        self.model.tokenizer.model_max_length = tokenizer.model_max_length
        self.decoders = {task: SimpleNamespace(config=CONFIGS[task]) for task in tasks}

    def suggested_batch(self):
        return 8

    def fingerprint(self):
        return {"engine": "torchless", "dtype": "fp32", "device": "cpu"}


def drawn(request: Request, tasks) -> Sample | Quarantined:
    """A sample that depends on its request alone; a prompt with the word `broken` is set aside."""
    if "broken" in request.prompt:
        return Quarantined(request, "NaN or infinite values in latents")
    bits = np.random.Philox(key=request.seed).random_raw(16)
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = (x * int(bits[0] % 7) + y * int(bits[1] % 7)) // 4 + int(bits[2] % 256)
    image = np.stack([wave, wave * 3 + int(bits[3] % 64), 255 - wave], -1).astype(np.uint8)
    count = int(bits[4] % 4)
    centres, radii = bits[5 : 5 + count] % SIDE, bits[8 : 8 + count] % 12 + 3
    masks = np.array(
        [(x - int(c)) ** 2 + (y - SIDE // 2) ** 2 < int(r) ** 2 for c, r in zip(centres, radii, strict=True)], bool
    ).reshape(-1, SIDE, SIDE)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for k, mask in enumerate(masks):
        labels[mask] = 2 + (int(bits[11]) + k) % len(world.THINGS)
    people = int(bits[12] % 2)
    joints = (np.arange(2 * len(world.JOINTS)).reshape(-1, 2) * 1.25 + int(bits[13] % 20)) % SIDE
    points = np.concatenate([joints, np.full((len(joints), 1), 0.75)], 1).astype(np.float32)[None].repeat(people, 0)
    made = {
        "semantic": SemanticMap(labels, (wave % 101 / 100).astype(np.float32), world.CLASSES),
        "instance": Instances(
            masks, np.arange(count) % len(world.THINGS), np.linspace(0.9, 0.5, count, dtype=np.float32), world.THINGS
        ),
        "depth": DepthMap((1 + (x + y + int(bits[14] % 50)) / 100).astype(np.float32), 4.0),
        "pose": Keypoints(
            points, np.full(points.shape[:2], 2, np.int64), np.full(people, 0.8, np.float32), world.JOINTS, world.LIMBS
        ),
        "open-vocabulary": SemanticMap(
            np.maximum(labels, 1) - 1, np.ones(labels.shape, np.float32), ("background", *world.THINGS)
        ),
    }
    trust = DOUBT if int(bits[4] % 3) == 1 else Trust()
    return Sample(request, image, {task: made[task] for task in tasks}, trust=trust)


def install(patch=setattr) -> None:
    """Puts the arithmetic in its place; `patch` is setattr, or a test's monkeypatch.setattr."""

    def open_engine(model, engine, labels, stored, dtype="", guidance=None):
        return Engine(labels), {task: {"digest": "arithmetic", "licence": "none"} for task in labels}

    def recipe_of(sampling, labels, engine, classes, table=None):
        facts = {
            "sampler": sampling.sampler,
            "profile": sampling.profile,
            "steps": 2,
            "calls": 2,
            "guidance": 2.0,
            "size": SIDE,
            "capture_timestep": 1,
        }
        words = (tuple(classes) or world.THINGS) if "open-vocabulary" in labels.task else ()
        return Recipe(Schedule(), 2.0, SIDE, labels.task, {}, words, facts=facts)

    def made(batches, engine, recipe, on_unet_call=lambda: None, make=None):
        for batch in batches:
            for _ in recipe.schedule.timesteps:
                on_unet_call()
            yield batch, [drawn(request, recipe.tasks) for request in batch.requests]

    for module in (job, remake):
        patch(module, "open_engine", open_engine)
        patch(module, "recipe_of", recipe_of)
    patch(driver, "generate", made)
