"""How speed and memory go with the batch size, and with how many images the autoencoder takes at once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.machine.machine import is_out_of_memory, peak
from bench.machine.measure import interleaved
from bench.machine.work import HALVES
from bench.peers import PEERS
from bench.rows.parity import ParityJudge, fitted
from bench.rows.race import OURS, best_batch, meter, release
from bench.setting import Setting

SWEPT = ("diffusers", OURS)
CHUNKS = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16, 32)}


def batch_rows(setting: Setting, judge: ParityJudge, raced: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One UNet call by batch size: what the peers that raced were tried at, else diffusers and ours alone."""
    found = [(row, row["tried"]) for row in raced if row["status"] == "ok" and "tried" in row] or list(
        tried_alone(setting, judge)
    )
    work = HALVES * setting.stages["call"]
    return [
        {"peer": row["peer"], "dtype": row["dtype"], **one, "tflops": round(work / one["call_s"] / 1e12, 4)}
        for row, tried in found
        for one in tried
    ]


def tried_alone(setting: Setting, judge: ParityJudge) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for name in SWEPT:
        peer = PEERS[name].build(setting, 1)
        yield {"peer": name, "dtype": peer.dtype}, best_batch(peer, setting, judge)[1]
        release(setting.device)


def chunk_rows(setting: Setting, judge: ParityJudge, seconds: float) -> list[dict[str, Any]]:
    """Decoding of images by our autoencoder, so many at once."""
    engine = PEERS[OURS].build(setting, 1).engine

    def call(size: int) -> Callable[[], object]:
        latents = (
            fitted(judge.truth.latents, size)
            .to(setting.device, engine.dtype)
            .contiguous(memory_format=torch.channels_last)
        )
        return lambda: engine.image_decoder(latents)

    with torch.inference_mode():
        found = swept(setting, CHUNKS[setting.device.type][: 2 if setting.quick else None], call, seconds)
    return [
        {
            "images": size,
            "image_s": taken / size,
            "tflops": round(setting.stages["image"] * size / taken / 1e12, 4),
            "peak_mib": most,
        }
        for size, taken, most in found
    ]


def swept(
    setting: Setting, sizes: Sequence[int], make: Callable[[int], Callable[[], object]], seconds: float
) -> list[tuple[int, float, float]]:
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
