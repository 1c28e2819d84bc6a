"""Regenerating one sample of a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.data import Batch, Quarantined
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.jobs.job import open_engine, recipe_of
from datasetdm_fast.runs.run_folder.document import (
    COMMANDS,
    LEDGER,
    check_same,
    differences,
    made_by,
    read_document,
    refuse_shards,
    table_of,
)
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.goal import acceptance_of
from datasetdm_fast.runs.run_folder.ledger import QUARANTINED, Ledger, Row
from datasetdm_fast.runs.run_settings import LabelSettings
from datasetdm_fast.settings import EngineSettings, ModelSettings, SamplingSettings

LONGEST_ID = 18  # digits


def find_remake_row(folder: Path, id: str) -> tuple[dict[str, Any], Row]:
    """run.json and the row of a sample; a folder that generate has not made and an unknown id are refused."""
    refuse_shards(folder)
    stored = read_document(folder)
    if stored is None or not (folder / LEDGER).exists():
        raise Refused(f"--only {id}: {folder} is not a run folder", "Name the folder with --out.")
    if made_by(stored) != COMMANDS[0]:
        raise Refused(
            f"--only {id}: {folder} was made by {made_by(stored)}",
            "Take damaged samples out with audit --repair; the line that made the run then makes them again.",
        )
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        row = ledger.row(int(id)) if id.isdecimal() and len(id) <= LONGEST_ID else None
    if row is None:
        raise Refused(
            f"--only {id}: no sample of {folder} has this id", "Use an id from samples.jsonl, for example 00000003."
        )
    return stored, row


def check_provided(folder: Path, stored: Mapping[str, Any], provided: Mapping[str, Any]) -> None:
    """Refuses settings provided with --only that are not those of the run folder, which decide what is regenerated."""
    changes = [line for name in sorted(provided) for line in differences(stored.get(name), provided[name], name)]
    if changes:
        raise Refused(
            f"{folder}: it holds a run with other settings ({'; '.join(changes)})",
            "Drop these flags: --only takes them from the run folder.",
        )


def prepare_remake(
    folder: Path,
    stored: Mapping[str, Any],
    row: Row,
    model: ModelSettings,
    engine: EngineSettings,
    sampling: SamplingSettings,
    labels: LabelSettings,
    classes: tuple[str, ...],
) -> Callable[[], list[str]]:
    """What regenerates the sample of a row, in a batch as before, and gives the files that are written anew."""
    opened, decoders = open_engine(model, engine, labels.task, stored, guidance=sampling.guidance)
    weights = {"model": {"digests": dict(opened.model.digests)}, "decoders": decoders}
    check_same(folder, {"model": {"digests": stored["model"]["digests"]}, "decoders": stored["decoders"]}, weights)
    words = tuple(stored["plan"].get("words", ())) or classes
    recipe = recipe_of(sampling, labels, opened, words, table=table_of(stored))
    size, place = row.recipe["batch_size"], row.request.index % row.recipe["batch_size"]
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
        with RunFolder(folder, stored) as run:
            if row.status == QUARANTINED:
                run.add(acceptance_of(stored).apply([result]), row.recipe)
                finish_run(run)
                return [path for path, _ in run.ledger.row(result.request.index).files.values()]
            return run.renew(row, result)

    return remake
