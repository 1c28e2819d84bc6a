"""A real image back into the network: encode, noise to the capture timestep, one CFG call, capture."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import AnyCapture, Text
from datasetdm_fast.engine.engines import Engine
from datasetdm_fast.engine.loop.calls import CapturedCalls, call_text, trained_calls
from datasetdm_fast.engine.sampling.schedule import ImageNoise, add_noise, is_flow, shares_at
from datasetdm_fast.errors import Refused

POSTERIOR = "posterior"  # the name of the stream of draws from it


def invert_for(
    engine: Engine, labels: Sequence[str], images: Tensor, captions: Sequence[str], seeds: Sequence[int]
) -> dict[str, AnyCapture]:
    """Label -> what its decoder reads of images at the timesteps it was trained at; 0, upstream's, by default."""
    times, calls = trained_calls({label: engine.decoders[label].config for label in labels})
    captured = CapturedCalls(engine, calls)
    for call, capture in enumerate(invert_at(engine, images, captions, times, seeds)):
        captured.add(call, capture)
    return captured.read


def invert_at(
    engine: Engine,
    images: Tensor,
    captions: Sequence[str],
    timesteps: Sequence[int],
    seeds: Sequence[int],
    *,
    is_raw: bool = False,
    is_sampled: bool = False,
    ddim_steps: int = 0,
) -> Iterator[AnyCapture]:
    """The captures of images [B, H, W, 3] (0..255) at each timestep; image b's noise comes from seeds[b] alone.

    `is_raw` asks for the features and maps themselves, where an engine would give only what its decoders make of them.
    `is_sampled` draws the latents from the autoencoder's posterior instead of taking its mean. `ddim_steps` walks to
    the timestep with the noise that the UNet itself predicts, in that many calls, instead of adding drawn noise.
    """
    generators = [posterior_generator(seed) for seed in seeds] if is_sampled else None
    clean = engine.encode_image(images, generators)
    text = call_text(engine, captions)
    call = engine.denoise_and_capture_raw if is_raw else engine.denoise_and_capture
    noise = ImageNoise(seeds, clean.shape[1:], clean.device).draw().to(clean.dtype)
    for timestep in timesteps:
        if ddim_steps:
            latents = ddim_latents(engine, clean, text, timestep, ddim_steps)
        else:
            latents = add_noise(engine.model.scheduler, clean, noise, timestep)
        yield call(latents, timestep, text)[1]


def posterior_generator(seed: int) -> torch.Generator:
    """The generator of an image's draw from the autoencoder's posterior, whose numbers are not those of its noise.

    torch's generator on the CPU reads the lowest 32 bits of a seed alone, so what is added to it must lie there.
    """
    digest = hashlib.sha256(f"{POSTERIOR} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def ddim_latents(engine: Engine, clean: Tensor, text: Text, timestep: int, steps: int) -> Tensor:
    """Clean latents brought to `timestep` by DDIM backwards (Song et al. 2020, 4.3), of a flow by Euler's method."""
    scheduler = engine.model.scheduler
    latents, time, signal, noisy = clean.clone(), 0, 1.0, 0.0
    for target in np.unique(np.linspace(0, timestep, steps + 1).round().astype(int)[1:] if timestep else [0]).tolist():
        output = engine.denoise(latents, time, text)[-len(latents) :].to(latents)
        if is_flow(scheduler):
            image, noise = latents - noisy * output, latents + signal * output
        elif scheduler.get("prediction_type", "epsilon") == "v_prediction":
            image, noise = signal * latents - noisy * output, signal * output + noisy * latents
        else:
            image, noise = (latents - noisy * output) / signal, output
        time, (signal, noisy) = target, shares_at(scheduler, target)
        latents = signal * image + noisy * noise
    return latents


def capture_timestep(configs: Mapping[str, Any]) -> int:
    """The one timestep that decoders of these configs, by label, were trained at; 0, upstream's, by default."""
    times, calls = trained_calls(configs)
    if len(times) > 1:
        named = {label: " and ".join(str(times[call]) for call in places) for label, places in calls.items()}
        listed = ", ".join(f"{label} {several}" for label, several in named.items())
        raise Refused(f"decoders: trained at different timesteps ({listed})", "Name the one to read with timestep=T.")
    return times[0]
