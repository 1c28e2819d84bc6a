"""Dataset Diffusion's labels from attention written plainly over diffusers: fp32, an image at a time, every probability
of the layers that are read formed whole, and all of them kept until the last call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler
from torch import Tensor

from datasetdm_fast.data import Request
from datasetdm_fast.engine.loading.model import Model


@dataclass(frozen=True)
class Numbers:
    """With which maps become labels."""

    exponent: int = 4
    threshold: float = 0.6
    uncertainty: float = 0.5
    self_cells: int = 32
    cross_cells: int = 16
    guidance: float = 7.5


@dataclass(frozen=True)
class DrawnImage:
    """One image, and what was read while it was drawn."""

    latents: Tensor  # [1, 4, h, w]
    cells: Tensor  # [S, S]
    tokens: Tensor  # [N, T]
    maps: Tensor  # [K, s, s], one for each class word, 0 to 1


class DatasetDiffusion:
    def __init__(self, model: Model, numbers: Numbers, steps: int):
        self.model, self.numbers, self.steps = model, numbers, steps

    @torch.inference_mode()
    def draw(self, requests: Sequence[Request]) -> list[DrawnImage]:
        """One generator draws the noise of all images."""
        side, generator = self.model.size // 8, torch.Generator().manual_seed(requests[0].seed)
        noise = torch.randn(len(requests), 4, side, side, generator=generator)
        return [self._one(request, noise[k : k + 1]) for k, request in enumerate(requests)]

    @torch.inference_mode()
    def make(self, requests: Sequence[Request], classes: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Images [H, W, 3] and label maps [H, W], both uint8."""
        vae, made = self.model.modules["vae"], []
        for request, drawn in zip(requests, self.draw(requests)):
            pixels = vae.decode(drawn.latents / vae.config.scaling_factor, return_dict=False)[0][0]
            image = ((pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255).to(torch.uint8)
            made.append((image, self.label(drawn.maps, request, classes)))
        return made

    def label(self, maps: Tensor, request: Request, classes: Sequence[str]) -> Tensor:
        """255 marks uncertain pixels, 0 those of no class."""
        largest = F.interpolate(maps[None], (self.model.size,) * 2, mode="bicubic")[0].max(0)
        own = torch.tensor([1 + classes.index(word) for word in request.classes])[largest.indices]
        weak = torch.where(largest.values >= self.numbers.uncertainty, 255, 0)
        return torch.where(largest.values >= self.numbers.threshold, own, weak).to(torch.uint8)

    def _encoded(self, text: str) -> Tensor:
        ids = self.model.tokenizers["tokenizer"](
            [text], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        return self.model.modules["text_encoder"](ids.input_ids).last_hidden_state

    def _one(self, request: Request, latents: Tensor) -> DrawnImage:
        unet, words = self.model.modules["unet"], " ".join(request.classes)
        scheduler = PNDMScheduler.from_config({**self.model.scheduler, "steps_offset": 1, "set_alpha_to_one": False})
        scheduler.set_timesteps(self.steps)
        context = torch.cat([self._encoded(request.negative), self._encoded(f"{request.prompt}; {words}")])
        kept: dict[str, list[Tensor]] = {"attn1": [], "attn2": []}
        hear = partial(self._hear, kept, self._encoded(words))
        hooks = [
            module.register_forward_hook(partial(hear, name[-5:]))
            for name, module in unet.named_modules()
            if name.endswith(tuple(kept))
        ]
        try:
            for timestep in scheduler.timesteps:
                out = unet(torch.cat([latents, latents]), timestep, context).sample
                out = out[:1] + self.numbers.guidance * (out[1:] - out[:1])
                latents = scheduler.step(out, timestep, latents).prev_sample
        finally:
            for hook in hooks:
                hook.remove()
        cells, tokens = (torch.stack(found).mean(0) for found in kept.values())
        return DrawnImage(latents, cells, tokens, self._maps(cells, tokens, len(request.classes)))

    def _hear(self, kept, class_context: Tensor, kind: str, module, given: tuple[Tensor, ...], answer: Tensor) -> None:
        """Keeps the mean over heads of the conditional half's probabilities in one layer, where its side is read."""
        own, is_self = given[0][1:], kind == "attn1"
        if own.shape[1] == (self.numbers.self_cells if is_self else self.numbers.cross_cells) ** 2:
            q, k = module.to_q(own), module.to_k(own if is_self else class_context)
            q, k = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2)[0] for x in (q, k))
            kept[kind].append(torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1).mean(0))

    def _maps(self, cells: Tensor, tokens: Tensor, count: int) -> Tensor:
        """The word of a class stands where its place in the class prompt says, counted in words."""
        side = self.numbers.self_cells
        grid = tokens.T.unflatten(1, (self.numbers.cross_cells,) * 2)[None]
        seen = F.interpolate(grid, (side, side), mode="bicubic")[0][1 : 1 + count].flatten(1)
        spread = seen @ torch.matrix_power(cells, self.numbers.exponent).T
        spread = spread - spread.amin(1, keepdim=True)
        return (spread / spread.amax(1, keepdim=True)).unflatten(1, (side, side))
