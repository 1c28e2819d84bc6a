"""What the driver itself costs an image, with an engine that costs nothing, how fast samples are written, and what a
second rank brings.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine.machine import ROOT
from bench.machine.measure import status
from bench.rows.race import mib
from datasetdm_fast.config import RunConfig
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Request, Sample, SemanticMap
from datasetdm_fast.disk import storage
from datasetdm_fast.generation import driver, job, prompts, run, settings
from datasetdm_fast.generation.overlap import BackgroundWriter
from datasetdm_fast.generation.plan import make_plan
from datasetdm_fast.generation.recipe import Recipe, make_recipe
from datasetdm_fast.labels import label_files
from datasetdm_fast.run_folder.folder import RunFolder
from datasetdm_fast.scenes import world
from datasetdm_fast.stages import FACTOR
from tests.stub_engine import StubEngine

MARKS = {True: (100, 300), False: (100, 1_000, 10_000)}  # quick or not: images after which time and memory are read
MEASURED = 64  # samples whose encoding and writing is timed alone
IN_MEMORY = "/dev/shm"  # a folder that costs no disk, where there is one
TASKS = ("semantic", "depth")
BATCH = 8
SCENES = {True: (128,), False: (128, 512)}  # pixels of the rendered scenes that are written
SCENE_TASKS = ("semantic", "instance", "depth", "pose")
SCENE_COUNT, SCENE_SECONDS = 32, 1.0
RANKS = (1, 2)
RANK_IMAGES, RANK_BATCH, RANK_STEPS = 16, 4, 8


class TimedStub(StubEngine):
    """The engine of the tests, with the core seconds spent in it."""

    def __init__(self) -> None:
        super().__init__(tasks=TASKS)
        self.spent = 0.0
        for name in ("encode_text", "denoise", "denoise_and_capture", "decode_image", "annotate"):
            setattr(self, name, self._timed(getattr(self, name)))

    def _timed(self, method: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            begin = time.thread_time()
            answer = method(*arguments)
            self.spent += time.thread_time() - begin
            self.log.clear()
            return answer

        return call


def rows(is_quick: bool) -> list[dict[str, Any]]:
    found = [
        *driver_rows(MARKS[is_quick]),
        *(scene_row(size) for size in SCENES[is_quick]),
        disk_row(20 if is_quick else 200),
    ]
    return found if is_quick else [*found, *rank_rows()]


def driver_rows(marks: tuple[int, ...]) -> list[dict[str, Any]]:
    """One run of the real driver: at each mark, core milliseconds an image since the one before, by what they went
    into, and the memory held.

    Files and rows are written in threads, so an image takes less time than the cores work for it; `wall` is that time.
    The last row also says what the index files and the gallery, which are made at the end, cost an image.
    """
    engine = TimedStub()
    recipe = make_recipe(engine, TASKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what the engine spends must be in the thread that is asked for it
    try:
        apart = alone(engine, recipe)
        with scratch() as folder:
            return marked_run(engine, recipe, folder / "run", marks, apart)
    finally:
        torch.set_num_threads(threads)


def marked_run(
    engine: TimedStub, recipe: Recipe, folder: Path, marks: tuple[int, ...], apart: dict[str, float]
) -> list[dict[str, Any]]:
    made, found, before = 0, [], (0, time.perf_counter(), time.process_time(), engine.spent)

    def count(new: int) -> None:
        nonlocal made, before
        made += new
        if len(found) < len(marks) and made >= marks[len(found)]:
            now = (made, time.perf_counter(), time.process_time(), engine.spent)
            wall, whole, inside = ((b - a) / (made - before[0]) for a, b in zip(before[1:], now[1:]))
            spent = {
                "engine": inside,
                **apart,
                "own": max(whole - inside - sum(apart.values()), 0.0),
                "whole": whole,
                "wall": wall,
            }
            parts = {name: round(1000 * value, 4) for name, value in spent.items()}
            found.append({"images": made, "pixels": recipe.size, "resident_mib": mib(status("VmRSS")), "ms": parts})
            before = now

    run.run(stub_job(engine, recipe, folder, marks[-1]), on_commit=count)
    closing = 1000 * (time.process_time() - before[2]) / marks[-1]
    return [*found[:-1], found[-1] | {"closing_ms": round(closing, 4)}]


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if os.path.isdir(IN_MEMORY) else None) as folder:
        yield Path(folder)


def stub_job(engine: StubEngine, recipe: Recipe, folder: Path, number: int) -> job.Job:
    config = RunConfig(out=str(folder), number=number, task=recipe.tasks, prompts="a ball", batch_size=BATCH)
    source = prompts.read_source(config)
    plan = make_plan(source, engine.model.tokenizer, number=number, seed=0, batch_size=config.batch_size)
    document = job.describe(settings.identity(config, source), plan, engine, recipe, {})
    return job.Job(config, plan, engine, recipe, document, 0)


def alone(engine: TimedStub, recipe: Recipe) -> dict[str, float]:
    """Seconds an image of post-processing, encoding and writing, each by itself on samples of the same kind."""
    config = RunConfig(prompts="a ball", number=MEASURED)
    plan = make_plan(prompts.read_source(config), engine.model.tokenizer, number=MEASURED, seed=0, batch_size=BATCH)
    samples = [
        sample
        for _, made in driver.generate((plan.batch(k) for k in range(len(plan))), engine, recipe)
        for sample in made
    ]
    encoded, encoding = clocked(lambda: [label_files.encode(sample, "png")[0] for sample in samples])
    with scratch() as folder:
        files = [
            {folder / name: content for made in encoded[k : k + BATCH] for name, content in made.values()}
            for k in range(0, MEASURED, BATCH)
        ]
        _, writing = clocked(lambda: [storage.publish(batch) for batch in files])
    _, labelling = clocked(lambda: relabel(engine, samples, recipe))
    return {"post-process": labelling / MEASURED, "encode": encoding / MEASURED, "write": writing / MEASURED}


def relabel(engine: TimedStub, samples: list[Sample], recipe: Recipe) -> None:
    """Post-processing of as many images, in batches."""
    latents, context = (
        torch.zeros(BATCH, 4, recipe.size // FACTOR, recipe.size // FACTOR),
        torch.zeros(2 * BATCH, 77, 2),
    )
    _, capture = StubEngine.denoise_and_capture(engine, latents, 0, context)
    for first in range(0, len(samples), BATCH):
        requests = [sample.request for sample in samples[first : first + BATCH]]
        for task in TASKS:
            driver.postprocess(
                task, requests, StubEngine.annotate(engine, task, capture), engine.decoders[task].config, recipe
            )


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    """The answer of `call`, and the seconds that cores worked for it."""
    begin = time.process_time()
    answer = call()
    return answer, time.process_time() - begin


def scene_row(size: int) -> dict[str, Any]:
    """Images a second that the threads of a run encode and write with four kinds of labels, rendered scenes in place of
    generated ones.
    """
    engine = StubEngine(size=size, tasks=SCENE_TASKS)
    recipe = make_recipe(engine, SCENE_TASKS)
    samples = [scene(index, size) for index in range(SCENE_COUNT)]
    with scratch() as place:
        task = stub_job(engine, recipe, place / "run", SCENE_COUNT)
        with RunFolder(task.folder, task.document) as folder:
            begin, worked, count = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() < begin + SCENE_SECONDS:
                with BackgroundWriter(folder, lambda _: None) as writing:
                    for first in range(0, SCENE_COUNT, BATCH):
                        writing.put(samples[first : first + BATCH], recipe.facts)
                count += SCENE_COUNT
            seconds, cores = time.perf_counter() - begin, time.process_time() - worked
    return {
        "pixels": size,
        "written": count,
        "images_per_second": round(count / seconds, 1),
        "core_ms": round(1e3 * cores / count, 3),
    }


def disk_row(count: int) -> dict[str, Any]:
    """Milliseconds of a commit of one batch, and of making one sample's files durable, on the disk of temporary
    files.
    """
    engine = StubEngine(size=SCENES[True][0], tasks=SCENE_TASKS)
    recipe = make_recipe(engine, SCENE_TASKS)
    samples = [scene(index, recipe.size) for index in range(BATCH)]
    with tempfile.TemporaryDirectory() as place:
        task = stub_job(engine, recipe, Path(place, "run"), BATCH)
        with RunFolder(task.folder, task.document) as folder:
            folder.unseal()
            files = [
                {task.folder / name: content for name, content in label_files.encode(sample, "png")[0].values()}
                for sample in samples
            ]
            together = {path: content for made in files for path, content in made.items()}
            written = folder.write(samples, recipe.facts)
            commits, publishes = (
                clock(call, count)
                for call in (lambda: folder.ledger.commit(written), lambda: storage.publish(together))
            )
    return {
        "commit_ms": round(1e3 * commits, 3),
        "rows": BATCH,
        "publish_ms": round(1e3 * publishes / BATCH, 3),
        "files": len(together) // BATCH,
    }


def clock(call: Callable[[], object], count: int) -> float:
    """Median seconds."""
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def scene(index: int, size: int) -> Sample:
    """A rendered scene with its true labels."""
    view = world.view(index, size)
    present = [k for k in range(1, len(view.scene.things) + 1) if (view.instance == k).any()]
    kinds = np.array([world.THINGS.index(view.scene.things[k - 1].kind) for k in present], np.int64)
    people = np.stack([*view.keypoints.values(), np.zeros((len(world.JOINTS), 3))]).astype(np.float32)[
        : len(view.keypoints)
    ]
    sure = np.random.default_rng(index).random(view.semantic.shape, np.float32)
    labels = {
        "semantic": SemanticMap(view.semantic, 1 - sure**4, world.CLASSES),
        "instance": Instances(
            view.instance == np.array(present)[:, None, None], kinds, np.ones(len(present), np.float32), world.THINGS
        ),
        "depth": DepthMap(view.depth, world.MAX_DEPTH),
        "pose": Keypoints(
            people, people[..., 2].astype(np.int64), np.ones(len(people), np.float32), world.JOINTS, world.LIMBS
        ),
    }
    return Sample(Request(index, view.caption, index), view.image, labels)


def rank_rows() -> list[dict[str, Any]]:
    """The demo model with one and with two ranks of one thread each, as the command runs them."""
    return [{"ranks": ranks, "images": RANK_IMAGES, "images_per_second": round(pace(ranks), 4)} for ranks in RANKS]


def pace(ranks: int) -> float:
    """Images a second from the first files to the last, so that loading is left out, and with it the first batch of
    each rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        sizes = [
            "--ranks",
            ranks,
            "--threads",
            1,
            "--number",
            RANK_IMAGES,
            "--batch-size",
            RANK_BATCH,
            "--steps",
            RANK_STEPS,
        ]
        command = [
            sys.executable,
            "-m",
            "datasetdm_fast.generate",
            *map(str, sizes),
            "--out",
            f"{folder}/run",
            "--quiet",
        ]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        written = [path.stat().st_mtime_ns / 1e9 for path in Path(folder, "run", "images").iterdir()]
    return (len(written) - ranks * RANK_BATCH) / (max(written) - min(written))
