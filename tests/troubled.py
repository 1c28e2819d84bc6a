"""Ranks with arithmetic instead of networks, and with the trouble their environment asks for; a module of its own, as
each rank imports it by name.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import MappingProxyType

import torchless

from datasetdm_fast.engine.loop import driver

SECONDS = "TROUBLED_SECONDS"  # that a batch takes
TROUBLE = "TROUBLED_BY"  # dies or hangs at every batch from the second on, or dies or raises at the start


def install(environment: Mapping[str, str] = MappingProxyType({})) -> None:
    """Puts the arithmetic and the trouble in their place; `environment` for workers that something else has started."""
    os.environ.update(environment)
    if os.environ.get(TROUBLE) == "start":
        os._exit(9)
    if os.environ.get(TROUBLE) == "raises":
        raise RuntimeError("planted")
    torchless.install()
    undisturbed = driver.generate

    def troubled(batches, engine, recipe, on_unet_call=lambda: None, make=None):
        for batch, results in undisturbed(batches, engine, recipe, on_unet_call, make):
            time.sleep(float(os.environ.get(SECONDS, "0")))
            if any("poison" in request.prompt for request in batch.requests):
                os.kill(os.getpid(), signal.SIGKILL)
            trouble = os.environ.get(TROUBLE)
            if trouble and troubled.count:
                if trouble == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if trouble == "hangs":
                    os.kill(os.getpid(), signal.SIGSTOP)
            troubled.count += 1
            yield batch, results

    troubled.count = 0
    driver.generate = troubled
