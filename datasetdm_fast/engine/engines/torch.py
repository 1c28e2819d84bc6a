"""The reference engine: diffusers and transformers modules as they come, fp32, eager, never optimised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from datasetdm_fast.data import AttentionSums, Capture
from datasetdm_fast.engine.engines.derived_calls import BaseEngine
from datasetdm_fast.engine.engines.device import engine_call, resolve_device
from datasetdm_fast.engine.engines.engine import check_task
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Refused


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


class TorchEngine(BaseEngine):
    """See engines.Engine; decoders run in the mode they were loaded in.

    `model` and `decoders` are moved to the device in place. Results are inference tensors: clone to train on them.
    """

    name, precision = "torch", "fp32"

    def __init__(
        self,
        model: Model,
        decoders: Mapping[str, nn.Module] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
    ):
        if dtype not in ("auto", "fp32"):
            raise Refused(
                f"dtype: the torch engine is the fp32 reference and cannot run in {dtype}",
                "Use --dtype fp32, or another engine.",
            )
        self.model, self.device = model, resolve_device(device)
        self.decoders = {task: decoder.to(self.device) for task, decoder in (decoders or {}).items()}
        for module in (model.text_encoder, model.unet, model.vae):
            module.to(self.device)

    @engine_call
    def encode_text(self, prompts: Sequence[str]) -> Tensor:  # [B, T, D]
        length = min(self.model.clip_tokenizer.model_max_length, self.model.text_encoder.config.max_position_embeddings)
        tokens = self.model.clip_tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return self.model.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    @engine_call
    def denoise(self, latents: Tensor, timestep: float, context: Tensor) -> Tensor:  # [2B, 4, h, w]
        return self.model.unet(torch.cat([latents, latents]), timestep, context, return_dict=False)[0]

    @engine_call
    def denoise_and_capture(self, latents: Tensor, timestep: float, context: Tensor) -> tuple[Tensor, Capture]:
        with capturing(self.model.unet) as captures:
            noise = self.denoise(latents, timestep, context)
        return noise, captures[0]

    denoise_and_capture_raw = denoise_and_capture

    @engine_call
    def denoise_and_average(
        self, latents: Tensor, timestep: float, context: Tensor, class_context: Tensor, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        cells: dict[nn.Module, SummingAttention] = {}
        tokens: dict[nn.Module, SummingAttention] = {}
        for level, blocks in zip(self.model.levels, transformers_of(self.model.unet)):
            for block in blocks:
                if level.side**2 == sums.cells.shape[1]:
                    cells[block.attn1] = SummingAttention(block.attn1.processor, len(latents))
                if level.side**2 == sums.tokens.shape[1]:
                    tokens[block.attn2] = SummingAttention(block.attn2.processor, len(latents), class_context)
        with set_processors({**cells, **tokens}):
            noise = self.denoise(latents, timestep, context)
        means = [torch.stack([layer.map for layer in kind.values()]).mean(0) for kind in (cells, tokens)]
        return noise, AttentionSums(sums.cells + means[0], sums.tokens + means[1])

    @engine_call
    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        decoded = self.model.vae.decode(latents / self.model.vae.config.scaling_factor, return_dict=False)[0]
        images = ((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).to(torch.uint8)
        return images, decoded.isfinite().flatten(1).all(1)

    @engine_call
    def encode_image(
        self, images: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:  # [B, 4, h, w]
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.model.vae.encode(pixels.to(self.model.vae.dtype)).latent_dist
        latents = posterior.mean.float()
        if generators is not None:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
            latents = latents + posterior.std * noise.to(self.device)
        return latents * self.model.vae.config.scaling_factor

    @engine_call
    def annotate(self, task: str, capture: Capture, text: Tensor | None = None) -> dict[str, Tensor]:
        check_task(task, self.decoders)
        return self.decoders[task](capture, text)

    def _versions(self) -> dict[str, str]:
        return {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
