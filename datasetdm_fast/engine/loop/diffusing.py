"""Images by the arguments of diffusers' pipelines: generators, a callback after every step, output types."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

from datasetdm_fast.data import Batch, Request, Sample
from datasetdm_fast.engine.engines import in_own_precision
from datasetdm_fast.engine.loop import driver, labelling
from datasetdm_fast.engine.loop.calls import Beginning, Origin
from datasetdm_fast.engine.loop.recipe import as_texts, check_numbers
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from datasetdm_fast.engine.engines import Engine
    from datasetdm_fast.engine.loading.model import Model
    from datasetdm_fast.engine.sampling.schedule import Schedule

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PROFILE = "0.14.0"  # whose timesteps later versions of diffusers have, too
OnStepEnd = Callable[[int, "Tensor", dict[str, "Tensor"]], "dict[str, Tensor] | None"]


def repeat_prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None, each: int = 1
) -> tuple[list[str], list[str]]:
    """A prompt for every image, and as many negative prompts; each prompt is there so many times, one after another."""
    if not isinstance(each, Integral) or each < 1:
        raise Refused(f"num_images_per_prompt: {each!r} is no whole number from 1 on", "Give 1 or more.")
    prompts = list(as_texts("prompt", prompt))
    if not prompts:
        raise Refused("prompt: none was given", "Give at least one.")
    if isinstance(negative, str | None):
        negatives = [negative or ""] * len(prompts)
    else:
        negatives = list(as_texts("negative_prompt", negative))
    if len(negatives) != len(prompts):
        raise Refused(
            f"negative_prompt: {len(negatives)} given for {count_noun(len(prompts), 'prompt')}",
            "Give one, or one per prompt.",
        )
    return [text for text in prompts for _ in range(each)], [text for text in negatives for _ in range(each)]


def fill_sampling(model: Model, steps: int | None, guidance: float | None) -> tuple[int, float]:
    """Steps and guidance of a call as a recipe takes them, where 0 means the model's own."""
    usual_steps, usual_guidance = model.defaults.stock
    if guidance is None:
        guidance = usual_guidance
    else:
        check_numbers(guidance=guidance)
        # up to 1, of most models, the text alone decides, as in diffusers; one that reads its guidance reads any
        least = 0.0 if model.guidance == "embedded" else model.backbone.unguided
        guidance = max(guidance, least or sys.float_info.min)
    return usual_steps if steps is None else steps, guidance


@in_own_precision()
def mark_empty(engine: Engine, requests: Sequence[Request]) -> list[Request]:
    """The requests of negative prompts that were given. Where zeros stand for no negative prompt, diffusers encodes an
    empty one that is given: a blank has the same tokens.
    """
    if all(request.negative for request in requests) or engine.encode_text([""]).context.any():
        return list(requests)
    return [replace(request, negative=request.negative or " ") for request in requests]


def draw_noise(
    generator: torch.Generator | Sequence[torch.Generator] | None,
    count: int,
    shape: tuple[int, int, int],
    draws: int = 1,
) -> tuple[Tensor, list[int]]:
    """[draws, count, C, h, w] fp32 noise on the CPU as diffusers draws it, and the seed of each image's generator: one
    generator, or None for PyTorch's own, draws all images at once, several draw one each.
    """
    import torch

    def draw(source: torch.Generator, images: int) -> Tensor:
        form = {"generator": source, "dtype": torch.float32, "device": source.device}
        return torch.stack([torch.randn((images, *shape), **form).cpu() for _ in range(draws)])

    if generator is None or isinstance(generator, torch.Generator):
        source = torch.default_generator if generator is None else generator
        return draw(source, count), [source.initial_seed() % 2**63] * count
    sources = list(generator) if isinstance(generator, Iterable) else [generator]
    for source in sources:
        if not isinstance(source, torch.Generator):
            raise Refused(f"generator: {source!r} is no generator of torch", "Give torch.Generator().manual_seed(7).")
    if len(sources) != count:
        raise Refused(
            f"generator: {len(sources)} given for {count_noun(count, 'image')}", "Give one, or one per image."
        )
    return torch.cat([draw(source, 1) for source in sources], 1), [source.initial_seed() % 2**63 for source in sources]


@dataclass(frozen=True)
class NoiseOfCaller(Origin):
    """Images from noise of the caller, who may replace the latents of a batch after every call."""

    noise: Tensor  # [1 + calls that add noise, N, C, h, w] fp32, by the index of a request
    on_step_end: OnStepEnd | None = None

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        from datasetdm_fast.kernels.transfer import to_device

        first, *fresh = to_device(self.noise[:, [request.index for request in requests]], engine.device)
        beginning = Beginning(first * schedule.noise_scale, noise=iter(fresh).__next__ if fresh else None)
        if self.on_step_end is None:
            return beginning
        count = len({request.index for request in requests})  # the rest are repeats of the last
        return replace(beginning, after=partial(_after, self.on_step_end, schedule, count))


def _after(on_step_end: OnStepEnd, schedule: Schedule, count: int, call: int, latents: Tensor) -> Tensor:
    """The latents that the next call gets: those that the callback returns for the first `count` of a batch."""
    import torch

    before = latents[:count].clone()
    returned = on_step_end(call, torch.tensor(schedule.timesteps[call]), {"latents": before}) or {}
    changed = returned.get("latents", before)
    if changed.shape != before.shape:
        raise Refused(
            f"callback_on_step_end: it returned latents of shape {list(changed.shape)}, expected {list(before.shape)}",
            "Return them in the shape they came in.",
        )
    return torch.cat([changed.to(latents), latents[count:]])


class LatentGenerator(driver.BatchGenerator):
    """Stores the final latents of every image, by its place."""

    def __init__(self, *arguments: Any, latents: dict[int, Tensor]):
        super().__init__(*arguments)
        self.latents = latents

    def sample(self, batch: Batch) -> labelling.SampledBatch:
        sampled: labelling.SampledBatch = super().sample(batch)
        self.latents |= {request.index: sampled.latents[place] for place, request in enumerate(batch.requests)}
        return sampled


def convert_images(samples: Sequence[Sample], output_type: str, latents: Mapping[int, Tensor]) -> Any:
    """The images as diffusers returns them: of PIL, [N, H, W, 3] or [N, 3, H, W] float32, or latents [N, C, h, w]."""
    import numpy as np
    import torch

    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(sample.image) for sample in samples]
    if output_type == "latent":
        return torch.stack([latents[place] for place in range(len(samples))]).cpu()
    pixels = np.stack([sample.image for sample in samples]).astype(np.float32) / 255
    return pixels if output_type == "np" else torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
