"""Labels for pictures that exist: a job whose samples are pictures brought back into the network, not drawn by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import INVERSION, LABELLER_KINDS
from datasetdm_fast.data import Quarantined
from datasetdm_fast.engine.labels.class_tables import digest_of
from datasetdm_fast.engine.labels.names import task_of_label
from datasetdm_fast.engine.labels.tiles import Tiling
from datasetdm_fast.engine.loop import driver, prompts
from datasetdm_fast.engine.loop.inverting import TRAINING_STEPS, inversion_generator, inversion_recipe, picture_prompt
from datasetdm_fast.engine.loop.plan import Plan
from datasetdm_fast.engine.loop.recipe import prompt_words
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.jobs.class_file import own_table
from datasetdm_fast.runs.jobs.job import (
    Job,
    adopt,
    check_room,
    count_rows,
    describe,
    engine_of,
    moved,
    recipe_of,
    row_facts,
)
from datasetdm_fast.runs.jobs.pictures import Pictures, open_pictures
from datasetdm_fast.runs.jobs.run import facts_of
from datasetdm_fast.runs.run_folder.document import LEDGER, check_same, made_by, read_document, table_of
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, QUARANTINED, Ledger
from datasetdm_fast.runs.run_folder.remaking import check_given, remakable
from datasetdm_fast.runs.run_settings import LabelConfig
from datasetdm_fast.settings import flags_of, json_values
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    pass

MOVABLE = ("model", "decoder", "class_table")  # settings of a run whose files may lie elsewhere now
WHOLE = ("depth", "pose")  # tasks that read a picture as a whole; labellers of other packages do, too


def as_stored(config: LabelConfig, given: Collection[str]) -> LabelConfig:
    """The settings a run folder was started with; its pictures, captions, model and decoders may have been moved, and
    others in `given` must agree.
    """
    stored, _ = remakable("label", Path(config.out), config.only)
    source = stored["composition"]["source"]
    decisive = {flag.name: flag.default for flag in flags_of(type(config)) if flag.metadata["identity"]}
    asked = {name: getattr(config, name) for name in decisive if name in given and name not in MOVABLE}
    check_given(Path(config.out), *map(json_values, (decisive | stored["config"], asked)))
    kept = {name: value for name, value in stored["config"].items() if name in decisive}
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    kept.pop("class_table", None)  # the run folder holds its words
    for name in ("model", "decoder"):
        if getattr(config, name) != getattr(LabelConfig, name):
            kept.pop(name, None)
    places = {"images": config.images or source["path"], "captions": config.captions or source.get("captions", "")}
    return replace(config, **kept, **places)


def tileable(config: LabelConfig, given: Collection[str]) -> LabelConfig:
    """The settings with only the labels that can be read from tiles, where `given` names none."""
    whole = [task for task in config.task if task_of_label(task) in (*WHOLE, *LABELLER_KINDS.others)]
    if not config.tiles or not whole:
        return config
    if "task" in given or whole[0] in LABELLER_KINDS.others:
        raise Refused(
            f"--tiles: {whole[0]} needs the whole picture, and a tile shows only a part of it",
            "Leave it out of --task and --labeller, or drop --tiles.",
        )
    return replace(config, task=tuple(task for task in config.task if task not in whole))


def prepare(config: LabelConfig) -> Job:
    """The job of labelling a folder of pictures, checked in full; nothing is written."""
    timesteps = _timesteps(config.timesteps)
    pictures = open_pictures(config.images, config.captions)
    if Path(config.out).resolve().is_relative_to(pictures.folder.resolve()):
        raise Refused(
            f"--out {config.out}: it lies inside {pictures.folder}, so its files would count as pictures",
            "Choose another --out.",
        )
    stored = read_document(Path(config.out))
    if stored is not None and config.only:
        names = _labelled(Path(config.out))
        if len(names) == stored["plan"]["number"]:  # else one that has no row yet may be among the others
            pictures = pictures.among(names)
    sides = pictures.sides() if config.tiles else []
    if stored is None:
        pictures.check()
    engine, decoders = engine_of(config, stored)
    table = own_table(config.class_table) if config.class_table else table_of(stored or {}) if config.only else None
    recipe = recipe_of(config, engine, prompts.check_classes(config.classes), table=table)
    words = recipe.words or prompt_words(engine, recipe.decoded, prompts.check_classes(config.classes))
    recipe = inversion_recipe(recipe, engine, timesteps)
    number, names = len(pictures.paths), pictures.names
    lines = [picture_prompt(pictures.captions.get(name, ""), recipe, words, engine, name) for name in names]
    tiles = [len(Tiling.of(each, recipe.size).corners) for each in sides]
    before = (stored["composition"].get("together") if tiles else stored["plan"]["batch_size"]) if stored else 0
    together = config.batch_size or before or min(engine.suggested_batch(), sum(tiles) or number)
    # a picture in tiles is a batch of its own, so that each is committed when it is done
    size = 1 if tiles else together
    plan = Plan(lines.__getitem__, words, number, config.seed, size, pictures.digest(), number, table=table)
    for request in plan if recipe.attention else ():
        recipe.check_request(request, engine.model.tokenizer)
    identity = json_values(config.identity())
    if table is not None:
        identity["class_table"] = digest_of(table, config.classes)
    composition = _composition(config, pictures, together if tiles else 0, recipe.size)
    document = describe({**identity, "sampler": INVERSION}, plan, engine, recipe, decoders)
    document |= {"command": "label", "composition": composition}
    generator = inversion_generator(recipe, pictures, together if tiles else 0)
    job = Job(config, plan, engine, replace(recipe, facts=row_facts(document)), document, 0, generator=generator)
    if words and not recipe.asks_all:
        unnamed = [name for name, line in zip(names, lines) if pictures.captions.get(name) and not line.classes]
        job = replace(job, unnamed=(len(unnamed), number))
    if tiles:
        calls = sum(ceil(count / together) for count in tiles) / number * recipe.facts["calls"]
        job = replace(job, pixels=sum(width * height for width, height in sides) // number, calls=ceil(calls))
    if stored is not None:
        _check_stored(job, stored)
        job = replace(adopt(job, stored), done=count_rows(config))
    check_room(job)
    return job


def _labelled(folder: Path) -> set[str]:
    """The names of the pictures that a run folder has rows of."""
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        rows = [*ledger.rows(DONE, QUARANTINED, DOUBTFUL, parts=()), *ledger.dropped_rows()]
    return {row.recipe["picture"] for row in rows if "picture" in row.recipe}


def _composition(config: LabelConfig, pictures: Pictures, together: int, size: int) -> dict[str, Any]:
    """What run.json says of the pictures; `together` are the tiles read at once, 0 where whole pictures are."""
    return {
        "told": f"Labels of {len(pictures.paths)} pictures from the folder {pictures.folder.resolve().name}",
        "sides": "their own sizes" if together else f"{size} × {size} pixels",
        **({"together": together} if together else {}),
        "source": {
            "path": str(pictures.folder),
            "captions": config.captions,
            "digests": {"pictures": pictures.digest()},
        },
    }


def _check_stored(job: Job, stored: Mapping[str, Any]) -> None:
    """Refuses to go on with a run folder of other settings, pictures or captions."""
    wanted = job.document["config"] | moved(job.config, stored)
    pairs = ((stored, stored["config"]), (job.document, wanted))
    check_same(job.folder, *({"command": made_by(one), "config": settings} for one, settings in pairs))
    source, folder = job.document["composition"]["source"], job.config.images
    if stored["composition"]["source"]["digests"] != source["digests"]:
        raise Refused(
            f"{job.folder}: it holds labels of other pictures or captions than {folder} has now",
            "Restore them, or choose another --out: pictures that were added need one of their own.",
        )


def _timesteps(given: Sequence[str]) -> tuple[int, ...]:
    """Noise levels of the attention."""
    for text in given:
        if not (text.isdecimal() and int(text) < TRAINING_STEPS):
            raise Refused(
                f"--timesteps: {documents.quote(text)} is not a whole number from 0 to {TRAINING_STEPS - 1}",
                "Write --timesteps 100,300,500.",
            )
    if not given:
        raise Refused("--timesteps: there are none", "Write --timesteps 100,300,500.")
    return tuple(map(int, given))


def remake(job: Job, id: str) -> list[str]:
    """Labels one picture of a run folder again; the files that were missing or damaged."""
    _, row = remakable("label", job.folder, id)
    with RunFolder(job.folder, job.document) as folder:
        batch = job.plan.batch(row.request.index // job.plan.batch_size)
        ((_, results),) = driver.generate([batch], job.engine, job.recipe, make=job.generator)
        result = next(one for one in results if one.request.index == row.request.index)
        if isinstance(result, Quarantined):
            raise GateFailed(
                f"sample {result.request.id}: {result.reason}; nothing was written", "Try another --dtype."
            )
        recorded = replace(result, provenance={**result.provenance, **facts_of(job.recipe, batch)})
        return folder.renew(row, recorded)
