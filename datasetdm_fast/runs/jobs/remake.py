"""Regenerating one sample of a run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from datasetdm_fast.data import Batch, Quarantined
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.jobs.job import open_engine, recipe_of
from datasetdm_fast.runs.run_folder.document import COMMANDS, check_same, differences, made_by, table_of
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.goal import acceptance_of
from datasetdm_fast.runs.run_folder.ledger import QUARANTINED, Row
from datasetdm_fast.runs.run_folder.reader import Run, open_run
from datasetdm_fast.runs.run_settings import LabelSettings
from datasetdm_fast.settings import EngineSettings, ModelSettings, SamplingSettings

LONGEST_ID = 18  # digits


def find_remake_row(place: str, id: str) -> tuple[Run, Row]:
    """The run at a place and the row of a sample; a run that generate has not made and an unknown id are refused."""
    with open_run(place) as run:
        if made_by(run.document) != COMMANDS[0]:
            raise Refused(
                f"--only {id}: {place} was made by {made_by(run.document)}",
                "Take damaged samples out with audit --repair; the line that made the run then makes them again.",
            )
        if run.shards is not None:
            raise Refused(
                f"--only {id}: {place} is in shards, of which none is changed",
                "Take damaged ones out with audit --repair; the line that made the run then makes them again.",
            )
        row = run.ledger.row(int(id) if id.isdecimal() and len(id) <= LONGEST_ID else -1)
    if row is None:
        raise Refused(f"--only {id}: no sample of {place} has this id", "Use an id of the run, for example 00000003.")
    return run, row


def check_provided(place: str, stored: Mapping[str, Any], provided: Mapping[str, Any]) -> None:
    """Refuses settings provided with --only that are not those of the run folder, which decide what is regenerated."""
    changes = [line for name in sorted(provided) for line in differences(stored.get(name), provided[name], name)]
    if changes:
        raise Refused(
            f"{place}: it holds a run with other settings ({'; '.join(changes)})",
            "Drop these flags: --only takes them from the run folder.",
        )


def prepare_remake(
    run: Run,
    row: Row,
    model: ModelSettings,
    engine: EngineSettings,
    sampling: SamplingSettings,
    labels: LabelSettings,
    classes: tuple[str, ...],
) -> Callable[[], list[str]]:
    """What regenerates the sample of a row, in a batch as before, and gives the files that are written anew."""
    folder, stored = run.path, run.document
    opened, decoders = open_engine(model, engine, labels.task, stored, guidance=sampling.guidance)
    weights = {"model": {"digests": dict(opened.model.digests)}, "decoders": decoders}
    check_same(folder, {"model": {"digests": stored["model"]["digests"]}, "decoders": stored["decoders"]}, weights)
    words = tuple(stored["plan"].get("words", ())) or classes
    recipe = recipe_of(sampling, labels, opened, words, table=table_of(stored))
    size = row.recipe["batch_size"]
    place = row.recipe.get("place", row.request.index) % size
    filler = replace(row.request, classes=recipe.words[: row.recipe["word_slots"]] or row.request.classes)
    batch = Batch(row.request.index // size, tuple(row.request if k == place else filler for k in range(size)))

    def remake() -> list[str]:
        ((_, results),) = driver.generate([batch], opened, recipe)
        result = results[place]
        if isinstance(result, Quarantined):
            raise GateFailed(
                f"sample {result.request.id}: {result.reason}; nothing was written",
                "Try another --dtype in a run of its own.",
            )
        with RunFolder(folder, stored) as renewed:
            if row.status == QUARANTINED:
                renewed.add(acceptance_of(stored).apply([result]), row.recipe)
                finish_run(renewed)
                return [file.path for file in renewed.ledger.row(result.request.index).files.values()]
            return renewed.renew(row, result)

    return remake
