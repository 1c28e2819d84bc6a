"""How speed and memory of image decoding change with the batch size."""

import statistics

import torch

from bench.machine.measure import held, interleaved, meter, mib, peak
from bench.peers import OURS, PEERS
from bench.report.tables import Table, figure, memory, text
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.rows.parity import fitted
from datasetdm_fast.engine.engines.device import is_out_of_memory

SIZES = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16, 32)}


def rows(run: BenchRun) -> Rows:
    """Decoding of images by our autoencoder, by batch size, up to the first size that does not fit into memory."""
    setting, device = run.setting, run.setting.device
    engine, calls, peaks = PEERS[OURS].build(setting, 1).engine, {}, {}
    others = held(device)
    with torch.inference_mode():
        for size in SIZES[device.type][: 2 if setting.quick else None]:
            latents = fitted(run.judge.truth.latents, size).to(device, engine.dtype)
            latents = latents.contiguous(memory_format=torch.channels_last)

            def call(latents=latents) -> None:
                engine.image_decoder(latents)

            try:
                call()
                peaks[size] = mib(peak(device, call, others)[1])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break
            calls[size] = call
        rounds = interleaved(calls, run.seconds / 12, meter(device))
    each = {size: statistics.median(taken.seconds) / size for size, taken in rounds.items()}
    work = setting.stages["image"] / 1e12
    return [
        {"images": size, "image_s": taken, "tflops": round(work / taken, 4), "peak_mib": peaks[size]}
        for size, taken in each.items()
    ]


COLUMNS = {"batch": text("images"), "ms/image": figure("image_s", 1e3), "TFLOP/s": figure("tflops"), "memory": memory()}
MEASUREMENT = Measurement("chunks", "Image decoding by batch size", rows, (Table(COLUMNS),), least_seconds=30)
