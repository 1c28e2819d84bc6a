"""An engine of this package as a peer: the loop of `generate` over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bench.peers.samples import noise_of
from bench.setting import Setting
from datasetdm_fast.data import Batch, Request, Sample, SetAside
from datasetdm_fast.engines import build_engine
from datasetdm_fast.engines.engine import Engine
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.generation.driver import generate
from datasetdm_fast.sampling.walk import SamplerState


class EnginePeer:
    rounds_text = False

    def __init__(self, engine: Engine, setting: Setting, batch: int):
        self.engine, self.recipe, self.batch = engine, setting.recipe, batch
        self.dtype = engine.fingerprint()["dtype"]
        self.encode_text, self.denoise, self.denoise_and_capture = (
            engine.encode_text,
            engine.denoise,
            engine.denoise_and_capture,
        )

    def make(self, requests: Sequence[Request]) -> list[Sample]:
        ((_, results),) = generate([Batch(0, tuple(requests))], self.engine, self.recipe)
        for result in results:
            if isinstance(result, SetAside):
                raise GateFailed(
                    f"{self.engine.name}: sample {result.request.id} was set aside: {result.reason}",
                    "nothing was timed",
                )
        return results

    def draw(self, requests: Sequence[Request]) -> np.ndarray:
        """Images without labels."""
        engine, recipe = self.engine, self.recipe
        texts = engine.encode_text([request.prompt for request in requests])
        context = torch.cat([engine.encode_text([""]).expand(len(requests), -1, -1), texts])
        walk = SamplerState(recipe.schedule, recipe.guidance, noise_of(requests, recipe).to(engine.device))
        for call, timestep in enumerate(recipe.schedule.timesteps):
            walk.step(call, engine.denoise(walk.latents, timestep, context))
        return engine.decode_image(walk.latents).cpu().numpy()


def open_peer(name: str, setting: Setting, batch: int, dtype: str = "auto") -> EnginePeer:
    """The peer of an engine over the setting's model and decoders; Missing where this installation has no such
    engine.
    """
    engine = build_engine(name, setting.model, setting.reference.decoders, dtype=dtype, device=str(setting.device))
    return EnginePeer(engine, setting, batch)
