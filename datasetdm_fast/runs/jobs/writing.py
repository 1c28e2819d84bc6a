"""One process makes the missing samples of a run and writes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasetdm_fast.data import Batch, Quarantined, Sample
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.labelling import word_slots
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.runs.jobs.background_writer import BackgroundWriter
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.quota import Quota, batches_of
from datasetdm_fast.runs.jobs.result import Result, close_run
from datasetdm_fast.runs.run_folder.acceptance import acceptance_of
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Row


def write_missing(
    job: Job,
    *,
    on_commit: Callable[[int], None] = lambda count: None,
    on_unet_call: Callable[[], None] = lambda: None,
    is_stopping: Callable[[], bool] = lambda: False,
    before_commit: Callable[[list[Sample | Quarantined]], None] = lambda results: None,
) -> Result:
    """Makes the missing samples batch by batch; `on_commit` is called after commits, `is_stopping` after each batch.
    `before_commit` receives what is about to be committed.
    """
    begin, new = time.perf_counter(), 0

    def on_rows(rows: list[Row]) -> None:
        nonlocal new
        new += len(rows)
        on_commit(sum(row.status != DOUBTFUL for row in rows))

    with RunFolder(job.folder, job.document) as folder:
        quota = Quota(job, folder.ledger)
        with BackgroundWriter(folder, on_rows) as writer:
            while missing := quota.missing():
                batches = (job.plan.batch(k) for k in batches_of(missing, job.plan.batch_size))
                for batch, results in make_samples(job, _until(is_stopping, batches), on_unet_call):
                    taken = quota.take(results)
                    before_commit(taken)
                    writer.put(taken, batch_facts(job.recipe, batch))
                if is_stopping():
                    break
        return close_run(folder, job.plan.number, new, begin)


def make_samples(
    job: Job, batches: Iterable[Batch], on_unet_call: Callable[[], None] = lambda: None
) -> Iterator[tuple[Batch, list[Sample | Quarantined]]]:
    """Every batch with its samples, in order; those that the run quarantines have their reason."""
    rule = acceptance_of(job.document)
    for batch, results in driver.generate(batches, job.engine, job.recipe, on_unet_call, job.generator):
        yield batch, rule.apply(results)


def batch_facts(recipe: Recipe, batch: Batch) -> dict[str, Any]:
    """How a batch was made, for its rows."""
    return {**recipe.facts, "word_slots": word_slots([recipe.query_words(request) for request in batch.requests])}


def _until(is_stopping: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches up to the one after which `is_stopping`."""
    for batch in batches:
        yield batch
        if is_stopping():
            return
