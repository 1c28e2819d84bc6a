"""Training recipes: the architecture of each task's decoder and the schedule of its training, ours or upstream's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.stages import Level
from datasetdm_fast.training.settings import RecipeSettings

WIDE_UNET = 320  # channels of the first block of a U-Net of full size, which gets decoders of upstream's widths
POINTS = 12544 / 512**2  # sampled on a mask, as a share of the image's pixels
WHOLE_EPOCHS = 5000
# For decoders of upstream's widths: its number of points, a rate their attention stands, and no more steps than pay.
LARGE = {"steps": 6000, "batch_size": 4, "rate": 2e-4, "points": 12544, "dropout": 0.0, "warmup": 200}
# At most, where strong augmentation already keeps the decoder from overfitting to a hundred images.
VARIED = {"dropout": 0.2, "weight_decay": 0.1}
EPOCHS = {"nyu": 400}  # of data sets, after which upstream's rate falls to a tenth; 350 elsewhere


@dataclass(frozen=True)
class TrainingSchedule:
    steps: int = 1500
    batch_size: int = 16
    rate: float = 1e-3
    optimiser: str = "adamw"  # or adam
    decay: str = "cosine"  # or steps: a tenth after every `decay_every` images
    decay_every: int = 0
    warmup: int = 50  # steps
    weight_decay: float = 0.05
    average: float = 0.995  # decay of the average of the weights; 0 = the last weights
    clip: float = 1.0  # norm of the gradient; 0 = no clipping
    points: int = 2048  # sampled on each mask; upstream takes 12544 at 512 pixels
    sigma: float = 1.0  # heatmap width in its cells; upstream 2 at 64 cells
    dropout: float = 0.3  # share of feature channels hidden from each view, against overfitting to a hundred images
    is_deep: bool = True  # whether every layer of a transformer has a loss; upstream only the last
    is_absence_taught: bool = True  # whether an absent joint's target is an empty heatmap; upstream skips it
    gain: float = 100.0  # of the heatmap loss
    is_relative: bool = False  # whether the loss of depth is its mean relative error, not that of its logarithms
    gradient_accumulation_steps: int = 2  # of a step, which takes less memory the more there are
    seed: int = 0


@dataclass(frozen=True)
class TrainingRecipe:
    config: DecoderConfig
    schedule: TrainingSchedule


def recipe(
    task: str,
    source: LabelledSource,
    levels: Sequence[Level],
    text_width: int,
    timesteps: Sequence[int],
    images: int,
    *,
    preset: str = "default",
    pose_head: str = "heatmap",
    reader: str = "",
    is_varied: bool = False,
) -> TrainingRecipe:
    """Decoder and schedule for a task; `preset` is default or upstream, `images` are those to train on, which strong
    augmentation makes varied.
    """
    is_small = levels[-1].features[0] < WIDE_UNET and preset != "upstream"
    config = DecoderConfig(
        task=task,
        levels=tuple(levels),
        text_width=text_width,
        capture_timestep=tuple(timesteps) if len(timesteps) > 1 else timesteps[0] or None,
        **TASKS[task].decoder(source, is_small, pose_head),
    )
    if preset == "upstream":
        return TrainingRecipe(config, _upstream(task, images, reader, levels))
    schedule = TrainingSchedule(**(TASKS[task].small if is_small else LARGE | TASKS[task].large))
    if is_varied:
        schedule = replace(schedule, **{name: min(most, getattr(schedule, name)) for name, most in VARIED.items()})
    return TrainingRecipe(config, schedule)


def adjust(schedule: TrainingSchedule, settings: RecipeSettings) -> TrainingSchedule:
    """The schedule with what the user changes of it."""
    changes = {name: getattr(settings, name) for name in ("steps", "batch_size", "rate", "seed")}
    changes["gradient_accumulation_steps"] = settings.accumulate
    return replace(schedule, **{name: value for name, value in changes.items() if value})


def _upstream(task: str, images: int, reader: str, levels: Sequence[Level]) -> TrainingSchedule:
    """Upstream's training: Adam at 1e-4, one image a step, a tenth of the rate every 350 or 400 of 5000 epochs."""
    every = TASKS[task].epochs or EPOCHS.get(reader, 350)
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
