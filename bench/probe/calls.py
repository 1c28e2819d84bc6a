"""Whole calls of the fast engine: a batch, the decoders, the autoencoder, and the kernels that take longest."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.kernels.inputs import BATCH
from bench.machine.measure import wait
from bench.probe.forms import timed_choice
from bench.setting import PROFILE, TASKS, seeded_decoders
from datasetdm_fast.config import CACHED, EXACT, FAST, FAST_CACHED, FAST_STEPS, FP8
from datasetdm_fast.data import Batch, Request, Text
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.device import release
from datasetdm_fast.engine.engines.fast import CHUNK_PIXELS, FastEngine
from datasetdm_fast.engine.engines.fast.joint import JointEngine
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.loop.driver import LabelStream, generate
from datasetdm_fast.engine.loop.recipe import make_recipe

BATCHES = {"cuda": (1, 2, 4, 8, 16, 32), "cpu": (1,)}
LONGEST = 60
TIMESTEP = 500.0
ROUNDS = 5

Rows = Iterator[dict[str, Any]]


def engine_of(model: Model, device: torch.device) -> FastEngine:
    """The fast engine of the model's family; of one that has its modules, `batches` and `longest` are measured."""
    decoders, _ = seeded_decoders(model)
    return cast(FastEngine, build_engine("fast", model, decoders, device=str(device)))


def given(engine: FastEngine, batch: int) -> tuple[Tensor, Text]:
    """Latents and text of a batch."""
    model = engine.model
    latents = torch.randn(batch, *model.latent_shape(), device=engine.device)
    text = engine.encode_text([""]).expand(model.halves * batch)
    return latents, text.map(torch.randn_like)


def milliseconds(call: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    call()
    wait(device)
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        wait(device)
        taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken)


def batches(engine: FastEngine) -> Rows:
    """Milliseconds an image of everything a batch is put through, for several batch sizes."""
    for batch in BATCHES[engine.device.type]:
        yield {"what": f"batch of {batch}, {engine.precision}, an image", "ms": one_batch(engine, batch)}
        release()


def speeds(engine: FastEngine) -> Rows:
    """Milliseconds an image: of a call in every approximate form the engine has, and, of a U-Net, of whole images with
    their labels, but without files, at every speed.
    """
    is_gpu, is_cached = engine.device.type == "cuda", CACHED in engine.speeds
    batch = 1 if not is_gpu else 32 if is_cached else BATCH
    latents, text = given(engine, batch)
    forms: dict[str, Callable[[], object]] = {EXACT: lambda: engine.denoise(latents, TIMESTEP, text)}
    if is_cached:
        _, deep = engine.denoise_and_keep(latents, TIMESTEP, text)
        forms["from deep features"] = lambda: engine.denoise_from(deep, latents, TIMESTEP, text)
    if FP8 in engine.speeds and is_gpu:  # a CPU emulates it
        forms[FP8] = lambda: engine.denoise_in_fp8(latents, TIMESTEP, text)
    found = {name: round(milliseconds(form, engine.device) / batch, 3) for name, form in forms.items()}
    yield {"what": f"a call of {batch}, {engine.precision}, an image", "ms": found}
    release()
    if is_cached:
        fewer = (FAST, FAST_CACHED) if engine.model.defaults.steps > FAST_STEPS else ()
        for speed in (EXACT, CACHED, *fewer):
            found = whole_images(engine, speed, batch)
            yield {"what": f"images and labels at --speed {speed}, batch of {batch}", "ms": found}


def whole_images(engine: FastEngine, speed: str, batch: int) -> dict[str, float]:
    """Milliseconds an image from prompts to labels, of two batches in a row after one that does not count."""
    recipe = make_recipe(engine, TASKS, profile=PROFILE, speed=speed)
    requests = [Request(index, "a photo of a cat on a chair", index) for index in range(3 * batch)]
    batches = [Batch(number, tuple(requests[number * batch :][:batch])) for number in range(3)]
    list(generate(batches[:1], engine, recipe))
    wait(engine.device)
    begin = time.perf_counter()
    made = sum(len(results) for _, results in generate(batches[1:], engine, recipe))
    wait(engine.device)
    return {"an image": round(1e3 * (time.perf_counter() - begin) / made, 3)}


def choices(engine: FastEngine) -> Rows:
    """Milliseconds an image of a call whose convolutions have the engine's algorithms, and those that timing chooses of
    all, which takes a while.
    """
    if isinstance(engine, JointEngine):
        return
    batch, found = BATCH if engine.device.type == "cuda" else 1, {}
    for name, is_timed in {"cuDNN's choice": False, "timed choice": True}.items():
        with timed_choice(is_timed):
            if engine.device.type == "cuda":
                engine._forget()  # a recorded call keeps the algorithms it was recorded with
            _, found[name] = recorded(engine, *given(engine, batch))
    yield {"what": f"convolutions of a batch of {batch}, {engine.precision}, a call and image", "ms": found}


def recorded(engine: FastEngine, latents: Tensor, text: Text) -> tuple[float, float]:
    """Milliseconds of the first call of a shape, and of a later one for each image."""

    def call() -> Tensor:
        return engine.denoise(latents, TIMESTEP, text)

    begin = time.perf_counter()
    call()
    wait(engine.device)
    first = 1e3 * (time.perf_counter() - begin)
    return round(first, 1), round(milliseconds(call, engine.device) / len(latents), 3)


def one_batch(engine: FastEngine, batch: int) -> dict[str, float]:
    device, (latents, text) = engine.device, given(engine, batch)

    def each(call: Callable[[], object]) -> float:
        return round(milliseconds(call, device, 3) / batch, 3)

    found: dict[str, float] = {}
    found["recording, all images"], found["call"] = recorded(engine, latents, text)
    _, capture = engine.denoise_and_capture(latents, 1.0, text)
    found["captured call"] = each(lambda: engine.denoise_and_capture(latents, 1.0, text))
    for task in engine.decoders:
        found[f"decoder {task}"] = each(functools.partial(engine.annotate, task, capture))
    found["autoencoder"] = each(lambda: engine.decode_image(latents))
    return found


def longest_32(engine: FastEngine) -> Rows:
    """The same for the batch that races take."""
    yield from longest(engine, 32)


def longest(engine: FastEngine, batch: int = BATCH) -> Rows:
    """The kernels of a call that take longest, as the profiler of PyTorch sees them."""
    latents, text = given(engine, batch if engine.device.type == "cuda" else 1)
    engine.denoise(latents, TIMESTEP, text)
    is_gpu = engine.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as seen:
        engine.denoise(latents, TIMESTEP, text)
        wait(engine.device)
    found = [
        {
            "what": event.key[:110],
            "count": event.count,
            "ms": {"call": round((event.self_device_time_total if is_gpu else event.self_cpu_time_total) / 1e3, 4)},
        }
        for event in seen.key_averages()
    ]
    yield from sorted(found, key=lambda one: -one["ms"]["call"])[:LONGEST]


def once(engine: FastEngine) -> Rows:
    """One call without a graph, for tools that look at each kernel."""
    if isinstance(engine, JointEngine):
        return
    latents, text = given(engine, BATCH if engine.device.type == "cuda" else 1)
    with torch.inference_mode():
        engine._plain(*engine._inputs(latents, TIMESTEP, text))
    wait(engine.device)
    yield {"what": "one call without a graph", "ms": {}}


def overlap(engine: FastEngine) -> Rows:
    """Images decoded beside the sampler in several parts, against the same decoded alone; the largest difference in
    grey levels, which has to be none.
    """
    if isinstance(engine, JointEngine) or engine.device.type != "cuda":
        return
    latents, text = given(engine, BATCH)
    alone = torch.cat([engine.decode_image(part) for part in latents.split(2)]).cpu()
    worst, chunk = 0, {engine.device.type: 2 * engine.model.size**2}
    with LabelStream(engine.device) as stream, mock.patch.dict(CHUNK_PIXELS, chunk):
        for _ in range(3):
            stream.put("", lambda: engine.decode_image(latents).cpu())
            for _ in range(10):  # the sampler goes on meanwhile
                engine.denoise(latents, TIMESTEP, text)
            stream.settle()
            worst = max(worst, *(int((images.int() - alone.int()).abs().max()) for _, images in stream.ready()))
    row = {"what": "images decoded beside the sampler, grey levels", "ms": {}, "largest_difference": worst}
    yield row | ({"status": "failed", "why": f"differ by {worst} grey levels, expected none"} if worst else {})
