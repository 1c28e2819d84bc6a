"""What every row of one run shares: model, decoders, prompts, recipe and the reference engine."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from bench.decoders import load_decoders
from bench.machine.work import image_flops, stage_flops
from datasetdm_fast.data import Request
from datasetdm_fast.engine.decoders import checkpoint
from datasetdm_fast.engine.decoders.config import DEMO
from datasetdm_fast.engine.decoders.trunk import Decoder, fold
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.device import resolve_device
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.loading.presets import SEEDED_LICENCE
from datasetdm_fast.engine.loop.prompts import make_plan
from datasetdm_fast.engine.loop.recipe import Recipe, make_recipe, prompt_words
from datasetdm_fast.runs.jobs.prompt_files import read_source
from datasetdm_fast.runs.run_settings import PromptSettings

TASKS = ("semantic", "instance", "depth", "pose")  # what `generate` makes unless told otherwise
# the timesteps of the diffusers that DatasetDM's requirements pin, and of today's: every peer makes the same calls
PROFILE = "0.14.0"


@dataclass(frozen=True)
class Setting:
    reference: TorchEngine  # fp32, the oracle; its modules are what the peers are built from
    trained: Mapping[str, Decoder]  # the decoders as they were trained, spectral norms and all
    recipe: Recipe
    requests: tuple[Request, ...]  # as many as the largest batch needs
    device: torch.device
    quick: bool = False  # fewer and smaller rows, for a look

    @property
    def model(self) -> Model:
        return self.reference.model

    @property
    def is_trained(self) -> bool:
        """Whether images and labels mean something: seeded weights serve for speed alone."""
        return self.model.licence != SEEDED_LICENCE

    @cached_property
    def stages(self) -> dict[str, int]:
        return stage_flops(self.model)

    @property
    def flops(self) -> int:
        """Nominal operations of one finished image."""
        return image_flops(self.stages, len(self.recipe.schedule))

    def batch(self, size: int) -> tuple[Request, ...]:
        """The first `size` requests; beyond those there are, they come round again."""
        return tuple(self.requests[k % len(self.requests)] for k in range(size))

    def document(self) -> dict[str, Any]:
        recipe = self.recipe
        facts = {"model": self.model.name, "trained": self.is_trained, "tasks": list(recipe.tasks), "size": recipe.size}
        facts |= {"quick": self.quick, "calls": len(recipe.schedule), "guidance": recipe.guidance}
        return facts | {"tflop_per_image": round(self.flops / 1e12, 6)}


def open_setting(
    model: str, device: str = "auto", *, steps: int = 0, number: int = 32, size: int = 0, quick: bool = False
) -> Setting:
    """The model with its decoders: those shipped for the demo, seeded ones for any other."""
    loaded, target = load_model(model, size=size), resolve_device(device)
    if model == "demo":
        shipped = load_decoders("demo")
        folded = {task: shipped[task] for task in TASKS}
        trained = {task: checkpoint.read_decoder(DEMO / task) for task in TASKS}
    else:
        folded, trained = seeded_decoders(loaded)
    for task, decoder in folded.items():
        checkpoint.check_fits(decoder, loaded.levels, task, loaded.text_width)
    reference = build_engine("torch", loaded, folded, device=str(target))
    recipe = make_recipe(reference, TASKS, steps=steps, profile=PROFILE)
    source = read_source(PromptSettings(), has_captions=True)
    words = prompt_words(reference, TASKS, ())
    plan = make_plan(source, loaded.tokenizer, number=number, seed=0, batch_size=number, words=words)
    trained = {task: decoder.to(target) for task, decoder in trained.items()}
    return Setting(reference, trained, recipe, tuple(plan), target, quick)


def seeded_decoders(model: Model) -> tuple[dict[str, Decoder], dict[str, Decoder]]:
    """Decoders with seeded weights, folded and not."""
    trained = checkpoint.seeded_decoders(model.levels, model.text_width)
    folded = {task: fold(copy.deepcopy(decoder)) for task, decoder in trained.items()}
    return folded, {task: decoder.requires_grad_(False) for task, decoder in trained.items()}
