"""Samples and run folders without any network: images and labels come from the demo world's renderer."""

from pathlib import Path

import numpy as np

from datasetdm_fast.data import DepthMap, Instances, Keypoints, Request, Sample, SemanticMap
from datasetdm_fast.engine.labels import number_classes
from datasetdm_fast.engine.labels.class_tables import find_classes
from datasetdm_fast.engine.labels.pose import MIDDLE, WIDENED
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.document import FORMAT
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.version import __version__

TASKS = ("semantic", "instance", "depth", "pose", "open-vocabulary")


def rendered(index: int, size: int = 64, prompt: str | None = None) -> Sample:
    view = world.view(index, size)
    present = [k for k in np.unique(view.instance) if k]
    masks = np.stack([view.instance == k for k in present]) if present else np.zeros((0, size, size), bool)
    kinds = np.array([world.THINGS.index(view.scene.things[k - 1].kind) for k in present], np.int64)
    joints = np.stack(list(view.keypoints.values())) if view.keypoints else np.zeros((0, len(world.JOINTS), 3))
    points = np.concatenate([joints[..., :2], np.full((*joints.shape[:2], 1), 0.75)], 2).astype(np.float32)
    scores = np.linspace(0.9, 0.6, len(present), dtype=np.float32)
    words = ("background", *world.THINGS)
    things = np.where(view.semantic >= 2, view.semantic - 1, 0).astype(np.uint8)
    prompt = view.caption if prompt is None else prompt
    return Sample(
        Request(index, prompt, index, find_classes(prompt, world.THINGS)),
        view.image,
        {
            "semantic": SemanticMap(
                view.semantic, np.linspace(0, 1, size * size, dtype=np.float32).reshape(size, size), world.CLASSES
            ),
            "instance": Instances(masks, kinds, scores, world.THINGS),
            "depth": DepthMap(view.depth, world.MAX_DEPTH),
            "pose": Keypoints(
                points,
                joints[..., 2].astype(np.int64),
                np.full(len(joints), 0.8, np.float32),
                world.JOINTS,
                world.LIMBS,
            ),
            "open-vocabulary": SemanticMap(things, np.linspace(1, 0, size * size).reshape(size, size), words),
        },
    )


def document(number: int, size: int = 64, **config) -> dict:
    """A run.json as generate would write it."""
    return {
        "format": FORMAT,
        "versions": {"datasetdm_fast": __version__},
        "config": RunConfig(task=TASKS, number=number, **config).identity(),
        "plan": {"number": number, "batch_size": 4, "prompts": "", "words": list(world.THINGS)},
        "sampling": {"size": size, "steps": 50, "calls": 51, "guidance": 3.0},
        "model": {"name": "rendered", "source": "", "licence": "Apache-2.0", "digests": {}},
        "decoders": {task: {"digest": "", "licence": "Apache-2.0"} for task in TASKS},
        "engine": {"engine": "renderer"},
        **number_classes(
            {
                "semantic": {"classes": list(world.CLASSES), "ignore": 255},
                "instance": {"classes": list(world.THINGS), "size": [size, size]},
                "depth": {"max_depth": world.MAX_DEPTH, "unit": "millimetre"},
                "pose": {
                    "joints": list(world.JOINTS),
                    "limbs": [list(limb) for limb in world.LIMBS],
                    "origin": MIDDLE,
                    "size": [size, size],
                    "widened": WIDENED,
                },
                "open-vocabulary": {"classes": ["background", *world.THINGS], "has_confidence": True},
            }
        ),
    }


def write_run(path: Path, number: int, size: int = 64, prompts: list[str] | None = None) -> None:
    with RunFolder(path, document(number, size)) as folder:
        for first in range(0, number, 50):
            folder.add(
                [rendered(k, size, prompts[k] if prompts else None) for k in range(first, min(first + 50, number))],
                {"batch_size": 4},
            )
        finish_run(folder)
