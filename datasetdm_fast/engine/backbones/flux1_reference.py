"""FLUX.1 as its stock pipeline computes it, in fp32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from datasetdm_fast.data import Text
from datasetdm_fast.engine.backbones import joint_attention
from datasetdm_fast.engine.backbones.prompt_encoders import encode_t5, tokenize


class Flux1Reference(joint_attention.JointReference):
    def encode(self, prompts: Sequence[str]) -> Text:
        modules, tokenizers = self.model.modules, self.model.tokenizers
        tokens = tokenize(tokenizers["tokenizer"], prompts, tokenizers["tokenizer"].model_max_length, self.device)
        pooled = modules["text_encoder"](tokens["input_ids"]).pooler_output
        length, _ = self.model.backbone.text(self.model.configs)
        return Text(encode_t5(modules["text_encoder_2"], tokenizers["tokenizer_2"], prompts, length), pooled)

    def call(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        rows, device, side = len(latents), latents.device, latents.shape[-1]
        is_guided = self.model.configs["transformer"].guidance_embeds
        output = self.network(
            hidden_states=joint_attention.pack(latents),
            timestep=torch.full((rows,), timestep, device=device) / 1000,
            guidance=torch.full((rows,), text.guidance, device=device) if is_guided else None,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.context,
            txt_ids=torch.zeros(text.context.shape[1], 3, device=device),
            img_ids=joint_attention.grid(side // 2, 3, device),
            return_dict=False,
        )[0]
        return joint_attention.unpack(output, side)
