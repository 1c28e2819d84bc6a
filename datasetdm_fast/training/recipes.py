"""How each task is taught: the shape of its decoder and the schedule of its training, ours or upstream's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasetdm_fast.decoders.config import DecoderConfig
from datasetdm_fast.stages import Level
from datasetdm_fast.training.schedule import TrainingSchedule
from datasetdm_fast.truth.labelled import LabelledSource

SMALL = {"width": 64, "heads": 4, "layers": 3, "feed_forward": 128, "mask_dim": 64, "queries": 16, "upscale": 2}
WIDE_UNET = 320  # channels of the first block of Stable Diffusion; such a UNet gets decoders of upstream's widths
POINTS = 12544 / 512**2  # sampled on a mask, as a share of the image's pixels
WHOLE_EPOCHS = 5000
EPOCHS = {"pose": 400, "nyu": 400}  # after which upstream's rate falls to a tenth; 350 elsewhere


@dataclass(frozen=True)
class TrainingRecipe:
    config: DecoderConfig
    schedule: TrainingSchedule


def recipe(
    task: str,
    source: LabelledSource,
    levels: Sequence[Level],
    text_width: int,
    timestep: int,
    images: int,
    *,
    preset: str = "default",
    pose_head: str = "heatmap",
    reader: str = "",
) -> TrainingRecipe:
    """Decoder and schedule for a task; `preset` is default or upstream, `images` are those to learn from."""
    is_small = levels[-1].features[0] < WIDE_UNET
    config = _config(task, source, tuple(levels), text_width, timestep, is_small, pose_head)
    if preset == "upstream":
        return TrainingRecipe(config, _upstream(task, images, reader, levels))
    schedule = _small(task) if is_small else _large(task)
    return TrainingRecipe(config, replace(schedule, sigma=2.0) if not is_small and task == "pose" else schedule)


def _config(
    task: str,
    source: LabelledSource,
    levels: tuple[Level, ...],
    text_width: int,
    timestep: int,
    is_small: bool,
    pose_head: str,
) -> DecoderConfig:
    shared = {"task": task, "levels": levels, "text_width": text_width, "capture_timestep": timestep or None}
    masks = SMALL if is_small else {}
    if task in ("semantic", "instance"):
        return DecoderConfig(
            kind="segmentation",
            classes=source.classes if task == "semantic" else source.thing_classes,
            **masks,
            **shared,
        )
    if task == "open-vocabulary":
        masks = {**SMALL, "queries": 8} if is_small else {"queries": 20}
        return DecoderConfig(
            kind="open-vocabulary", classes=source.thing_classes, text_centre=is_small, **masks, **shared
        )
    if task == "depth":
        sizes = {"width": 16, "depth_width": 24, "upscale": 2} if is_small else {}
        return DecoderConfig(kind="depth", max_depth=source.max_depth, **sizes, **shared)
    sizes = {"width": 32, "upscale": 0 if pose_head == "simcc" else 2} if is_small else {}
    threshold = 0.3 if is_small else 0.2
    return DecoderConfig(
        kind=pose_head, joints=source.joints, limbs=source.limbs, score_threshold=threshold, **sizes, **shared
    )


def _small(task: str) -> TrainingSchedule:
    """Found on the demo model with a hundred scenes."""
    masks = TrainingSchedule(batch_size=12, points=512)
    return {
        "semantic": replace(masks, steps=1250, dropout=0.6, weight_decay=0.2),
        "instance": replace(masks, steps=1500, dropout=0.0),
        "depth": TrainingSchedule(batch_size=12, steps=900, rate=2e-3, dropout=0.0),
        "pose": TrainingSchedule(steps=1500, sigma=1.5, dropout=0.0),
        "open-vocabulary": replace(masks, steps=900),
    }[task]


def _large(task: str) -> TrainingSchedule:
    """For decoders of upstream's widths: its number of points, a lower rate, and fewer steps."""
    wide = TrainingSchedule(steps=6000, batch_size=4, rate=2e-4, points=12544, dropout=0.0, warmup=200)
    return replace(wide, dropout=0.2) if task in ("semantic", "open-vocabulary") else wide


def _upstream(task: str, images: int, reader: str, levels: Sequence[Level]) -> TrainingSchedule:
    """Upstream's training: Adam at 1e-4, one image a step, a tenth of the rate every 350 or 400 of 5000 epochs."""
    every = EPOCHS.get(task, EPOCHS.get(reader, 350))
    epochs = 800 if reader == "deepfashion-mm" else WHOLE_EPOCHS
    return TrainingSchedule(
        steps=epochs * images,
        batch_size=1,
        rate=1e-4,
        optimiser="adam",
        decay="steps",
        decay_every=every * images,
        warmup=1,
        weight_decay=0.0,
        average=0.0,
        clip=0.0,
        points=max(round(POINTS * (levels[-1].side * 8) ** 2), 64),
        sigma=2.0 * levels[-1].side / 64,
        dropout=0.0,
        is_deep=False,
        is_absence_taught=False,
        gain=1.0,
    )
