"""Prompts: checked, counted in tokens, truncated on request; and the plan, which gives a run's images theirs."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from datasetdm_fast.config import DEMO_PROMPTS, SEEDS
from datasetdm_fast.data import Batch, Request
from datasetdm_fast.engine.labels.class_tables import ClassTable, find_classes, name_key, spoken, with_article
from datasetdm_fast.engine.scenes.world import sample_scene
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

LONGEST_LINE = 4096  # bytes; no prompt of 77 tokens comes near it
FILE_ENDINGS = (".txt", ".csv", ".json", ".jsonl")  # which no class word has
MOST_PIECES = 3  # tokens of a word, on average, where a tokenizer knows the language of a prompt
NEGATIVE_PROMPTS = {
    # Dataset Diffusion's text, letter by letter: two of its commas have no space after them.
    "dataset-diffusion": "ugly, tiling, poorly drawn hands, poorly drawn feet, poorly drawn face,out of frame, "
    "extra limbs, disfigured, deformed, body out of frame, bad anatomy,watermark, signature, cut off, low contrast, "
    "underexposed, overexposed, bad art, beginner, amateur, distorted face"
}
_UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")  # letters of Thai, Japanese and Chinese
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class Tokenizer(Protocol):
    """The part of a tokenizer of transformers that is used here."""

    model_max_length: int

    def __call__(self, text: Any, /, *, truncation: bool = ...) -> Any: ...

    def spans(self, prompt: str) -> list[tuple[int, int]]: ...


class PromptLine(NamedTuple):
    """One prompt of a list; a list of JSON lines may also say which classes it names and which seed it has."""

    line: int  # from 1
    text: str
    classes: tuple[str, ...] | None = None  # None: those found in the text
    seed: int | None = None  # of the first image of it; None: the run's seed plus the number of the image
    file: str = ""  # of a folder of lists
    negative: str | None = None  # None: that of the run
    class_prompt: str = ""  # empty: made of the class words


def _identity(prompt: PromptLine) -> str:
    """All that decides the image, in the fewest words: lists that bring no more have the digest they always had."""
    ways: list[list[Any]] = [
        [prompt.text],
        [prompt.classes, prompt.seed],
        [prompt.negative],
        [prompt.class_prompt or None],
    ]
    while len(ways) > 1 and ways[-1] == [None] * len(ways[-1]):
        ways.pop()
    return prompt.text if len(ways) == 1 else json.dumps([value for way in ways for value in way])


@dataclass(frozen=True)
class PromptSource:
    """Prompts that are not yet measured in tokens."""

    lines: tuple[PromptLine, ...]  # empty: the demo world's captions, or templates
    name: str  # for messages: the file, or --prompts
    classes: tuple[str, ...]
    per_class: int
    negative: str = ""  # of --negative-prompt
    is_part: bool = False  # of a longer list: batches have the requested size, whatever the part's length
    table: ClassTable | None = None  # the words of --class-table
    tokenizer_cuts: bool = False  # prompts of any length are taken, and cut as diffusers does: also within a word

    @property
    def listed(self) -> tuple[str, ...]:
        """The classes that the prompts themselves bring, in the order they first come up."""
        return tuple(dict.fromkeys(name for prompt in self.lines for name in prompt.classes or ()))

    @property
    def digest(self) -> str:
        text = "\n".join(map(_identity, self.lines)) or ("templates" if self.per_class else DEMO_PROMPTS)
        return hashlib.sha256(text.encode()).hexdigest()


def refuse_file_names(words: Sequence[str]) -> None:
    """Refuses the name of a file in the place of class words."""
    for word in words:
        if word.lower().endswith(FILE_ENDINGS):
            raise Refused(
                f"--classes: {word!r} names a file, expected class words",
                "Write the words, separated by commas, or name a file of classes with --class-table.",
            )


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    seen = set()
    refuse_file_names(classes)
    for word in classes:
        if not word.strip():
            raise Refused(
                "--classes: one of the class words is empty", "Separate the words by single commas: --classes ball,cube"
            )
        if _CONTROL.search(word) or not documents.is_unicode(word):
            raise Refused(f"--classes: {shorten(word)} holds control characters or invalid UTF-8", "Use plain words.")
        key = " ".join(word.lower().split())
        if key in seen:
            raise Refused(f"--classes: {shorten(word)} is named twice", "Name each class once.")
        seen.add(key)
    return tuple(" ".join(word.split()) for word in classes)


def split_prompts(text: str, name: str, *, truncate: bool = False, first: int = 1) -> tuple[PromptLine, ...]:
    """One prompt a line, the first of which has the number `first`; empty lines are skipped."""
    lines = []
    for number, line in enumerate(text.split("\n"), first):
        if bad := _CONTROL.search(line.rstrip("\r")):
            what = "a NUL byte" if bad[0] == "\0" else f"the control character U+{ord(bad[0]):04X}"
            raise Refused(f"{name} line {number}: holds {what}", "Remove it: prompts are plain text.")
        prompt = line.strip()
        if not documents.is_unicode(prompt):
            raise Refused(f"{name} line {number}: {shorten(prompt)} is not valid Unicode", "Write the prompt in UTF-8.")
        if (size := len(prompt.encode())) > LONGEST_LINE and not truncate:
            raise Refused(
                f"{name} line {number}: {size} bytes, at most {LONGEST_LINE} are read",
                "Shorten it, or pass --truncate-prompts.",
            )
        if prompt:
            lines.append(PromptLine(number, prompt))
    if not lines:
        raise Refused(f"{name}: holds no prompt", "Write one prompt per line.")
    return tuple(lines)


def check_line(text: str, where: str) -> str:
    """A text that is no list of prompts, on one line."""
    line = " ".join(text.splitlines())
    if _CONTROL.search(line) or not documents.is_unicode(line):
        raise Refused(f"{where}: {shorten(line)} holds control characters or invalid UTF-8", "Use plain words.")
    return line.strip()


def check_negative(texts: Iterable[str], has_negative: bool, title: str) -> None:
    """Refuses a negative prompt where no call reads one."""
    if not has_negative and (text := next(filter(None, texts), "")):
        raise Refused(
            f"--negative-prompt {shorten(text)}: {title} is sampled without classifier-free guidance here, so it reads "
            "no negative prompt",
            "Drop it, or raise --guidance if the model was made for guidance.",
        )


def fit_negative(negative: str, tokenizer: Tokenizer, where: str, *, truncate: bool = False) -> str:
    """The text of the unconditional half, which must fit; one that has a name in NEGATIVE_PROMPTS may not."""
    text = NEGATIVE_PROMPTS.get(negative, negative)
    return text if text in NEGATIVE_PROMPTS.values() else fit_prompt(text, tokenizer, where, truncate=truncate)


def check_class_lengths(
    classes: Sequence[str], tokenizer: Tokenizer, table: ClassTable | None = None, prompt: str = ""
) -> None:
    """Refuses class words that are too long for the text encoder, alone or in a `prompt` with {} in their place."""
    for word in spoken(classes, table):
        if (count := count_tokens((prompt or "{}").format(word), tokenizer)) > (most := tokenizer.model_max_length):
            size = f"makes a prompt of {count}" if prompt else f"has {count}"
            raise Refused(
                f"--classes: {shorten(word)} {size} tokens, at most {most} fit", "Use a shorter name for the class."
            )


def count_tokens(prompt: str, tokenizer: Tokenizer) -> int:
    """Tokens of a prompt, its start and end marks among them, and what a chat says before it."""
    count = len(tokenizer(prompt, truncation=False).input_ids)
    if not hasattr(tokenizer, "spans") or 2 * count < tokenizer.model_max_length:  # which no chat takes half of
        return count
    within = [place + 1 for place, (begin, end) in enumerate(tokenizer.spans(prompt)) if begin < end]
    return max([count, *within[-1:]])


def fit_prompt(
    prompt: str,
    tokenizer: Tokenizer,
    where: str,
    words: Sequence[str] = (),
    *,
    truncate: bool | None = None,
    table: ClassTable | None = None,
) -> str:
    """The prompt if it fits, or with `truncate` cut between words; None stands for a command without that flag. Where
    two text encoders read it, the longer one must, and the other one all class words.
    """
    if longer := getattr(tokenizer, "longer", None):
        prompt = fit_prompt(prompt, longer, where, truncate=truncate)
        if count_tokens(prompt, tokenizer) > tokenizer.model_max_length:
            _cut_prompt(prompt, tokenizer, where, words, table)
        return prompt
    limit = tokenizer.model_max_length
    head = prompt[:LONGEST_LINE]
    count = count_tokens(head, tokenizer)
    if count <= limit and head == prompt:
        return prompt
    if not truncate:
        remedy = "Shorten it." if truncate is None else "Shorten it, or pass --truncate-prompts."
        if count > MOST_PIECES * len(head.split()) + len(_UNSPACED.findall(head)):
            remedy = (
                "The model's tokenizer knows few of its words. For the demo model write prompts with "
                "python -m datasetdm_fast.prompts --set demo; others need another --model."
            )
        raise Refused(f"{where}: {count} tokens, at most {limit} fit: {shorten(prompt)}", remedy)
    return _cut_prompt(prompt, tokenizer, where, words, table)


def _cut_prompt(prompt: str, tokenizer: Tokenizer, where: str, words: Sequence[str], table: ClassTable | None) -> str:
    """The prompt cut between words to what the text encoder reads, where no class word is lost."""
    limit, head = tokenizer.model_max_length, prompt[:LONGEST_LINE]
    shortest, longest = 0, len(head)
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        shortest, longest = (
            (middle, longest) if count_tokens(head[:middle], tokenizer) <= limit else (shortest, middle - 1)
        )
    cut = head[:shortest]
    is_inside_word = not any(letter.isspace() or _UNSPACED.match(letter) for letter in prompt[shortest - 1 :][:2])
    if is_inside_word and re.search(r"\s", cut):
        cut = cut.rsplit(None, 1)[0]
    cut = cut.strip()
    lost = [word for word in find_classes(prompt, words, table) if word not in find_classes(cut, words, table)]
    if lost or not cut:
        what = (
            f"cutting it to {limit} tokens would lose the class word {shorten(lost[0])}"
            if lost
            else f"nothing of it fits into {limit} tokens"
        )
        raise Refused(f"{where}: {what}: {shorten(prompt)}", "Name the classes earlier in the prompt.")
    return cut


def shorten(text: str) -> str:
    """The text for a message: short, and nothing in it can steer a terminal."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


DEMO_SCENES = 900_000_000  # first scene seed of the demo captions, far from those the demo model was trained on
OPENINGS = ("a photo of", "a picture of", "a scene with")
SURROUNDINGS = ("", " at night", " at sunset", " in fog")
TURN = 100_000_007  # between seeds and prompts of what may take the place of a sample: prime, so that prompts differ


@dataclass(frozen=True)
class Plan:
    """Every image of a run, a pure function of the settings: sample k has prompt k in turn and seed run seed + k,
    unless its prompt brings a seed, which is another one whenever that prompt is repeated."""

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
            turn, place = divmod(index, len(prompts))
            line = prompts[place]
            return line._replace(seed=(line.seed + turn * TURN) % SEEDS) if turn and line.seed is not None else line
        return PromptLine(0, sample_scene(DEMO_SCENES + seed + index).caption)

    # Batches of equal size leave less padding than full ones and a remainder.
    batches = -(-number // batch_size)
    size = batch_size if source.is_part else -(-number // batches)
    has_seeds = any(line.seed is not None for line in source.lines)
    if has_seeds and turns > 1:
        raise Refused(
            f"{source.name}: prompts with seeds of their own name certain images, which no others replace",
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
