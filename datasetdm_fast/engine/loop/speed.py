"""Approximate ways to sample: fewer calls, calls from the deep features of an earlier one, or products in fp8."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import CACHED, FAST, FAST_SAMPLER, FAST_STEPS, FP8, USUAL_SAMPLER
from datasetdm_fast.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.data import Text
    from datasetdm_fast.engine.engines.engine import Engine

FIRST_WHOLE_CALLS = 3  # in which the composition of an image arises
CACHE_INTERVAL = 3  # calls from one whole call to the next


def fast_sampling(engine: Engine, speed: str, sampler: str, steps: int) -> tuple[str, int]:
    """Sampler and steps of fast25; refused where others were given, or the model needs as few calls anyway."""
    usual = engine.model.defaults.steps
    if sampler != USUAL_SAMPLER or steps:
        raise Refused(f"--speed {speed}: it has a sampler and steps of its own", "Drop --sampler and --steps.")
    if engine.model.backbone.flow is not None or usual <= FAST_STEPS:
        title = engine.model.backbone.title
        raise Refused(f"--speed {speed}: {title} is sampled in {usual} steps as it is", "Drop --speed.")
    return FAST_SAMPLER, FAST_STEPS


def check_call_speed(engine: Engine, speed: str, reads_every_call: bool) -> None:
    """Refuses cache3 and fp8 where the engine or the device lacks them, or labels are read from every call."""
    from datasetdm_fast.engine.engines.device import multiplies_fp8  # which needs torch

    kind = FP8 if speed == FP8 else CACHED
    if kind not in getattr(engine, "speeds", ()):  # which engines of other packages may lack
        lack, model = (
            ("has no fp8 products", "") if kind == FP8 else ("keeps no deep features", " with a model that has a U-Net")
        )
        raise Refused(
            f"--speed {speed}: the engine {engine.name} {lack} of {engine.model.backbone.title}",
            f"Use --engine fast{model}, or drop --speed.",
        )
    if speed == FP8 and not multiplies_fp8(engine.device):
        raise Refused(
            f"--speed {FP8}: the GPU has no fp8 products; Ada, Hopper and Blackwell have them", "Drop --speed."
        )
    if reads_every_call:
        raise Refused(f"--speed {speed}: labels from attention are read from every call", f"Use --speed {FAST}.")


def inner_calls(count: int, captured: Collection[int]) -> frozenset[int]:
    """All calls but the first, the last and those that are captured."""
    return frozenset(range(1, count - 1)).difference(captured)


def cached_calls(count: int, captured: Collection[int]) -> frozenset[int]:
    """Which of `count` calls reuse deep features of the last whole call (DeepCache, arXiv 2312.00858): none of the
    first, no captured one, and none CACHE_INTERVAL calls after a whole one. The last captured call keeps no features.
    """
    cached, last_whole = set(), 0
    for call in range(count):
        if call in captured and call == max(captured):
            continue
        if call in captured or call < FIRST_WHOLE_CALLS or call - last_whole >= CACHE_INTERVAL:
            last_whole = call
        else:
            cached.add(call)
    return frozenset(cached)


class SpeedCalls:
    """The calls of a batch whose output no capture gives, at the speed of its recipe."""

    def __init__(self, engine: Engine, cached: Collection[int], fp8: Collection[int]):
        self.engine: Any = engine  # with the calls of its `speeds` besides those of Engine
        self.cached, self.fp8 = cached, fp8
        self.deep: Tensor | None = None  # features that cached calls start from

    def denoise(self, call: int, latents: Tensor, timestep: float, text: Text) -> Tensor:
        engine, inputs = self.engine, (latents, timestep, text)
        output: Tensor
        if call in self.fp8:
            output = engine.denoise_in_fp8(*inputs)
        elif call in self.cached:
            output = engine.denoise_from(self.deep, *inputs)
        elif self.cached:
            output, self.deep = engine.denoise_and_keep(*inputs)
        else:
            output = engine.denoise(*inputs)
        return output
