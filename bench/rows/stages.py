"""What every stage of one image costs, as DatasetDM writes it and as we do."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.machine.measure import interleaved
from bench.machine.work import HALVES
from bench.peers import PEERS
from bench.peers.engine import EnginePeer
from bench.peers.upstream import Upstream
from bench.rows.parity import ParityJudge, fitted, fitted_pair
from bench.rows.race import OURS, meter, release, spread, write
from bench.setting import Setting
from datasetdm_fast.agreement.distances import relative
from datasetdm_fast.agreement.gates import EXACT, ROUNDED
from datasetdm_fast.data import Annotation
from datasetdm_fast.generation.driver import postprocess
from datasetdm_fast.labels.label_files import encode


class Stage(NamedTuple):
    """One stage both ways; `naive` is for one image, `ours` for a batch, and `gate` names the limit of what they may
    differ by.
    """

    name: str
    ours: Callable[[], Any]
    naive: Callable[[], Any] | None = None
    gate: str = ""
    flops: int = 0  # of one image


def rows(
    setting: Setting, judge: ParityJudge, limits: dict[str, Any], seconds: float, batch: int
) -> list[dict[str, Any]]:
    """A row for each stage, its two forms compared before they are timed in turn."""
    naive, ours = PEERS["upstream"].build(setting, 1), PEERS[OURS].build(setting, batch)
    with tempfile.TemporaryDirectory() as folder:
        stages = chain(setting, judge, naive, ours, Path(folder))
        made = [timed(stage, setting, limits, seconds / len(stages), ours) for stage in stages]
    release(setting.device)
    return made


def chain(setting: Setting, judge: ParityJudge, naive: Upstream, ours: EnginePeer, folder: Path) -> list[Stage]:
    """The stages in the order of an image's way, each fed with what the oracle had there."""
    engine, recipe, truth, batch = ours.engine, setting.recipe, judge.truth, ours.batch
    prompts = [request.prompt for request in setting.batch(batch)]
    call, captured = 0, recipe.capture_call
    times = recipe.schedule.timesteps
    many = {place: fitted(truth.seen[place], batch).to(setting.device) for place in (call, captured)}
    contexts = {
        1: fitted_pair(truth.context, 1).to(setting.device),
        batch: fitted_pair(truth.context, batch).to(setting.device),
    }
    latents = fitted(truth.latents, batch).to(setting.device)
    _, capture = engine.denoise_and_capture(many[captured], times[captured], contexts[batch])
    naive.denoise_and_capture(many[captured][:1], times[captured], contexts[1])
    samples = ours.make(setting.batch(batch))

    def image() -> Tensor:
        return torch.from_numpy(naive.image_of(latents[:1])).float()

    stages = [
        Stage(
            "text",
            lambda: engine.encode_text(prompts),
            lambda: (naive.encode_text([""]), naive.encode_text(prompts[:1]))[1],
            "text",
            setting.stages["text"],
        ),
        Stage(
            "call",
            lambda: by_half(engine.denoise(many[call], times[call], contexts[batch])),
            lambda: by_half(naive.denoise(many[call][:1], times[call], contexts[1])),
            "call",
            HALVES * setting.stages["call"],
        ),
        Stage(
            "captured call",
            lambda: by_half(engine.denoise_and_capture(many[captured], times[captured], contexts[batch])[0]),
            lambda: by_half(naive.captured(many[captured][:1], times[captured], contexts[1])),
            "call",
            HALVES * setting.stages["call"],
        ),
        *(decoder_stage(task, naive, ours, capture) for task in recipe.tasks),
        Stage("image", lambda: engine.decode_image(latents).float(), image, "image", setting.stages["image"]),
    ]
    raw = {task: engine.annotate(task, capture) for task in recipe.tasks}
    on_host = {task: {name: value[:1].cpu() for name, value in answer.items()} for task, answer in raw.items()}
    return [
        *stages,
        Stage("post-process", lambda: labels(raw, setting, batch), lambda: labels(on_host, setting, 1)),
        Stage("encode", lambda: [encode(sample, "png") for sample in samples]),
        Stage("encode and write", lambda: write(samples, folder)),
    ]


def decoder_stage(task: str, naive: Upstream, ours: EnginePeer, capture: Any) -> Stage:
    """Upstream's decoder from features and maps, which it averages anew for every level; ours from the level sums of
    the captured call.
    """

    def first(answer: dict[str, Tensor]) -> Tensor:
        return next(reversed(answer.values()))

    def slow() -> Tensor:
        with naive.arithmetic():
            return first(naive.decoders[task](naive.capture()))

    return Stage(f"decoder {task}", lambda: first(ours.engine.annotate(task, capture)), slow, "outputs")


def by_half(noise: Tensor) -> Tensor:
    """A CFG batch [2B, ...] as [B, 2, ...]."""
    return noise.unflatten(0, (2, -1)).transpose(0, 1)


def labels(raw: dict[str, dict[str, Tensor]], setting: Setting, batch: int) -> list[list[Annotation]]:
    decoders, requests = setting.reference.decoders, setting.batch(batch)
    return [postprocess(task, requests, answer, decoders[task].config, setting.recipe) for task, answer in raw.items()]


def timed(stage: Stage, setting: Setting, limits: dict[str, Any], seconds: float, ours: EnginePeer) -> dict[str, Any]:
    """The row of a stage in seconds an image."""
    row: dict[str, Any] = {"stage": stage.name, "dtype": ours.dtype, "batch": ours.batch, "status": "ok"}
    with torch.inference_mode():
        if stage.gate:
            row["error"] = error = float(relative(stage.ours()[:1].cpu(), stage.naive().cpu()).max())
            row["limit"] = limit = (EXACT if ours.dtype == "fp32" else ROUNDED)[stage.gate][1]
            if not error <= limit:
                return row | {
                    "status": "failed",
                    "why": f"the two forms differ by {error:.1e}, expected at most {limit:.0e}",
                }
        calls = {"ours": stage.ours, **({"naive": stage.naive} if stage.naive else {})}
        for call in calls.values():
            call()
        rounds = interleaved(calls, seconds, meter(setting))
    row["ours_s"] = spread([value / ours.batch for value in rounds["ours"].seconds])
    if stage.naive:
        row["naive_s"] = spread(rounds["naive"].seconds)
        row["ratio"] = spread([a / (b / ours.batch) for a, b in zip(rounds["naive"].seconds, rounds["ours"].seconds)])
    if stage.flops:
        row["tflops"] = round(stage.flops / statistics.median(rounds["ours"].seconds) * ours.batch / 1e12, 4)
        row["share_of_products"] = round(row["tflops"] / limits["tflops"][ours.dtype], 4)
    return row
