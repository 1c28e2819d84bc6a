"""The Stable Diffusion pipeline of diffusers, with the captured call and the decoders appended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from torch import Tensor

from bench.peers.samples import noise_of, samples_of
from bench.peers.upstream import arithmetic, lean_decoders, stored
from bench.setting import Setting
from datasetdm_fast.data import Capture, Request, Sample, Text
from datasetdm_fast.engine.backbones.sd_reference import capturing_levels, feature_modules, transformers_of
from datasetdm_fast.engine.decoders.trunk import Decoder, copy_for_gpu
from datasetdm_fast.kernels.choice import operations

# A call of another form would be compiled anew.
AS_THE_PIPELINE = {"timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None}
AS_THE_PIPELINE |= {"return_dict": False}


class Diffusers:
    """The decoders are those of ours: folded, each level projected before it is resized, and on a GPU in fp16 by our
    kernels, so that the rows compare the diffusion.
    """

    times_convolutions = False  # whether cuDNN's algorithms are chosen by timing

    def __init__(self, setting: Setting, batch: int):
        self.recipe, self.device, self.batch = setting.recipe, setting.device, batch
        self.tokenizer = setting.model.tokenizer
        self.dtype = "fp32" if setting.device.type == "cpu" else "fp16"
        self.rounds_text = self.dtype != "fp32"
        self.storage = torch.float32 if self.dtype == "fp32" else torch.float16
        model = setting.model
        parts = {name: stored(model.modules[name], self.storage) for name in ("vae", "text_encoder", "unet")}
        scheduler = PNDMScheduler.from_config(dict(model.scheduler))
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        self.pipe = StableDiffusionPipeline(
            **parts, tokenizer=model.tokenizers["tokenizer"], scheduler=scheduler, **absent
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.unet = self.pipe.unet  # the plain module, which the captured call runs in
        self.decoders = lean_decoders(setting) if setting.device.type == "cpu" else narrow_decoders(setting)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with arithmetic(False):
            torch.backends.cudnn.benchmark = self.times_convolutions  # put back with the flags of the block
            yield

    def encode_text(self, prompts: Sequence[str]) -> Text:
        with self._arithmetic():
            return Text(self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0].float())

    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        with self._arithmetic():  # the inputs, too, are made without gradients, as the pipeline's are
            doubled, context = torch.cat([latents, latents]).to(self.storage), text.context.to(self.storage, copy=True)
            moment = torch.tensor(int(timestep), device=self.device)
            return self.pipe.unet(doubled, moment, encoder_hidden_states=context, **AS_THE_PIPELINE)[0].float()

    def denoise_and_capture(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        captured = CapturedCall(self, call=0)
        captured.before(0)
        noise = self.denoise(latents, timestep, text)
        return noise, captured.after(0).to(torch.float32)

    def _run(self, requests: Sequence[Request], **options: Any) -> np.ndarray:
        prompts = [request.prompt for request in requests]
        options["latents"] = noise_of(requests, self.recipe).to(self.device, self.storage)
        options |= {"num_inference_steps": self.recipe.facts["steps"], "guidance_scale": self.recipe.guidance}
        with self._arithmetic():
            return (self.pipe(prompts, output_type="np", **options).images * 255).astype(np.uint8)

    def draw(self, requests: Sequence[Request]) -> np.ndarray:
        return self._run(requests)

    def make(self, requests: Sequence[Request]) -> list[Sample]:
        captured = CapturedCall(self, self.recipe.captured[-1])
        captured.before(0)
        images = self._run(requests, callback_on_step_end=captured.on_step_end)
        with self._arithmetic():
            answers = {task: answered(decoder, captured.capture) for task, decoder in self.decoders.items()}
        return samples_of(requests, images, answers, self.decoders, self.recipe, self.tokenizer)


class TunedDiffusers(Diffusers):
    """With what its guides switch on for a GPU and compile nothing for: channels-last, packed projections, and
    convolutions chosen by timing.
    """

    times_convolutions = True

    def __init__(self, setting: Setting, batch: int):
        super().__init__(setting, batch)
        for module in (self.pipe.unet, self.pipe.vae):
            module.to(memory_format=torch.channels_last)
        self.pipe.fuse_qkv_projections()


def narrow_decoders(setting: Setting) -> dict[str, Decoder]:
    """The folded decoders in fp16, with the operations that our engine gives them."""
    ops = operations(setting.device, torch.float16)
    return {task: copy_for_gpu(decoder, torch.float16, ops) for task, decoder in setting.reference.decoders.items()}


def answered(decoder: Decoder, capture: Capture) -> dict[str, Tensor]:
    """What a decoder says, in fp32."""
    return {name: value.float() for name, value in decoder(capture.to(next(decoder.parameters()).dtype)).items()}


class CapturedCall:
    """Captures features and maps in one call of a pipeline's loop."""

    def __init__(self, peer: Diffusers, call: int):
        self.peer, self.call, self.capture = peer, call, None
        self._hooks, self._found = ExitStack(), []

    def before(self, call: int) -> None:
        if call == self.call:
            self._usual, self.peer.pipe.unet = self.peer.pipe.unet, self.peer.unet
            layers = feature_modules(self.peer.unet), transformers_of(self.peer.unet)
            self._found = self._hooks.enter_context(capturing_levels(*layers))

    def after(self, call: int) -> Capture | None:
        if call == self.call:
            self._hooks.close()
            self.peer.pipe.unet = self._usual
            (self.capture,) = self._found
        return self.capture

    def on_step_end(self, pipe: Any, call: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.after(call)
        self.before(call + 1)
        return tensors
