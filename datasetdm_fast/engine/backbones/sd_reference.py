"""The oracle of Stable Diffusion 1.x and 2.x: its U-Net with hooks, attention probabilities formed explicitly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.data import AttentionSums, Capture, Text
from datasetdm_fast.engine.backbones.record import LoadedModel


def feature_modules(unet: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """Per level, low to highest, the modules whose outputs are its features, in the order of the weights."""
    down, up = unet.down_blocks, unet.up_blocks
    levels = [(down[2].downsamplers[0], *down[3].resnets, unet.mid_block, *up[0].resnets)]
    for depth in (2, 1, 0):
        entry = unet.conv_in if depth == 0 else down[depth - 1].downsamplers[0]
        levels.append((entry, *down[depth].attentions, up[2 - depth].upsamplers[0], *up[3 - depth].attentions))
    return tuple(levels)


def transformers_of(unet: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """Per level the transformers: up blocks first, then down; the middle block alone for low."""
    levels = [unet.mid_block.attentions]
    levels += [(*unet.up_blocks[3 - depth].attentions, *unet.down_blocks[depth].attentions) for depth in (2, 1, 0)]
    return tuple(tuple(block.transformer_blocks[0] for block in blocks) for blocks in levels)


def map_modules(unet: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """Per level the cross-attention layers, in the order of its transformers."""
    return tuple(tuple(block.attn2 for block in level) for level in transformers_of(unet))


class CapturingAttention:
    """Attention processor that forms the probabilities explicitly and keeps those of the conditional half."""

    def __init__(self) -> None:
        self.map: Tensor | None = None  # [B, heads, h*w, T]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        # A view would keep both halves alive.
        self.map = probabilities.unflatten(0, (-1, attn.heads)).chunk(2)[1].clone()
        output = attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, value)))
        return attn.to_out[1](output) / attn.rescale_output_factor


class SummingAttention:
    """Attention processor that leaves the output to `inner`, and averages the probabilities of the conditional queries
    over `text`, or over the layer's keys where that is None.
    """

    def __init__(self, inner: Callable[..., Tensor], batch: int, text: Tensor | None = None):
        self.inner, self.batch, self.text = inner, batch, text
        self.map: Tensor | None = None  # [B, S, T], the mean over heads

    def __call__(self, attn: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        conditional = hidden_states[-self.batch :]
        keys = attn.head_to_batch_dim(attn.to_k(conditional if self.text is None else self.text))
        probabilities = attn.get_attention_scores(attn.head_to_batch_dim(attn.to_q(conditional)), keys)
        self.map = probabilities.unflatten(0, (-1, attn.heads)).mean(1)
        return self.inner(attn, hidden_states, *arguments, **options)


@contextmanager
def set_processors(processors: Mapping[nn.Module, object]) -> Iterator[None]:
    """Within the block the attentions have these processors."""
    before = {attention: attention.processor for attention in processors}
    try:
        for attention, processor in processors.items():
            attention.set_processor(processor)
        yield
    finally:
        for attention, processor in before.items():
            attention.set_processor(processor)


@contextmanager
def capturing(unet: nn.Module) -> Iterator[list[Capture]]:
    """Within the block one forward of `unet` is captured; the Capture is appended to the list on leaving."""
    layers, attentions = feature_modules(unet), map_modules(unet)
    captures: list[Capture] = []
    outputs: dict[nn.Module, Tensor] = {}

    def store(module: nn.Module, _: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # [B, 2C, h, w]: for each image the unconditional half, then its conditional half
        outputs[module] = torch.cat(hidden.chunk(2), dim=1)

    hooks = [module.register_forward_hook(store) for level in layers for module in level]
    try:
        with set_processors({attention: CapturingAttention() for level in attentions for attention in level}):
            yield captures
            features = tuple(tuple(outputs[module] for module in level) for level in layers)
            maps = tuple(tuple(attention.processor.map for attention in level) for level in attentions)
            captures.append(Capture(features, maps))
    finally:
        for hook in hooks:
            hook.remove()


class SDReference:
    """See BackboneReference."""

    def __init__(self, model: LoadedModel):
        self.model, self.unet, self.vae = model, model.modules["unet"], model.modules["vae"]
        self.text_encoder, self.tokenizer = model.modules["text_encoder"], model.tokenizers["tokenizer"]

    def encode(self, prompts: Sequence[str]) -> Text:
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.model.text_length,
            truncation=True,
            return_tensors="pt",
        )
        return Text(self.text_encoder(tokens.input_ids.to(self.text_encoder.device)).last_hidden_state)

    def predict(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        return self.unet(torch.cat([latents, latents]), timestep, text.context, return_dict=False)[0]

    def capturing(self) -> AbstractContextManager[list[Capture]]:
        return capturing(self.unet)

    def predict_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        """The output of `predict`, and the sums with the attention of this call."""
        cells: dict[nn.Module, SummingAttention] = {}
        tokens: dict[nn.Module, SummingAttention] = {}
        for level, blocks in zip(self.model.levels, transformers_of(self.unet)):
            for block in blocks:
                if level.side**2 == sums.cells.shape[1]:
                    cells[block.attn1] = SummingAttention(block.attn1.processor, len(latents))
                if level.side**2 == sums.tokens.shape[1]:
                    tokens[block.attn2] = SummingAttention(block.attn2.processor, len(latents), class_text.context)
        with set_processors({**cells, **tokens}):
            output = self.predict(latents, timestep, text)
        means = [torch.stack([layer.map for layer in kind.values()]).mean(0) for kind in (cells, tokens)]
        return output, AttentionSums(sums.cells + means[0], sums.tokens + means[1])

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    def encode_image(self, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        latents = posterior.mean.float()
        if generators is not None:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
            latents = latents + posterior.std * noise.to(latents.device)
        return latents * self.vae.config.scaling_factor
