"""Labels for pictures that exist: a job whose samples are pictures brought back into the network, not drawn by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from datasetdm_fast.config import INVERSION
from datasetdm_fast.engine.labels.tiles import Tiling
from datasetdm_fast.engine.loop.inverting import TRAINING_STEPS, inversion_generator, inversion_recipe, picture_prompt
from datasetdm_fast.engine.loop.plan import Plan
from datasetdm_fast.engine.loop.recipe import prompt_words
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.job import Job, check_room, describe_run, open_engine, recipe_of
from datasetdm_fast.runs.jobs.pictures import Pictures
from datasetdm_fast.runs.jobs.resume import count_rows, merge_with_stored, relocated_paths
from datasetdm_fast.runs.run_folder.document import check_same, made_by, row_facts
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.untrusted import documents


def prepare_labelling(
    spec: RunSpec,
    stored: Mapping[str, Any] | None,
    pictures: Pictures,
    timesteps: Sequence[int],
    *,
    has_tiles: bool,
) -> Job:
    """The job of labelling a folder of pictures, checked in full; nothing is written."""
    sides = pictures.sides() if has_tiles else []
    if stored is None:
        pictures.check()
    table, classes = spec.source.table, spec.source.classes
    engine, decoders = open_engine(spec.model, spec.engine, spec.labels.task, stored)
    recipe = recipe_of(spec.sampling, spec.labels, engine, classes, table=table)
    words = recipe.words or prompt_words(engine, recipe.decoded, classes)
    recipe = inversion_recipe(recipe, engine, timesteps)
    number, names = len(pictures.paths), pictures.names
    lines = [picture_prompt(pictures.captions.get(name, ""), recipe, words, engine, name) for name in names]
    tiles = [len(Tiling.of(each, recipe.size).corners) for each in sides]
    before = (stored["composition"].get("together") if tiles else stored["plan"]["batch_size"]) if stored else 0
    together = spec.batch_size or before or min(engine.suggested_batch(), sum(tiles) or number)
    # a picture in tiles is a batch of its own, so that each is committed when it is done
    size = 1 if tiles else together
    digest = pictures.digest()
    plan = Plan(lines.__getitem__, words, number, spec.prompts.seed, size, digest, number, table=table)
    for request in plan if recipe.attention else ():
        recipe.check_request(request, engine.model.tokenizer)
    document = describe_run({**spec.identity, "sampler": INVERSION}, plan, engine, recipe, decoders)
    document |= {
        "command": "label",
        "composition": {
            "told": f"Labels of {number} pictures from the folder {pictures.folder.resolve().name}",
            "sides": "their own sizes" if tiles else f"{recipe.size} × {recipe.size} pixels",
            **({"together": together} if tiles else {}),  # tiles that are read as one batch
            "source": {
                "path": str(pictures.folder),
                "captions": pictures.captions_file,
                "digests": {"pictures": digest},
            },
        },
    }
    job = Job(
        spec.folder,
        plan,
        engine,
        replace(recipe, facts=row_facts(document)),
        document,
        limit=spec.limit,
        batch_size=spec.batch_size,
        generator=inversion_generator(recipe, pictures, together if tiles else 0),
    )
    if words and not recipe.asks_all:
        unnamed = [name for name, line in zip(names, lines) if pictures.captions.get(name) and not line.classes]
        job = replace(job, unnamed=(len(unnamed), number))
    if tiles:
        calls = sum(ceil(count / together) for count in tiles) / number * recipe.facts["calls"]
        job = replace(job, pixels=sum(width * height for width, height in sides) // number, calls=ceil(calls))
    if stored is not None:
        relocated = relocated_paths(spec.model.model, spec.model.decoder, spec.model.size, stored)
        _check_stored(job, relocated, stored, pictures.folder)
        job = replace(merge_with_stored(job, stored), done=count_rows(job.folder))
    check_room(job)
    return job


def _check_stored(job: Job, relocated: Mapping[str, str], stored: Mapping[str, Any], folder: Path) -> None:
    """Refuses to resume a run folder of other settings, pictures or captions."""
    settings = {**job.document["config"], **relocated}
    before = {"command": made_by(stored), "config": stored["config"]}
    check_same(job.folder, before, {"command": made_by(job.document), "config": settings})
    if stored["composition"]["source"]["digests"] != job.document["composition"]["source"]["digests"]:
        raise Refused(
            f"{job.folder}: it holds labels of other pictures or captions than {folder} has now",
            "Restore them, or choose another --out: pictures that were added need one of their own.",
        )


def parse_timesteps(texts: Sequence[str]) -> tuple[int, ...]:
    """Noise levels of the attention, from the flag."""
    for text in texts:
        if not (text.isdecimal() and int(text) < TRAINING_STEPS):
            raise Refused(
                f"--timesteps: {documents.quote(text)} is not a whole number from 0 to {TRAINING_STEPS - 1}",
                "Write --timesteps 100,300,500.",
            )
    if not texts:
        raise Refused("--timesteps: there are none", "Write --timesteps 100,300,500.")
    return tuple(map(int, texts))
