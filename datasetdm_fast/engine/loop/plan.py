"""The plan of a run: which image is made from which words, with which seed, in which batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from datasetdm_fast.data import Batch, Request
from datasetdm_fast.engine.labels.class_tables import ClassTable, find_classes, name_key, spoken, with_article
from datasetdm_fast.engine.loop.prompts import (
    PromptLine,
    PromptSource,
    Tokenizer,
    check_class_lengths,
    fit_negative,
    fit_prompt,
)
from datasetdm_fast.engine.scenes.world import sample_scene
from datasetdm_fast.errors import Refused

DEMO_SCENES = 900_000_000  # first scene seed of the demo captions, far from those the demo model was trained on
OPENINGS = ("a photo of", "a picture of", "a scene with")
SURROUNDINGS = ("", " at night", " at sunset", " in fog")
TURN = 100_000_007  # between seeds and prompts of what may take the place of a sample: prime, so that prompts differ


@dataclass(frozen=True)
class Plan:
    """Every image of a run, a pure function of the settings: sample k has prompt k in turn and seed run seed + k,
    unless its prompt brings a seed."""

    prompt: Callable[[int], PromptLine]
    words: tuple[str, ...]  # class words looked for in the prompts
    number: int
    seed: int
    batch_size: int
    digest: str  # of the prompts
    most: int  # samples that may be made: more than `number` where further ones replace doubtful ones
    has_seeds: bool = False  # whether prompts bring seeds of their own
    negative: str = ""  # text of the unconditional half, where a prompt brings none
    table: ClassTable | None = None  # of the user's own words
    turn: int = TURN  # from a prompt to that of the next turn

    def __len__(self) -> int:
        """Batches."""
        return -(-self.number // self.batch_size)

    def request(self, index: int, turn: int = 0) -> Request:
        """Sample `index`; of a later `turn` with another seed, and another prompt of the same class."""
        prompt = self.prompt(index + turn * self.turn)
        if prompt.classes is None:
            named = find_classes(prompt.text, self.words, self.table)
        else:
            named = listed_words(prompt.classes, self.words)
        seed = self.seed + index + turn * TURN if prompt.seed is None else prompt.seed
        negative = self.negative if prompt.negative is None else prompt.negative
        return Request(index, prompt.text, seed, named, negative, prompt.class_prompt)

    def batch(self, index: int) -> Batch:
        """The requests index * batch_size and on, filled up to the batch size at the tail."""
        first = index * self.batch_size
        stop = min(first + self.batch_size, self.most)
        requests = tuple(self.request(k) for k in range(first, stop))
        return Batch(index, requests, self.batch_size - len(requests))

    def batches_of(self, indices: Sequence[int], turn: int = 0) -> Iterator[Batch]:
        """The requests of samples, of which the last batch is filled up."""
        for index, begin in enumerate(range(0, len(indices), self.batch_size)):
            requests = tuple(self.request(k, turn) for k in indices[begin : begin + self.batch_size])
            yield Batch(index, requests, self.batch_size - len(requests))

    def __iter__(self) -> Iterator[Request]:
        return (self.request(index) for index in range(self.number))


def make_plan(
    source: PromptSource,
    tokenizer: Tokenizer,
    *,
    number: int,
    seed: int,
    batch_size: int,
    words: Sequence[str] = (),
    truncate: bool = False,
    turns: int = 1,
    is_by_class: bool = False,
) -> Plan:
    """The plan of a run; `words` are the class words to look for where --classes names none, `turns` how many samples
    may be made for every requested one, `is_by_class` whether the samples of a class lie side by side.
    """
    words = source.classes or tuple(words)
    per_class = source.classes if source.per_class else ()
    if source.per_class:
        number = source.per_class * len(source.classes)
        longest = f"{max(OPENINGS, key=len)} an {{}}{max(SURROUNDINGS, key=len)}"
        check_class_lengths(source.classes, tokenizer, source.table, longest)
    negative = fit_negative(source.negative, tokenizer, "--negative-prompt", truncate=truncate)
    prompts = tuple(_fit(line, source, tokenizer, words, truncate) for line in source.lines)
    names = spoken(per_class, source.table)

    def prompt(index: int) -> PromptLine:
        if per_class:
            kind, turn = class_and_turn(index, source.per_class if is_by_class else 1, len(per_class))
            text = template(names[kind], turn)
            return PromptLine(0, text, (*find_classes(text, words, source.table), per_class[kind]))
        if prompts:
            return prompts[index % len(prompts)]
        return PromptLine(0, sample_scene(DEMO_SCENES + seed + index).caption)

    # Batches of equal size leave less padding than full ones and a remainder.
    batches = -(-number // batch_size)
    size = batch_size if source.is_part else -(-number // batches)
    has_seeds = any(line.seed is not None for line in source.lines)
    if has_seeds and turns > 1:
        raise Refused(
            f"{source.name}: prompts with seeds of their own, so that further images would repeat the first ones",
            "Drop the seeds, or --keep trusted and --accept: filter leaves out samples later.",
        )
    most = number * turns
    turn = TURN * max(len(per_class), 1)
    return Plan(prompt, words, number, seed, size, source.digest, most, has_seeds, negative, source.table, turn)


def _fit(
    line: PromptLine, source: PromptSource, tokenizer: Tokenizer, words: Sequence[str], truncate: bool
) -> PromptLine:
    """The prompt and its negative one where the text encoder takes them whole, or its tokenizer is to cut them."""
    if source.tokenizer_cuts:
        return line
    where = f"{line.file or source.name} line {line.line}"
    # Labels of a prompt that brings its class prompt are read from that one alone.
    named = () if line.class_prompt else words
    text = fit_prompt(line.text, tokenizer, where, named, truncate=truncate, table=source.table)
    if line.negative is None:
        return line._replace(text=text)
    return line._replace(
        text=text, negative=fit_negative(line.negative, tokenizer, f"{where}: negative", truncate=truncate)
    )


def listed_words(classes: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """The class words that a prompt lists, also in another spelling: Ball for ball, fire_hydrant for fire hydrant."""
    exact = set(classes).intersection(words)
    others = {name_key(name) for name in classes if name not in exact}
    return tuple(word for word in words if word in exact or name_key(word) in others)


def template(word: str, turn: int) -> str:
    """The prompt for the turn-th image of a class; all pairings of opening and surroundings come up equally often."""
    opening = OPENINGS[turn % len(OPENINGS)]
    surroundings = SURROUNDINGS[turn // len(OPENINGS) % len(SURROUNDINGS)]
    return f"{opening} {with_article(word)}{surroundings}"


def class_and_turn(index: int, number: int, classes: int) -> tuple[int, int]:
    """The class of an index where a run counts `number` samples of each, and which of its samples that is."""
    block, inside = divmod(index, number)
    turn, kind = divmod(block, classes)
    return kind, turn * number + inside
