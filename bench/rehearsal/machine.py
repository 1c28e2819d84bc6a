"""The simulated machine as a scenario is given it, and the engines that are opened on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bench.rehearsal.timeline import LOAD, Timeline
from datasetdm_fast.data import Batch, Request, Sample
from datasetdm_fast.engine.backbones.sd3 import SD3
from datasetdm_fast.engine.decoders.checkpoint import KINDS, build_decoder, seeded_decoders
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.decoders.trunk import Decoder, fold
from datasetdm_fast.engine.engines import fast
from datasetdm_fast.engine.engines.fast.joint import JointEngine
from datasetdm_fast.engine.loading import PRESETS
from datasetdm_fast.engine.loading.model import ConfigFile, Model
from datasetdm_fast.engine.loading.presets import preset
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.diffusing import PROFILE
from datasetdm_fast.engine.loop.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from bench.rehearsal.operations import Operations

TASKS = tuple(KINDS)  # what most runs make
WORDS = ("car", "dog")
PROMPT = "a photo of a red car and a dog"
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = {  # an MM-DiT
    "text_encoder": TEXT | {"projection_dim": 32},
    "text_encoder_2": TEXT | {"projection_dim": 32},
    "transformer": {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
    },
    "vae": {"latent_channels": 4, "block_out_channels": (32,) * 4, "norm_num_groups": 8, "layers_per_block": 1},
}
OPEN, NAMED, SIMCC = "open-vocabulary", "semantic:named", "pose:simcc"  # other decoders


def open_engine(model: str, dtype: str, device: str, labels: Sequence[str] = TASKS) -> fast.FastEngine:
    """The fast engine over a preset, with decoders of upstream's form."""
    loaded = PRESETS[model](0)
    return fast.FastEngine(loaded, decoders_of(loaded, labels), dtype=dtype, device=device)


def decoders_of(model: Model, labels: Sequence[str]) -> dict[str, Decoder]:
    """Decoders of these labels: of those that every run makes, and of words, of a prompt's words, of joints by bins."""
    width = model.text_width
    found = seeded_decoders(model.levels, width) if set(labels) & set(TASKS) else {}
    sizes = {"levels": model.levels, "text_width": width, "width": 64, "mask_dim": 64, "feed_forward": 128}
    heads = sum(sum(level.heads) for level in model.levels)
    named = {"classes": ("background", *WORDS), "named": WORDS, "word_heads": (1.0,) * heads}
    others = {
        OPEN: ("open-vocabulary", {"classes": WORDS}),
        NAMED: ("segmentation", named),
        SIMCC: ("simcc", {}),
    }
    found |= {
        label: build_decoder(upstream(kind, **sizes, **settings))
        for label, (kind, settings) in others.items()
        if label in labels
    }
    return {label: fold(found[label]) for label in labels}


@dataclass
class Machine:
    """What a scenario is given: the simulated machine, and how much to do on it."""

    timeline: Timeline
    operations: Operations
    model: str
    batch: int
    batches: int
    steps: int
    dtype: str
    device: str
    engines: list[fast.FastEngine] = field(default_factory=list)

    def engine(self, *labels: str, device: str = "") -> fast.FastEngine:
        """An engine whose image decoder works in two chunks, as with large images."""
        self.timeline.phase = LOAD
        self.uses(device := device or self.device)
        self.operations.judge(self.dtype)
        engine = open_engine(self.model, self.dtype, device, labels)
        engine.prepare(self.batch)  # its weights are read before the first batch
        self.engines.append(engine)
        self.operations.autoencoder = None if engine.image_dtype == engine.dtype else engine.image_dtype
        fast.CHUNK_PIXELS["cuda"] = -(-self.batch // 2) * engine.model.size**2
        return engine

    def joint_engine(self, *labels: str) -> JointEngine:
        """That of a small Stable Diffusion 3."""
        model = self.small_joint_model()
        return JointEngine(model, decoders_of(model, labels), device=self.device)

    def small_joint_model(self) -> Model:
        self.timeline.phase = LOAD
        self.uses(self.device)
        self.operations.judge("bf16")
        numbers = SD3.defaults({"transformer": ConfigFile(SMALL["transformer"])}), 128, 0
        return preset("small SD 3", SMALL, *numbers, SD3)

    def uses(self, device: str) -> None:
        """Notes that a GPU is the run's."""
        self.timeline.homes.add(torch.device(device).index or 0)

    @contextmanager
    def of(self, precision: str) -> Iterator[None]:
        """Judges calls as those of an engine of another precision."""
        self.operations.judge(precision)
        yield
        self.operations.judge(self.dtype)

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, self.timeline.phase = self.timeline.phase, phase
        yield
        self.timeline.phase = before

    def recipe(self, engine: fast.FastEngine, labels: Sequence[str], **choices: Any) -> Recipe:
        return make_recipe(engine, labels, **{"steps": self.steps, "profile": PROFILE, **choices})

    def batch_of(self, place: int) -> Batch:
        numbers = range(place * self.batch, (place + 1) * self.batch)
        return Batch(place, tuple(Request(number, PROMPT, number, WORDS) for number in numbers))

    def made(self, engine: fast.FastEngine, recipe: Recipe, make: Callable | None = None) -> int:
        """Samples of all batches, by one run of the driver."""
        batches = map(self.batch_of, range(self.batches))
        answers = driver.generate(batches, engine, recipe, make=make)
        return sum(isinstance(one, Sample) for _, results in answers for one in results)
