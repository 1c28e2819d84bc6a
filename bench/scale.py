"""What the driver itself costs an image, with an engine that costs nothing, and what a second rank brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.measure import status
from datasetdm_fast import driver, job, label_files, prompts, storage
from datasetdm_fast.config import RunConfig
from datasetdm_fast.data import Sample
from datasetdm_fast.driver import Recipe
from datasetdm_fast.stages import FACTOR
from tests.stub_engine import StubEngine

MARKS = {True: (100, 300), False: (100, 1_000, 10_000)}  # quick or not: images after which time and memory are read
MEASURED = 64  # samples whose encoding and writing is timed alone
IN_MEMORY = "/dev/shm"  # a folder that costs no disk, where there is one
TASKS = ("semantic", "depth")
BATCH = 8
RANKS = (1, 2)
RANK_IMAGES, RANK_STEPS = 8, 8


class TimedStub(StubEngine):
    """The engine of the tests, with the seconds spent in it."""

    def __init__(self) -> None:
        super().__init__(tasks=TASKS)
        self.spent = 0.0
        for name in ("encode_text", "denoise", "denoise_and_capture", "decode_image", "annotate"):
            setattr(self, name, self._timed(getattr(self, name)))

    def _timed(self, method: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            answer = method(*arguments)
            self.spent += time.perf_counter() - begin
            self.log.clear()
            return answer

        return call


def rows(is_quick: bool) -> list[dict[str, Any]]:
    return [*driver_rows(MARKS[is_quick]), *([] if is_quick else rank_rows())]


def driver_rows(marks: tuple[int, ...]) -> list[dict[str, Any]]:
    """One run of the real driver: at each mark, milliseconds an image since the one before, by what they went into, and the memory held."""
    engine = TimedStub()
    recipe = job.make_recipe(engine, TASKS)
    apart = alone(engine, recipe)
    made, found, before = 0, [], (0, time.perf_counter(), 0.0)

    def count(new: int) -> None:
        nonlocal made, before
        made += new
        if len(found) < len(marks) and made >= marks[len(found)]:
            images, now = made - before[0], time.perf_counter()
            whole, inside = ((now - before[1]) / images, (engine.spent - before[2]) / images)
            own = max(whole - inside - sum(apart.values()), 0.0)
            parts = {name: round(1000 * value, 4) for name, value in {"engine": inside, **apart, "own": own, "whole": whole}.items()}
            found.append({"images": made, "resident_mib": round(status("VmRSS") / 2**20, 1), "ms": parts})
            before = (made, now, engine.spent)

    with tempfile.TemporaryDirectory(dir=IN_MEMORY if os.path.isdir(IN_MEMORY) else None) as folder:
        driver.run(stub_job(engine, recipe, Path(folder) / "run", marks[-1]), made=count)
    return found


def stub_job(engine: StubEngine, recipe: Recipe, folder: Path, number: int) -> job.Job:
    config = RunConfig(out=str(folder), number=number, task=TASKS, prompts="a ball", batch_size=BATCH)
    source = prompts.read_source(config)
    plan = prompts.make_plan(source, engine.model.tokenizer, number=number, seed=0, batch_size=config.batch_size)
    document = job.describe(job.identity(config, source), plan, engine, recipe, {})
    return job.Job(config, plan, engine, recipe, document, 0)


def alone(engine: TimedStub, recipe: Recipe) -> dict[str, float]:
    """Seconds an image of post-processing, encoding and writing, each by itself on samples of the same kind."""
    config = RunConfig(prompts="a ball", number=MEASURED)
    plan = prompts.make_plan(prompts.read_source(config), engine.model.tokenizer, number=MEASURED, seed=0, batch_size=BATCH)
    samples = [sample for _, made in driver.generate((plan.batch(k) for k in range(len(plan))), engine, recipe) for sample in made]
    encoded, encoding = clocked(lambda: [label_files.encode(sample, "png")[0] for sample in samples])
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if os.path.isdir(IN_MEMORY) else None) as folder:
        files = [{Path(folder, name): content for made in encoded[k : k + BATCH] for name, content in made.values()} for k in range(0, MEASURED, BATCH)]
        _, writing = clocked(lambda: [storage.publish(batch) for batch in files])
    _, labelling = clocked(lambda: relabel(engine, samples, recipe))
    return {"post-process": labelling / MEASURED, "encode": encoding / MEASURED, "write": writing / MEASURED}


def relabel(engine: TimedStub, samples: list[Sample], recipe: Recipe) -> None:
    """Post-processing of as many images, in batches."""
    import torch

    latents, context = torch.zeros(BATCH, 4, recipe.size // FACTOR, recipe.size // FACTOR), torch.zeros(2 * BATCH, 77, 2)
    _, capture = StubEngine.denoise_and_capture(engine, latents, 0, context)
    for first in range(0, len(samples), BATCH):
        requests = [sample.request for sample in samples[first : first + BATCH]]
        for task in TASKS:
            driver.postprocess(task, requests, StubEngine.annotate(engine, task, capture), engine.decoders[task].config, recipe)


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    answer = call()
    return answer, time.perf_counter() - begin


def rank_rows() -> list[dict[str, Any]]:
    """The demo model with one and with two ranks of one thread each, as the command runs them."""
    if "ranks" not in {field.name for field in fields(RunConfig)}:
        return []
    made = []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--ranks", ranks, "--threads", 1, "--number", RANK_IMAGES * max(RANKS), "--batch-size", 4, "--steps", RANK_STEPS, "--out", f"{folder}/run"]
            command = [sys.executable, "-m", "datasetdm_fast.generate", *map(str, flags), "--quiet", "--json"]
            said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        made.append({"ranks": ranks, "images_per_second": json.loads(said)["images_per_second"], "images": RANK_IMAGES * max(RANKS)})
    return made
