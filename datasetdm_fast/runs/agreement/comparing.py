"""Two engines side by side: samples of a run through its engine and the reference, or against stored ones."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.config import CACHED, REFERENCE
from datasetdm_fast.data import Request, Sample
from datasetdm_fast.engine import engines
from datasetdm_fast.engine.engines import Engine, build_engine, check_engine
from datasetdm_fast.engine.labels import by_task, kind_of, label_files
from datasetdm_fast.engine.loading.model import digest
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.calls import FROM_NOISE
from datasetdm_fast.engine.loop.prompts import make_plan
from datasetdm_fast.engine.loop.recipe import Recipe, check_seed, check_tasks, make_recipe, prompt_words
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.tensorrt import flavours
from datasetdm_fast.runs.agreement.observe import image_distance
from datasetdm_fast.runs.agreement.verify import EXACT, ROUNDED, GateRow, Verdict, evaluate_gates, verify
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.prompt_files import read_source
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row
from datasetdm_fast.runs.run_folder.reader import StoredSample
from datasetdm_fast.runs.run_settings import PromptSettings
from datasetdm_fast.settings import EngineSettings, ModelSettings, SamplingSettings
from datasetdm_fast.untrusted import images
from datasetdm_fast.version import __version__


def compare_with_reference(job: Job, number: int, on_unet_call: Callable[[], None] = lambda: None) -> Verdict:
    """The first samples through the job's engine and the reference, without labels of other packages' labellers."""
    if job.engine.name == REFERENCE:
        raise Refused(
            f"--verify {number}: the engine is {REFERENCE}, the reference itself, so nothing can be compared",
            "Drop --verify.",
        )
    requests = [job.plan.request(index) for index in range(number)]
    size = min(job.plan.batch_size, number)
    with job.engine.model.built_for_now():  # networks that the reference alone needs are freed at the end
        reference = build_engine(REFERENCE, job.engine.model, job.engine.decoders, device=str(job.engine.device))
        # As the reference makes it: each sample from its own noise, no call in fp8, no labels of other packages.
        tasks = tuple(task for task in job.recipe.tasks if task not in job.recipe.labellers)
        captures = {task: call for task, call in job.recipe.captures.items() if task in tasks}
        cached = job.recipe.cached if CACHED in reference.speeds else frozenset()
        recipe = replace(job.recipe, tasks=tasks, captures=captures, origin=FROM_NOISE, cached=cached, fp8=frozenset())
        return verify(job.engine, reference, requests, recipe, size, on_unet_call)


def count_calls(job: Job, number: int) -> int:
    """U-Net calls of the comparison, as on_unet_call counts them."""
    return -(-number // min(job.plan.batch_size, number)) * 3 * len(job.recipe.schedule)


def describe_verdict(verdict: Verdict, engine: Engine) -> dict[str, Any]:
    """A verdict as run.json has it."""
    return verdict.document() | {"setting": setting_of(engine)}


def still_holds(stored: Any, engine: Engine, number: int) -> bool:
    """Whether a stored verdict is of this engine on this machine, over as many samples."""
    return (
        isinstance(stored, Mapping)
        and stored.get("agrees") is True
        and isinstance(stored.get("number"), int)
        and stored["number"] >= number
        and stored.get("setting") == setting_of(engine)
    )


def setting_of(engine: Engine) -> dict[str, str]:
    """What a verdict holds for: device, driver, versions and, of an engine that has them, its plan files."""
    facts = {name: value for name, value in engine.fingerprint().items() if name != "device"}
    facts |= {"python": platform.python_version(), "datasetdm_fast": __version__}
    if engine.device.type == "cuda":
        facts["driver"] = flavours.describe_driver()
    folder = getattr(engine, "folder", None)
    if isinstance(folder, Path) and folder.is_dir():
        files = (path for path in folder.rglob("*") if path.is_file())
        facts["plans"] = digest(sorted(files))
    return facts


SAMPLES = 8  # of the run that are regenerated, spread evenly over it
FAR = 1e9  # the distance of a sample that did not come out finite


def choose_samples(folder: Path) -> list[int]:
    """The indices of the samples that are regenerated."""
    if not (folder / LEDGER).exists():
        return []
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        indices = ledger.indices()
    return [indices[k * len(indices) // SAMPLES] for k in range(SAMPLES)] if len(indices) > SAMPLES else indices


def compare_with_stored(
    job: Job, indices: Sequence[int], on_unet_call: Callable[[], None] = lambda: None
) -> list[GateRow]:
    """Stored images and labels of these samples against those of the job's engine, with the gates of free runs."""
    distances: dict[str, list[float]] = {}
    batches = job.plan.batches_of(indices)
    with Ledger(job.folder / LEDGER, read_only=True) as ledger:
        for batch, results in driver.generate(batches, job.engine, job.recipe, on_unet_call, job.generator):
            for request, result in zip(batch.requests, results, strict=False):
                for name, value in _distances(job, ledger.row(request.index), result).items():
                    distances.setdefault(name, []).append(value)
    is_exact = all(engine.get("dtype") == "fp32" for engine in (job.document["engine"], job.engine.fingerprint()))
    measures = {name: np.array([values]) for name, values in distances.items()}
    return evaluate_gates(measures, EXACT if is_exact else ROUNDED, {})


def _distances(job: Job, row: Row, result: Any) -> dict[str, float]:
    """How far a sample is from the one of its row, in image and labels."""
    if not isinstance(result, Sample):
        return {"free image": FAR, **{f"free {task}": FAR for task in row.labels if _has_gate(task)}}
    tables = job.document["labels"]
    stored = StoredSample(row, job.folder, job.document)
    files, records = label_files.encode(result, job.document["config"]["image_format"], tables)
    made = {role: np.array(images.decode_image(content, name)) for role, (name, content) in files.items()}
    distances = {"free image": float(image_distance(made["image"][None], stored.image[None])[0])}
    for task in filter(_has_gate, row.labels):
        label = kind_of(task).decode(made, records[task], tables[task])
        distances[f"free {task}"] = float(kind_of(task).distance(label, stored.label(task)))
    return distances


def _has_gate(task: str) -> bool:
    return f"free {task.partition(':')[0]}" in EXACT


def open_pair(
    model: ModelSettings, settings: EngineSettings, against: str, labels: Sequence[str]
) -> tuple[Engine, Engine]:
    """The engine to check and the one to compare with; both read the modules of one loaded model."""
    options = {"provider": settings.provider, "streams": settings.streams, "compile": settings.compile}
    check_engine(against)
    check_engine(settings.engine, **options)
    if labels:
        check_tasks(labels)
    reference, _ = engines.open_engine(
        model.model,
        None if model.decoder == "none" else model.decoder,
        labels or None,
        engine=against,
        device=settings.device,
        size=model.size,
        allow_download=model.allow_download,
        threads=settings.threads,
    )
    engine = build_engine(
        settings.engine, reference.model, reference.decoders, dtype=settings.dtype, device=settings.device, **options
    )
    if engine.fingerprint() == reference.fingerprint():
        raise Refused(
            f"--against {against}: it is the engine to check itself, in the same precision, so nothing can be compared",
            "Choose another engine for one of the two.",
        )
    return engine, reference


def choose_requests(
    engine: Engine, reference: Engine, prompts: PromptSettings, sampling: SamplingSettings
) -> tuple[Recipe, list[Request]]:
    """The recipe of all labels that the decoders make, which both engines can follow, and the first requests of the
    prompts.
    """
    check_seed(prompts.seed, prompts.number)
    source = read_source(prompts, has_captions=True)
    labels = tuple(by_task(reference.decoders))
    _, recipe = (make_recipe(each, labels, classes=source.classes, **asdict(sampling)) for each in (engine, reference))
    words = recipe.words or prompt_words(reference, labels, source.classes)
    number, tokenizer = prompts.number, reference.model.tokenizer
    plan = make_plan(source, tokenizer, number=number, seed=prompts.seed, batch_size=number, words=words)
    return recipe, [plan.request(k) for k in range(number)]
