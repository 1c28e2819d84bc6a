"""What the scheduler config of a model says (its sampler, timesteps and noise levels), and the initial noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.config import SCHEDULERS
from datasetdm_fast.errors import Refused

FLOW_PREDICTION = "flow_prediction"
# Settings that change images, for each class: what the samplers here follow, then what diffusers takes where a config
# does not say. Its pipelines turn clip_sample off where it is not given.
FOLLOWED: Mapping[str, Mapping[str, tuple[Any, Any]]] = {
    "PNDMScheduler": {"skip_prk_steps": (True, False)},
    "DDIMScheduler": {"clip_sample": (False, False), "thresholding": (False, False)},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "dpmsolver++"),
        "solver_order": (2, 2),
        "solver_type": ("midpoint", "midpoint"),
        "final_sigmas_type": ("zero", "zero"),
        **dict.fromkeys(
            ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
            (False, False),
        ),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2, 2),
        "solver_type": ("bh2", "bh2"),
        "predict_x0": (True, True),
        "lower_order_final": (True, True),
        "disable_corrector": ([], []),
        "solver_p": (None, None),
        "final_sigmas_type": ("zero", "zero"),
        **dict.fromkeys(
            ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False, False)
        ),
    },
    "LCMScheduler": {"clip_sample": (False, False), "thresholding": (False, False)},
}


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether the config is of a flow, whose latents at timestep t are (1 - t / 1000) * image + t / 1000 * noise."""
    return bool(
        scheduler.get("_class_name", "").startswith("FlowMatch")
        or scheduler.get("use_flow_sigmas")
        or scheduler.get("prediction_type") == FLOW_PREDICTION
    )


def choose_sampler(scheduler: Mapping[str, Any], sampler: str) -> str:
    """The sampler of this name; "auto" is that of the scheduler config, refused where images would differ."""
    if sampler != "auto":
        return sampler
    named = scheduler.get("_class_name", "PNDMScheduler")
    if named not in SCHEDULERS:
        raise Refused(
            f"scheduler: the model's own, {named}, is none of {', '.join(SCHEDULERS)}",
            f"Name another: sampler={'euler' if is_flow(scheduler) else 'ddim'!r}.",
        )
    for name, (followed, default) in FOLLOWED.get(named, {}).items():
        value = scheduler.get(name, default)
        if (default if value is None else value) != followed:
            raise Refused(
                f"scheduler: the model's {named} has {name}={value!r}, which the sampler here does not follow, so its "
                f"images would differ; expected {followed!r}",
                f"Change it, or take the images of sampler={SCHEDULERS[named]!r}.",
            )
    return SCHEDULERS[named]


ANOTHER = "Name another model with --model."


def alphas_cumprod(scheduler: Mapping[str, Any]) -> Tensor:
    """[training steps] fp32 cumulative products of 1 - beta, rounded as diffusers rounds them."""
    if scheduler.get("rescale_betas_zero_snr"):
        raise Refused(
            "rescale_betas_zero_snr: the scheduler config asks for zero terminal SNR, which the samplers here do not "
            "support",
            ANOTHER,
        )
    if scheduler.get("trained_betas") is not None:
        return torch.cumprod(1 - torch.tensor(scheduler["trained_betas"], dtype=torch.float32), 0)
    count, start, end = (
        scheduler.get("num_train_timesteps", 1000),
        scheduler.get("beta_start", 0.0001),
        scheduler.get("beta_end", 0.02),
    )
    name = scheduler.get("beta_schedule", "linear")
    if name == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif name == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    else:
        raise Refused(
            f"beta_schedule: the scheduler config says {name!r}, supported are linear and scaled_linear", ANOTHER
        )
    return torch.cumprod(1 - betas, 0)


def initial_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """[channels, height, width] fp32 noise of one image, drawn on the CPU from its seed alone."""
    return torch.randn((channels, height, width), generator=torch.Generator("cpu").manual_seed(seed))


class ImageNoise:
    """Noise of the images of a batch, each from a generator with its own seed: draw after draw what a pipeline of
    diffusers draws from it, first the latents, then the noise of one call after another.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]):
        self.shape, self.generators = shape, [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw(self) -> Tensor:  # [B, channels, height, width] fp32
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


class OneGenerator:
    """Noise of image after image from one generator, as a run of diffusers draws it; an earlier one starts it anew."""

    def __init__(self) -> None:
        self.seed, self.next, self.generator = -1, 0, torch.Generator("cpu")

    def draw(self, seed: int, place: int, shape: tuple[int, int, int]) -> Tensor:  # fp32
        """The noise of the image at `place` of a run with this seed."""
        if seed != self.seed or place < self.next:
            self.generator.manual_seed(seed)
            self.seed, self.next = seed, 0
        for _ in range(place - self.next + 1):
            noise = torch.randn(shape, generator=self.generator)
        self.next = place + 1
        return noise


def add_noise(scheduler: Mapping[str, Any], latents: Tensor, noise: Tensor, timestep: float) -> Tensor:
    """`latents` as they would be at `timestep` of the forward process."""
    signal, noisy = shares_at(scheduler, timestep)
    return signal * latents + noisy * noise


def shares_at(scheduler: Mapping[str, Any], timestep: float) -> tuple[float, float]:
    """The shares of image and noise in the latents of a timestep."""
    if is_flow(scheduler):
        sigma = timestep / scheduler.get("num_train_timesteps", 1000)
        return 1 - sigma, sigma
    alphas = alphas_cumprod(scheduler)
    if timestep >= len(alphas) - 1 or float(timestep).is_integer():
        alpha = float(alphas[min(int(timestep), len(alphas) - 1)])
    else:  # between whole ones by their ratio of noise to signal
        sigma = float(np.interp(timestep, np.arange(len(alphas)), noise_ratios(alphas)))
        alpha = 1 / (sigma**2 + 1)
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def noise_ratios(alphas: Tensor) -> np.ndarray:
    """[training steps] fp32 noise over signal, the sigma of diffusers."""
    ratios: np.ndarray = (((1 - alphas) / alphas) ** 0.5).numpy()
    return ratios


def respace(scheduler: Mapping[str, Any], sigmas: np.ndarray) -> np.ndarray:
    """Falling sigmas, spaced anew between their ends where the config asks for it (arXiv 2206.00364, equation 5)."""
    least, most = (scheduler.get(name) for name in ("sigma_min", "sigma_max"))
    least = sigmas[-1].item() if least is None else least
    most = sigmas[0].item() if most is None else most
    if scheduler.get("use_karras_sigmas"):
        ends, rho = (most ** (1 / 7.0), least ** (1 / 7.0)), 7.0
        return (ends[0] + np.linspace(0, 1, len(sigmas)) * (ends[1] - ends[0])) ** rho
    if scheduler.get("use_exponential_sigmas"):
        return np.exp(np.linspace(math.log(most), math.log(least), len(sigmas)))
    return sigmas


def space_times(
    scheduler: Mapping[str, Any], count: int, steps: int, usual: str = "linspace", beyond: int = 0
) -> np.ndarray:
    """[steps] falling timesteps by the config's timestep_spacing, laid out with steps `beyond` the last."""
    spacing, many = scheduler.get("timestep_spacing", usual), steps + beyond
    if spacing == "trailing":  # for 61 steps of 1000 rounding lets arange end with one too many
        return np.arange(count, 0, -count / steps)[:steps].round() - 1
    if spacing == "leading":
        rising = np.arange(many) * (count // many) + scheduler.get("steps_offset", 0)
    elif spacing == "linspace":
        rising = np.linspace(0, count - 1, many)
    else:
        raise Refused(
            f"timestep_spacing: the scheduler config says {spacing!r}, supported are leading, linspace and trailing",
            "Put one of these into the model's scheduler_config.json.",
        )
    return rising[::-1][:steps]


def whole_times(times: np.ndarray, count: int) -> list[int]:
    """The timesteps as whole numbers; refuses those that repeat or leave the training steps."""
    times = times.round()
    if times.min() < 0 or times.max() >= count or np.unique(times).size < times.size:
        raise Refused(
            f"steps: {len(times)} steps do not fit into {count} training steps with this spacing and offset, ask for "
            "fewer",
            "Choose a smaller --steps.",
        )
    return [int(time) for time in times]
