"""A training from its settings: data, decoders, captures, one task after the other."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.locks import cache_folder
from datasetdm_fast.engine.decoders.trunk import Decoder, fold
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.device import slow_in_fp16
from datasetdm_fast.engine.labels.class_file import own_table
from datasetdm_fast.engine.labels.class_tables import ClassTable, digest_of, spoken, words_of
from datasetdm_fast.engine.labels.words import always_named, find_classes
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.pictures.reading import photo_of
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.training import data_record, log, outlines, recipes, word_heads
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.captures.cache import Inversion
from datasetdm_fast.training.captures.targets import check_truth
from datasetdm_fast.training.captures.views import TrainingViews, ViewSettings, check_quirks
from datasetdm_fast.training.held_out import answers, are_enough, split
from datasetdm_fast.training.loop import fit
from datasetdm_fast.training.page import SHOWN
from datasetdm_fast.training.processes import SOLO, Ranks
from datasetdm_fast.training.readers import is_read, open_data
from datasetdm_fast.training.settings import QUIRKS, TrainConfig
from datasetdm_fast.training.task_run import TaskPlan, TaskTraining, read_state
from datasetdm_fast.training.truth.augment import AUGMENTATIONS, Augmentation
from datasetdm_fast.untrusted import documents

SECONDS_PER_LINE = 10.0  # seconds between two lines of progress
LISTED = 20  # bad images that are named


@dataclass(frozen=True)
class TrainingSession:
    config: TrainConfig
    engine: Any
    source: LabelledSource
    ranks: Ranks
    numbers: tuple[int, ...]  # of the items learnt from or held out
    say: Callable[[str], None]
    data: Mapping[str, Any] = field(default_factory=lambda: {"items": []})  # digests of the source's items

    @property
    def timestep(self) -> int:
        return self.engine.model.defaults.capture if self.config.timestep < 0 else self.config.timestep

    @cached_property
    def parts(self) -> tuple[list[int], list[int]]:
        """The items to learn from, and those held out."""
        return split(self.source, self.numbers, self.config.held_out, self.config.seed)

    @cached_property
    def shown(self) -> list[tuple[list[str], str]]:
        """What each item shows, and its caption."""
        return [(_names(self.source, item), item.caption) for item in map(self.source.__getitem__, self.numbers)]

    def cache_plan(self, task: str) -> cache.CachePlan:
        """Whether the captures of all views of a task are kept on the disk."""
        learnt, held = self.parts
        return self._cache_plan(self._looked_at(task, learnt), self._looked_at(task, held, 1))

    def _cache_plan(self, *parts: TrainingViews) -> cache.CachePlan:
        config, engine = self.config, self.engine
        folder = Path(config.cache_dir) if config.cache_dir else cache_folder() / "captures"

        def kept() -> int:
            return sum(cache.kept_bytes(engine, views, self._inversion, folder) for views in parts)

        room = config.cache, config.cache_gb
        return self.ranks.said(cache.plan(folder, engine.model.levels, sum(map(len, parts)), *room, kept))

    @property
    def _inversion(self) -> Inversion:
        config = self.config
        latent = config.latent if config.latent != "auto" else "sample" if config.preset == "upstream" else "mean"
        return Inversion(self.timestep, latent, config.ddim_steps if config.inversion == "ddim" else 0)

    def _looked_at(self, task: str, numbers: Sequence[int], draws: int = 0) -> TrainingViews:
        """Views of some items: as they are learnt from, or so many draws of each as it is."""
        config = self.config
        augment = AUGMENTATIONS["none"] if draws else _augmentation(config, task)
        settings = ViewSettings(draws or config.draws, augment, config.captions, config.seed, frozenset(config.quirks))
        return TrainingViews(self.source, numbers, task, settings)

    def recipe(self, task: str, images: int) -> tuple[recipes.TrainingRecipe, Any]:
        """Decoder and schedule of a task, and the class embeddings it is taught with."""
        config, engine, table = self.config, self.engine, self.source.class_table
        width = engine.model.text_width
        found = recipes.recipe(
            *(task, self.source, engine.model.levels, width, self.timestep, images),
            preset=config.preset,
            pose_head=config.pose_head,
            reader=config.data.partition(":")[0],
            is_varied=_augmentation(config, task).is_recoloured,
        )
        words = (
            engine.encode_classes(spoken(self.source.thing_classes, table)).float().clone()
            if found.config.has_text
            else None
        )
        decoder = replace(found.config, named=self._named(found.config.classes))
        if table is not None and (decoder.named or decoder.has_text):
            decoder = replace(decoder, class_words=words_of(table, self.source.thing_classes))
        changes = {name: getattr(config, name) for name in ("steps", "batch_size", "rate") if getattr(config, name)}
        changes |= {"parts": config.accumulate, "seed": config.seed, "first_word_only": "Q11" in config.quirks}
        schedule = replace(found.schedule, **changes)
        if schedule.batch_size < self.ranks.world:
            raise Refused(
                f"--batch-size: {schedule.batch_size} views cannot be shared by {self.ranks.world} processes",
                "Start fewer, or raise --batch-size.",
            )
        return recipes.TrainingRecipe(decoder, schedule), words

    def _named(self, classes: Sequence[str]) -> tuple[str, ...]:
        """The classes of a decoder that are looked for only where a prompt names them."""
        config, table = self.config, self.source.class_table
        is_wanted = config.by_name == "yes" or (config.by_name == "auto" and self.source.captions_name_all)
        things = [name for name in classes if name in self.source.thing_classes]
        if not (is_wanted and config.captions != "none" and things):
            return ()
        if self.source.captions_name_all:
            said = zip(things, spoken(things, table), strict=True)
            return tuple(name for name, word in said if name in find_classes(photo_of([word]), things, table))
        return always_named(things, self.shown, table)

    def plan(self, task: str) -> TaskPlan:
        """What is taught, with everything that decides the weights."""
        learnt, held = self.parts
        recipe, words = self.recipe(task, len(learnt))
        settings = self.config.identity() | {
            "timestep": self.timestep,
            "model_digests": self.engine.model.digests,
            "images": len(learnt),
            "left_out": "",
        }
        if self.config.images:
            settings["listed"] = storage.sha256_of(Path(self.config.images))[:12]
        if self.source.class_table is not None:
            settings["class_table"] = digest_of(self.source.class_table, self.source.thing_classes)
        for name in ("task", "steps", "batch_size", "rate", "skip_bad"):  # said by the recipe, or by what is left out
            del settings[name]
        if skipped := self.source.skipped:
            names = "\n".join(sorted(skipped)).encode(errors="surrogateescape")
            settings["left_out"] = f"{len(skipped)} images, {hashlib.sha256(names).hexdigest()[:12]}"
        settings |= {"task": task, "held_out_images": len(held)}
        settings = json.loads(json.dumps({"decoder": recipe.config.values, **asdict(recipe.schedule), **settings}))
        taught_anew = partial(self._taught_anew, task, words is not None)
        return TaskPlan(recipe.config, recipe.schedule, words, settings, self.data, taught_anew)

    def _taught_anew(self, task: str, asks_words: bool) -> str:
        """A picture whose caption is made of its labels and of which looks leave something out, or that shows a crowd
        where words are asked for; empty if there is none.
        """
        how = _augmentation(self.config, task)
        is_changed = how.has_crops or how.rotated or how.zoom > 1 or how.pasted
        for index in self.numbers:
            item, is_captioned = self.source[index], self.config.captions != "none"
            is_named = is_captioned and item.named is not None
            is_other = is_named and (is_changed or item.named != self.source.whole(index).named)
            if is_other or (asks_words and item.crowds is not None and len(item.crowds)):
                return self.source.name(self.source.order[index])
        return ""

    def views(
        self,
        task: str,
        numbers: Sequence[int],
        draws: int = 0,
        plan: cache.CachePlan | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> TrainingViews:
        """Views of some items with their captures, made now where they are kept."""
        ranks, views, inversion = self.ranks, self._looked_at(task, numbers, draws), self._inversion
        plan = plan or self._cache_plan(views)
        if not plan.is_stored:
            return views.with_captures(cache.RecomputedCaptures(self.engine, views, inversion))
        share = (ranks.rank, ranks.world)
        found = None
        try:
            found = cache.stored(self.engine, views, inversion, plan.folder, share, progress=progress)
        except _Stopped:
            pass  # told to the others below, who wait for this share
        if ranks.any(found is None):
            raise _Stopped
        return views.with_captures(found)

    def announce(self, plans: dict[str, TaskPlan], results: dict[str, Any], folds: int = 0) -> None:
        config, (learnt, held), how = self.config, self.parts, data_record.framed(self.framing)
        self.say(f"data       {config.data}")
        self.say(
            f"images     {len(learnt)} to learn from in {count_noun(config.draws, 'view')} each, {len(held)} held out, "
            f"{self.engine.model.size} pixels a side{f' ({how})' if how else ''}"
        )
        self.say(f"captures   {self.cache_plan(next(iter(plans)))}")
        for task, plan in plans.items():
            steps, batch = plan.schedule.steps, plan.schedule.batch_size
            done = " - finished" if results[task] is not None else ""
            what = f"{plan.decoder.kind} decoder, {count_noun(steps, 'step')} of {count_noun(batch, 'view')}"
            self.say(f"{task:<10} {what}{self._patience()}{done}")
        if folds:
            self.say(f"folds      {folds} more decoders of each kind, each to judge a share of the images")
            for task, plan in plans.items():
                self.say(f"{task:<10} {self._time_of_folds(task, plan, folds, results[task] is not None)}")
        for name in sorted(config.quirks):
            self.say(f"{name}        {QUIRKS[name]}")

    def _patience(self) -> str:
        """When the training stops before its last step."""
        config = self.config
        if not (config.patience and are_enough(len(self.parts[1]))):
            return ""
        return f", fewer once {config.patience} of {config.checks} evaluations in turn bring no improvement"

    def _time_of_folds(self, task: str, plan: TaskPlan, folds: int, is_finished: bool) -> str:
        """How many steps the folds take with the decoder itself, and how long, where a log of these steps tells it."""
        steps, learnt, config = plan.schedule.steps, len(self.parts[0]), self.config
        of_fold = steps
        if config.preset == "upstream" and not config.steps:  # by images
            images = round(len(self.numbers) * (1 - 1 / folds))
            held = round(config.held_out * images)
            of_fold = round(steps / learnt * (images - held if are_enough(held) else images))
        whole = folds * of_fold + (0 if is_finished else steps)
        each = log.seconds_of_step(Path(self.config.out) / task / "training")
        time_of_all = f", about {format_duration(each * whole)} by the steps that were taken" if each else ""
        return f"{whole} steps in all, {whole / steps:.2g} times those of one decoder{time_of_all}"

    @cached_property
    def framing(self) -> dict[str, Any]:
        """How the pictures are brought to the model's size."""
        rule = data_record.PERSON if self.source.shows_persons else self.config.framing
        return data_record.framing(self.data, len(self.source), self.engine.model.size, rule)

    def training(
        self,
        folder: Path,
        plan: TaskPlan,
        is_stopping: Callable[[], bool],
        command: str = "",
        folds: dict[str, Any] | None = None,
        is_finished: bool = False,
    ) -> TaskTraining | None:
        """The training of a task with its captures at hand, or None where the making of them was stopped. `command` and
        `folds`, the figures of cross-validation, are for its page; of one that `is_finished` only what the page shows
        is opened.
        """
        (learnt, held), task = self.parts, plan.decoder.task
        if is_finished:
            learnt, held = [], held[:SHOWN]
        count = len(learnt) * self.config.draws + len(held)
        choice, began, told = self._as_begun(folder, task), time.monotonic(), time.monotonic()
        done = 0

        def progress(views: int) -> None:
            nonlocal done, told
            done += views
            if is_stopping():
                raise _Stopped
            if time.monotonic() - told >= SECONDS_PER_LINE:
                told = time.monotonic()
                share = done * self.ranks.world / count
                left = format_duration((told - began) * max(1 / share - 1, 0))
                self.say(f"captures {min(share, 1):.0%}, about {left} left")

        try:
            lessons = self.views(task, learnt, plan=choice, progress=progress)
            judged = self.views(task, held, 1, choice, progress) if held else None
        except _Stopped:
            return None
        model, device = self.engine.model, self.engine.device
        given = (folder, plan, lessons, judged, self.config, self.framing, device, model.tokenizer)
        return TaskTraining(*given, command, folds)

    def _as_begun(self, folder: Path, task: str) -> cache.CachePlan:
        """The plan with captures kept or not as when the training began, as half precision decides bits; until its
        captures were made, it has not begun.
        """
        plan, path = self.cache_plan(task), folder / "training" / "captures.json"
        has_begun = storage.is_there(path.with_name("settings.json"))
        if self.ranks.is_first and not (has_begun and path.exists()):
            storage.publish({path: json.dumps({"are_kept": plan.is_stored}).encode()})
        self.ranks.wait()
        are_kept = read_state(path, {"are_kept": bool})["are_kept"]
        if self.config.cache != "auto" and are_kept != plan.is_stored:
            raise Refused(
                f"--cache {self.config.cache}: {folder} was started with captures "
                f"{'kept on the disk' if are_kept else 'made anew at every step'}",
                "Leave --cache out, or choose another --out.",
            )
        return replace(plan, is_stored=are_kept)


class _Stopped(Exception):
    """A signal came while captures were made; those that are there stay."""


def _check_apart(config: TrainConfig) -> None:
    """Refuses to begin a training in its data, whose reader would take the decoder's folders and files for labels."""
    for task in config.task:
        folder = Path(config.out) / task
        has_begun = storage.is_there(folder / "training" / "settings.json")
        if not has_begun and is_read(config.data, folder):
            raise Refused(
                f"--out: {folder} lies in the data, {config.data}, where a decoder's files can be taken for labels",
                "Choose an --out beside the data.",
            )


def _check_together(config: TrainConfig) -> None:
    """Refuses to train labels together that are not read from the same pictures."""
    alone = [task for task in config.task if TASKS[task].sees_one_person(config.data)]
    if alone and len(config.task) > 1:
        raise Refused(
            f"--task: {alone[0]} learns from one person of coco: at a time, the others from whole images",
            f"Train it by itself, with the same --out: --task {alone[0]}.",
        )


def _table(path: str, source: LabelledSource) -> ClassTable:
    """The words of the user's own for the classes of the data."""
    table = own_table(path)
    if not words_of(table, source.thing_classes)[:-1]:
        raise Refused(
            f"--class-table {path}: holds none of the data's classes",
            f"Name them as the data does: {', '.join(source.thing_classes[:20]) or 'it has no things'}.",
        )
    return table


def _augmentation(config: TrainConfig, task: str) -> Augmentation:
    """The one that is asked for or that of the data set, in its form for the task where there is one."""
    kind = config.data.partition(":")[0].removesuffix("-mm") if config.augment == "auto" else config.augment
    return AUGMENTATIONS.get(f"{kind}-{task}") or AUGMENTATIONS.get(kind) or AUGMENTATIONS["flip"]


def _names(source: LabelledSource, item: Labelled) -> list[str]:
    """The things a labelled image shows."""
    if item.mask_classes is not None:
        return sorted({source.thing_classes[k] for k in item.mask_classes})
    return [name for name, _ in source.things_of(item)]


def train_on(engine, source: LabelledSource, task: str, count: int, **settings: Any) -> Decoder:
    """A decoder for `task`, ready for inference, taught from the first `count` items of `source` as the command would.

    Captures of an image are shared by every count, task and later run; `settings` are further fields of TrainConfig.
    """
    return fold(taught(engine, source, task, count, **settings)).requires_grad_(False)


def taught(engine, source: LabelledSource, task: str, count: int, *, held_out: float = 0.0, **settings: Any) -> Decoder:
    """The same decoder before it is made ready, to be kept with save_decoder."""
    config = TrainConfig(task=(task,), held_out=held_out, quiet=True, **settings)
    config.check()
    if not 1 <= count <= len(source):
        raise Refused(
            f"{task}: {count} images to learn from, expected 1 to {len(source)}, which the data set has",
            "Choose another number, or data with more images.",
        )
    learnt, _ = split(source, range(count), held_out, config.seed)
    session = TrainingSession(config, engine, source, SOLO, tuple(learnt), lambda line: None)
    recipe, words = session.recipe(task, len(learnt))
    views = session.views(task, learnt)
    decoder = fit(recipe.config, views, recipe.schedule, words, device=engine.device)
    if config.by_word == "auto":
        decoder.config = word_heads.learnt(views, recipe.config, engine.model.tokenizer).given_to(recipe.config)
    given = (decoder, views, words, engine.model.size, engine.device, engine.model.tokenizer)
    decoder.config = outlines.chosen(config, decoder.config, views, lambda some: answers(*given, views=some))
    return decoder


def open_session(config: TrainConfig, ranks: Ranks) -> TrainingSession:
    """Model, data and engine of the command, checked."""
    _check_apart(config)
    _check_together(config)
    model = load_model(config.model, size=config.size, allow_download=config.allow_download)
    options = {"selection": config.selection(), "skip_bad": config.skip_bad, "framing": config.framing}
    source = open_data(config.data, model.size, tasks=config.task, **options)
    if config.class_table:
        source.class_table = _table(config.class_table, source)
    if config.skip_bad:
        source = source.readable()
    for task in config.task:
        check_truth(source, task, config.data)
    check_quirks(config.quirks, source, config.task)
    steps = model.scheduler.get("num_train_timesteps", 1000)
    if config.timestep >= steps:
        raise Refused(
            f"--timestep: {config.timestep} is not one of the model's {steps}",
            f"Give a number from 0 to {steps - 1}, or -1 for the model's default.",
        )
    is_auto = config.engine == "torch" or (config.engine in ("auto", "fast") and config.device != "cpu")
    engine = build_engine(config.engine, model, {}, dtype="auto" if is_auto else "fp32", device=config.device)
    if config.dtype == "fp16" and engine.device.type == "cpu":
        raise slow_in_fp16("--dtype")

    def say(line: str) -> None:
        if ranks.is_first and not config.quiet:
            print(line, file=sys.stderr, flush=True)

    for name, reason in list(source.skipped.items())[:LISTED]:
        said = reason if reason.startswith(f"{name}: ") else f"{name}: {reason}"
        say(f"left out   {documents.one_line(said)}")
    if len(source.skipped) > LISTED:
        say(f"left out   {len(source.skipped)} in all")
    told = time.monotonic()

    def progress(done: int) -> None:
        nonlocal told
        if time.monotonic() - told >= SECONDS_PER_LINE:
            told = time.monotonic()
            say(f"data       {done} of {len(source)} images read")

    data = ranks.said(data_record.record(source, progress) if ranks.is_first else None)
    source.digests = {source.order[k]: item["image"] for k, item in enumerate(data["items"])}
    return TrainingSession(config, engine, source, ranks, tuple(range(len(source))), say, data)
