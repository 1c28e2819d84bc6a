"""FLUX.2 klein as its stock pipeline computes it, in fp32."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.data import Text
from datasetdm_fast.engine.backbones import joint_attention
from datasetdm_fast.engine.backbones.flux2_klein import CONCEPT_PLACE, LENGTH, READ_LAYERS
from datasetdm_fast.engine.backbones.prompt_encoders import encode_chat


class Flux2KleinReference(joint_attention.JointReference):
    """See BackboneReference; latents have 16 pixels a cell, as the pipeline draws their noise."""

    def cells(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, 2)

    def encode(self, prompts: Sequence[str]) -> Text:
        states, _ = encode_chat(self.model, prompts, LENGTH)
        return Text(torch.cat([states[layer] for layer in READ_LAYERS], -1))

    def call(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        device, side = latents.device, latents.shape[-1]
        texts = torch.zeros(text.context.shape[1], 4, device=device)
        texts[:, 3] = torch.arange(len(texts))
        if text.concepts:
            texts[-text.concepts :] = texts[CONCEPT_PLACE]
        output: Tensor = self.network(
            hidden_states=latents.flatten(2).mT,
            timestep=torch.full((len(latents),), timestep, device=device) / 1000,
            encoder_hidden_states=text.context,
            txt_ids=texts,
            img_ids=joint_attention.grid(side, 4, device),
            return_dict=False,
        )[0]
        return output.mT.unflatten(2, (side, side))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of latents, which lie among the autoencoder's weights."""
        normalisation = self.vae.bn
        variance = normalisation.running_var + self.vae.config.batch_norm_eps
        return normalisation.running_mean[:, None, None], variance.sqrt()[:, None, None]

    def unscale(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics()
        return F.pixel_shuffle(latents * deviation + mean, 2)

    def scale(self, raw: Tensor) -> Tensor:
        mean, deviation = self._statistics()
        return (F.pixel_unshuffle(raw, 2) - mean) / deviation
