"""The reference engine: diffusers and transformers modules as they come, fp32, eager, never optimised."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import diffusers
import torch
import transformers
from torch import Tensor, nn

from datasetdm_fast.data import AttentionSums, Capture
from datasetdm_fast.engine.engines.device import allow_tf32, choose_by_shape, resolve_device
from datasetdm_fast.engine.engines.engine import check_task
from datasetdm_fast.engine.engines.memory import BATCH, suggest_batch
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Refused


def _oracle(method):
    """`method` without gradients; on a GPU without TF32, which cuDNN uses for fp32 convolutions unless told not to, and
    by algorithms that round alike every time.
    """

    @functools.wraps(method)
    def strict(engine: TorchEngine, *arguments, **keywords):
        allow_tf32(engine.device, False)
        choose_by_shape(engine.device)
        with torch.inference_mode():
            return method(engine, *arguments, **keywords)

    return strict


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
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, **_
    ) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self.map = (
            probabilities.unflatten(0, (-1, attn.heads)).chunk(2)[1].clone()
        )  # a view would keep both halves alive
        output = attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, value)))
        return attn.to_out[1](output) / attn.rescale_output_factor


class SummingAttention:
    """Attention processor that leaves the answer to another, and adds up the probabilities of the conditional queries
    over `text`, or over their own keys where that is None.
    """

    def __init__(self, answer, batch: int, text: Tensor | None = None):
        self.answer, self.batch, self.text = answer, batch, text
        self.map: Tensor | None = None  # [B, S, T], the mean over heads

    def __call__(self, attn, hidden_states: Tensor, *arguments, **named) -> Tensor:
        own = hidden_states[-self.batch :]
        keys = attn.head_to_batch_dim(attn.to_k(own if self.text is None else self.text))
        found = attn.get_attention_scores(attn.head_to_batch_dim(attn.to_q(own)), keys)
        self.map = found.unflatten(0, (-1, attn.heads)).mean(1)
        return self.answer(attn, hidden_states, *arguments, **named)


@contextmanager
def processed(processors: Mapping[nn.Module, object]) -> Iterator[None]:
    """Within the block the attentions have these processors."""
    before = {attention: attention.processor for attention in processors}
    try:
        for attention, processor in processors.items():
            attention.set_processor(processor)
        yield
    finally:
        for attention, processor in before.items():
            attention.set_processor(processor)


def _joined(hidden: Tensor) -> Tensor:
    """[B, 2C, h, w]: for each image the unconditional half, then its own conditional half."""
    return torch.cat(hidden.chunk(2), dim=1)


@contextmanager
def capturing(unet: nn.Module) -> Iterator[list[Capture]]:
    """Within the block one forward of `unet` is observed; the Capture is appended to the list on leaving."""
    layers, result, seen = feature_modules(unet), [], {}
    attentions = map_modules(unet)
    before = {attention: attention.processor for level in attentions for attention in level}

    def keep(module, _, output):
        seen[module] = _joined(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep) for level in layers for module in level]
    try:
        for attention in before:
            attention.set_processor(CapturingAttention())
        yield result
        features = tuple(tuple(seen[module] for module in level) for level in layers)
        maps = tuple(tuple(attention.processor.map for attention in level) for level in attentions)
        result.append(Capture(features, maps))
    finally:
        for hook in hooks:
            hook.remove()
        for attention, processor in before.items():
            attention.set_processor(processor)


class TorchEngine:
    """See engines.Engine; decoders run in the mode they were loaded in.

    `model` and `decoders` are moved to the device in place. Results are inference tensors: clone to train on them.
    """

    name = "torch"
    adjustments: Mapping[str, int] = {}

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

    @_oracle
    def encode_text(self, prompts: Sequence[str]) -> Tensor:  # [B, T, D]
        length = min(self.model.clip_tokenizer.model_max_length, self.model.text_encoder.config.max_position_embeddings)
        tokens = self.model.clip_tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return self.model.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    @_oracle
    def encode_classes(self, words: Sequence[str]) -> Tensor:  # [K, D]
        return self.encode_text(words).mean(1)

    @_oracle
    def denoise(self, latents: Tensor, timestep: float, context: Tensor) -> Tensor:  # [2B, 4, h, w]
        return self.model.unet(torch.cat([latents, latents]), timestep, context, return_dict=False)[0]

    @_oracle
    def denoise_and_capture(self, latents: Tensor, timestep: float, context: Tensor) -> tuple[Tensor, Capture]:
        with capturing(self.model.unet) as captures:
            noise = self.denoise(latents, timestep, context)
        return noise, captures[0]

    denoise_and_capture_raw = denoise_and_capture

    @_oracle
    def denoise_and_average(
        self, latents: Tensor, timestep: float, context: Tensor, class_context: Tensor, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        cells, tokens = {}, {}
        for level, blocks in zip(self.model.levels, transformers_of(self.model.unet)):
            for block in blocks:
                if level.side**2 == sums.cells.shape[1]:
                    cells[block.attn1] = SummingAttention(block.attn1.processor, len(latents))
                if level.side**2 == sums.tokens.shape[1]:
                    tokens[block.attn2] = SummingAttention(block.attn2.processor, len(latents), class_context)
        with processed({**cells, **tokens}):
            noise = self.denoise(latents, timestep, context)
        found = [torch.stack([one.map for one in kind.values()]).mean(0) for kind in (cells, tokens)]
        return noise, AttentionSums(sums.cells + found[0], sums.tokens + found[1])

    def decode_image(self, latents: Tensor) -> Tensor:  # [B, H, W, 3] uint8
        return self.decode_and_check(latents)[0]

    @_oracle
    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # images, [B] bool
        decoded = self.model.vae.decode(latents / self.model.vae.config.scaling_factor, return_dict=False)[0]
        images = ((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).to(torch.uint8)
        return images, decoded.isfinite().flatten(1).all(1)

    @_oracle
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

    @_oracle
    def annotate(self, task: str, capture: Capture, text: Tensor | None = None) -> dict[str, Tensor]:
        check_task(task, self.decoders)
        return self.decoders[task](capture, text)

    def suggested_batch(self) -> int:
        return BATCH if self.device.type == "cuda" else suggest_batch(self.model.size // 8, self.device)

    def fp32_fallback(self) -> None:
        return None

    def fingerprint(self) -> dict[str, str]:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
        return {"engine": self.name, "device": str(self.device), "device_name": device, "dtype": "fp32", **versions}
