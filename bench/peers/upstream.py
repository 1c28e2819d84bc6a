"""DatasetDM as it is written: one image at a time, attention probabilities in memory in every layer of every call,
naive decoders.

Written from its published behaviour; its networks are those of diffusers. Two things are ours, so that labels can be
compared: every image sees the decoders' spectral norms as the first one does, and raw answers become labels by the
rules of `tasks/`, on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import PNDMScheduler
from torch import Tensor, nn

from bench.peers.samples import noise_of, samples_of
from bench.setting import Setting
from datasetdm_fast.data import Capture, Request, Sample, Text, join_texts
from datasetdm_fast.engine.backbones.sd_reference import capturing_levels, feature_modules, transformers_of
from datasetdm_fast.engine.decoders.trunk import Decoder, with_ops
from datasetdm_fast.kernels import native, plain

PLACES = ("down", "mid", "up")
LAST_TIMES = (0, 1)  # timesteps at which upstream keeps features


class AttentionMaps:
    """The attention maps of one call: those of the conditional half, by place and kind, kept while `is_active`."""

    def __init__(self) -> None:
        self.is_active, self.calls = False, 0
        self.clear()

    def clear(self) -> None:
        self.calls = 0
        places = ((place, is_text) for place in PLACES for is_text in (False, True))
        self.maps: dict[tuple[str, bool], list[Tensor]] = {place: [] for place in places}

    def see(self, probabilities: Tensor, place: str, is_text: bool) -> None:
        half = len(probabilities) // 2
        # Upstream hands the half to its store and writes back what returns, active or not.
        probabilities[half:] = probabilities[half:]
        if self.is_active:
            self.maps[place, is_text].append(probabilities[half:])

    def average(self) -> dict[tuple[str, bool], list[Tensor]]:
        """Every map over the number of calls seen, self-attention's too, although no decoder reads them."""
        return {name: [layer / self.calls for layer in layers] for name, layers in self.maps.items()}


class FormingAttention:
    """Attention that writes its probabilities to memory and shows them to the store."""

    def __init__(self, store: AttentionMaps, place: str):
        self.store, self.place = store, place

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_,
    ) -> Tensor:
        is_text = encoder_hidden_states is not None
        context = encoder_hidden_states if is_text else hidden_states
        inputs = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        query, key, value = (attn.head_to_batch_dim(layer(x)) for layer, x in inputs)
        probabilities = (torch.einsum("nid,njd->nij", query, key) * attn.scale).softmax(-1)
        self.store.see(probabilities, self.place, is_text)
        answer = attn.batch_to_head_dim(torch.einsum("nij,njd->nid", probabilities, value))
        return attn.to_out[1](attn.to_out[0](answer))


@contextmanager
def arithmetic(has_tf32: bool) -> Iterator[None]:
    """Within the block fp32 products are rounded to TF32, or not at all."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = has_tf32
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=has_tf32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def stored(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module's own in `dtype`."""
    copied = copy.deepcopy(module)
    return copied if next(copied.parameters()).dtype == dtype else copied.to(dtype)


class Upstream:
    """`forms_maps` and `has_naive_decoders` switch off one inefficiency each, for the rows between it and us."""

    batch = 1

    def __init__(
        self, setting: Setting, dtype: str = "fp32", *, forms_maps: bool = True, has_naive_decoders: bool = True
    ):
        self.setting, self.dtype, self.recipe, self.device = setting, dtype, setting.recipe, setting.device
        self.rounds_text = dtype != "fp32"
        self.storage = torch.float16 if dtype == "fp16" else torch.float32
        model = setting.model
        self.tokenizer, self.levels, self.forms_maps = model.tokenizers["tokenizer"], model.levels, forms_maps
        parts = (model.modules["text_encoder"], model.modules["unet"], model.modules["vae"])
        self.text_encoder, self.unet, self.vae = (stored(part, self.storage) for part in parts)
        self.scheduler = PNDMScheduler.from_config(dict(model.scheduler))
        self.store, self.features = AttentionMaps(), {}
        self.layers = feature_modules(self.unet)
        if forms_maps:
            self._add_hooks()
        self.decoders = own_decoders(setting) if has_naive_decoders else lean_decoders(setting)
        self._first = [(buffer, buffer.clone()) for decoder in self.decoders.values() for buffer in decoder.buffers()]

    def _add_hooks(self) -> None:
        blocks_of = (self.unet.down_blocks, nn.ModuleList([self.unet.mid_block]), self.unet.up_blocks)
        for place, blocks in zip(PLACES, blocks_of, strict=True):
            for name, module in blocks.named_modules():
                if name.endswith(("attn1", "attn2")):
                    module.set_processor(FormingAttention(self.store, place))
        for module in (module for level in self.layers for module in level):
            module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, _, output: Tensor | tuple[Tensor, ...]) -> None:
        if self.store.is_active:
            found = output[0] if isinstance(output, tuple) else output
            # For one image: [uncond | cond] on channels.
            self.features[module] = found.reshape(len(found) // 2, -1, *found.shape[2:])

    def encode_text(self, prompts: Sequence[str]) -> Text:
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options)
        with self.arithmetic():
            return Text(self.text_encoder(tokens.input_ids.to(self.device))[0].float())

    def arithmetic(self):
        return arithmetic(self.dtype != "fp32")  # in fp16 what stays in fp32 may be rounded, too

    def denoise(self, latents: Tensor, timestep: float | Tensor, text: Text) -> Tensor:
        moment = torch.as_tensor(timestep, dtype=torch.float32)[None].to(self.device)
        # Upstream asks the device at every call whether this is the last one.
        any(bool(moment[0] == time) for time in LAST_TIMES)
        doubled = torch.cat([latents, latents]).to(self.storage)
        with self.arithmetic():
            return self.unet(doubled, moment, text.context.to(self.storage), return_dict=False)[0].float()

    def denoise_and_capture(self, latents: Tensor, timestep: float | Tensor, text: Text) -> tuple[Tensor, Capture]:
        noise = self.captured(latents, timestep, text)
        return noise, self.capture()

    def captured(self, latents: Tensor, timestep: float | Tensor, text: Text) -> Tensor:
        if not self.forms_maps:
            with capturing_levels(feature_modules(self.unet), transformers_of(self.unet)) as captures:
                noise = self.denoise(latents, timestep, text)
            (self._capture,) = captures
            return noise
        self.store.clear()
        self.store.is_active = True
        noise = self.denoise(latents, timestep, text)
        self.store.is_active, self.store.calls = False, 1
        return noise

    def capture(self) -> Capture:
        """What a decoder reads; all maps are averaged anew for each of its levels."""
        if not self.forms_maps:
            return self._capture
        features = tuple(tuple(self.features[module].float() for module in level) for level in self.layers)
        return Capture(features, tuple(tuple(self._level_maps(level.side, level.name)) for level in self.levels))

    def _level_maps(self, side: int, name: str) -> list[Tensor]:
        with self.arithmetic():
            average = self.store.average()
        layers = [layer for place in (("mid",) if name == "low" else ("up", "down")) for layer in average[place, True]]
        return [layer.float()[None] for layer in layers if layer.shape[1] == side * side]

    def make(self, requests: Sequence[Request]) -> list[Sample]:
        """The sample of the one request there is."""
        for buffer, first in self._first:
            buffer.copy_(first)
        latents = self._sampled(requests)
        image = self.image_of(latents)
        with self.arithmetic():
            answers = {task: decoder(self.capture()) for task, decoder in self.decoders.items()}
        on_host = {task: {name: value.cpu() for name, value in answer.items()} for task, answer in answers.items()}
        self.store.clear()
        self.features.clear()
        return samples_of(requests, image, on_host, self.decoders, self.recipe, self.setting.model.tokenizer)

    def _sampled(self, requests: Sequence[Request]) -> Tensor:
        (request,) = requests
        text = self.encode_text([request.prompt])
        context = join_texts([self.encode_text([""]), text])
        latents = noise_of(requests, self.recipe).to(self.device)
        self.scheduler.set_timesteps(self.recipe.facts["steps"])
        for call, timestep in enumerate(self.scheduler.timesteps):
            predict = self.captured if call == self.recipe.captured[-1] else self.denoise
            without, with_text = predict(latents, timestep, context).chunk(2)
            guided = without + self.recipe.guidance * (with_text - without)
            latents = self.scheduler.step(guided, timestep, latents)["prev_sample"]
        return latents

    def image_of(self, latents: Tensor) -> np.ndarray:
        with self.arithmetic():
            decoded = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.storage), return_dict=False)[0]
        pixels = (decoded.float() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        return (pixels * 255).astype(np.uint8)


def own_decoders(setting: Setting) -> dict[str, Decoder]:
    """Copies of the decoders in the mode upstream runs them: spectral norms estimated anew for every image."""
    return {task: copy.deepcopy(decoder) for task, decoder in setting.trained.items()}


def lean_decoders(setting: Setting) -> dict[str, Decoder]:
    """The decoders folded, with the operations of ours."""
    ops = native if setting.device.type == "cpu" else plain
    return {task: with_ops(decoder, ops) for task, decoder in setting.reference.decoders.items()}


def with_dtype(dtype: str) -> Callable[[Setting, int], Upstream]:
    return lambda setting, batch: Upstream(setting, dtype)
