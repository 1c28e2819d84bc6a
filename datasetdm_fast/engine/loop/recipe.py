"""How every image of a run is made, decided before the first batch; and checks of settings that need nothing loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from inspect import signature
from numbers import Integral, Real
from operator import index
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import (
    ATTENTION,
    EXACT,
    FAST,
    FAST_CACHED,
    FP8,
    LABELLER_KINDS,
    OUTLINES,
    PARITIES,
    PROVIDERS,
    SAMPLERS,
    SEEDS,
    TASKS,
    UNDECODED,
    USUAL_SAMPLER,
)
from datasetdm_fast.data import Request
from datasetdm_fast.engine.engines import Engine
from datasetdm_fast.engine.labels import BACKGROUND, LabelName, kind_of
from datasetdm_fast.engine.labels.class_tables import ClassTable, of_words, spoken
from datasetdm_fast.engine.loop.calls import (
    FROM_NOISE,
    FromOneGenerator,
    Origin,
    cached_calls,
    check_call_speed,
    fast_sampling,
    inner_calls,
    timesteps_of,
)
from datasetdm_fast.engine.loop.class_prompts import AttentionRecipe, attention_recipe, class_columns, concept_places
from datasetdm_fast.engine.loop.combining import Combination, check_mask_words, parse_combinations
from datasetdm_fast.engine.loop.prompts import Tokenizer, check_class_lengths, count_tokens, shorten
from datasetdm_fast.errors import Refused, check_choice, nearest

if TYPE_CHECKING:
    from datasetdm_fast.engine.sampling.schedule import Schedule


@dataclass(frozen=True)
class Recipe:
    """How every image of a run is made, decided before the first batch."""

    schedule: Schedule
    guidance: float
    size: int  # pixels
    tasks: tuple[str, ...]
    # label -> the sampler calls whose activations its decoder or labeller reads, in the order of its timesteps
    captures: Mapping[str, tuple[int, ...]]
    words: tuple[str, ...] = ()  # open-vocabulary classes; a label map holds 1 + the position here
    combinations: tuple[Combination, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # of how a sample was made, for its row
    ignores_doubtful: bool = False  # whether doubtful pixels of label maps become 255
    least_confidence: float = 0.0  # pixels of label maps with less become 255
    origin: Origin = FROM_NOISE
    attention: AttentionRecipe | None = None  # of labels that need no decoder
    asks_all: bool = False  # whether all words are looked for in every image
    table: ClassTable | None = None  # of the user's own words
    draws: tuple[str, ...] = ()  # the things that the model can draw, where its card lists them
    has_negative: bool = True  # whether its calls read negative prompts
    cached: frozenset[int] = frozenset()  # calls that start from the deep features of an earlier one
    fp8: frozenset[int] = frozenset()  # calls whose products are in fp8
    inverted: tuple[int, ...] = ()  # of existing pictures: the timesteps that are captured, whose places are calls
    uncaptioned: str | None = None  # the prompt of an existing picture without a caption, which names no word

    @property
    def captured(self) -> tuple[int, ...]:
        """The calls that are captured, in their order; the last of the schedule where no label is read from any."""
        last = () if self.attention or self.labellers else (len(self.schedule) - 1,)
        return tuple(sorted({call for calls in self.captures.values() for call in calls})) or last

    @property
    def taken_on(self) -> frozenset[int]:
        """The captured calls whose own output the sampler goes on with: the last, and those of labels of several.

        Others are made plainly, too: the output of a captured call differs from that of a plain one by rounding, and
        a run of the last one's decoders alone has plain calls before it.
        """
        several = [] if self.cached else [calls for calls in self.captures.values() if len(calls) > 1]
        return frozenset((*self.captured[-1:], *(call for calls in several for call in calls)))

    @property
    def averaged(self) -> tuple[int, ...]:
        """The calls whose attention labels are read from."""
        if self.attention is None:
            return ()
        if not self.attention.blocks:
            return tuple(range(len(self.schedule)))
        return capture_calls(self.schedule, {ATTENTION: (self.attention.timestep,)})[ATTENTION]

    @property
    def decoded(self) -> tuple[str, ...]:
        """The labels that decoders read."""
        return tuple(task for task in self.tasks if task not in UNDECODED)

    @property
    def labellers(self) -> tuple[str, ...]:
        """The labels that labellers of other packages read."""
        return tuple(task for task in self.tasks if task in LABELLER_KINDS.others)

    @property
    def raw(self) -> frozenset[int]:
        """The captured calls of which features and maps themselves are kept, as labellers read them."""
        read = frozenset(call for task in self.labellers for call in self.captures.get(task, ()))
        has_sums = any(len(calls) > 1 for calls in self.captures.values())
        return frozenset(self.captured) if read and has_sums else read  # sums are of one kind

    def query_words(self, request: Request) -> tuple[str, ...]:
        """The words looked for in an image."""
        return self.words if self.asks_all else self.requested_words(request)

    def requested_words(self, request: Request) -> tuple[str, ...]:
        """The words that a prompt names, all those of the run for a picture without a caption."""
        return self.words if request.prompt == self.uncaptioned else request.classes

    @property
    def concepts(self) -> tuple[str, ...]:
        """The words that join the texts of a call, as not every prompt names them; the last is none of the run's."""
        return (*self.words, BACKGROUND) if self.asks_all and self.attention and self.attention.blocks else ()

    def class_prompt(self, request: Request) -> str:
        """The text whose attention is read, empty where no label is read from attention."""
        return self.attention.class_prompt(request, self.query_words(request), self.table) if self.attention else ""

    def text(self, request: Request) -> str:
        """The prompt of an image as it is encoded, with its class words where labels from attention ask for that. No
        others that are looked for are added: they would be drawn, or change what decoders read in a picture.
        """
        if self.attention is None:
            return request.prompt
        is_read_alone = request.prompt == self.uncaptioned and not self.decoded
        words = self.words if is_read_alone else request.classes
        return self.attention.text(request, self.attention.class_prompt(request, words, self.table))

    def class_columns(self, request: Request, tokenizer: Tokenizer) -> list[tuple[str, tuple[int, ...]]]:
        """The query words of an image, each with its places among the tokens of the class prompt."""
        if self.concepts:
            return [(word, (place,)) for place, word in enumerate(self.words)]
        is_by_words = bool(self.attention and self.attention.parity)
        is_listed = bool(self.attention and not self.attention.blocks and not request.class_prompt)
        words, class_prompt = self.query_words(request), self.class_prompt(request)
        return class_columns(
            class_prompt, words, tokenizer, by_words=is_by_words, is_listed=is_listed, table=self.table
        )

    def check_request(self, request: Request, tokenizer: Tokenizer, *, tokenizer_cuts: bool = False) -> Request:
        """The request; refused if labels are read from attention and its texts do not fit into the text encoder, unless
        its tokenizer is to cut them, or its query words are not in the class prompt or have no place among its tokens.
        """
        if self.attention is None or self.concepts:
            return request
        class_prompt, limit = self.class_prompt(request), tokenizer.model_max_length
        for text in () if tokenizer_cuts else (class_prompt, self.text(request)):
            if (count := count_tokens(text, tokenizer)) > limit:
                raise Refused(
                    f"prompt {request.index}: with its class words {count} tokens, at most {limit} fit: "
                    f"{shorten(text)}",
                    "Shorten it, or ask for fewer classes.",
                )
        places = self.class_columns(request, tokenizer)
        if (most := max((columns[-1] for _, columns in places), default=0)) >= limit:
            raise Refused(
                f"prompt {request.index}: its class prompt has a class at word {most}, at most {limit - 1} words are "
                "read",
                "Name fewer classes.",
            )
        return request


NOT_CHOSEN = {"engine", "table", "attention", "strength", "speed"}  # parameters that no caller of the library gives


def make_recipe(
    engine: Engine,
    tasks: Sequence[str],
    *,
    sampler: str = "pndm",
    steps: int = 0,
    guidance: float = 0.0,
    profile: str = "0.3.0",
    classes: Sequence[str] = (),
    combine: Sequence[str] = (),
    ignore: str = "nothing",
    ignore_below: float = 0.0,
    strength: float = 1.0,
    speed: str = EXACT,
    ask: str = "named",
    table: ClassTable | None = None,
    **attention: Any,
) -> Recipe:
    """The recipe of a run; 0 means the default of the model. A `strength` below 1 leaves only the last calls of the
    schedule. `attention` are settings of attention_recipe.
    """
    from datasetdm_fast.engine.sampling.schedule import choose_sampler, make_schedule

    model = engine.model
    if speed in (FAST, FAST_CACHED):
        sampler, steps = fast_sampling(engine, speed, sampler, steps)
    sampler = choose_sampler(model.scheduler, model.defaults.sampler if sampler == USUAL_SAMPLER else sampler)
    labellers = labellers_of(engine, tasks)
    schedule = make_schedule(model.scheduler, sampler, steps or model.defaults.steps, profile, strength, **model.flow)
    configs = {task: engine.decoders[task].config for task in tasks if task not in UNDECODED}
    trained = dict.fromkeys(word for config in configs.values() for word in config.class_words)
    if table is None and trained:
        table = of_words(tuple(trained))
    open_labels = [task for task in tasks if task == ATTENTION or (labellers | configs)[task].is_open]
    words = class_words_of(engine, open_labels, classes, table) if open_labels else ()
    readers = {**configs, **{task: labeller for task, labeller in labellers.items() if labeller.reads_capture}}
    captures = capture_calls(schedule, {task: timesteps_of(reader) for task, reader in readers.items()})
    numbers = None
    if ATTENTION in tasks:
        numbers = _read_attention(model, ask, spoken(words, table), attention)
    elif attention:
        name, known = next(iter(attention)), signature(attention_recipe).parameters
        chosen = sorted(signature(make_recipe).parameters.keys() - NOT_CHOSEN)
        hint = f"; it needs the task {ATTENTION}" if name in known else nearest(name, chosen)
        raise TypeError(f"{name!r} is no choice here{hint}")
    if model.guidance == "none" and guidance > 1:
        raise Refused(
            f"--guidance {guidance:g}: {model.backbone.title} is sampled without guidance here, expected at most 1",
            "Drop it.",
        )
    facts: dict[str, Any] = {
        "sampler": sampler,
        "profile": profile,
        "steps": steps or model.defaults.steps,
        "calls": len(schedule),
        "guidance": guidance or model.defaults.guidance,
        "size": model.size,
        "capture_timestep": name_timesteps(captures, schedule.timesteps, schedule.timesteps[-1]),
    }
    if schedule.noisy_calls and numbers and numbers.parity:
        raise Refused(
            f"sampler: {sampler} adds noise at every call, and with --parity one generator draws that of all images",
            "Choose another with --sampler.",
        )
    if speed != EXACT:
        facts["speed"] = speed
    if sampler in SAMPLERS.others:
        facts["sampler_package"] = SAMPLERS.package(sampler)
    if numbers is not None:
        read = {"blocks": [*numbers.blocks]} if numbers.blocks else {}  # a list, as run.json gives it back
        unread = () if read else ("blocks", "timestep")
        facts["attention"] = {name: value for name, value in asdict(numbers).items() if name not in unread} | read
    if labellers:
        facts["labellers"] = {name: LABELLER_KINDS.package(name) for name in labellers}
    recipe = Recipe(
        schedule,
        scale_at(model, facts["guidance"]),
        model.size,
        tuple(tasks),
        captures,
        words,
        parse_combinations(combine, tasks) if combine else (),
        facts,
        ignores_doubtful=ignore == "disagreeing",
        least_confidence=ignore_below,
        origin=FromOneGenerator() if numbers and numbers.parity else FROM_NOISE,
        attention=numbers,
        asks_all=ask == "all",
        table=table,
        draws=getattr(model, "draws", ()),
        has_negative=model.has_negative(facts["guidance"]),
    )
    if speed not in (EXACT, FAST):
        check_call_speed(engine, speed, numbers is not None and not numbers.blocks)
        choose = inner_calls if speed == FP8 else cached_calls
        calls = choose(len(schedule), recipe.captured)
        facts["whole_calls"] = len(schedule) - len(calls)
        recipe = replace(recipe, fp8=calls) if speed == FP8 else replace(recipe, cached=calls)
    if combine:
        check_mask_words(recipe.combinations, label_tables(engine, recipe))
    return recipe


def _read_attention(model: Any, ask: str, words: Sequence[str], settings: Mapping[str, Any]) -> AttentionRecipe:
    """How labels are read from the attention of a model; with `ask` "all" its tokenizer must know the words."""
    if not (model.backbone.has_averages or model.backbone.has_text_maps):
        raise Refused(
            f"--labeller {ATTENTION}: labels are not read from the attention of {model.backbone.title} yet",
            "Name a decoder that was trained for this model: --decoder DIR",
        )
    side = model.levels[0 if model.backbone.has_text_maps else -1].side
    numbers = attention_recipe(model.defaults.attention, side, **settings)
    if ask != "all" or not numbers.blocks:
        return numbers
    if not model.defaults.attention.concept_blocks:
        raise Refused(
            f"--ask all: words are read in blocks of two streams, {model.backbone.title} has blocks of one",
            "Ask for the words that a prompt names: --ask named.",
        )
    for word in words:
        concept_places(word, model.tokenizer)
    return replace(numbers, blocks=model.defaults.attention.concept_blocks)


def scale_at(model: Any, guidance: float) -> float:
    """By how much the outputs of a call's two halves are guided: where the prompt alone counts, by what gives its
    output, as decoders may read both halves nevertheless.
    """
    is_unguided = model.guidance == "cfg" and model.guidance_at(guidance) == "none"
    return model.backbone.unguided if is_unguided else guidance


def label_tables(engine: Engine, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The table of each label in run.json: names and ranges; those of a labeller come from its class."""
    sources = labellers_of(engine, recipe.tasks) | {name: decoder.config for name, decoder in engine.decoders.items()}
    tables = {}
    for label in recipe.tasks:
        table = partial(kind_of(label).table, sources.get(label), recipe.size, recipe.words)
        tables[label] = LABELLER_KINDS.guard(label, table, "does not say what its labels are")
    return tables


def labellers_of(engine: Engine, tasks: Sequence[str]) -> dict[str, Any]:
    """The labellers of other packages among these labels, by their names."""
    names = [task for task in tasks if task in LABELLER_KINDS.others]
    if not names:
        return {}
    from datasetdm_fast.engine.tasks.labeller import open_labeller

    return {name: open_labeller(name, engine.device) for name in names}


def class_words_of(
    engine: Engine, labels: Sequence[str], classes: Sequence[str], table: ClassTable | None = None
) -> tuple[str, ...]:
    """The query words of these labels: `classes`, by default those that the decoders were trained on."""
    words = tuple(classes) or tuple(
        dict.fromkeys(
            word for label in labels if label not in UNDECODED for word in engine.decoders[label].config.classes
        )
    )
    if not words or not classes and not set(labels).isdisjoint(UNDECODED):
        raise Refused(
            f"--task {labels[0]}: no class words were given, and no decoder of it names any", "Add --classes ball,cube."
        )
    if len(words) > 254 and any(label in UNDECODED or engine.decoders[label].config.has_text for label in labels):
        raise Refused(f"--classes: {len(words)} words, an 8-bit label map holds 254", "Make several runs.")
    check_class_lengths(words, engine.model.tokenizer, table)
    return words


def capture_calls(schedule: Schedule, timesteps: Mapping[str, Sequence[int | None]]) -> dict[str, tuple[int, ...]]:
    """The calls that the decoder of each label reads: the last, or those nearest the timesteps it was trained at."""
    last = len(schedule) - 1

    def nearest(timestep: int | None) -> int:
        if timestep is None:
            return last
        return min(range(last + 1), key=lambda k: (abs(schedule.timesteps[k] - timestep), -k))

    return {label: tuple(map(nearest, several)) for label, several in timesteps.items()}


def name_timesteps(captures: Mapping[str, tuple[int, ...]], timesteps: Sequence[float], otherwise: float) -> Any:
    """What a sample's row says of the timesteps of its captures: a number or several, by label if these differ."""
    times = {label: tuple(timesteps[call] for call in calls) for label, calls in captures.items()}
    named = {label: list(several) if len(several) > 1 else several[0] for label, several in times.items()}
    return named if len(set(times.values())) > 1 else next(iter(named.values()), otherwise)


def prompt_words(engine: Engine, tasks: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """The words looked for in prompts: `classes`, by default the classes of the decoders."""
    tasks = [task for task in tasks if task not in UNDECODED]
    known = dict.fromkeys(name for task in tasks for name in engine.decoders[task].config.classes)
    if classes and known and not any(engine.decoders[task].config.has_text for task in tasks):
        for word in classes:
            if word not in known:
                is_limited = bool(getattr(engine.model, "draws", ()))
                others = ", or add --task open-vocabulary, which takes any word"
                raise Refused(
                    f"--classes: no decoder of this run knows {word!r}, they know {', '.join(known)}",
                    f"Choose from these{'; the model draws nothing else' if is_limited else others}.",
                )
    return tuple(classes) or tuple(known)


LEAST_SETTINGS: dict[str, float] = {  # a whole number where the least value is one
    **dict.fromkeys(("seed", "steps", "batch_size", "threads", "streams", "self_cells", "cross_cells"), 0),
    **dict.fromkeys(("guidance", "threshold", "uncertainty"), 0.0),
    "exponent": -1,
}
LARGEST_GUIDANCE = 1000  # far above any that is of use; numbers of an image would leave fp16, at last fp32
LARGEST_SIDE = 4096  # pixels
LARGEST_BATCH = 4096
CHOICES: dict[str, Sequence[str]] = {
    "ignore": ("nothing", "disagreeing"),
    "ask": ("named", "all"),
    "parity": ("", *PARITIES),
    "outlines": ("auto", *OUTLINES),
    "provider": PROVIDERS,
}


def check_iterable(name: str, value: Any, expected: str) -> Any:
    """An argument of the library that must be iterable; refused if it is not."""
    try:
        iter(value)
    except TypeError:
        is_several = False
    else:
        is_several = not isinstance(value, bytes)
    if not is_several:
        raise Refused(f"{name}: {value!r} was given, expected {expected}", f"Give {expected}.")
    return value


def as_texts(name: str, texts: str | Iterable[str]) -> Iterable[str]:
    """Texts of a caller of the library, who may also pass one alone."""
    return [texts] if isinstance(texts, str) else check_iterable(name, texts, "a text or several texts")


def check_size(size: int) -> None:
    is_whole = isinstance(size, Integral)
    if not is_whole or size % 64 or not 0 <= size <= LARGEST_SIDE:
        near = min(max(round(size / 64), 1) * 64, LARGEST_SIDE) if is_whole else 512
        raise Refused(
            f"--size {_quote(size)}: expected a multiple of 64 up to {LARGEST_SIDE}",
            f"Try --size {near}; 0 takes what the model was made for.",
        )


def check_choices(**values: str) -> None:
    """Refuses a setting that is none of its CHOICES."""
    for name, value in values.items():
        check_choice(_flag(name), value, CHOICES[name])


def check_numbers(**values: float) -> dict[str, float]:
    """The settings as plain numbers; one that is no number, below its least value in LEAST_SETTINGS, or too large is
    refused.
    """
    for name, value in values.items():
        kind, form = (Integral, "whole number") if isinstance(LEAST_SETTINGS[name], int) else (Real, "number")
        least = LEAST_SETTINGS[name]
        most = LARGEST_GUIDANCE if name == "guidance" else math.inf if kind is Integral else 1
        if not (isinstance(value, kind) and least <= value <= most):
            bounds = f"of {least} or more" if kind is Integral else f"from {least:g} to {most}"
            raise Refused(f"{_flag(name)} {_quote(value)}: expected a {form} {bounds}", "Choose another number.")
    return {name: type(LEAST_SETTINGS[name])(value) for name, value in values.items()}  # also of numpy


def check_batch_size(batch_size: int) -> None:
    check_numbers(batch_size=batch_size)
    if batch_size > LARGEST_BATCH:
        raise Refused(f"--batch-size {batch_size}: expected at most {LARGEST_BATCH}", "Choose what fits into memory.")


def check_seed(seed: int, number: int = 1) -> int:
    """The seed as a plain number, where a generator and the ledger can hold it and those of the images after it."""
    if number > SEEDS:
        raise Refused(f"--number {number}: there are {SEEDS} seeds", "Choose another number.")
    try:
        whole = index(seed)  # also of numpy and torch
    except TypeError:
        whole = -1
    if not 0 <= whole <= SEEDS - number:
        raise Refused(
            f"--seed {_quote(seed)}: expected a whole number from 0 to {SEEDS - number}", "Choose another seed."
        )
    return whole


def check_tasks(tasks: Sequence[str], known: Sequence[str] = TASKS) -> None:
    """Refuses what is no list of labels, each TASK or TASK:NAME."""
    if not tasks:
        raise Refused("--task: names no task", f"Choose from {', '.join(known)}.")
    for task in tasks:
        try:
            if LabelName.parse(task).task not in known:
                raise ValueError(f"not one of {', '.join(known)}")
        except ValueError as error:
            raise Refused(f"--task {task}: {error}", f"Choose from {', '.join(known)}, or TASK:NAME.") from error
    if len({task.lower() for task in tasks}) < len(tasks):  # some file systems know no capitals
        raise Refused(f"--task {','.join(tasks)}: a label is named twice", "Name each label once.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _quote(value: object) -> str:
    """A value that is no number, such as the text '3', as its caller wrote it."""
    return repr(value) if isinstance(value, str) else str(value)
