"""Stable Diffusion 3 and 3.5 as its stock pipeline computes it, in fp32."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.data import Text
from datasetdm_fast.engine.backbones import joint_attention
from datasetdm_fast.engine.backbones.prompt_encoders import encode_clips, encode_t5
from datasetdm_fast.engine.backbones.sd3 import t5_length


class SD3Reference(joint_attention.JointReference):
    def places(self, cells: int, text: int) -> tuple[slice, slice]:
        return slice(0, cells), slice(cells, cells + text)

    def encode(self, prompts: Sequence[str]) -> Text:
        modules, tokenizers = self.model.modules, self.model.tokenizers
        clip, pooled = (torch.cat(part, -1) for part in zip(*encode_clips(self.model, prompts)))
        width, length = self.model.configs["transformer"].joint_attention_dim, t5_length(self.model.configs)
        if "text_encoder_3" in modules:
            t5 = encode_t5(modules["text_encoder_3"], tokenizers["tokenizer_3"], prompts, length)
        else:
            t5 = clip.new_zeros(len(prompts), length, width)
        return Text(torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5], 1), pooled)

    def call(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        return self.network(
            hidden_states=latents,
            timestep=torch.full((len(latents),), timestep, device=latents.device),
            encoder_hidden_states=text.context,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]
