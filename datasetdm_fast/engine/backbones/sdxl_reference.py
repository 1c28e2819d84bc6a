"""Stable Diffusion XL as its stock pipeline computes it, in fp32."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.data import Text
from datasetdm_fast.engine.backbones import LoadedModel
from datasetdm_fast.engine.backbones.prompt_encoders import encode_clips
from datasetdm_fast.engine.backbones.sd_reference import SDReference


def feature_modules(unet: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """Per level, low to highest, the modules whose outputs are its features."""
    down, up = unet.down_blocks, unet.up_blocks
    return (
        (unet.mid_block,),
        (down[1].downsamplers[0], *down[2].attentions, *up[0].attentions),
        (down[0].downsamplers[0], *down[1].attentions, up[0].upsamplers[0], *up[1].attentions),
        (unet.conv_in, *down[0].resnets, up[1].upsamplers[0], *up[2].resnets),
    )


def transformers_of(unet: nn.Module) -> tuple[tuple[nn.ModuleList, ...], ...]:
    """Per level the transformers, each as its blocks: up blocks first, then down."""
    levels = [unet.mid_block.attentions]
    levels += [(*unet.up_blocks[2 - depth].attentions, *unet.down_blocks[depth].attentions) for depth in (2, 1)]
    return (*(tuple(transformer.transformer_blocks for transformer in level) for level in levels), ())


class SDXLReference(SDReference):
    def __init__(self, model: LoadedModel):
        self.model, self.unet = model, model.modules["unet"]
        self.features, self.transformers = feature_modules(self.unet), transformers_of(self.unet)

    def encode(self, prompts: Sequence[str]) -> Text:
        """As the stock pipeline does; an empty prompt is zeros where the model was trained so."""
        (first, _), (second, pooled) = encode_clips(self.model, prompts)
        context = torch.cat([first, second], -1)
        if self.model.configs["model_index"].get("force_zeros_for_empty_prompt", True):
            has_text = torch.tensor([float(bool(prompt)) for prompt in prompts], device=context.device)[:, None]
            context, pooled = context * has_text[..., None], pooled * has_text
        return Text(context, pooled)

    def _guidance_embedding(self, text: Text) -> Tensor | None:
        """[R, E] waves of the guidance less 1, for a network that was distilled to read it."""
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return None
        assert text.guidance is not None
        half = width // 2
        waves = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1))) * 1000 * (text.guidance - 1)
        embedding = F.pad(torch.cat([waves.sin(), waves.cos()]), (0, width % 2))
        return embedding.to(text.context).expand(len(text), -1)

    def predict(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        if len(text) > len(latents) and self.model.levels[-1].halves == 1:  # the last call is the one that is captured
            halves = text[: len(latents)], text[len(latents) :]
            return torch.cat([self._call(latents, timestep, half) for half in halves])
        return self._call(latents, timestep, text)

    def _call(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        rows, size = len(text), self.model.size
        return self.unet(
            latents.repeat(rows // len(latents), 1, 1, 1),
            timestep,
            text.context,
            timestep_cond=self._guidance_embedding(text),
            added_cond_kwargs={
                "text_embeds": text.pooled,
                "time_ids": latents.new_tensor([[size, size, 0, 0, size, size]]).expand(rows, -1),
            },
            return_dict=False,
        )[0]
