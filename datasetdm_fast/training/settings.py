"""The flags of the command train, and the groups of settings that its modules take."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasetdm_fast.config import ENGINE_NAMES, MOST_CALLS, OUTLINES, SEEDS, TASKS
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import CommandSettings, EngineSettings, ModelSettings, OutputSettings, setting
from datasetdm_fast.training.truth.augment import AUGMENTATIONS, Augmentation
from datasetdm_fast.training.truth.selection import EVERYTHING, DataSettings, Selection
from datasetdm_fast.untrusted import documents

MOST_FOLDS = 100
MOST_BLOCKS = 16
BEST = "auto"  # of timesteps and blocks
TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class RecipeSettings:
    """The recipe, and what the user changes of it; 0 = the value of the preset."""

    preset: str = setting(
        "default",
        "training recipe: ours, or DatasetDM's architecture, optimiser, schedule and loss",
        choices=("default", "upstream"),
    )
    pose_head: str = setting("heatmap", "output of the pose decoder", choices=("heatmap", "simcc"))
    steps: int = setting(0, "optimiser steps, 0 = as the preset says", metavar="N", least=0)
    batch_size: int = setting(0, "examples per optimiser step, 0 = as the preset says", metavar="N", least=0)
    accumulate: int = setting(
        2, "gradient accumulation steps of each optimiser step, which save memory", metavar="N", least=1
    )
    rate: float = setting(0.0, "learning rate, 0 = as the preset says", metavar="R", least=0)
    by_name: str = setting(
        "auto",
        "predict a class only where the prompt names it, for data whose captions name every class shown; auto: yes "
        "for demo scenes, where the captions are made from the labels, and where 20 or more captions name whatever "
        "they name in every image that shows it, but for classes that all of 20 images or more show",
        choices=("auto", "yes", "no"),
    )
    seed: int = setting(0, "seed of weights, noise, order and sampled points", metavar="N", least=0, most=SEEDS - 1)


@dataclass(frozen=True)
class TaskSettings:
    """How a decoder is trained beyond its schedule; without `outlines` they are as its configuration says."""

    checks: int = setting(10, "evaluations on the held-out images in a whole training", metavar="N", least=1)
    patience: int = setting(
        4,
        "early-stopping patience: evaluations without improvement on 30 held-out images or more, 0 = never stop early",
        metavar="N",
        least=0,
    )
    save_every: float = setting(60.0, "seconds between checkpoints", identity=False, metavar="S", least=0)
    storage: str = setting("fp32", "precision of the saved weights", choices=("fp32", "fp16"))
    dtype: str = setting(
        "auto",
        "precision of training; auto: bf16 on a GPU that supports it in hardware, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    by_word: str = setting(
        "auto",
        "name things by the attention to the words of the caption, in addition to the decoder's prediction; auto: "
        "with --by-name, if at least 20 masks of training images show that the attention can",
        choices=("auto", "no"),
    )
    outlines: str = setting(
        "auto",
        "outlines of the decoder's labels: those of its masks, or outlines that follow the colours of the image near "
        "them; auto: the latter where the labels of training images are better with them, the former with --preset "
        "upstream",
        identity="if given",
        choices=("auto", *OUTLINES),
    )
    log: tuple[str, ...] = setting(
        (),
        "libraries that losses and figures are reported to, as each is set up, beside log.jsonl: "
        + ", ".join(TRACKERS),
        choices=TRACKERS,
        identity=False,
        metavar="LIST",
    )


@dataclass(frozen=True)
class CacheSettings:
    """Where captures are kept."""

    cache: str = setting(
        "auto", "cache captures on disk: if they fit, always, or never", choices=("auto", "disk", "off"), identity=False
    )
    cache_dir: str = setting(
        "",
        "folder of that cache; default: captures in the package's cache folder",
        identity=False,
        metavar="DIR",
        output="folder",
    )
    cache_gb: float = setting(
        0.0,
        "GB of disk that the captures of --cache may fill, 0 = half of the free space",
        identity=False,
        metavar="GB",
        least=0,
    )


@dataclass(frozen=True)
class TrainingData:
    """The labelled images to train on."""

    address: str
    selection: Selection = EVERYTHING
    framing: str = "fit"
    skip_bad: bool = False
    class_table: str = ""  # file of the user's own class words


@dataclass(frozen=True)
class ModelChoice:
    """The diffusion model, and the engine that runs it."""

    model: str
    size: int = 0
    allow_download: bool = False
    engine: str = "auto"
    device: str = "auto"
    blocks: tuple[int, ...] = ()  # that decoders read; (): those of the model's levels


@dataclass(frozen=True)
class Inversion:
    """How an image is brought into the network."""

    timesteps: tuple[int, ...] = (0,)
    latent: str = "mean"  # or sample, of the autoencoder's posterior
    ddim_steps: int = 0  # 0 = drawn noise

    @property
    def is_sampled(self) -> bool:
        return self.latent == "sample"


@dataclass(frozen=True)
class ViewSettings:
    """How images become training views."""

    draws: int = 12  # augmented views of each image
    augmentation: Augmentation = Augmentation(flip=True)
    captions: str = "true"  # or none, or mixed: every fourth view has none
    seed: int = 0


@dataclass(frozen=True)
class TrainConfig(
    RecipeSettings,
    TaskSettings,
    CacheSettings,
    DataSettings,
    ModelSettings,
    EngineSettings,
    OutputSettings,
    CommandSettings,
):
    FLAGS = (
        "data task out model size select images limit_per_class min_area limit_images only_classes framing skip_bad "
        "allow_download held_out folds preset pose_head steps batch_size accumulate rate patience checks draws "
        "augment captions class_table by_name by_word outlines timestep blocks latent inversion ddim_steps cache "
        "cache_dir cache_gb storage engine dtype device seed save_every log threads dry_run json quiet"
    ).split()

    data: str = setting(
        "demo:100", "labelled images: KIND:PATH, KIND:PATH[SPLIT] or demo:COUNT@FIRST_SEED", metavar="DATA"
    )
    task: tuple[str, ...] = setting(
        ("semantic",),
        "labels to learn, comma-separated, one decoder each: " + ", ".join(TASKS),
        choices=TASKS,
        metavar="LIST",
    )
    out: str = setting(
        "decoder", "output folder, with one sub-folder per task", identity=False, metavar="DIR", output="folder"
    )
    held_out: float = setting(
        0.1, "share of images held out for evaluation; none of fewer than 10 images", metavar="SHARE", least=0, most=0.5
    )
    folds: str = setting(
        "auto",
        "k-fold cross-validation: train N more decoders, so that every image is evaluated by one not trained on it, "
        "and the final decoder compared with them; auto: 5 if fewer than 30 images are held out",
        identity=False,
        metavar="N|auto|no",
    )
    draws: int = setting(
        12,
        "views of each image, each with its own noise and augmentation; the first is not mirrored, and with strong the "
        "image itself",
        metavar="N",
        least=1,
    )
    augment: str = setting(
        "auto",
        "augmentation: none, flip, strong (flips, crops, other colours, things of other images pasted in), or "
        "DatasetDM's for a data set; auto: that of this data set, else flip",
        choices=("auto", *(name for name in AUGMENTATIONS if name != "strong-depth")),
    )
    captions: str = setting(
        "true",
        "text condition: each image's own caption, none, or mixed: none in every fourth view of an image",
        choices=("true", "none", "mixed"),
    )
    class_table: str = setting(
        "",
        "class words of your own: a CSV file (name,say,words), or an annotation file of LVIS or COCO; captions made of "
        "labels say them, and --by-name finds them in captions",
        identity="if given",
        metavar="FILE",
    )
    timestep: tuple[str, ...] = setting(
        ("-1",),
        "timesteps of the calls that the decoder reads, one or several; -1 = the model's default, auto = the one that "
        "tells most by linear probes; DatasetDM uses 0",
        metavar="LIST",
    )
    blocks: tuple[str, ...] = setting(
        (),
        "blocks of a transformer that the decoder reads, counted from 0; auto = those that tell most together by "
        "linear probes; default: those of the model's levels",
        identity="if given",
        metavar="LIST",
    )
    latent: str = setting(
        "auto",
        "latents: the autoencoder's mean or a sample; auto: mean, with --preset upstream a sample",
        choices=("auto", "mean", "sample"),
    )
    inversion: str = setting("noise", "noise on the latents: random, or by DDIM inversion", choices=("noise", "ddim"))
    ddim_steps: int = setting(10, "U-Net calls of DDIM inversion", metavar="N", least=1)
    engine: str = setting("auto", "engine that runs the model's networks", choices=ENGINE_NAMES)
    json: bool = setting(False, "the results as one JSON object on stdout", identity=False)

    def check(self) -> None:
        self.timesteps()
        self.named_blocks()
        if self.folds not in ("auto", "no") and not (self.folds.isdecimal() and 2 <= int(self.folds) <= MOST_FOLDS):
            raise Refused(
                f"--folds: {self.folds!r} is neither auto, no, nor a number from 2 to {MOST_FOLDS}",
                "--folds 5 trains five more decoders; auto does so where few images are held out",
            )

    def timesteps(self) -> tuple[int, ...]:
        """The timesteps of --timestep, largest first, (-1,) for the model's default, which auto begins with."""
        texts = self.timestep if self.timestep != (BEST,) else ("-1",)
        if (
            texts != ("-1",)
            and not all(text.isdecimal() and len(text) < 6 for text in texts)
            or not 1 <= len(texts) <= MOST_CALLS
        ):
            raise Refused(
                f"--timestep: {documents.quote(','.join(texts))} is not -1, auto, or 1 to {MOST_CALLS} numbers",
                "--timestep 780,520,260,1 reads four calls",
            )
        return tuple(sorted({int(text) for text in texts}, reverse=True))

    def named_blocks(self) -> tuple[int, ...]:
        """The blocks of --blocks, () for those of the model's levels, which auto begins with."""
        texts = self.blocks if self.blocks != (BEST,) else ()
        if not all(text.isdecimal() and len(text) < 4 for text in texts) or len(texts) > MOST_BLOCKS:
            raise Refused(
                f"--blocks: {documents.quote(','.join(texts))} is not auto, or at most {MOST_BLOCKS} numbers of blocks",
                "--blocks 6,9,12,18 reads four",
            )
        return tuple(sorted({int(text) for text in texts}))

    def training_data(self) -> TrainingData:
        return TrainingData(self.data, self.selection(), self.framing, self.skip_bad, self.class_table)

    def model_choice(self) -> ModelChoice:
        return ModelChoice(self.model, self.size, self.allow_download, self.engine, self.device, self.named_blocks())

    def capture_settings(self) -> Inversion:
        latent = self.latent if self.latent != "auto" else "sample" if self.preset == "upstream" else "mean"
        return Inversion(self.timesteps(), latent, self.ddim_steps if self.inversion == "ddim" else 0)

    def task_settings(self) -> TaskSettings:
        group = self.group(TaskSettings)
        return replace(group, outlines="") if self.outlines == "auto" and self.preset == "upstream" else group

    def session_settings(self) -> dict[str, Any]:
        """Further fields of the training session."""
        without = ("task", "steps", "batch_size", "rate", "skip_bad")
        identity = {name: value for name, value in self.identity().items() if name not in without}
        if self.images:
            identity["listed"] = storage.sha256_of(Path(self.images))[:12]
        return {
            "view_settings": ViewSettings(self.draws, captions=self.captions, seed=self.seed),
            "augment": self.augment,
            "cache_settings": self.group(CacheSettings),
            "recipe_settings": self.group(RecipeSettings),
            "held_out": self.held_out,
            "identity": identity,
        }
