"""One process makes the missing samples of a run, or one sample again."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasetdm_fast.data import Batch, Quarantined, Sample
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.loop import driver, prompts
from datasetdm_fast.engine.loop.labelling import word_slots
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.jobs.background_writer import BackgroundWriter
from datasetdm_fast.runs.jobs.job import Job, engine_of, recipe_of
from datasetdm_fast.runs.jobs.result import Result, closed
from datasetdm_fast.runs.jobs.settings import identity
from datasetdm_fast.runs.run_folder.acceptance import acceptance_of
from datasetdm_fast.runs.run_folder.document import check_same, table_of
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.goal import goal_of
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, QUARANTINED, Ledger, Row
from datasetdm_fast.runs.run_folder.object_store import open_folder, refuse_stored
from datasetdm_fast.runs.run_folder.remaking import check_given, remakable
from datasetdm_fast.runs.run_settings import RunConfig


def run(
    job: Job,
    *,
    on_commit: Callable[[int], None] = lambda count: None,
    on_unet_call: Callable[[], None] = lambda: None,
    is_stopping: Callable[[], bool] = lambda: False,
    before_commit: Callable[[list[Sample | Quarantined]], None] = lambda results: None,
) -> Result:
    """Makes the missing samples batch by batch; `on_commit` hears of commits, `is_stopping` is asked after each.
    `before_commit` is given what is about to be committed.
    """
    begin, new = time.perf_counter(), 0

    def committed(rows: list[Row]) -> None:
        nonlocal new
        new += len(rows)
        on_commit(sum(row.status != DOUBTFUL for row in rows))

    with RunFolder(job.folder, job.document) as folder:
        quota = Quota(job, folder.ledger)
        with BackgroundWriter(folder, committed) as writing:
            while wanted := quota.lacking():
                batches = (job.plan.batch(k) for k in in_order(wanted, job.plan.batch_size))
                stopping = until(is_stopping, batches)
                for batch, results in made(job, stopping, on_unet_call):
                    taken = quota.taken(results)
                    before_commit(taken)
                    writing.put(taken, facts_of(job.recipe, batch))
                if is_stopping():
                    break
        return closed(folder, job.plan.number, new, begin)


def made(
    job: Job, batches: Iterable[Batch], on_unet_call: Callable[[], None] = lambda: None
) -> Iterator[tuple[Batch, list[Sample | Quarantined]]]:
    """Every batch with its samples, in order; those that the run sets aside have their reason."""
    rule = acceptance_of(job.document)
    for batch, results in driver.generate(batches, job.engine, job.recipe, on_unet_call, job.generator):
        yield batch, rule.judged(results)


def facts_of(recipe: Recipe, batch: Batch) -> dict[str, Any]:
    """What the rows of a batch say of how it was made."""
    return {**recipe.facts, "word_slots": word_slots([recipe.query_words(request) for request in batch.requests])}


def until(is_stopping: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches up to the one after which `is_stopping` says so."""
    for batch in batches:
        yield batch
        if is_stopping():
            return


def in_order(wanted: Iterable[int], size: int) -> list[int]:
    """The batches that hold these samples, in the order they are handed out."""
    return sorted({index // size for index in wanted})


class Quota:
    """Which samples of a run are still to be made.

    Where some are set aside, each makes room for one more at the end, of its class where the run counts by class. So
    the run ends with the sample that is the last one needed, whatever the order in which they are made.
    """

    def __init__(self, job: Job, ledger: Ledger, first: int = 0, stop: int | None = None):
        """Of all samples, or of those from `first` to before `stop`, which alone are then taken."""
        self._goal = goal_of(job.document["config"], job.plan.number)
        self._there = ledger.indices_between(first, job.plan.most if stop is None else stop)
        self._aside = self._goal.tally(ledger).aside if job.sets_aside else [0]
        self._left = job.config.limit or job.plan.most  # samples that this command may make

    def wants(self, index: int) -> bool:
        """Whether a sample belongs to the run, as far as is known now."""
        kind, turn = self._goal.place(index)
        return turn < self._goal.stop(self._aside[kind])

    def lacking(self) -> list[int]:
        """Indices still to be made, as far as is known now."""
        wanted = (index for index in self._goal.wanted(self._aside) if index not in self._there)
        return list(islice(wanted, self._left))

    def taken(self, results: Iterable[Sample | Quarantined]) -> list[Sample | Quarantined]:
        """The results of a batch that belong to the run, which are there from now on."""
        found = []
        for result in results:
            index = result.request.index
            if index not in self._there and self.wants(index) and self._left:
                found.append(result)
                self._there.add(index)
                self._left -= 1
                if isinstance(result, Sample) and result.aside:
                    self._aside[self._goal.place(index)[0]] += 1
        return found


_NO_PROMPTS = prompts.PromptSource((), "", (), 0)


@dataclass(frozen=True)
class Remake:
    """One sample of a run folder to be made again.

    Batch shape and place are as before, so the arithmetic is the same; the other places repeat the sample.
    """

    folder: Path
    document: dict[str, Any]
    row: Row
    engine: Engine
    recipe: Recipe
    batch: Batch
    place: int


def prepare_remake(config: RunConfig, given: Iterable[str] = ()) -> Remake:
    """The sample `config.only` from its row; settings in `given` must agree with the run folder's."""
    folder = Path(config.out)
    stored, row = remakable("", folder, config.only)
    if row.status == QUARANTINED:
        refuse_stored(folder)
    moved = {"model", "decoder"} & set(given)  # their digests tell whether they are the same
    settings = replace(
        config,
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in stored["config"].items()
            if name not in ("prompts", *moved)
        },
    )
    engine = row.recipe.get("engine")
    if engine is not None and engine in [entry["engine"] for entry in stored.get("mixed", ())]:
        settings = replace(settings, engine=engine["engine"], dtype=engine["dtype"], compile="compiled" in engine)
    changed = {
        name: value
        for name, value in identity(config, _NO_PROMPTS).items()
        if name in set(given) - {"prompts"} and getattr(config, name) != getattr(settings, name)
    }
    check_given(folder, stored["config"], changed)
    engine, decoders = engine_of(settings, stored)
    weights = {"model": {"digests": dict(engine.model.digests)}, "decoders": decoders}
    check_same(folder, {"model": {"digests": stored["model"]["digests"]}, "decoders": stored["decoders"]}, weights)
    words = tuple(stored["plan"].get("words", ())) or settings.classes
    recipe = recipe_of(settings, engine, words, table=table_of(stored))
    size, place = row.recipe["batch_size"], row.request.index % row.recipe["batch_size"]
    filler = replace(row.request, classes=recipe.words[: row.recipe["word_slots"]] or row.request.classes)
    batch = Batch(row.request.index // size, tuple(row.request if k == place else filler for k in range(size)))
    return Remake(folder, stored, row, engine, recipe, batch, place)


def remake(task: Remake) -> list[str]:
    """Makes one sample of a run folder again, and returns the files that had to be written anew."""
    ((_, results),) = driver.generate([task.batch], task.engine, task.recipe)
    result = results[task.place]
    if isinstance(result, Quarantined):
        raise GateFailed(
            f"sample {result.request.id}: {result.reason}; nothing was written",
            "Try another --dtype in a run of its own.",
        )
    with open_folder(task.folder, task.document) as folder:
        if task.row.status == QUARANTINED:
            folder.add(acceptance_of(task.document).judged([result]), task.row.recipe)
            finish_run(folder)
            return [path for path, _ in folder.ledger.row(result.request.index).files.values()]
        return folder.renew(task.row, result)
