"""Samples of a run folder made again by another engine, and compared with the stored ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.data import Batch, Sample
from datasetdm_fast.engine.labels import kind_of, label_files
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.runs.agreement.distances import image_distance
from datasetdm_fast.runs.agreement.gates import EXACT, ROUNDED, GateRow, evaluate_gates
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.folder import into
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row
from datasetdm_fast.untrusted import images

if TYPE_CHECKING:
    from datasetdm_fast.runs.jobs.job import Job

SAMPLES = 8  # of the run that are made again, spread evenly over what it holds
FAR = 1e9  # the distance of a sample that did not come out finite


def choose_samples(folder: Path) -> list[int]:
    """The indices of the samples that are made again."""
    if not (folder / LEDGER).exists():
        return []
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        indices = ledger.indices()
    return [indices[k * len(indices) // SAMPLES] for k in range(SAMPLES)] if len(indices) > SAMPLES else indices


def compare_with_stored(
    job: Job, indices: Sequence[int], on_unet_call: Callable[[], None] = lambda: None
) -> list[GateRow]:
    """Images and labels of these samples as the job's engine makes them, against those of the run folder: as both are
    stored, with the gates of engines that run on their own from the same noise and prompt.
    """
    size = job.plan.batch_size
    distances: dict[str, list[float]] = {}
    blocks = [indices[first : first + size] for first in range(0, len(indices), size)]
    batches = [
        Batch(k, tuple(job.plan.request(index) for index in block), size - len(block)) for k, block in enumerate(blocks)
    ]
    with Ledger(job.folder / LEDGER, read_only=True) as ledger, tempfile.TemporaryDirectory() as place:
        for batch, results in driver.generate(batches, job.engine, job.recipe, on_unet_call, job.generator):
            for request, result in zip(batch.requests, results, strict=False):
                for name, value in _distances(job, ledger.row(request.index), result, Path(place)).items():
                    distances.setdefault(name, []).append(value)
    is_exact = all(engine.get("dtype") == "fp32" for engine in (job.document["engine"], job.engine.fingerprint()))
    measures = {name: np.array([values]) for name, values in distances.items()}
    return evaluate_gates(measures, EXACT if is_exact else ROUNDED, {})


def _distances(job: Job, row: Row, result: Any, place: Path) -> dict[str, float]:
    """How far a sample is from the one of its row, in image and labels."""
    if not isinstance(result, Sample):
        return {"free image": FAR, **{f"free {task}": FAR for task in row.labels if _has_gate(task)}}
    tables = job.document["labels"]
    files, records = label_files.encode(result, job.document["config"]["image_format"], tables)
    into(place)(dict(files.values()))
    made, stored = (
        np.array(images.read_image(folder / name))[None]
        for folder, name in ((place, files["image"][0]), (job.folder, row.files["image"][0]))
    )
    distances = {"free image": float(image_distance(made, stored)[0])}
    made_names = {role: name for role, (name, _) in files.items()}
    stored_names = {role: name for role, (name, _) in row.files.items()}
    for task in filter(_has_gate, row.labels):
        label = label_files.decode(task, place, made_names, records[task], tables[task])
        other = label_files.decode(task, job.folder, stored_names, row.labels[task], tables[task])
        distances[f"free {task}"] = float(kind_of(task).distance(label, other))
    return distances


def _has_gate(task: str) -> bool:
    return f"free {task.partition(':')[0]}" in EXACT
