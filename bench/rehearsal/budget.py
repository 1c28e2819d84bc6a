"""The ratchet: what calls of SD 1.4, SDXL and two MM-DiTs cost a GPU, reckoned, and bench/gpu_budget.json, above which
none may rise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from bench.rehearsal.kernels import storages
from bench.rehearsal.machine import TASKS as USUAL_LABELS
from bench.rehearsal.machine import decoders_of, open_engine
from bench.rehearsal.roofline import STATED, Reckoning, reckon
from bench.rehearsal.run import stage
from bench.rehearsal.timeline import Timeline
from bench.report.results import BUDGET
from datasetdm_fast.data import Text
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.engine.engines.fast.joint import JointEngine
from datasetdm_fast.engine.loading import PRESETS
from datasetdm_fast.engine.sampling import schedule as walk
from datasetdm_fast.engine.sampling.schedule import SamplerState
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.runs.run_settings import RunConfig

MODEL, BATCHES, USUAL = "random-sd14", (1, 8, 32), 8
LARGER, LARGER_BATCHES = "random-sdxl", (1, 8)
JOINT = {"SD 3.5 medium": "random-sd35", "FLUX.2 klein": "random-klein"}
COPIED = ("UNet call", "label decoders and autoencoder")
AROUND = "around the"  # begins the names of what is launched beside the graphs of calls: copies, steps, post-processing
SLACK = 1.0005  # of rounding
FIGURES = ("launches", "gigabytes", "tflop", "milliseconds")


class Reckoned(NamedTuple):
    """What the file holds."""

    calls: dict[str, Reckoning]  # by their names
    kernels: dict[str, list[str]]  # operation of ours that they launch -> storage types of its activations


def reckoned() -> Reckoned:
    timeline = Timeline()
    with stage(timeline):
        engine = open_engine(MODEL, "auto", "cuda")
        calls = {
            f"UNet call, {batch} image{'s' * (batch > 1)}": unet_call(engine, batch, "_plain") for batch in BATCHES
        }
        calls |= {f"captured call, {USUAL} images": unet_call(engine, USUAL, "_capture_projected")}
        _, capture = _captured(engine)  # records the graph
        found = {name: reckon(launched(timeline, call)) for name, call in calls.items()}
        latents, text = _latents(engine, USUAL), _text(engine, USUAL)
        state = sampler_state(engine, latents)

        def sample() -> None:
            state.step(len(state.schedule) - 1, engine.denoise(latents, 1.0, text))

        def label() -> None:
            for task, decoder in engine.decoders.items():
                TASKS[task].postprocess(engine.annotate(task, capture), decoder.config, engine.model.size)
            engine.decode_and_check(latents)

        for name, call in zip(COPIED, (sample, label), strict=True):
            launched(timeline, call)  # records its graphs, so that what is launched afterwards lies around them
            found[f"{AROUND} {name}, {USUAL} images"] = reckon(launched(timeline, call))
        found[f"label decoders, {USUAL} images"] = reckon(recorded(engine, engine.decoders))
        found[f"autoencoder, {USUAL} images"] = reckon(recorded(engine, ["image"]))
        larger = open_engine(LARGER, "auto", "cuda")
        calls = {
            f"SDXL UNet call, {batch} image{'s' * (batch > 1)}": unet_call(larger, batch, "_plain")
            for batch in LARGER_BATCHES
        }
        calls["SDXL captured call, 1 image"] = unet_call(larger, 1, "_capture_projected")
        for title, name in JOINT.items():
            calls |= joint_calls(title, name)
        found |= {name: reckon(launched(timeline, call)) for name, call in calls.items()}
        return Reckoned(found, storages(timeline.kernels.values()))


def joint_calls(title: str, name: str) -> dict[str, Callable[[], Any]]:
    """Calls of an MM-DiT for one image, in bf16."""
    model = PRESETS[name](0)
    engine = JointEngine(model, decoders_of(model, USUAL_LABELS), device="cuda")
    rows, pooled = model.halves, engine.network.config.get("pooled_projection_dim", 1)
    context = torch.empty(rows, model.levels[0].tokens, model.text_width, device="cuda")
    latents = torch.empty(1, *model.latent_shape(), device="cuda")
    text = Text(context, torch.empty(rows, pooled, device="cuda"))
    return {
        f"{title} call, 1 image": lambda: engine.denoise(latents, 500.0, text),
        f"{title} captured call, 1 image": lambda: engine.denoise_and_capture(latents, 500.0, text),
    }


def sampler_state(engine: FastEngine, latents: torch.Tensor) -> SamplerState:
    """The default sampler before its first call."""
    usual = engine.model.defaults
    schedule = walk.make_schedule(engine.model.scheduler, RunConfig.sampler, usual.steps)
    return SamplerState(schedule, usual.guidance, latents)


def launched(timeline: Timeline, call: Callable[[], Any]) -> list:
    begin = len(timeline.launches)
    with torch.inference_mode():
        call()
    return timeline.launches[begin:]


def recorded(engine: FastEngine, names: Iterable[str]) -> list:
    """What the graphs of these decoders, or of the image decoder, hold; the copies around a replay are left out."""
    graphs = [graph for (name, *_), graph in engine._label_calls.graphs.items() if name in set(names)]
    return [launch for graph in graphs for launch in graph.graph.launches]


def unet_call(engine: FastEngine, batch: int, step: str) -> Callable[[], Any]:
    """What the graph of one call holds; the tables of timestep and texts are made once, before."""
    engine.prepare(batch)
    with torch.inference_mode():
        inputs = engine._inputs(_latents(engine, batch), 1.0, _text(engine, batch))
    return lambda: getattr(engine, step)(*inputs)


def _captured(engine: FastEngine):
    with torch.inference_mode():
        return engine.denoise_and_capture(_latents(engine, USUAL), 1.0, _text(engine, USUAL))


def _latents(engine: FastEngine, batch: int) -> torch.Tensor:
    return torch.empty(batch, *engine.model.latent_shape(), device=engine.device)


def _text(engine: FastEngine, batch: int) -> Text:
    model, rows = engine.model, engine.model.halves * batch
    second = model.configs.get("text_encoder_2")
    pooled = None if second is None else torch.empty(rows, second.projection_dim, device=engine.device)
    return Text(torch.empty(rows, model.levels[0].tokens, model.text_width, device=engine.device), pooled)


def stored() -> Reckoned:
    document = json.loads(BUDGET.read_text(encoding="utf-8"))
    calls = {name: Reckoning(**figures) for name, figures in document["calls"].items()}
    return Reckoned(calls, document["kernels"])


def store(found: Reckoned) -> None:
    calls = {name: asdict(one) for name, one in found.calls.items()}
    document = {"model": MODEL, "roofline": STATED, "calls": calls, "kernels": found.kernels}
    BUDGET.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def risen(found: Reckoned, budget: Reckoned) -> list[str]:
    """A line for every figure above the budget, and for every call or kernel that only one of both has."""
    calls, limits = found.calls, budget.calls
    kernels, others = (
        {f"{op} of {one}" for op, types in side.kernels.items() for one in types} for side in (found, budget)
    )
    lines = [
        f"{name}: only in one of the file and the reckoning"
        for name in (calls.keys() ^ limits.keys()) | (kernels ^ others)
    ]
    for name in calls.keys() & limits.keys():
        for figure in FIGURES:
            now, most = getattr(calls[name], figure), getattr(limits[name], figure)
            if now > most * SLACK:
                lines.append(f"{name}: {now:g} {figure}, the budget is {most:g}")
    return sorted(lines)
