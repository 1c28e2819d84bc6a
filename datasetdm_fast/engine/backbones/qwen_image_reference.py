"""Qwen-Image as its stock pipeline computes it, in fp32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from datasetdm_fast.data import Text
from datasetdm_fast.engine.backbones import joint_attention
from datasetdm_fast.engine.backbones.prompt_encoders import join_rows
from datasetdm_fast.engine.backbones.qwen_image import INSTRUCTION, LENGTH, TEMPLATE

MOST_TOKENS = 1024  # that the text encoder is given of a prompt


class QwenImageReference(joint_attention.JointReference):
    def encode(self, prompts: Sequence[str]) -> Text:
        tokens = self.model.tokenizers["tokenizer"](
            [TEMPLATE.format(prompt) for prompt in prompts],
            max_length=MOST_TOKENS + INSTRUCTION,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        states = self.model.modules["text_encoder"](**tokens, output_hidden_states=True).hidden_states[-1]
        end = INSTRUCTION + LENGTH
        rows = [row[read][INSTRUCTION:end] for row, read in zip(states, tokens["attention_mask"].bool())]
        context, mask = join_rows(rows)
        return Text(context, mask=mask)

    def guide(self, output: Tensor, guidance: float) -> Tensor:
        """Each token of 2 x 2 cells as long as its conditional one."""
        side = output.shape[-1]
        without, with_text = joint_attention.pack(output).chunk(2)
        guided = without + guidance * (with_text - without)
        lengths = [part.norm(dim=-1, keepdim=True) for part in (with_text, guided)]
        return joint_attention.unpack(guided * (lengths[0] / lengths[1]), side)

    def call(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        side = latents.shape[-1]
        with self._placing(text.concepts) if text.concepts else nullcontext():
            output = self.network(
                hidden_states=joint_attention.pack(latents),
                timestep=torch.full((len(latents),), timestep, device=latents.device) / 1000,
                encoder_hidden_states=text.context,
                encoder_hidden_states_mask=text.mask,
                img_shapes=[[(1, side // 2, side // 2)]] * len(latents),
                return_dict=False,
            )[0]
        return joint_attention.unpack(output, side)

    @contextmanager
    def _placing(self, concepts: int) -> Iterator[None]:
        """Within the block the last words of a text stand where a prompt begins."""

        def turn(_: nn.Module, arguments: object, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            image, words = turns
            return image, torch.cat([words[: len(words) - concepts], words[:1].expand(concepts, -1)])

        hook = self.network.pos_embed.register_forward_hook(turn)
        try:
            yield
        finally:
            hook.remove()

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.unsqueeze(2))[:, :, 0]

    def encode_image(self, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        return super().encode_image(pixels.unsqueeze(2), generators)[:, :, 0]
