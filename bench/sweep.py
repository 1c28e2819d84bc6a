"""How speed and memory go with the batch size, and with how many images the autoencoder takes at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.machine import is_out_of_memory, peak
from bench.measure import interleaved
from bench.parity import Judge, fitted, fitted_pair
from bench.peers import PEERS
from bench.race import OURS, meter, release
from bench.setting import Setting
from bench.work import HALVES
from datasetdm_fast.errors import Missing

BATCHES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (1, 2, 4, 6, 8, 12, 16, 24, 32)}
CHUNKS = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16, 32)}


def batch_rows(setting: Setting, judge: Judge, names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """One UNet call of each peer at each batch size; the sizes of one peer are timed in turn, each size twice in a round's time."""
    rows, sizes = [], BATCHES[setting.device.type][: 3 if setting.quick else None]
    truth, timestep, work = judge.truth, setting.recipe.schedule.timesteps[0], HALVES * setting.stages["call"]
    for name in names:
        try:
            peer = PEERS[name].build(setting, 1)
        except Missing:
            continue

        def call(size: int, peer=peer) -> Callable[[], object]:
            latents, context = fitted(truth.seen[0], size).to(setting.device), fitted_pair(truth.context, size).to(setting.device)
            return lambda: peer.denoise(latents, timestep, context)

        for size, taken, most in swept(setting, sizes, call, seconds / len(names)):
            rate = round(work * size / taken / 1e12, 4)
            rows.append({"peer": name, "dtype": peer.dtype, "batch": size, "call_s": taken / size, "tflops": rate, "peak_mib": most})
        release(setting.device)
    return rows


def chunk_rows(setting: Setting, judge: Judge, seconds: float) -> list[dict[str, Any]]:
    """Decoding of images by our autoencoder, so many at once."""
    engine = PEERS[OURS].build(setting, 1).engine

    def call(size: int) -> Callable[[], object]:
        latents = fitted(judge.truth.latents, size).to(setting.device, engine.dtype).contiguous(memory_format=torch.channels_last)
        return lambda: engine.image_decoder(latents)

    with torch.inference_mode():
        found = swept(setting, CHUNKS[setting.device.type][: 2 if setting.quick else None], call, seconds)
    return [
        {"images": size, "image_s": taken / size, "tflops": round(setting.stages["image"] * size / taken / 1e12, 4), "peak_mib": most}
        for size, taken, most in found
    ]


def swept(setting: Setting, sizes: Sequence[int], make: Callable[[int], Callable[[], object]], seconds: float) -> list[tuple[int, float, float]]:
    """Size, median seconds and peak MiB of a call of each size, up to the first that does not fit into memory."""
    calls, peaks = {}, {}
    for size in sizes:
        call = make(size)
        try:
            call()
            peaks[size] = round(peak(setting.device, call)[1] / 2**20, 1)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        calls[str(size)] = call
    rounds = interleaved(calls, seconds, meter(setting))
    return [(int(size), statistics.median(taken.seconds), peaks[int(size)]) for size, taken in rounds.items()]
