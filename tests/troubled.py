"""Ranks with arithmetic instead of networks, and with the trouble their environment asks for; a module of its own, as
each rank imports it by name.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torchless

from datasetdm_fast.engine.loop import driver
from datasetdm_fast.runs.workers import launched, spawn

SECONDS = "TROUBLED_SECONDS"  # that a batch takes
# dies or hangs at every batch from the second on, or waits there until it is to stop or the sign is there; or dies or
# raises at the start
TROUBLE = "TROUBLED_BY"
SIGN = "TROUBLED_SIGN"  # a file that is made right before a process dies or hangs; those without trouble start then


def install(environment: Mapping[str, str] = MappingProxyType({})) -> None:
    """Puts the arithmetic and the trouble in their place; `environment` for workers that something else has started."""
    os.environ.update(environment)
    trouble = os.environ.get(TROUBLE)
    if trouble == "start":
        sign()
        os._exit(9)
    if trouble == "raises":
        raise RuntimeError("planted")
    while SIGN in os.environ and not trouble and not is_signed():
        time.sleep(0.01)
    torchless.install()
    undisturbed, stopping = driver.generate, []
    for module in (spawn, launched):
        module.work_on_folder = partial(remember_stop, module.work_on_folder, stopping)

    def troubled(batches, engine, recipe, on_unet_call=lambda: None, make=None):
        for batch, results in undisturbed(batches, engine, recipe, on_unet_call, make):
            time.sleep(float(os.environ.get(SECONDS, "0")))
            if any("poison" in request.prompt for request in batch.requests):
                os.kill(os.getpid(), signal.SIGKILL)
            if trouble and troubled.count:
                while trouble == "waits" and not (is_signed() or any(is_stopping() for is_stopping in stopping)):
                    time.sleep(0.01)
                if trouble in ("dies", "hangs"):
                    sign()
                    os.kill(os.getpid(), signal.SIGKILL if trouble == "dies" else signal.SIGSTOP)
            troubled.count += 1
            yield batch, results

    troubled.count = 0
    driver.generate = troubled


def sign() -> None:
    if SIGN in os.environ:
        Path(os.environ[SIGN]).touch()


def is_signed() -> bool:
    return SIGN in os.environ and Path(os.environ[SIGN]).exists()


def remember_stop(work_on_folder, stopping, spec, callbacks, *arguments, **options):
    """Does the work of a process, and remembers what tells it to stop."""
    stopping.append(callbacks.is_stopping)
    return work_on_folder(spec, callbacks, *arguments, **options)
