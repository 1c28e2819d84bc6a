"""How long a UNet call of a run takes, for its plan."""

import time

from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.loop.calls import call_text

CHEAP = 2.0  # seconds
MANY_CALLS = 40  # of which one more is no matter


def probe(engine: Engine, batch_size: int, calls: int) -> float:
    """Seconds of one UNet call at the batch size of a run of so many calls."""
    import torch

    latents, seconds = torch.zeros(batch_size, *engine.model.latent_shape(), device=engine.device), []
    text = call_text(engine, [""] * batch_size)
    timestep = float(engine.model.scheduler.get("num_train_timesteps", 1000) // 2)
    # The first call may also compile; a second one costs a short run of slow calls too much.
    while len(seconds) < 2 and (sum(seconds) < CHEAP or calls >= MANY_CALLS):
        begin = time.perf_counter()
        engine.denoise(latents, timestep, text).sum().item()  # which waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
