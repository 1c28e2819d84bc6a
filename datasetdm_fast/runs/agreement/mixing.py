"""Whether an engine makes the samples that a run folder holds already, so that it may make the others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.data import Batch, Sample
from datasetdm_fast.engine.labels import kind_of, label_files
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.runs.agreement.distances import image_distance
from datasetdm_fast.runs.agreement.gates import EXACT, ROUNDED, GateRow, judge
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.folder import into
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row
from datasetdm_fast.untrusted import images

SAMPLES = 8  # of the run that are made again, spread evenly over what it holds
FAR = 1e9  # the distance of a sample that did not come out finite


def chosen(job: Job) -> list[int]:
    """The indices of the samples that are made again."""
    if not (job.folder / LEDGER).exists():
        return []
    with Ledger(job.folder / LEDGER, read_only=True) as ledger:
        there = ledger.indices()
    return [there[k * len(there) // SAMPLES] for k in range(SAMPLES)] if len(there) > SAMPLES else there


def compared(job: Job, indices: Sequence[int], on_unet_call: Callable[[], None] = lambda: None) -> list[GateRow]:
    """Images and labels of these samples as the job's engine makes them, against those of the run folder: as both are
    stored, judged like engines that run on their own from the same noise and prompt.
    """
    size, distances = job.plan.batch_size, {}
    blocks = [indices[first : first + size] for first in range(0, len(indices), size)]
    batches = [
        Batch(k, tuple(job.plan.request(index) for index in block), size - len(block)) for k, block in enumerate(blocks)
    ]
    with Ledger(job.folder / LEDGER, read_only=True) as ledger, tempfile.TemporaryDirectory() as place:
        for batch, results in driver.generate(batches, job.engine, job.recipe, on_unet_call, job.generator):
            for request, result in zip(batch.requests, results, strict=False):
                for name, value in _distances(job, ledger.row(request.index), result, Path(place)).items():
                    distances.setdefault(name, []).append(value)
    exact = all(engine.get("dtype") == "fp32" for engine in (job.document["engine"], job.engine.fingerprint()))
    return judge({name: np.array([values]) for name, values in distances.items()}, EXACT if exact else ROUNDED, {})


def _distances(job: Job, row: Row, result: Any, place: Path) -> dict[str, float]:
    """How far a sample is from the one of its row, in image and labels."""
    if not isinstance(result, Sample):
        return {"free image": FAR, **{f"free {task}": FAR for task in row.labels if _has_gate(task)}}
    tables = job.document["labels"]
    files, records = label_files.encode(result, job.config.image_format, tables)
    into(place)(dict(files.values()))
    found, truth = (
        np.array(images.read_image(folder / name))[None]
        for folder, name in ((place, files["image"][0]), (job.folder, row.files["image"][0]))
    )
    distances = {"free image": float(image_distance(found, truth)[0])}
    for task in filter(_has_gate, row.labels):
        made = {role: name for role, (name, _) in files.items()}
        stored = {role: name for role, (name, _) in row.files.items()}
        label = label_files.decode(task, place, made, records[task], tables[task])
        other = label_files.decode(task, job.folder, stored, row.labels[task], tables[task])
        distances[f"free {task}"] = float(kind_of(task).distance(label, other))
    return distances


def _has_gate(task: str) -> bool:
    return f"free {task.partition(':')[0]}" in EXACT


def kept(job: Job, rows: Sequence[GateRow], number: int) -> dict[str, Any]:
    """What run.json keeps of an engine that goes on with a run of another."""
    measures = [asdict(row) | {"passed": row.is_passed} for row in rows]
    return {"engine": dict(job.engine.fingerprint()), "number": number, "measures": measures}


def mixed(job: Job, rows: Sequence[GateRow], number: int) -> tuple[Job, list[dict[str, Any]]]:
    """The job that goes on, and all engines beside the first that run.json names."""
    entries = [*job.document.get("mixed", []), kept(job, rows, number)]
    return replace(job, document=job.document | {"mixed": entries}, differing=()), entries
