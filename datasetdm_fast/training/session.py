"""A training from its settings: data, decoders, captures, one task after the other."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasetdm_fast.decoders.trunk import Decoder, fold
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.locks import cache_folder
from datasetdm_fast.engines import build_engine
from datasetdm_fast.errors import Refused
from datasetdm_fast.foreign import documents
from datasetdm_fast.labels.class_tables import spoken
from datasetdm_fast.labels.words import always_named
from datasetdm_fast.lessons import cache
from datasetdm_fast.lessons.augment import AUGMENTATIONS
from datasetdm_fast.lessons.cache import Inversion
from datasetdm_fast.lessons.targets import check_shown, check_truth
from datasetdm_fast.lessons.views import Looks, Views, check_quirks
from datasetdm_fast.loading import load_model
from datasetdm_fast.readers import open_data
from datasetdm_fast.training import recipes
from datasetdm_fast.training.held_out import split
from datasetdm_fast.training.loop import TrainingViews, fit
from datasetdm_fast.training.processes import SOLO, Ranks
from datasetdm_fast.training.settings import QUIRKS, TrainConfig
from datasetdm_fast.training.task_run import TaskTraining, settings_of
from datasetdm_fast.truth.labelled import LabelledSource

SECONDS_PER_LINE = 10.0  # seconds between two lines of progress
LISTED = 20  # bad images that are named


@dataclass(frozen=True)
class TrainingSession:
    """What the training of every task is made from."""

    config: TrainConfig
    engine: Any
    source: LabelledSource
    ranks: Ranks
    numbers: tuple[int, ...]  # of the items learnt from or held out
    say: Callable[[str], None]
    shown: list[tuple[list[str], str]] = field(
        default_factory=list
    )  # what each item shows, and its caption, once somebody asked


def train_on(engine, source: LabelledSource, task: str, count: int, **settings: Any) -> Decoder:
    """A decoder for `task`, ready for inference, taught from the first `count` items of `source` as the command would.

    Captures of an image are shared by every count, task and later run; `settings` are further fields of TrainConfig.
    """
    return fold(taught(engine, source, task, count, **settings)).requires_grad_(False)


def taught(
    engine,
    source: LabelledSource,
    task: str,
    count: int,
    *,
    steps: int = 0,
    seed: int = 0,
    held_out: float = 0.0,
    cache_dir: str = "",
    **settings: Any,
) -> Decoder:
    """The same decoder before it is made ready, to be kept with save_decoder."""
    config = TrainConfig(
        task=(task,), steps=steps, seed=seed, held_out=held_out, cache_dir=cache_dir, quiet=True, **settings
    )
    config.check()
    if not 1 <= count <= len(source):
        raise Refused(f"{task}: {count} images to learn from, expected 1 to {len(source)}, which the data set has")
    learnt, _ = split(range(count), held_out, seed)
    session = TrainingSession(config, engine, source, SOLO, tuple(learnt), lambda line: None)
    recipe, words = _recipe(session, task, len(learnt))
    return fit(recipe.config, _lessons(session, task, learnt), recipe.schedule, words, device=engine.device)


def _session(config: TrainConfig, ranks: Ranks) -> TrainingSession:
    model = load_model(config.model, size=config.size, allow_download=config.allow_download)
    source = open_data(
        config.data,
        model.size,
        tasks=config.task,
        selection=config.selection(),
        skip_bad=config.skip_bad,
        framing=config.framing,
    )
    if config.skip_bad:
        source = _readable(source, config.data)
    for task in config.task:
        check_truth(source, source[0], task, config.data)
        check_shown(source, task, config.data)
    check_quirks(config.quirks, source, config.task)
    if config.timestep >= model.scheduler.get("num_train_timesteps", 1000):
        raise Refused(
            f"--timestep: {config.timestep} is not one of the model's "
            f"{model.scheduler.get('num_train_timesteps', 1000)}"
        )
    dtype = "auto" if config.engine in ("auto", "fast") and config.device != "cpu" else "fp32"
    engine = build_engine(
        config.engine, model, {}, dtype=dtype if config.engine != "torch" else "auto", device=config.device
    )

    def say(line: str) -> None:
        if ranks.is_first and not config.quiet:
            print(line, file=sys.stderr, flush=True)

    for name, reason in list(source.skipped.items())[:LISTED]:
        say(f"left out   {documents.one_line(name)}: {documents.one_line(reason)}")
    if len(source.skipped) > LISTED:
        say(f"left out   {len(source.skipped)} in all")
    return TrainingSession(config, engine, source, ranks, tuple(range(len(source))), say)


def _readable(source: LabelledSource, spec: str) -> LabelledSource:
    """The items that can be read; the others are in `skipped` with the reason."""
    found = source.readable()
    if not len(found):
        raise Refused(
            f"--data {spec}: none of {len(source)} images can be read; {next(iter(source.skipped.values()))}",
            "mend the files, or name other data",
        )
    return found


def _augmentation(config: TrainConfig, task: str) -> str:
    if config.augment != "auto":
        return config.augment
    kind = config.data.partition(":")[0].removesuffix("-mm")
    return next((name for name in (f"{kind}-{task}", kind) if name in AUGMENTATIONS), "flip")


def _timestep(session: TrainingSession) -> int:
    return session.engine.model.defaults.capture if session.config.timestep < 0 else session.config.timestep


def _recipe(session: TrainingSession, task: str, images: int) -> tuple[Any, Any]:
    """Decoder and schedule of a task, and the class embeddings it is taught with."""
    config, engine = session.config, session.engine
    width = engine.model.text_encoder.config.hidden_size
    found = recipes.recipe(
        *(task, session.source, engine.model.levels, width, _timestep(session), images),
        preset=config.preset,
        pose_head=config.pose_head,
        reader=config.data.partition(":")[0],
    )
    words = (
        engine.encode_classes(spoken(session.source.thing_classes)).float().clone() if found.config.has_text else None
    )
    found = replace(found, config=replace(found.config, named=_named(session, found.config.classes)))
    changes = {name: getattr(config, name) for name in ("steps", "batch_size", "rate") if getattr(config, name)}
    schedule = replace(
        found.schedule, **changes, parts=config.accumulate, seed=config.seed, first_word_only="Q11" in config.quirks
    )
    if schedule.batch_size < session.ranks.world:
        raise Refused(
            f"--batch-size: {schedule.batch_size} views cannot be shared by {session.ranks.world} processes",
            "start fewer, or raise --batch-size",
        )
    return replace(found, schedule=schedule), words


def _named(session: TrainingSession, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes of a decoder that are looked for only where a prompt names them."""
    config, source = session.config, session.source
    is_wanted = config.by_name == "yes" or (config.by_name == "auto" and config.data.startswith("demo:"))
    things = [name for name in classes if name in source.thing_classes]
    if not is_wanted or config.captions != "true" or not things:
        return ()
    if not session.shown:
        session.shown.extend(
            (_names(source, item), item.caption) for item in (source[number] for number in session.numbers)
        )
    return always_named(things, session.shown)


def _names(source: LabelledSource, item) -> list[str]:
    """The things a labelled image shows."""
    if item.mask_classes is not None:
        return sorted({source.thing_classes[k] for k in item.mask_classes})
    return [
        name for k, name in enumerate(source.classes) if name in source.thing_classes and (item.semantic == k).any()
    ]


def _planned(session: TrainingSession, task: str) -> tuple[Any, dict[str, Any], Any]:
    """Recipe, everything that decides the weights, and the class embeddings."""
    learnt, held = split(session.numbers, session.config.held_out, session.config.seed)
    recipe, words = _recipe(session, task, len(learnt))
    others = {
        **session.config.identity(),
        "timestep": _timestep(session),
        "model_digests": session.engine.model.digests,
        "images": len(learnt),
    }
    for name in ("task", "steps", "batch_size", "rate"):  # said by the recipe, task by task
        del others[name]
    if not others.pop("skip_bad") or not session.source.skipped:
        others["left_out"] = ""
    else:
        names = "\n".join(sorted(session.source.skipped))
        others["left_out"] = (
            f"{len(session.source.skipped)} images, "
            f"{hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest()[:12]}"
        )
    return (
        recipe,
        settings_of(recipe.config, recipe.schedule, others | {"task": task, "held_out_images": len(held)}),
        words,
    )


def _lessons(
    session: TrainingSession,
    task: str,
    numbers: Sequence[int],
    draws: int = 0,
    plan=None,
    progress: Callable[[int], None] = lambda count: None,
):
    """Views of some items with their captures, made now where they are kept."""
    config = session.config
    looks = Looks(
        draws or config.draws,
        AUGMENTATIONS["none" if draws else _augmentation(config, task)],
        config.captions,
        config.seed,
        frozenset(config.quirks),
    )
    views = Views(session.source, numbers, task, looks)
    plan = plan or _cache_plan(session, len(views))
    if not plan.is_stored:
        return TrainingViews(cache.RecomputedCaptures(session.engine, views, _inversion(session)), views)
    found = cache.stored(
        session.engine,
        views,
        _inversion(session),
        plan.folder,
        (session.ranks.rank, session.ranks.world),
        progress=progress,
    )
    session.ranks.wait()
    return TrainingViews(found, views)


def _inversion(session: TrainingSession):
    config = session.config
    latent = config.latent if config.latent != "auto" else "sample" if config.preset == "upstream" else "mean"
    return Inversion(_timestep(session), latent, config.ddim_steps if config.inversion == "ddim" else 0)


def _cache_plan(session: TrainingSession, count: int):
    folder = Path(session.config.cache_dir) if session.config.cache_dir else cache_folder() / "captures"
    found = cache.plan(folder, session.engine.model.levels, count, session.config.cache, session.config.cache_gb)
    return session.ranks.said(found)


def _announce(session: TrainingSession, plans: dict[str, Any], results: dict[str, Any]) -> None:
    config = session.config
    learnt, held = split(session.numbers, config.held_out, config.seed)
    count = len(learnt) * config.draws + len(held)
    session.say(
        f"images     {len(learnt)} to learn from in {config.draws} looks each, {len(held)} held out, "
        f"{session.engine.model.size} pixels a side"
    )
    session.say(f"captures   {_cache_plan(session, count)}")
    for task, (recipe, _, _) in plans.items():
        steps, batch = recipe.schedule.steps, recipe.schedule.batch_size
        done = " - finished" if results[task] is not None else ""
        session.say(f"{task:<16}{recipe.config.kind} decoder, {steps} steps of {batch} views{done}")
    for name in sorted(config.quirks):
        session.say(f"{name}        {QUIRKS[name]}")


def _training(
    session: TrainingSession, folder: Path, task: str, plan: tuple, is_stopping: Callable[[], bool]
) -> TaskTraining | None:
    """The task's course with its captures at hand, or None where the making of them was stopped."""
    config, (recipe, settings, words) = session.config, plan
    learnt, held = split(session.numbers, config.held_out, config.seed)
    count = len(learnt) * config.draws + len(held)
    choice, began, told = _as_begun(session, folder, _cache_plan(session, count)), time.monotonic(), time.monotonic()
    done = 0

    def progress(views: int) -> None:
        nonlocal done, told
        done += views
        if is_stopping():
            raise _Stopped
        if time.monotonic() - told >= SECONDS_PER_LINE:
            told = time.monotonic()
            share = done * session.ranks.world / count
            session.say(f"captures {min(share, 1):.0%}, about {(told - began) * max(1 / share - 1, 0):.0f} s left")

    try:
        lessons = _lessons(session, task, learnt, plan=choice, progress=progress)
        judged = _lessons(session, task, held, 1, choice, progress) if held else None
    except _Stopped:
        return None
    return TaskTraining(
        *(folder, recipe.config, recipe.schedule, lessons, judged, words, session.engine.model.size, settings),
        checks=config.checks,
        patience=config.patience,
        storage=config.storage,
        save_every=config.save_every,
        device=session.engine.device,
        dtype=_dtype(config, session.engine.device),
    )


def _as_begun(session: TrainingSession, folder: Path, plan):
    """The plan with captures kept or not as when the training began, as half precision decides bits."""
    path = folder / "training" / "captures.json"
    if session.ranks.is_first and not path.exists():
        storage.publish({path: json.dumps({"are_kept": plan.is_stored}).encode()})
    session.ranks.wait()
    are_kept = bool(json.loads(storage.read(path, 2**16))["are_kept"])
    if session.config.cache != "auto" and are_kept != plan.is_stored:
        raise Refused(
            f"--cache {session.config.cache}: {folder} was begun with captures "
            f"{'kept on the disk' if are_kept else 'made anew at every step'}",
            "leave --cache out, or choose another --out",
        )
    return replace(plan, is_stored=are_kept)


class _Stopped(Exception):
    """A signal came while captures were made; those that are there stay."""


def _dtype(config: TrainConfig, device) -> str:
    return ("bf16" if device.type == "cuda" else "fp32") if config.dtype == "auto" else config.dtype
