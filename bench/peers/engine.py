"""An engine of this package as a peer: the loop of `generate` over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bench.setting import Setting
from datasetdm_fast.data import Batch, Quarantined, Request, Sample, join_texts
from datasetdm_fast.engine.engines import Engine, build_engine
from datasetdm_fast.engine.loop.calls import FROM_NOISE
from datasetdm_fast.engine.loop.driver import generate
from datasetdm_fast.engine.sampling.schedule import SamplerState
from datasetdm_fast.errors import GateFailed


class EnginePeer:
    rounds_text = False

    def __init__(self, engine: Engine, setting: Setting, batch: int):
        self.engine, self.recipe, self.batch = engine, setting.recipe, batch
        self.dtype = engine.fingerprint()["dtype"]
        self.encode_text, self.denoise = engine.encode_text, engine.denoise
        self.denoise_and_capture = engine.denoise_and_capture

    def make(self, requests: Sequence[Request]) -> list[Sample]:
        ((_, results),) = generate([Batch(0, tuple(requests))], self.engine, self.recipe)
        for result in results:
            if isinstance(result, Quarantined):
                cause = f"{self.engine.name}: sample {result.request.id} was quarantined: {result.reason}"
                raise GateFailed(cause, "nothing was timed")
        return results

    def draw(self, requests: Sequence[Request]) -> np.ndarray:
        """Images without labels."""
        engine, recipe = self.engine, self.recipe
        texts = engine.encode_text([request.prompt for request in requests])
        context = join_texts([engine.encode_text([""]).expand(len(requests)), texts])
        beginning = FROM_NOISE.begin(engine, recipe.schedule, requests)
        state = SamplerState(recipe.schedule, recipe.guidance, beginning.latents, beginning.noise)
        for call, timestep in enumerate(recipe.schedule.timesteps):
            state.step(call, engine.denoise(state.latents, timestep, context))
        return engine.decode_image(state.latents).cpu().numpy()


def reference(setting: Setting, batch: int) -> EnginePeer:
    """The reference engine: diffusers' modules in fp32, several images at a time."""
    return EnginePeer(setting.reference, setting, batch)


def named(name: str, dtype: str = "auto") -> Callable[[Setting, int], EnginePeer]:
    """Builds the peer of an engine over the setting's model and decoders; Missing where this installation has no such
    engine.
    """

    def build(setting: Setting, batch: int) -> EnginePeer:
        model, decoders, device = setting.model, setting.reference.decoders, str(setting.device)
        engine = build_engine(name, model, decoders, dtype=dtype, device=device)
        engine.prepare(batch)  # weights are read as it is loaded, rather than in its first batch
        return EnginePeer(engine, setting, batch)

    return build
