"""Initial latents of a batch, what is put into them after every call, and what becomes of the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasetdm_fast.data import Request, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.engines.engine import Engine
    from datasetdm_fast.engine.sampling.schedule import Schedule


@dataclass(frozen=True)
class Beginning:
    """The latents of a batch before its first call."""

    latents: Tensor  # [B, C, h, w] on the engine's device
    # (call, latents after it) -> latents the next call gets
    after: Callable[[int, Tensor], Tensor] = lambda call, latents: latents
    noise: Callable[[], Tensor] | None = None  # draws what a call adds; None = from the images' own seeds


class Origin:
    """Where the images of a run come from: by itself, from nothing but the noise of their seeds."""

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        """The initial latents of a batch; a request may occur several times."""
        from datasetdm_fast.kernels.transfer import to_device

        noise = to_device(initial_latents(requests, engine.model.latent_shape()), engine.device)
        return Beginning(noise * schedule.noise_scale)

    def finish(self, sample: Sample) -> Sample:
        """The sample that is written."""
        return sample


def initial_latents(requests: Sequence[Request], shape: tuple[int, int, int]) -> Tensor:  # [B, C, h, w] fp32
    """The noise of each request, from its own seed, for latents of this shape."""
    import torch

    from datasetdm_fast.engine.sampling.times import initial_noise

    return torch.stack([initial_noise(request.seed, *shape) for request in requests])


def fresh_noise(schedule: Schedule, requests: Sequence[Request], latents: Tensor) -> Callable[[], Tensor] | None:
    """Draws the noise [B, C, h, w] that calls add, of each seed after its first latents; None where none do."""
    from datasetdm_fast.engine.sampling.times import ImageNoise
    from datasetdm_fast.kernels.transfer import to_device

    if not schedule.noisy_calls:
        return None
    _, channels, height, width = latents.shape
    source = ImageNoise([request.seed for request in requests], (channels, height, width))
    source.draw()
    return lambda: to_device(source.draw(), latents.device)


class FromOneGenerator(Origin):
    """Images from the noise that one generator draws for the whole run, seeded with the run's seed."""

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        import torch

        from datasetdm_fast.engine.sampling.times import OneGenerator
        from datasetdm_fast.kernels.transfer import to_device

        shape, generator = engine.model.latent_shape(), OneGenerator()
        noise = [generator.draw(request.seed - request.index, request.index, shape) for request in requests]
        return Beginning(to_device(torch.stack(noise), engine.device) * schedule.noise_scale)


FROM_NOISE, ONE_GENERATOR = Origin(), FromOneGenerator()
