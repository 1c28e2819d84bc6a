"""Between the raw latents of an autoencoder and the scaled latents that a model draws."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.engine.backbones import Latents, LoadedModel
from datasetdm_fast.kernels.transfer import to_device


def sample_posterior(mean: Tensor, std: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """[B, C, ...] the means of a posterior, or a sample of each image by its generator on the CPU."""
    if generators is None:
        return mean
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
    return mean + std * to_device(noise, mean.device)


def scale(space: Latents, raw: Tensor) -> Tensor:
    """Scaled latents of raw ones [B, C, ...]."""
    if not space.mean:
        return (raw - space.shift) * space.scale
    mean, std = _by_channel(space, raw)
    return (raw - mean) / std


def _by_channel(space: Latents, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, for tensors [B, C, ...] like this one."""
    shape = -1, *(1,) * (like.dim() - 2)
    return torch.tensor(space.mean).to(like).view(shape), torch.tensor(space.std).to(like).view(shape)


class AutoencoderReference:
    """The calls of a BackboneReference that go through its autoencoder."""

    model: LoadedModel

    @cached_property
    def vae(self) -> Any:
        return self.model.modules["vae"]

    def unscale(self, latents: Tensor) -> Tensor:
        """Raw latents of scaled ones [B, C, ...]."""
        space = self.model.latents
        if not space.mean:
            return latents / space.scale + space.shift
        mean, std = _by_channel(space, latents)
        return latents * std + mean

    def scale(self, raw: Tensor) -> Tensor:
        """Scaled latents of raw ones."""
        return scale(self.model.latents, raw)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(self.unscale(latents).to(self.vae.dtype), return_dict=False)[0]

    def encode_image(self, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return self.scale(sample_posterior(posterior.mean.float(), posterior.std, generators))
