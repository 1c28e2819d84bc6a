"""What every stage of one image costs, as DatasetDM writes it and as we do."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.machine.limits import peak_tflops
from bench.machine.measure import interleaved, meter, spread
from bench.machine.work import HALVES
from bench.peers import OURS, PEERS
from bench.peers.engine import EnginePeer
from bench.peers.samples import decoder_labels
from bench.peers.upstream import Upstream
from bench.report.tables import Row, Table, figure, share, spread_of, text
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.rows.parity import fitted
from bench.rows.race import write
from bench.setting import Setting
from datasetdm_fast.data import Annotation
from datasetdm_fast.engine.engines.device import release
from datasetdm_fast.engine.labels.label_files import encode
from datasetdm_fast.engine.loop.recipe import label_tables
from datasetdm_fast.runs.agreement.observe import by_image, relative
from datasetdm_fast.runs.agreement.verify import EXACT, ROUNDED

NAIVE_DTYPE = "fp32"  # as DatasetDM is written


class Stage(NamedTuple):
    """One stage both ways; `naive` is for one image, `ours` for a batch, and `gate` names the limit of what they may
    differ by.
    """

    name: str
    ours: Callable[[], Any]
    naive: Callable[[], Any] | None = None
    gate: str = ""
    flops: int = 0  # of one image


def rows(run: BenchRun) -> Rows:
    """A row for each stage, its two forms compared before they are timed in turn."""
    naive, ours = Upstream(run.setting, NAIVE_DTYPE), PEERS[OURS].build(run.setting, run.batch)
    with tempfile.TemporaryDirectory() as folder:
        stages = stages_of(run, naive, ours, Path(folder))
        found = [timed(stage, run, run.seconds / 6 / len(stages), ours) for stage in stages]
    release()
    return found


def stages_of(run: BenchRun, naive: Upstream, ours: EnginePeer, folder: Path) -> list[Stage]:
    """The stages in the order of the computation, each given the reference's inputs."""
    setting, engine, recipe, batch = run.setting, ours.engine, run.setting.recipe, ours.batch
    requests, work = setting.batch(batch), setting.stages
    prompts = [request.prompt for request in requests]
    first, one_first = run.judge.inputs(0, batch), run.judge.inputs(0, 1)
    captured, one_captured = run.judge.inputs(recipe.captured[-1], batch), run.judge.inputs(recipe.captured[-1], 1)
    latents = fitted(run.judge.truth.latents, batch).to(setting.device)
    _, capture = engine.denoise_and_capture(*captured)
    naive.denoise_and_capture(*one_captured)
    samples, tables = ours.make(requests), label_tables(setting.reference, recipe)
    images = [sample.image for sample in samples]
    raw = {task: engine.annotate(task, capture) for task in recipe.tasks}
    on_host = {task: {name: value[:1].cpu() for name, value in answer.items()} for task, answer in raw.items()}

    def text_of_both() -> Tensor:
        naive.encode_text([""])
        return naive.encode_text(prompts[:1]).context

    return [
        Stage("text", lambda: engine.encode_text(prompts).context, text_of_both, "text", work["text"]),
        Stage(
            "call",
            lambda: by_image(engine.denoise(*first), batch),
            lambda: by_image(naive.denoise(*one_first), 1),
            "call",
            HALVES * work["call"],
        ),
        Stage(
            "captured call",
            lambda: by_image(engine.denoise_and_capture(*captured)[0], batch),
            lambda: by_image(naive.captured(*one_captured), 1),
            "call",
            HALVES * work["call"],
        ),
        *(decoder_stage(task, naive, ours, capture) for task in recipe.tasks),
        Stage(
            "image",
            lambda: engine.decode_image(latents).cpu(),
            lambda: torch.from_numpy(naive.image_of(latents[:1])),
            "image",
            work["image"],
        ),
        Stage("post-process", lambda: labels(raw, images, setting), lambda: labels(on_host, images[:1], setting)),
        Stage("encode", lambda: [encode(sample, "png", tables) for sample in samples]),
        Stage("encode and write", lambda: write(samples, tables, folder)),
    ]


def decoder_stage(task: str, naive: Upstream, ours: EnginePeer, capture: Any) -> Stage:
    """Upstream's decoder from features and maps, which it averages anew for every level; ours from the level sums of
    the captured call.
    """

    def last(answer: dict[str, Tensor]) -> Tensor:
        return [value for name, value in answer.items() if name != "token_attention"][-1]

    def slow() -> Tensor:
        with naive.arithmetic():
            return last(naive.decoders[task](naive.capture()))

    return Stage(f"decoder {task}", lambda: last(ours.engine.annotate(task, capture)), slow, "outputs")


def labels(raw: dict[str, dict[str, Tensor]], images: Sequence[np.ndarray], setting: Setting) -> list[list[Annotation]]:
    decoders, requests = setting.reference.decoders, setting.batch(len(images))
    given = setting.recipe, setting.model.tokenizer
    return [decoder_labels(requests, answer, images, decoders[task].config, *given) for task, answer in raw.items()]


def timed(stage: Stage, run: BenchRun, seconds: float, ours: EnginePeer) -> dict[str, Any]:
    """The row of a stage in seconds an image."""
    row: dict[str, Any] = {"stage": stage.name, "dtype": ours.dtype, "batch": ours.batch, "status": "ok"}
    calls = {"ours": stage.ours} | ({"naive": stage.naive} if stage.naive else {})
    with torch.inference_mode():
        if stage.gate:
            row["error"] = error = float(relative(stage.ours()[:1].cpu(), stage.naive().cpu()).max())
            row["limit"] = limit = (EXACT if ours.dtype == "fp32" else ROUNDED)[stage.gate][1]
            if not error <= limit:
                why = f"the two forms differ by {error:.1e}, expected at most {limit:.0e}"
                return row | {"status": "failed", "why": why}
        for call in calls.values():
            call()
        rounds = interleaved(calls, seconds, meter(run.setting.device))
    each = [value / ours.batch for value in rounds["ours"].seconds]
    row["ours_s"] = spread(each)
    if stage.naive:
        row |= {"naive_s": spread(rounds["naive"].seconds), "naive_dtype": NAIVE_DTYPE}
        row["ratio"] = spread([a / b for a, b in zip(rounds["naive"].seconds, each)])
    if stage.flops:
        row["tflops"] = round(stage.flops / statistics.median(each) / 1e12, 4)
        row["share_of_products"] = round(row["tflops"] / peak_tflops(run.limits, ours.dtype), 4)
    return row


def precision(row: Row) -> str:
    """Of both forms; where they differ, a speed-up is that of the precision, too."""
    ours = row.get("dtype", "")
    naive = row.get("naive_dtype", ours)
    return ours if naive == ours else f"{naive}, ours {ours}"


COLUMNS = {"stage": text("stage"), "precision": precision, "DatasetDM as written, ms/image": spread_of("naive_s", 1e3)}
COLUMNS |= {"ours, ms/image": spread_of("ours_s", 1e3), "speed-up": spread_of("ratio", unit="×")}
COLUMNS |= {"TFLOP/s": figure("tflops"), "share of peak": share("share_of_products")}
MEASUREMENT = Measurement("stages", "Stage by stage", rows, (Table(COLUMNS),), least_seconds=60)
