"""Images by the arguments of diffusers' pipelines: noise of a caller's generators, a callback after every step, images
in a caller's form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import SCHEDULERS
from datasetdm_fast.data import Batch, Request, Sample
from datasetdm_fast.engine.loop import driver, labelling
from datasetdm_fast.engine.loop.checks import as_texts
from datasetdm_fast.engine.loop.origin import Beginning, FromNoise
from datasetdm_fast.errors import Refused

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from datasetdm_fast.engine.engines.engine import Engine
    from datasetdm_fast.engine.loading.model import Model
    from datasetdm_fast.engine.sampling.schedule import Schedule

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PROFILE = "0.14.0"  # whose timesteps later versions of diffusers have, too
# Settings of a scheduler that change its images: what the samplers here follow, then what diffusers takes where a
# config does not say. Its pipeline of Stable Diffusion turns clip_sample off where it is not given.
FOLLOWED: Mapping[str, Mapping[str, tuple[Any, Any]]] = {
    "PNDMScheduler": {"skip_prk_steps": (True, False)},
    "DDIMScheduler": {"clip_sample": (False, False), "thresholding": (False, False)},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "dpmsolver++"),
        "solver_order": (2, 2),
        "solver_type": ("midpoint", "midpoint"),
        "final_sigmas_type": ("zero", "zero"),
        **dict.fromkeys(
            (
                "thresholding",
                "use_karras_sigmas",
                "use_exponential_sigmas",
                "use_beta_sigmas",
                "use_lu_lambdas",
                "use_flow_sigmas",
            ),
            (False, False),
        ),
    },
}
OnStepEnd = Callable[[int, "Tensor", dict[str, "Tensor"]], "dict[str, Tensor] | None"]


def check_sides(height: int | None, width: int | None, size: int) -> None:
    """Refuses sides of images that are not the model's."""
    for name, side in (("height", height), ("width", width)):
        if side not in (None, size):
            raise Refused(
                f"{name}: {side!r} was given, and the model was loaded for images of {size} x {size} pixels",
                f"Drop it, or load the model with size={side!r} for square images.",
            )


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
            f"negative_prompt: {len(negatives)} were given for {len(prompts)} prompts", "Give one, or one per prompt."
        )
    return [text for text in prompts for _ in range(each)], [text for text in negatives for _ in range(each)]


def draw_noise(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int, shape: tuple[int, int, int]
) -> tuple[Tensor, list[int]]:
    """[count, C, h, w] fp32 noise on the CPU as diffusers draws it, and the seed of each image's generator: one
    generator, or None for PyTorch's own, draws all images at once, several draw one each.
    """
    import torch

    def draw(source: torch.Generator, images: int) -> Tensor:
        return torch.randn((images, *shape), generator=source, dtype=torch.float32, device=source.device).cpu()

    if generator is None or isinstance(generator, torch.Generator):
        source = torch.default_generator if generator is None else generator
        return draw(source, count), [source.initial_seed() % 2**63] * count
    sources = list(generator) if isinstance(generator, Iterable) else [generator]
    for source in sources:
        if not isinstance(source, torch.Generator):
            raise Refused(f"generator: {source!r} is no generator of torch", "Give torch.Generator().manual_seed(7).")
    if len(sources) != count:
        raise Refused(f"generator: {len(sources)} were given for {count} images", "Give one, or one per image.")
    return torch.cat([draw(source, 1) for source in sources]), [source.initial_seed() % 2**63 for source in sources]


def sampler_of(model: Model) -> str:
    """The sampler that a model's scheduler is of; refused where a setting would give it other images than here."""
    named = model.scheduler.get("_class_name", "PNDMScheduler")
    if named not in SCHEDULERS:
        raise Refused(
            f"scheduler: the model's own, {named}, is none of {', '.join(SCHEDULERS)}",
            "Name another: sampler='ddim'.",
        )
    for name, (followed, default) in FOLLOWED[named].items():
        value = model.scheduler.get(name, default)
        if (default if value is None else value) != followed:
            raise Refused(
                f"scheduler: the model's {named} has {name}={value!r}, which the sampler here does not follow, so its "
                f"images would differ; expected {followed!r}",
                f"Change it, or take the images of sampler={SCHEDULERS[named]!r}.",
            )
    return SCHEDULERS[named]


@dataclass(frozen=True)
class NoiseOfCaller(FromNoise):
    """Images from noise of the caller, who may replace the latents of a batch after every call."""

    noise: Tensor  # [N, C, h, w] fp32, by the index of a request
    on_step_end: OnStepEnd | None = None

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        from datasetdm_fast.kernels.to_device import to_device

        latents = to_device(self.noise[[request.index for request in requests]], engine.device)
        if self.on_step_end is None:
            return Beginning(latents)
        count = len({request.index for request in requests})  # the rest are repeats of the last
        return Beginning(latents, partial(_after, self.on_step_end, schedule, count))


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
    """The images as diffusers returns them: a list of PIL images, [N, H, W, 3] or [N, 3, H, W] float32 in 0 .. 1, or
    the latents [N, C, h, w].
    """
    import numpy as np
    import torch

    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(sample.image) for sample in samples]
    if output_type == "latent":
        return torch.stack([latents[place] for place in range(len(samples))]).cpu()
    pixels = np.stack([sample.image for sample in samples]).astype(np.float32) / 255
    return pixels if output_type == "np" else torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
