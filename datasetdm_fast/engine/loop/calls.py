"""Calls of the network: the latents they begin with, the rows of text they read, the captures that labels read, and
approximate ones: fewer calls, calls from the deep features of an earlier one, or products in fp8.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import CACHED, FAST, FAST_SAMPLER, FAST_STEPS, FP8, USUAL_SAMPLER
from datasetdm_fast.data import AnyCapture, Capture, ProjectedCapture, Request, Sample, Text, join_texts
from datasetdm_fast.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.engines import Engine
    from datasetdm_fast.engine.sampling.schedule import Schedule


@dataclass(frozen=True)
class Beginning:
    """The latents of a batch before its first call."""

    latents: Tensor  # [B, C, h, w] on the engine's device
    # (call, latents after it) -> latents the next call gets
    after: Callable[[int, Tensor], Tensor] = lambda call, latents: latents
    noise: Callable[[], Tensor] | None = None  # draws what a call adds, where calls of the schedule add some


class Origin:
    """Where the images of a run come from: by itself, from nothing but the noise of their seeds."""

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        """The initial latents of a batch; a request may occur several times."""
        from datasetdm_fast.engine.sampling.schedule import ImageNoise

        noise = ImageNoise([request.seed for request in requests], engine.model.latent_shape(), engine.device)
        return Beginning(noise.draw() * schedule.noise_scale, noise=noise.draw)

    def finish(self, sample: Sample) -> Sample:
        """The sample that is written."""
        return sample


class FromOneGenerator(Origin):
    """Images of one run, from the noise that one generator draws for all of them, seeded with the run's seed: image
    after image, as a run of diffusers draws it; an earlier image starts it anew.
    """

    def __init__(self) -> None:
        self.seed, self.next, self.generator = -1, 0, None

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        import torch

        from datasetdm_fast.kernels.transfer import to_device

        shape = engine.model.latent_shape()
        noise = [self.draw(request.seed - request.index, request.index, shape) for request in requests]
        return Beginning(to_device(torch.stack(noise), engine.device) * schedule.noise_scale)

    def draw(self, seed: int, place: int, shape: tuple[int, int, int]) -> Tensor:  # fp32
        """The noise of the image at `place` of a run with this seed."""
        import torch

        if seed != self.seed or place < self.next:
            self.seed, self.next, self.generator = seed, 0, torch.Generator("cpu").manual_seed(seed)
        for _ in range(place - self.next + 1):
            noise = torch.randn(shape, generator=self.generator)
        self.next = place + 1
        return noise


FROM_NOISE = Origin()


def call_text(
    engine: Engine, prompts: Sequence[str], guidance: float = 0.0, negatives: Callable[[], Text] | None = None
) -> Text:
    """The rows of a call for these prompts: of the negative prompts, by default empty ones, and of the prompts with
    classifier-free guidance, otherwise of the prompts alone. A guidance of 0 is the model's own; a family that guides
    itself then returns both halves.
    """
    model, usual = engine.model, engine.model.defaults.guidance
    if model.has_negative(guidance or usual):
        negative = negatives() if negatives else engine.encode_text([""] * len(prompts))
        text = join_texts([negative, engine.encode_text(list(prompts))])
        return replace(text, guidance=guidance or None) if model.backbone.guides_itself else text
    text = engine.encode_text(list(prompts))
    return replace(text, guidance=guidance or usual) if model.guidance == "embedded" else text


def timesteps_of(reader: Any) -> tuple[int | None, ...]:
    """The timesteps that a decoder's configuration or a labeller names, None for that of the last sampler call."""
    named = reader.capture_timestep
    return named if isinstance(named, tuple) else (named,)


def trained_calls(readers: Mapping[str, Any]) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """The timesteps that decoders or labellers name, by label, from the noisiest on, 0 where they name none, as
    upstream trains them at; and the places of each label's own among them.
    """
    named = {label: [time or 0 for time in timesteps_of(reader)] for label, reader in readers.items()}
    times = tuple(sorted({time for several in named.values() for time in several}, reverse=True))
    return times, {label: tuple(map(times.index, several)) for label, several in named.items()}


class CapturedCalls:
    """The captures of labels while their calls are made: of a label that reads several calls, one sum is held."""

    def __init__(self, engine: Engine, calls: Mapping[str, tuple[int, ...]]):
        self.calls, self.read = calls, dict[str, AnyCapture]()
        several = (label for label, places in calls.items() if len(places) > 1)
        self._shares = {label: engine.decoders[label].call_shares().detach() for label in several}

    def add(self, call: int, capture: AnyCapture) -> None:
        """Reads the capture of a call for all labels that name it."""
        for label, calls in self.calls.items():
            if label not in self._shares:
                self.read |= {label: capture} if calls == (call,) else {}
                continue
            for place, named in enumerate(calls):
                if named == call:
                    self.read[label] = add_share(self.read.get(label), capture.of(label), self._shares[label][place])


def add_share(total: Any, capture: AnyCapture, shares: Tensor) -> AnyCapture:
    """The total, None for nothing yet, with so large a share [levels] of each level of a capture added."""

    def add(sums: Any, value: Tensor, share: Tensor) -> Tensor:
        part = value.float() * share.to(value.device)
        return part if sums is None else sums.add_(part)

    if isinstance(capture, ProjectedCapture):
        sums = total.sums if total else [None] * len(shares)
        return ProjectedCapture(tuple(map(add, sums, capture.sums, shares)), capture.slices)
    parts = []
    for name in ("features", "maps"):
        levels = getattr(capture, name)
        sums = getattr(total, name) if total else [[None] * len(level) for level in levels]
        parts.append(
            tuple(
                tuple(add(part, value, share) for part, value in zip(held, level, strict=True))
                for held, level, share in zip(sums, levels, shares, strict=True)
            )
        )
    return Capture(*parts)


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
            ("has no fp8 products", " with an MM-DiT")
            if kind == FP8
            else ("keeps no deep features", " with a model that has a U-Net")
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


@dataclass
class SpeedCalls:
    """The calls of a batch whose output no capture gives, at the speed of its recipe."""

    engine: Any  # an Engine with the calls of its `speeds`
    cached: Collection[int]
    fp8: Collection[int]
    deep: Tensor | None = None  # features that cached calls start from

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
