"""AuraFlow as its stock pipeline computes it, in fp32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from datasetdm_fast.data import Text
from datasetdm_fast.engine.backbones import joint_attention
from datasetdm_fast.engine.backbones.aura_flow import LENGTH
from datasetdm_fast.engine.backbones.prompt_encoders import tokenize


class AuraFlowReference(joint_attention.JointReference):
    """See BackboneReference."""

    def attentions(self) -> list[nn.Module]:
        network = self.network
        return [block.attn for block in (*network.joint_transformer_blocks, *network.single_transformer_blocks)]

    def encode(self, prompts: Sequence[str]) -> Text:
        tokens = tokenize(self.model.tokenizers["tokenizer"], prompts, LENGTH, self.device)
        states = self.model.modules["text_encoder"](**tokens)[0]
        return Text(states * tokens["attention_mask"][..., None])

    def call(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        output: Tensor = self.network(
            latents,
            encoder_hidden_states=text.context,
            timestep=torch.full((len(latents),), timestep / 1000, device=latents.device),
            return_dict=False,
        )[0]
        return output
