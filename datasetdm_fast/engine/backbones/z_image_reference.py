"""Z-Image as its stock pipeline computes it, in fp32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from datasetdm_fast.data import Text
from datasetdm_fast.engine.backbones import joint_attention
from datasetdm_fast.engine.backbones.prompt_encoders import encode_chat, join_rows
from datasetdm_fast.engine.backbones.z_image import LENGTH

MULTIPLE = 32  # to which the tokens of an image, and those of a text, are padded


class ZImageReference(joint_attention.JointReference):
    """See BackboneReference; the network's own time runs from 0 to 1, and it tells the way back to noise."""

    def attentions(self) -> list[nn.Module]:
        return [layer.attention for layer in self.network.layers]

    def places(self, cells: int, text: int) -> tuple[slice, slice]:
        begin = cells + -cells % MULTIPLE
        return slice(0, cells), slice(begin, begin + text + -text % MULTIPLE)

    def encode(self, prompts: Sequence[str]) -> Text:
        states, mask = encode_chat(self.model, prompts, LENGTH)
        context, padding = join_rows([row[read] for row, read in zip(states[-2], mask)])
        return Text(context, mask=padding)

    def guide(self, output: Tensor, guidance: float) -> Tensor:
        """The pipeline adds to the conditional output, so that 0 is no guidance."""
        without, with_text = output.chunk(2)
        return with_text + guidance * (with_text - without)

    def call(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        texts = list(text.context) if text.mask is None else [row[read] for row, read in zip(text.context, text.mask)]
        time = (1000 - torch.full((len(latents),), timestep, device=latents.device)) / 1000
        outputs = self.network(list(latents.unsqueeze(2)), time, texts, return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2)
