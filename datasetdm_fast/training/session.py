"""The training session of a command: model, data and engine, from which views, plans and trainings are made."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.backbones.flow_models import spread_blocks
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.labels.class_tables import always_named, digest_of, find_classes, photo_of, spoken, words_of
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, Picture
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.jobs.prompt_files import own_table
from datasetdm_fast.runs.run_folder.document import DOCUMENT
from datasetdm_fast.training import data_record
from datasetdm_fast.training.captures import cache
from datasetdm_fast.training.captures.targets import check_truth
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.evaluation import naming
from datasetdm_fast.training.predictions import Predictor
from datasetdm_fast.training.readers import READERS, check_address, is_read, open_data
from datasetdm_fast.training.recipes import TrainingRecipe, adjust, recipe
from datasetdm_fast.training.settings import (
    CacheSettings,
    Inversion,
    ModelChoice,
    RecipeSettings,
    TaskSettings,
    TrainingData,
    ViewSettings,
)
from datasetdm_fast.training.splits import split
from datasetdm_fast.training.task_training import TaskPlan, TaskTraining, read_state
from datasetdm_fast.training.truth import windows
from datasetdm_fast.training.truth.augment import AUGMENTATIONS, Augmentation
from datasetdm_fast.training.truth.selection import UPSTREAM_SIDE, least_mask
from datasetdm_fast.untrusted import documents

SECONDS_PER_LINE = 10.0  # seconds between two lines of progress
MOST_LISTED = 20  # bad images that are named
LEAST_CAPTIONS = 20  # below which they may name what images show by chance
PERSON = "person"  # the framing of items that each show one person of a picture


@dataclass(frozen=True)
class TrainingSession:
    address: str
    engine: Any
    source: LabelledSource
    numbers: tuple[int, ...]  # of the items trained on or held out
    view_settings: ViewSettings = ViewSettings()
    augment: str = "auto"
    inversion: Inversion = Inversion()
    cache_settings: CacheSettings = CacheSettings()
    recipe_settings: RecipeSettings = RecipeSettings()
    held_out: float = 0.0  # share
    identity: Mapping[str, Any] = field(default_factory=dict)  # settings of the command that decide the weights
    data: Mapping[str, Any] = field(default_factory=lambda: {"items": []})  # the data record
    on_message: Callable[[str], None] = lambda line: None

    @cached_property
    def split(self) -> tuple[list[int], list[int]]:
        """The items to train on, and those held out."""
        return split(self.source, self.numbers, self.held_out, self.view_settings.seed)

    @cached_property
    def framing(self) -> dict[str, Any]:
        """How images are brought to the model's size, and of how many that changes something."""
        sides, size = [item["sides"] for item in self.data["items"]], self.engine.model.size
        is_person = self.source.shows_persons  # in a square around each, whatever the sides of its picture
        return {
            "pixels_a_side": size,
            "framing": PERSON if is_person else self.source.framing,
            "pictures": len(self.source),
            "scaled": sum(is_person or each != [size, size] for each in sides),
            "cut_to_a_square": sum(is_person or width != height for width, height in sides),
        }

    def augmentation(self, task: str) -> Augmentation:
        """The requested one or that of the data set, in its form for the task where there is one."""
        kind = self.address.partition(":")[0].removesuffix("-mm") if self.augment == "auto" else self.augment
        forms = (f"{kind}-{task}", f"{kind}-{TASKS[task].shown_by}", kind)
        return next((AUGMENTATIONS[form] for form in forms if form in AUGMENTATIONS), AUGMENTATIONS["flip"])

    def reading(self, blocks: Sequence[Sequence[int]]) -> Self:
        """The session with an engine that captures these blocks for the levels low, mid and high."""
        engine, model = self.engine, self.engine.model.reading(blocks)
        options = {"dtype": engine.fingerprint()["dtype"], "device": str(engine.device)}
        return replace(self, engine=build_engine(engine.name, model, {}, **options))

    def plain_views(self, task: str, numbers: Sequence[int], draws: int = 0) -> TrainingViews:
        """Views of some items without captures: as they are trained on, or so many draws of each, not augmented."""
        augmentation = AUGMENTATIONS["none"] if draws else self.augmentation(task)
        settings = replace(self.view_settings, draws=draws or self.view_settings.draws, augmentation=augmentation)
        return TrainingViews(self.source if draws else self._cropped, numbers, task, settings)

    @property
    def _other_crops(self) -> str:
        """The rule of the crops of --augment, where it is that of another data set."""
        rule, rules = windows.RULE_OF.get(self.augment, self.augment), windows.RULES
        return rule if rule in rules and rules[rule] != rules[getattr(self.source, "rule", rule)] else ""

    @cached_property
    def _cropped(self) -> LabelledSource:
        """The data set, whose crops are those that the augmentation names."""
        if not self._other_crops:
            return self.source
        source: Any = copy.copy(self.source)
        source.rule = self._other_crops
        return source

    def cache_plan(self, task: str) -> cache.CachePlan:
        """Whether the captures of all views of a task are cached on the disk."""
        training, held_out = self.split
        return self._cache_plan(self.plain_views(task, training), self.plain_views(task, held_out, 1))

    def _cache_plan(self, *parts: TrainingViews) -> cache.CachePlan:
        settings, levels = self.cache_settings, self.engine.model.levels
        is_given = settings.cache_dir or settings.cache == "off"
        folder = Path(settings.cache_dir) if is_given else storage.cache_folder() / "captures"

        def cached_bytes() -> int:
            return sum(cache.cached_bytes(self.engine, views, self.inversion, folder) for views in parts)

        count = sum(map(len, parts)) * len(self.inversion.timesteps)
        return cache.plan(folder, levels, count, settings.cache, settings.cache_gb, cached_bytes)

    def views(
        self,
        task: str,
        numbers: Sequence[int],
        draws: int = 0,
        plan: cache.CachePlan | None = None,
        on_views: Callable[[int], None] = lambda count: None,
    ) -> TrainingViews:
        """Views of some items with their captures, which are computed now where they are cached."""
        views = self.plain_views(task, numbers, draws)
        plan = plan or self._cache_plan(views)
        if not plan.is_stored:
            return views.with_captures(cache.RecomputedCaptures(self.engine, views, self.inversion))
        cached = cache.cache_captures(self.engine, views, self.inversion, plan.folder, on_views=on_views)
        return views.with_captures(cached)

    def recipe(self, task: str) -> TrainingRecipe:
        """Decoder and schedule of a task."""
        settings, model, table = self.recipe_settings, self.engine.model, self.source.class_table
        levels = model.levels if model.blocks else [replace(level, blocks=()) for level in model.levels]
        base = recipe(
            *(task, self.source, levels, model.text_width, self.inversion.timesteps, len(self.split[0])),
            preset=settings.preset,
            pose_head=settings.pose_head,
            reader=self.address.partition(":")[0],
            is_varied=self.augmentation(task).is_recoloured,
        )
        decoder = replace(base.config, named=self._named_classes(base.config.classes))
        if table is not None and (decoder.named or decoder.has_text):
            decoder = replace(decoder, class_words=words_of(table, self.source.thing_classes))
        return TrainingRecipe(decoder, adjust(base.schedule, settings))

    def _named_classes(self, classes: Sequence[str]) -> tuple[str, ...]:
        """The classes that a decoder predicts only where a prompt names them."""
        table, source, by_name = self.source.class_table, self.source, self.recipe_settings.by_name
        known = {*source.thing_classes}
        things = [name for name in classes if name in known]
        if by_name == "no" or self.view_settings.captions == "none" or not things:
            return ()
        if source.captions_name_all:
            pairs = zip(things, spoken(things, table), strict=True)
            named = tuple(name for name, word in pairs if name in find_classes(photo_of([word]), things, table))
        else:
            named = always_named(things, [(shown, caption) for shown, caption, _ in self._shown_things], table)
        if by_name == "yes":
            return named
        if source.captions_name_all:
            return tuple(name for name in named if name not in self._shown_by_all) or named
        stored = [{*find_classes(caption, things, table)} for _, caption, is_stored in self._shown_things if is_stored]
        if len(stored) < LEAST_CAPTIONS or not set().union(*stored) <= set(named):
            return ()
        tells_nothing = set.intersection(*stored)  # a table of all images: its word would take pixels of what is on it
        return tuple(name for name in named if any(name in each for each in stored) and name not in tells_nothing)

    @cached_property
    def _shown_by_all(self) -> set[str]:
        """The things that every one of many images shows, such as walls: a prompt need not name them."""
        things = set(self.source.thing_classes if len(self.numbers) >= LEAST_CAPTIONS else ())
        for number in self.numbers:
            if not things:
                break
            things &= {*_things(self.source, self.source[number])}
        return things

    @cached_property
    def _shown_things(self) -> list[tuple[list[str], str, bool]]:
        """The things that each item shows, its caption, and whether the data set stores that."""
        items = map(self.source.__getitem__, self.numbers)
        return [(_things(self.source, item), item.caption, item.named is None) for item in items]

    def plan(self, task: str) -> TaskPlan:
        """Decoder and schedule of a task, with everything that decides the weights."""
        training, held_out = self.split
        recipe, source = self.recipe(task), self.source
        words = None
        if recipe.config.has_text:
            words = self.engine.encode_classes(spoken(source.thing_classes, source.class_table)).float().clone()
        schedule = asdict(recipe.schedule)
        schedule["parts"] = schedule.pop("gradient_accumulation_steps")
        settings = {"decoder": recipe.config.values, **schedule, **self.identity}
        if self._other_crops:  # earlier versions cropped by the rule of the data
            settings["crops"] = self.augment
        if source.class_table is not None:
            settings["class_table"] = digest_of(source.class_table, source.thing_classes)
        left_out = ""
        if source.skipped:
            names = "\n".join(sorted(source.skipped)).encode(errors="surrogateescape")
            left_out = f"{len(source.skipped)} images, {hashlib.sha256(names).hexdigest()[:12]}"
        settings |= {
            "task": task,
            "timestep": times if len(times := self.inversion.timesteps) > 1 else times[0],
            "model_digests": self.engine.model.digests,
            "images": len(training),
            "held_out": self.held_out,
            "held_out_images": len(held_out),
            "left_out": left_out,
        }
        return TaskPlan(recipe.config, recipe.schedule, words, json.loads(json.dumps(settings)), self.data)

    def predictor(self, plan: TaskPlan) -> Predictor:
        return Predictor(plan.words, self.engine.model.size, self.engine.device, self.engine.model.tokenizer)

    def watch_work(self, title: str, total: int, is_stopping: Callable[[], bool]) -> Callable[[int], None]:
        """A function that long work calls with how much more of `total` is done. It reports the share every ten
        seconds, and raises Stopped where a signal came.
        """
        done, begin = 0, time.monotonic()
        last_line = begin

        def on_done(count: int) -> None:
            nonlocal done, last_line
            done += count
            if is_stopping():
                raise Stopped
            if time.monotonic() - last_line >= SECONDS_PER_LINE:
                last_line = time.monotonic()
                share = done / total
                left = format_duration((last_line - begin) * max(1 / share - 1, 0))
                self.on_message(f"{title} {min(share, 1):.0%}, about {left} left")

        return on_done

    def open_training(
        self, folder: Path, plan: TaskPlan, settings: TaskSettings, is_stopping: Callable[[], bool]
    ) -> TaskTraining | None:
        """The training of a task with its captures, or None if it was stopped while they were computed."""
        (training, held_out), task = self.split, plan.decoder.task
        count = len(training) * self.view_settings.draws + len(held_out)
        cache_plan = self._stored_cache_plan(folder, task)
        on_views = self.watch_work("captures", count, is_stopping)
        try:
            views = self.views(task, training, plan=cache_plan, on_views=on_views)
            held_out_views = self.views(task, held_out, 1, cache_plan, on_views) if held_out else None
        except Stopped:
            return None
        return TaskTraining(folder, plan, views, held_out_views, settings, self.framing, self.predictor(plan))

    def _stored_cache_plan(self, folder: Path, task: str) -> cache.CachePlan:
        """The cache plan with the decision of the start of the training, as half precision decides bits; until its
        captures were computed, it has not started.
        """
        plan, path = self.cache_plan(task), folder / "training" / "captures.json"
        has_begun = storage.is_there(path.with_name("settings.json"))
        if not (has_begun and path.exists()):
            storage.publish({path: json.dumps({"are_kept": plan.is_stored}).encode()})
        is_stored = read_state(path, {"are_kept": bool})["are_kept"]
        if self.cache_settings.cache != "auto" and is_stored != plan.is_stored:
            raise Refused(
                f"--cache {self.cache_settings.cache}: {folder} was started with captures "
                f"{'kept on the disk' if is_stored else 'made anew at every step'}",
                "Leave --cache out, or choose another --out.",
            )
        return replace(plan, is_stored=is_stored)


class Stopped(Exception):
    """A signal came while captures or samples were computed; captures that are cached stay."""


def _things(source: LabelledSource, item: Labelled) -> list[str]:
    """The things that a labelled image shows."""
    return sorted({name for name, _ in source.things_of(item)})


def open_session(
    data: TrainingData,
    choice: ModelChoice,
    tasks: Sequence[str],
    inversion: Inversion,
    on_message: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> TrainingSession:
    """A session with its model, data and engine, checked; `settings` are its further fields."""
    _check_together(tasks, data.address)
    kind, *_ = check_address(data.address)
    # Before a model is loaded, but by readers of other packages, which may draw pictures of the size at once.
    early = None if kind in READERS.others else _open_source(data, choice.size or UPSTREAM_SIDE, tasks)
    model = load_model(choice.model, size=choice.size, allow_download=choice.allow_download)
    model = model.reading(spread_blocks(choice.blocks) if choice.blocks else ())
    source = _check_source(early or _open_source(data, model.size, tasks), model.size, data, tasks)
    steps = model.scheduler.get("num_train_timesteps", 1000)
    if (latest := max(inversion.timesteps)) >= steps:
        raise Refused(
            f"--timestep: {latest} is not one of the model's {steps}",
            f"Give numbers from 0 to {steps - 1}, or -1 for the model's default.",
        )
    if latest < 0:
        inversion = replace(inversion, timesteps=(model.defaults.capture,))
    is_auto = choice.engine == "torch" or (choice.engine in ("auto", "fast") and choice.device != "cpu")
    engine = build_engine(choice.engine, model, {}, dtype="auto" if is_auto else "fp32", device=choice.device)
    if source.layout:
        on_message(f"data       {source.layout}")
    for name, reason in list(source.skipped.items())[:MOST_LISTED]:
        cause = reason.removeprefix(f"{name}: ")
        on_message(f"left out   {documents.one_line(f'{name}: {cause}')}")
    if len(source.skipped) > MOST_LISTED:
        on_message(f"left out   {len(source.skipped)} in all")
    last_line, shown, empty = time.monotonic(), set[str](), 0

    def on_item(done: int, item: Picture | Labelled) -> None:
        nonlocal last_line, empty
        names = naming.classes_shown(source, item)
        shown.update(names)
        is_ignored = item.semantic is not None and not names
        has_crowds = item.crowd_classes is not None and len(item.crowd_classes) > 0  # ignored, too
        empty += not is_ignored and not has_crowds and all(map(reading.is_background, names))
        if time.monotonic() - last_line >= SECONDS_PER_LINE:
            last_line = time.monotonic()
            on_message(f"data       {done} of {len(source)} images read")

    record = data_record.record_data(source, on_item)
    if shown and (line := naming.describe_absent((*source.classes, *source.thing_classes), shown)):
        on_message(f"classes    {line}")
    if shown and empty:
        on_message(f"classes    {empty} of {count_noun(len(source), 'image')} without any, taken for pure background")
    source.digests = {source.order[k]: item["image"] for k, item in enumerate(record["items"])}
    common = {"inversion": inversion, "data": record, "on_message": on_message}
    return TrainingSession(data.address, engine, source, tuple(range(len(source))), **common, **settings)


def _open_source(data: TrainingData, size: int, tasks: Sequence[str]) -> LabelledSource:
    options = {"selection": data.selection, "skip_bad": data.skip_bad, "framing": data.framing}
    source = open_data(data.address, size, tasks=tasks, **options)
    if data.class_table:
        source.class_table = own_table(data.class_table)
        if not words_of(source.class_table, source.thing_classes)[:-1]:
            raise Refused(
                f"--class-table {data.class_table}: holds none of the data's classes",
                f"Name them as the data does: {', '.join(source.thing_classes[:20]) or 'it has no things'}.",
            )
    return source


def _check_source(source: LabelledSource, size: int, data: TrainingData, tasks: Sequence[str]) -> LabelledSource:
    """The data set at the model's size, once its pictures teach the tasks."""
    source.size, source.least_mask = size, least_mask(data.selection, size)
    if data.skip_bad:
        source = source.readable()
    for task in tasks:
        check_truth(source, task, data.address)
    return source


def check_apart(out: Path, tasks: Sequence[str], address: str) -> None:
    """Refuses to start a training inside a run or its data, whose reader would take the decoder's files for labels."""
    is_run = storage.is_there(out / DOCUMENT)
    for folder in (out / task for task in tasks):
        has_begun = storage.is_there(folder / "training" / "settings.json")
        if not has_begun and (is_run or is_read(address, folder)):
            place = "a run folder" if is_run else f"the data, {address}"
            cause = f"--out: {folder} lies in {place}, where a decoder's files can be taken for labels"
            raise Refused(cause, "Choose an --out beside it.")


def _check_together(tasks: Sequence[str], address: str) -> None:
    """Refuses to train labels together that are not read from the same pictures."""
    alone = [task for task in tasks if TASKS[task].sees_one_person(address)]
    if alone and len(tasks) > 1:
        raise Refused(
            f"--task: {alone[0]} learns from one person of coco: at a time, the others from whole images",
            f"Train it by itself, with the same --out: --task {alone[0]}.",
        )
