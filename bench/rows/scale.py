"""What the generation loop itself costs an image, with an engine that costs nothing, how fast samples are written and
a run is closed, and what a second rank adds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine.machine import ROOT
from bench.machine.measure import interleaved, mib, status
from bench.report.tables import Cell, Row, Table, count, figure, memory, number, text
from bench.rows.measurement import BenchRun, Measurement, Rows
from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Request, Sample, SemanticMap, Text
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import label_files
from datasetdm_fast.engine.loop import driver, labelling
from datasetdm_fast.engine.loop.prompts import make_plan
from datasetdm_fast.engine.loop.recipe import Recipe, label_tables, make_recipe
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.jobs.job import Job, describe_run
from datasetdm_fast.runs.jobs.writing import BackgroundWriter, write_missing
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.folder import RunFolder, unseal
from datasetdm_fast.runs.run_settings import RunConfig
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
CLOSED = {True: 64, False: 4_000}  # samples of the run whose closing is timed
RANKS = (1, 2)
RANK_IMAGES, RANK_BATCH, RANK_STEPS = 16, 4, 8  # images for each rank
MOST_GAIN = 1.15  # a rank adds no more than one alone makes, but for what timing is uncertain by


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


def rows(run: BenchRun) -> Rows:
    quick = run.setting.quick
    scenes = [scene_row(size) for size in SCENES[quick]]
    found = [*loop_rows(MARKS[quick]), *scenes, closing_row(CLOSED[quick]), disk_row(20 if quick else 200)]
    return found if quick else [*found, *rank_rows({ranks: images_per_second(ranks) for ranks in RANKS})]


def loop_rows(marks: tuple[int, ...]) -> Rows:
    """One run of the real generation loop: at each mark, core milliseconds an image since the one before, by what they
    went into, and the memory held.

    Files and rows are written in threads, so an image takes less time than the cores work for it; `wall` is that time.
    """
    engine = TimedStub()
    recipe = make_recipe(engine, TASKS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what the engine spends must be in the thread that is asked for it
    try:
        alone = costs_alone(engine, recipe)
        with memory_folder() as folder:
            return marked_run(engine, stub_job(engine, recipe, Path(folder, "run"), marks[-1]), marks, alone)
    finally:
        torch.set_num_threads(threads)


def marked_run(engine: TimedStub, task: Job, marks: tuple[int, ...], alone: dict[str, float]) -> Rows:
    made, found, before = 0, [], (0, time.perf_counter(), time.process_time(), engine.spent)

    def on_commit(new: int) -> None:
        nonlocal made, before
        made += new
        if len(found) < len(marks) and made >= marks[len(found)]:
            now = (made, time.perf_counter(), time.process_time(), engine.spent)
            wall, whole, inside = ((b - a) / (made - before[0]) for a, b in zip(before[1:], now[1:]))
            own = max(whole - inside - sum(alone.values()), 0.0)
            spent = {"engine": inside, **alone, "own": own, "whole": whole, "wall": wall}
            parts = {name: round(1000 * value, 4) for name, value in spent.items()}
            resident = mib(status("VmRSS"))
            found.append({"images": made, "pixels": task.recipe.size, "resident_mib": resident, "ms": parts})
            before = now

    write_missing(task, on_commit=on_commit)
    return found


def memory_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(dir=IN_MEMORY if os.path.isdir(IN_MEMORY) else None)


def stub_job(engine: StubEngine, recipe: Recipe, folder: Path, number: int) -> Job:
    config = RunConfig(out=str(folder), number=number, task=recipe.tasks, prompts="a ball", batch_size=BATCH)
    spec = read_spec(config)
    plan = make_plan(spec.source, engine.model.tokenizer, number=number, seed=0, batch_size=BATCH)
    return Job(folder, plan, engine, recipe, describe_run(spec.identity, plan, engine, recipe, {}))


def costs_alone(engine: TimedStub, recipe: Recipe) -> dict[str, float]:
    """Core seconds an image of post-processing, encoding and writing, each alone on samples of the same kind."""
    plan = stub_job(engine, recipe, Path("none"), MEASURED).plan
    batches = [made for _, made in driver.generate((plan.batch(k) for k in range(len(plan))), engine, recipe)]
    encoded: list[dict[str, Any]] = []
    tables = label_tables(engine, recipe)

    def encode() -> None:
        encoded.extend(label_files.encode(sample, "png", tables)[0] for made in batches for sample in made)

    def write() -> None:
        for first in range(0, MEASURED, BATCH):
            batch = encoded[first : first + BATCH]
            storage.publish({Path(folder, name): content for files in batch for name, content in files.values()})

    with memory_folder() as folder:
        calls = {"post-process": lambda: relabel(engine, batches, recipe), "encode": encode, "write": write}
        rounds = interleaved(calls, 0.0, least=1)
    return {name: taken.cpu_seconds[0] / MEASURED for name, taken in rounds.items()}


def relabel(engine: TimedStub, batches: Sequence[Sequence[Sample]], recipe: Recipe) -> None:
    """Post-processing of as many images, in batches."""
    side = recipe.size // FACTOR
    latents, context = torch.zeros(BATCH, 4, side, side), Text(torch.zeros(2 * BATCH, 77, 2))
    _, capture = StubEngine.denoise_and_capture(engine, latents, 0, context)
    for batch in batches:
        for task in TASKS:
            raw = StubEngine.annotate(engine, task, capture)
            labelling.postprocess([sample.request for sample in batch], raw, engine.decoders[task].config, recipe)


@contextmanager
def scene_run(size: int, number: int, place: str) -> Iterator[tuple[RunFolder, list[Sample], Recipe]]:
    """An open run folder, and rendered scenes in place of generated samples, `SCENE_COUNT` of them at most."""
    engine = StubEngine(size=size, tasks=SCENE_TASKS)
    recipe = make_recipe(engine, SCENE_TASKS)
    task = stub_job(engine, recipe, Path(place, "run"), number)
    with RunFolder(task.folder, task.document) as folder:
        yield folder, [scene(index, size) for index in range(min(number, SCENE_COUNT))], recipe


def scene_row(size: int) -> dict[str, Any]:
    """Images a second that the threads of a run encode and write with four kinds of labels."""
    with memory_folder() as place, scene_run(size, SCENE_COUNT, place) as (folder, samples, recipe):
        begin, worked, written = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() < begin + SCENE_SECONDS:
            with BackgroundWriter(folder, lambda _: None) as writing:
                for first in range(0, SCENE_COUNT, BATCH):
                    writing.put(samples[first : first + BATCH], recipe.facts)
            written += SCENE_COUNT
        seconds, cores = time.perf_counter() - begin, time.process_time() - worked
    rates = {"images_per_second": round(written / seconds, 1), "core_ms": round(1e3 * cores / written, 3)}
    return {"pixels": size, "written": written, **rates}


def closing_row(number: int) -> dict[str, Any]:
    """What the end of a run costs a sample with four kinds of labels, instances among them: index files, gallery page
    and seal; and how large its ledger is.
    """
    size = SCENES[True][0]
    with memory_folder() as place, scene_run(size, number, place) as (folder, samples, recipe):
        requests = (Request(index, samples[index % len(samples)].request.prompt, index) for index in range(number))
        renamed = (replace(samples[request.index % len(samples)], request=request) for request in requests)
        with BackgroundWriter(folder, lambda _: None) as writing:
            while batch := list(islice(renamed, BATCH)):
                writing.put(batch, recipe.facts)
        begin, worked = time.perf_counter(), time.process_time()
        finish_run(folder)
        seconds, cores = time.perf_counter() - begin, time.process_time() - worked
        ledger = (folder.path / LEDGER).stat().st_size
    costs = {"closing_ms": round(1e3 * seconds / number, 4), "closing_core_ms": round(1e3 * cores / number, 4)}
    return {"pixels": size, "closed": number, **costs, "ledger_bytes": round(ledger / number)}


def disk_row(rounds: int) -> dict[str, Any]:
    """Milliseconds of a commit of one batch, and of making one sample's files durable, on the disk of temporary
    files.
    """
    with tempfile.TemporaryDirectory() as place, scene_run(SCENES[True][0], BATCH, place) as run:
        folder, samples, recipe = run
        unseal(folder.path)
        encoded = (label_files.encode(sample, "png", folder.document["labels"])[0] for sample in samples)
        files = {folder.path / name: content for one in encoded for name, content in one.values()}
        written = folder.write(samples, recipe.facts)
        calls = {"commit": lambda: folder.ledger.commit(written), "publish": lambda: storage.publish(files)}
        taken = interleaved(calls, 0.0, least=rounds)
    commit, publish = (1e3 * statistics.median(taken[name].seconds) for name in calls)
    times = {"commit_ms": round(commit, 3), "rows": BATCH, "publish_ms": round(publish / BATCH, 3)}
    return {**times, "files": len(files) // BATCH}


def scene(index: int, size: int) -> Sample:
    """A rendered scene with its true labels."""
    view = world.view(index, size)
    present = [k for k in range(1, len(view.scene.things) + 1) if (view.instance == k).any()]
    kinds = np.array([world.THINGS.index(view.scene.things[k - 1].kind) for k in present], np.int64)
    people = np.array(list(view.keypoints.values()), np.float32).reshape(-1, len(world.JOINTS), 3)
    confidence = 1 - np.random.default_rng(index).random(view.semantic.shape, np.float32) ** 4
    masks, scores = view.instance == np.array(present)[:, None, None], np.ones(len(present), np.float32)
    visible, sure = people[..., 2].astype(np.int64), np.ones(len(people), np.float32)
    labels = {
        "semantic": SemanticMap(view.semantic, confidence, world.CLASSES),
        "instance": Instances(masks, kinds, scores, world.THINGS),
        "depth": DepthMap(view.depth, world.MAX_DEPTH),
        "pose": Keypoints(people, visible, sure, world.JOINTS, world.LIMBS),
    }
    return Sample(Request(index, view.caption, index), view.image, labels)


def images_per_second(ranks: int) -> float:
    """Of the demo model with so many ranks of one thread each, as the command runs them."""
    sizes = {"ranks": ranks, "threads": 1, "number": ranks * RANK_IMAGES, "batch-size": RANK_BATCH, "steps": RANK_STEPS}
    sizes |= {"device": "cpu"}  # which ranks share; a GPU is one rank's
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "datasetdm_fast.generate", *flags, "--out", f"{folder}/run", "--quiet"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return rate([path.stat().st_mtime for path in Path(folder, "run", "images").iterdir()], ranks)


def rate(made: Sequence[float], ranks: int) -> float:
    """Images a second from the first image made to the last, given when each was made: loading is left out, and with it
    the first batch of each rank, which was begun before.
    """
    return (len(made) - ranks * RANK_BATCH) / max(max(made) - min(made), 1e-9)


def rank_rows(rates: dict[int, float]) -> Rows:
    """A row for each number of ranks, failed where they make more images than so many of one rank could."""
    found = []
    for ranks, each in rates.items():
        row = {"ranks": ranks, "images": ranks * RANK_IMAGES, "images_per_second": round(each, 4), "status": "ok"}
        if each > MOST_GAIN * ranks * rates[1]:
            why = f"{each / rates[1]:.3g} times the rate of one rank, which {ranks} ranks cannot reach"
            row |= {"status": "failed", "why": why}
        found.append(row)
    return found


def with_key(key: str) -> Callable[[Sequence[Row]], list[Row]]:
    return lambda found: [row for row in found if key in row]


def against_one(found: Sequence[Row]) -> list[Row]:
    ranked = with_key("ranks")(found)
    return [row | {"over_one": row["images_per_second"] / ranked[0]["images_per_second"]} for row in ranked]


def part(name: str) -> Cell:
    return lambda row: number(row["ms"].get(name))


COSTS = ("engine", "post-process", "encode", "write", "own", "whole", "wall")
LOOP = {"images made": count("images"), "pixels": text("pixels"), **{f"{name}, ms": part(name) for name in COSTS}}
LOOP |= {"resident": memory("resident_mib")}
WRITING = {"pixels": text("pixels"), "images/s encoded and written": figure("images_per_second")}
WRITING |= {"CPU ms per image": figure("core_ms")}
CLOSING = {"samples": count("closed"), "pixels": text("pixels"), "ms per sample": figure("closing_ms")}
CLOSING |= {"CPU ms per sample": figure("closing_core_ms"), "ledger bytes per sample": text("ledger_bytes")}
CLOSING |= {"100,000 samples, s": lambda row: number(100 * row["closing_ms"])}
DISK = {"commit of a batch, ms": figure("commit_ms"), "rows per commit": text("rows")}
DISK |= {"syncing one sample's files, ms": figure("publish_ms"), "files per sample": text("files")}
BY_RANKS = {"ranks": text("ranks"), "images/s": figure("images_per_second"), "speed-up over one": figure("over_one")}
MEASUREMENT = Measurement(
    "scale",
    "Cost of the generation loop itself: CPU time per image, with a trivial engine and files in memory",
    rows,
    (
        Table(LOOP, with_key("ms")),
        Table(
            WRITING,
            with_key("written"),
            title="Encoding and writing rendered scenes with four kinds of labels, files in memory",
        ),
        Table(CLOSING, with_key("closed"), title="Closing a run: index files and gallery for four kinds of labels"),
        Table(DISK, with_key("commit_ms"), title="Waiting for the disk"),
        Table(BY_RANKS, against_one, title="Ranks of one thread each"),
    ),
    least_seconds=60,
)
