"""Two engines over one loaded model, for a comparison outside of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasetdm_fast.data import Request
from datasetdm_fast.engine.engines import build_engine, check_engine, opening
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.labels.names import by_task
from datasetdm_fast.engine.loop.checks import check_seed, check_tasks
from datasetdm_fast.engine.loop.plan import make_plan
from datasetdm_fast.engine.loop.recipe import Recipe, make_recipe, prompt_words
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.prompt_files import read_source
from datasetdm_fast.runs.run_folder.document import differences, engines_of, require_document
from datasetdm_fast.runs.run_settings import PromptSettings
from datasetdm_fast.settings import EngineSettings, ModelSettings, SamplingSettings


def open_pair(
    model: ModelSettings, settings: EngineSettings, against: str, labels: Sequence[str]
) -> tuple[Engine, Engine, Mapping[str, Mapping[str, str]]]:
    """The engine to check, the one to compare with, and the description of their decoders. Both read the modules of one
    loaded model, so that equal weights need not be assumed.
    """
    plans = {"engines": settings.engines, "trt_flavour": settings.trt_flavour}
    options = {"provider": settings.provider, "streams": settings.streams, "compile": settings.compile}
    reference_plans = plans if against == "trt" else {}
    if settings.engine == "trt" or not reference_plans:
        options |= plans
    check_engine(against, **reference_plans)
    check_engine(settings.engine, **options)
    if labels:
        check_tasks(labels)
    reference, decoders = opening.open_engine(
        model.model,
        None if model.decoder == "none" else model.decoder,
        labels or None,
        engine=against,
        device=settings.device,
        size=model.size,
        allow_download=model.allow_download,
        threads=settings.threads,
        **reference_plans,
    )
    engine = build_engine(
        settings.engine,
        reference.model,
        reference.decoders,
        dtype=settings.dtype,
        device=settings.device,
        **options,
    )
    if engine.fingerprint() == reference.fingerprint():
        raise Refused(
            f"--against {against}: it is the engine to check itself, in the same precision, so nothing can be compared",
            "Choose another engine for one of the two.",
        )
    return engine, reference, decoders


def choose_requests(
    reference: Engine, prompts: PromptSettings, sampling: SamplingSettings
) -> tuple[Recipe, list[Request]]:
    """The recipe of all labels that the decoders make, and the first requests of the prompts."""
    check_seed(prompts.seed, prompts.number)
    source = read_source(prompts, has_captions=True)
    labels = tuple(by_task(reference.decoders))
    steps = {name: getattr(sampling, name) for name in ("sampler", "steps", "guidance", "profile")}
    recipe = make_recipe(reference, labels, classes=source.classes, **steps)
    words = recipe.words or prompt_words(reference, labels, source.classes)
    number, tokenizer = prompts.number, reference.model.tokenizer
    plan = make_plan(source, tokenizer, number=number, seed=prompts.seed, batch_size=number, words=words)
    return recipe, [plan.request(k) for k in range(number)]


def check_made_by(run: Path, engine: Engine, decoders: Mapping[str, Mapping[str, str]]) -> None:
    """Refuses a run of another engine or of other weights: its run.json and card would claim the verdict on these."""
    document, maker = require_document(run), engine.fingerprint()
    stored = document["decoders"]
    changes = [
        *differences(document["model"]["digests"], dict(engine.model.digests), "model"),
        *differences(
            {label: row["digest"] for label, row in stored.items() if label in decoders},
            {label: row["digest"] for label, row in decoders.items() if label in stored},
            "decoders",
        ),
        *differences(document["sampling"]["size"], engine.model.size, "size"),
    ]
    makers = [(each.get("engine"), each.get("dtype")) for each in engines_of(document)]
    if (maker["engine"], maker["dtype"]) not in makers:
        names = ", ".join(" ".join(filter(None, pair)) for pair in makers)
        changes.append(f"engine: {names} there, {maker['engine']} {maker['dtype']} asked for")
    if changes:
        raise Refused(
            f"--run {run}: it was made otherwise than what is to be compared ({'; '.join(changes)})",
            "Give its own --model, --decoder, --size, --engine and --dtype, or drop --run.",
        )
