"""A run folder as a command finds it: what it holds, what is to be done with it, and whether a job may continue it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from datasetdm_fast.config import ENGINES, LABELLER_KINDS
from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.engine import engines
from datasetdm_fast.engine.decoders.config import find_decoders, parts_of
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.jobs.job import Job, build_job, check_room
from datasetdm_fast.runs.jobs.writing import Result, result_of
from datasetdm_fast.runs.run_folder.document import (
    GROWING,
    LEDGER,
    LOCK,
    check_config,
    check_same,
    differences,
    grows,
    row_facts,
)
from datasetdm_fast.runs.run_folder.folder import RunFolder, is_indexed
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, QUARANTINED, Ledger, Row
from datasetdm_fast.runs.run_settings import RunSpec

COMPARED = ("model", "decoders", "packages", "sampling", "plan", "labels")  # parts of run.json that must be equal
MAY_DIFFER = ("name", "source", "licence")  # entries of these parts that change no byte


def prepare_job(spec: RunSpec, stored: Mapping[str, Any] | None, *, mixes: bool = False, dtype: str = "") -> Job:
    """The job of a run whose run.json is `stored`, checked in full; with `mixes` the engine may be a new one for the
    run folder. `dtype` takes the place of `--dtype auto`.
    """
    return continue_job(build_job(spec, stored, dtype), stored, mixes=mixes)


def continue_job(job: Job, stored: Mapping[str, Any] | None, *, mixes: bool = False) -> Job:
    """The job as its run folder, whose run.json is `stored`, goes on; refused where it would fill the disk."""
    if stored is not None:
        job = replace(merge_with_stored(job, stored, mixes=mixes), done=count_rows(job.folder))
    if not job.url:
        check_room(job.folder, job.bytes_needed)
    return job


def merge_with_stored(job: Job, stored: Mapping[str, Any], *, mixes: bool = False) -> Job:
    """The job merged with the run.json of its folder, which has more samples where the run is to grow; other weights
    are refused, and other engines unless `mixes`, which then fills `differing`.

    Which of several equal GPUs continues a run folder, what its memory would hold and where the weights lie change no
    byte.
    """
    config = job.document["config"]
    document = job.document
    # A batch size as the run was started with stands for what its plan made of it: batches of equal size.
    other = job.batch_size if job.may_mix and job.batch_size != stored["config"].get("batch_size") else 0
    if grows(stored["config"], config):
        if (job.folder / LEDGER).exists():
            with Ledger(job.folder / LEDGER, read_only=True) as ledger:
                check_rows(job, ledger.rows(DONE, QUARANTINED, DOUBTFUL, parts=()))
        renewed = ["number", "prompts"]
        if job.may_mix and not other:
            renewed.append("batch_size")
        stored = {
            **stored,
            "config": stored["config"] | {name: config[name] for name in GROWING},
            "plan": stored["plan"] | {name: document["plan"][name] for name in renewed},
        }
    # Of the same settings; how many images are in a batch of theirs also depends on the number and on free memory.
    document = document | {"plan": document["plan"] | {"batch_size": stored["plan"].get("batch_size")}}
    compared = [
        {
            part: {name: value for name, value in source[part].items() if name not in MAY_DIFFER}
            for part in COMPARED
            if part in stored
        }
        for source in (stored, document)
    ]
    check_same(job.place, *compared)
    engine, differing = engine_among(stored, job.recipe.facts["engine"])
    if differing and not (mixes and job.may_mix):
        raise Refused(
            f"{job.place}: it holds a run with other settings ({'; '.join(differing)})",
            "Choose another --out, or continue with the engine and the versions of libraries that it was started with."
            if not job.may_mix or "command" in stored
            else "Run generate once alone, in one process, with --limit 1: it compares the two engines. Then resume.",
        )
    size = other or stored["plan"]["batch_size"]
    facts = row_facts({**stored, "engine": engine, "plan": stored["plan"] | {"batch_size": size}})
    return replace(
        job,
        plan=replace(job.plan, batch_size=size),
        recipe=replace(job.recipe, facts=facts),
        document=dict(stored),
        differing=differing,
    )


def engine_among(stored: Mapping[str, Any], engine: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A run folder's engine that equals this one on whichever GPU; else this engine, and in what it differs."""
    known = [stored["engine"], *(entry["engine"] for entry in stored.get("mixed", ()))]
    *plain, wanted_plain = [
        {name: value for name, value in each.items() if name != "device"} for each in (*known, engine)
    ]
    if wanted_plain in plain:
        return dict(known[plain.index(wanted_plain)]), ()
    return dict(engine), tuple(differences(plain[0], wanted_plain, "engine"))


def count_rows(folder: Path) -> int:
    """Samples the run folder holds, quarantined and dropped ones included."""
    if not (folder / LEDGER).exists():
        return 0
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return ledger.count() + ledger.count(QUARANTINED) + ledger.count_dropped()


def check_rows(job: Job, rows: Iterable[Row]) -> None:
    """Refuses a plan in which an image that the run holds would change."""
    for row in rows:
        planned = job.plan.request(row.request.index, row.recipe.get("turn", 0))
        if planned != row.request:
            changes = "; ".join(differences(asdict(row.request), asdict(planned)))
            raise Refused(
                f"{job.place}: with these settings image {row.request.id} would change ({changes})",
                "Add prompts at the end of the list, which must have been at least as long as the run, or "
                "choose another --out.",
            )


def relocated_paths(model: str, decoder: str, size: int, stored: Mapping[str, Any]) -> dict[str, str]:
    """--model and --decoder as run.json has them, where the same files lie elsewhere now."""
    return _relocated_model(model, stored) | _relocated_decoder(model, decoder, size, stored)


def _relocated_model(model: str, stored: Mapping[str, Any]) -> dict[str, str]:
    before, path = stored["config"].get("model"), Path(model)
    if before is None or model == before or not path.exists():
        return {}
    from datasetdm_fast.engine.loading.folder import folder_digests  # which needs torch
    from datasetdm_fast.engine.loading.model import digest

    try:
        digests = folder_digests(path) if path.is_dir() else {"file": digest([path])}
    except (Refused, Missing, OSError):  # loading states what is wrong with it
        return {}
    return {"model": before} if digests.items() <= stored["model"]["digests"].items() else {}


def _relocated_decoder(model: str, decoder: str, size: int, stored: Mapping[str, Any]) -> dict[str, str]:
    before, digests = stored["config"].get("decoder"), _digests(stored["decoders"])
    if before is None or decoder == before:
        return {}
    try:
        folders = parts_of(decoder)
        if not all(path.is_dir() for path in folders):
            from datasetdm_fast.engine.decoders.upstream import unpack_decoders  # which needs torch, as the next does
            from datasetdm_fast.engine.loading import load_model

            folders = unpack_decoders(decoder, load_model(model, size=size).levels)
        described = engines.describe_decoders(find_decoders(folders), list(digests))
    except (Refused, Missing, KeyError, OSError):  # loading states what is wrong with them
        return {}
    return {"decoder": before} if digests == _digests(described) else {}


def _digests(decoders: Mapping[str, Any]) -> dict[str, str]:
    return {name: decoder["digest"] for name, decoder in decoders.items()}


LEAST_MEASURED = 100  # images; comparing some with the reference would not pay in a shorter run
COMPUTING = ("engine", "dtype", "compile", "batch_size")  # settings that decide no more than how samples round
# whose versions engines name
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "onnxruntime", "openvino")


def find_result(
    spec: RunSpec, stored: Mapping[str, Any] | None, *, is_alone: bool = True, is_dry: bool = False
) -> Result | None:
    """The result of a run with nothing left to do, found without a network; a run of other settings is refused. Index
    files that are not up to date are rebuilt, unless other processes may be about to do it.
    """
    if stored is None:
        return None
    check_config(spec.folder, stored, comparable_settings(spec, stored))
    return settle(spec.folder, stored, spec.number, is_alone=is_alone, is_dry=is_dry)


def comparable_settings(spec: RunSpec, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that must be those of the run folder: what merely computes its samples may be mixed."""
    config, model = stored["config"], spec.model
    settings = {**spec.identity, **relocated_paths(model.model, model.decoder, model.size, stored)}
    if not spec.may_mix:
        return settings
    return settings | {name: config[name] for name in COMPUTING if name in config}


def may_differ(spec: RunSpec, stored: Mapping[str, Any] | None) -> bool:
    """Whether it can be seen without loading the engine that it may be another than the run folder's."""
    if stored is None or not spec.may_mix:
        return False
    config, engine = stored["config"], stored["engine"]
    return any(config.get(name) != spec.identity.get(name) for name in COMPUTING) or any(
        _version(name) != engine[name] for name in LIBRARIES if name in engine
    )


def tries_half(spec: RunSpec, stored: Mapping[str, Any] | None) -> bool:
    """Whether `--dtype auto` compares samples before this run: of a long one that is new and has no labels of other
    packages' labellers.
    """
    if stored is not None or spec.number < LEAST_MEASURED:
        return False
    kind = ENGINES["fast" if spec.engine.engine == "auto" else spec.engine.engine]
    is_default = spec.engine.dtype == "auto" and bool(kind.halves) and not spec.engine.compile
    return is_default and set(spec.labels.task).isdisjoint(LABELLER_KINDS.others)


def settle(
    folder: Path, stored: Mapping[str, Any], number: int, *, is_dry: bool, is_alone: bool = True
) -> Result | None:
    """The result of a run folder in which none of `number` samples is missing, its index files rebuilt."""
    if not (folder / LEDGER).exists():
        return None
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        result = result_of(folder, stored, number, ledger)
        # A process that was killed while it closed the ledger leaves SQLite's own files beside it.
        is_fresh = is_indexed(folder, stored, ledger) and not sqlite.has_log(folder / LEDGER)
    if not result.is_complete and is_alone and not is_dry:
        with storage.hold_lock(folder / LOCK):  # refused now, not once the networks are loaded
            return None
    if not result.is_complete or not (is_fresh or is_alone):
        return None
    if not is_fresh and not is_dry:
        with RunFolder(folder, stored) as opened:
            finish_run(opened)
    return result


def _version(name: str) -> str:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return ""
