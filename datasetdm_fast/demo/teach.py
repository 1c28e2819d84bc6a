"""python -m datasetdm_fast.demo.teach --out DIR: the five demo decoders from 100 rendered, labelled scenes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from datasetdm_fast.demo import world
from datasetdm_fast.engines import build_engine
from datasetdm_fast.loading import load_model
from datasetdm_fast.models.decoders import DecoderConfig, save_decoder
from datasetdm_fast.readers import open_data
from datasetdm_fast.training.cache import capture_views
from datasetdm_fast.training.loop import Schedule, fit
from datasetdm_fast.training.targets import target

TIMESTEP = 100  # where this model's features say most: at the last calls a v-prediction is nearly the noise alone
MASKS = {"width": 64, "heads": 4, "layers": 3, "feed_forward": 128, "mask_dim": 64, "queries": 16, "upscale": 2}


def configs(levels, text_width: int, timestep: int) -> dict[str, tuple[DecoderConfig, Schedule]]:
    """Each task's decoder and how it is fitted."""
    shared = {"levels": levels, "text_width": text_width, "capture_timestep": timestep}
    pose = {"joints": world.JOINTS, "limbs": world.LIMBS, "score_threshold": 0.3}
    masks = Schedule(batch_size=12, points=512)
    return {
        "semantic": (
            DecoderConfig(kind="segmentation", task="semantic", classes=world.CLASSES, **MASKS, **shared),
            replace(masks, steps=1250, dropout=0.6, weight_decay=0.2),
        ),
        "instance": (DecoderConfig(kind="segmentation", task="instance", classes=world.THINGS, **MASKS, **shared), replace(masks, steps=1500, dropout=0.0)),
        "depth": (
            DecoderConfig(kind="depth", task="depth", width=16, depth_width=24, max_depth=world.MAX_DEPTH, upscale=2, **shared),
            Schedule(batch_size=12, steps=900, rate=2e-3, dropout=0.0),
        ),
        "pose": (DecoderConfig(kind="heatmap", task="pose", width=32, upscale=2, **pose, **shared), Schedule(steps=1500, sigma=1.5, dropout=0.0)),
        "open-vocabulary": (
            DecoderConfig(kind="open-vocabulary", task="open-vocabulary", classes=world.THINGS, text_centre=True, **{**MASKS, "queries": 8}, **shared),
            replace(masks, steps=900),
        ),
    }


def reporter(task: str, steps: int) -> Callable[[int, float], None]:
    """A line every hundred steps."""
    started = time.monotonic()

    def report(step: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            print(f"{task} {step}/{steps} loss {loss:.4f} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m datasetdm_fast.demo.teach", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo:100@1000")
    parser.add_argument("--task", default="semantic,instance,depth,pose,open-vocabulary")
    parser.add_argument("--timestep", type=int, default=TIMESTEP)
    parser.add_argument("--draws", type=int, default=6, help="noise draws of each image and of its mirror image")
    parser.add_argument("--steps", type=int, default=0, help="0 = each task's own")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    engine = build_engine("torch", load_model(options.model), {})
    source = open_data(options.data, engine.model.size)
    items, started = list(source), time.monotonic()
    cache = capture_views(engine, [item.image for item in items], [item.caption for item in items], options.timestep, options.draws, mirror=True)
    print(f"captured {len(cache.views)} views of {len(items)} images in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    words = engine.encode_classes(list(source.thing_classes))
    for task, (config, schedule) in configs(engine.model.levels, words.shape[1], options.timestep).items():
        if task not in options.task.split(","):
            continue
        schedule = replace(schedule, seed=options.seed, steps=options.steps or schedule.steps)
        targets = [target(source, items[view.image], task, view.is_mirrored) for view in cache.views]
        decoder = fit(config, cache, targets, schedule, words.clone() if config.has_text else None, reporter(task, schedule.steps))
        save_decoder(decoder, options.out / task, storage="fp16")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
