"""Prompts as a user gives them, read and checked."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from datasetdm_fast.config import DEMO_PROMPTS, RunConfig
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import documents
from datasetdm_fast.engine.labels.class_tables import ClassTable, spoken
from datasetdm_fast.engine.labels.words import find_classes
from datasetdm_fast.engine.labels.class_file import own_table, refuse_files

LONGEST_LINE = 4096  # bytes; no prompt of 77 tokens comes near it
LARGEST_FILE = 256 * 2**20  # bytes
MOST_PIECES = 3  # tokens of a word, on average, where a tokenizer knows the language of a prompt
LINES = 'Write lines such as {"prompt": "a red ball", "classes": ["ball"], "seed": 7}; only prompt is needed.'
NEGATIVE_PROMPTS = {
    # Dataset Diffusion's text, letter by letter: two of its commas have no space after them.
    "dataset-diffusion": "ugly, tiling, poorly drawn hands, poorly drawn feet, poorly drawn face,out of frame, "
    "extra limbs, disfigured, deformed, body out of frame, bad anatomy,watermark, signature, cut off, low contrast, "
    "underexposed, overexposed, bad art, beginner, amateur, distorted face"
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

Tokenizer = Callable[..., object]


class GivenPrompt(NamedTuple):
    """One prompt of a list; a list of JSON lines may also say which classes it names and which seed it has."""

    line: int  # from 1
    text: str
    classes: tuple[str, ...] | None = None  # None: those found in the text
    seed: int | None = None  # None: the run's seed plus the number of the image
    file: str = ""  # of a folder of lists
    negative: str | None = None  # None: that of the run
    class_prompt: str = ""  # empty: made of the class words


def _identity(prompt: GivenPrompt) -> str:
    """All that decides the image, in the fewest words: lists that bring no more have the digest they always had."""
    ways = [[prompt.text], [prompt.classes, prompt.seed], [prompt.negative], [prompt.class_prompt or None]]
    while len(ways) > 1 and ways[-1] == [None] * len(ways[-1]):
        ways.pop()
    return prompt.text if len(ways) == 1 else json.dumps([value for way in ways for value in way])


@dataclass(frozen=True)
class PromptSource:
    """Prompts as they were given, not yet measured in tokens."""

    lines: tuple[GivenPrompt, ...]  # empty: the demo world's captions, or templates
    name: str  # for messages: the file, or --prompts
    classes: tuple[str, ...]
    per_class: int
    negative: str = ""  # what --negative-prompt said
    is_part: bool = False  # of a longer list: batches have the size that was asked for, whatever the part's length
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


def read_source(config: RunConfig) -> PromptSource:
    """The prompts of a run, checked as far as that needs no tokenizer."""
    table = own_table(config.class_table) if config.class_table else None
    return replace(_read_source(config), negative=check_line(config.negative_prompt, "--negative-prompt"), table=table)


def _read_source(config: RunConfig) -> PromptSource:
    classes = check_classes(config.classes)
    if config.per_class:
        if not classes:
            raise Refused(
                f"--per-class {config.per_class}: there are no classes to make prompts for",
                "Name them: --classes ball,cube",
            )
        if config.prompts:
            raise Refused(
                "--per-class makes its own prompts, so it cannot be combined with --prompts", "Drop one of the two."
            )
        return PromptSource((), "--classes", classes, config.per_class)
    if config.prompts:
        lines, name = read_list(config.prompts, truncate=config.truncate_prompts)
        return PromptSource(lines, name, classes, 0)
    if config.model != "demo":
        raise Refused(
            f"--model {config.model}: no prompts were given, and only the demo model has captions of its own",
            "Add --prompts FILE, or --classes with --per-class.",
        )
    return PromptSource((), "the demo world", classes, 0)


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    seen = set()
    refuse_files(classes)
    for word in classes:
        if not word.strip():
            raise Refused(
                "--classes: one of the class words is empty", "Separate the words by single commas: --classes ball,cube"
            )
        if _CONTROL.search(word) or not documents.is_unicode(word):
            raise Refused(f"--classes: {shown(word)} holds control characters or invalid UTF-8", "Use plain words.")
        key = " ".join(word.lower().split())
        if key in seen:
            raise Refused(f"--classes: {shown(word)} is named twice", "Name each class once.")
        seen.add(key)
    return tuple(" ".join(word.split()) for word in classes)


def read_list(given: str, *, truncate: bool = False) -> tuple[tuple[GivenPrompt, ...], str]:
    """The prompts of a text, a file or a folder, and the name to call them by."""
    path = _as_path(given)
    if path is not None and path.is_dir():
        return _read_folder(path, truncate), str(path)
    name, text = read_prompts(given)
    if path is not None and text.lstrip().startswith("{"):
        return parse_lines(text, name, truncate=truncate), name
    return split_prompts(text, name, truncate=truncate), name


def _read_folder(folder: Path, truncate: bool) -> tuple[GivenPrompt, ...]:
    """DatasetDM's layout: a file a class, named after it; general.txt names no class. Empty files are skipped."""
    found = []
    for path in sorted(folder.glob("*.txt")):
        name, text = read_prompts(str(path))
        classes = () if path.stem == "general" else check_classes([path.stem])
        for prompt in split_prompts(text, name, truncate=truncate) if text.strip() else ():
            found.append(prompt._replace(classes=classes, file=name))
    if not found:
        raise Refused(f"{folder}: holds no prompt", "It needs files named CLASS.txt with one prompt per line.")
    return tuple(found)


def parse_lines(text: str, name: str, *, truncate: bool = False) -> tuple[GivenPrompt, ...]:
    """Prompts from JSON lines such as those of `prompts` or of a run's samples.jsonl; other keys are left alone."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        value = documents.parse_json(line, where, LINES)
        try:
            documents.check_form(value, {"prompt": str})
            for key in ("negative", "class_prompt"):
                documents.check_form(value.get(key, ""), str, key)
            documents.check_form(value.get("classes", []), [str], "classes")
            seed = value.get("seed")
            if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
                raise ValueError(f"seed is {documents.quoted(seed)}, expected a whole number from 0 to 2^63 - 1")
        except ValueError as error:
            raise Refused(f"{where}: {error}", LINES) from error
        if not value["prompt"].strip():
            raise Refused(f"{where}: holds no prompt", LINES)
        (only,) = split_prompts(re.sub("\r?\n", " ", value["prompt"]), name, truncate=truncate, first=number)
        classes = check_classes(value["classes"]) if "classes" in value else None
        negative = check_line(value["negative"], f"{where}: negative") if "negative" in value else None
        words = check_line(value.get("class_prompt", ""), f"{where}: class_prompt")
        found.append(GivenPrompt(number, only.text, classes, seed, negative=negative, class_prompt=words))
    return tuple(found)


def read_prompts(given: str) -> tuple[str, str]:
    """The name to call the prompts by, and their text: the file `given` names, or `given` itself."""
    path = _as_path(given)
    if path is None:
        if not documents.is_unicode(given):
            raise Refused(f"--prompts: {shown(given)} is not valid UTF-8", "Write the prompt in UTF-8.")
        return "--prompts", given
    try:
        data = storage.read(path, LARGEST_FILE)
    except Missing as error:
        raise Refused(
            f"{path}: the prompt file cannot be read ({getattr(error.__cause__, 'strerror', '')})"
            f"{'' if path.exists() else storage.named_alike(path)}",
            "Name a readable file with one prompt per line, or give the prompt itself.",
        ) from error
    try:
        return str(path), data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Refused(f"{path} line {line}: not valid UTF-8", "Save the file as UTF-8.") from error


def _as_path(given: str) -> Path | None:
    """The file `given` means: one that is there, or a word that can only be meant as one."""
    path = Path(given)
    try:
        if path.exists():
            return path
    except (OSError, ValueError):
        return None
    looks_like_file = not re.search(r"\s", given) and (os.sep in given or re.search(r"\.[A-Za-z0-9]{1,5}$", given))
    return path if looks_like_file else None


def split_prompts(text: str, name: str, *, truncate: bool = False, first: int = 1) -> tuple[GivenPrompt, ...]:
    """One prompt a line, the first of which has the number `first`; empty lines are skipped."""
    lines = []
    for number, line in enumerate(text.split("\n"), first):
        if bad := _CONTROL.search(line.rstrip("\r")):
            what = "a NUL byte" if bad[0] == "\0" else f"the control character U+{ord(bad[0]):04X}"
            raise Refused(f"{name} line {number}: holds {what}", "Remove it: prompts are plain text.")
        prompt = line.strip()
        if not documents.is_unicode(prompt):
            raise Refused(f"{name} line {number}: {shown(prompt)} is not valid Unicode", "Write the prompt in UTF-8.")
        if (size := len(prompt.encode())) > LONGEST_LINE and not truncate:
            raise Refused(
                f"{name} line {number}: {size} bytes, at most {LONGEST_LINE} are read",
                "Shorten it, or pass --truncate-prompts.",
            )
        if prompt:
            lines.append(GivenPrompt(number, prompt))
    if not lines:
        raise Refused(f"{name}: holds no prompt", "Write one prompt per line.")
    return tuple(lines)


def check_line(text: str, where: str) -> str:
    """A text that is no list of prompts, on one line."""
    line = " ".join(text.splitlines())
    if _CONTROL.search(line) or not documents.is_unicode(line):
        raise Refused(f"{where}: {shown(line)} holds control characters or invalid UTF-8", "Use plain words.")
    return line.strip()


def fit_negative(given: str, tokenizer: Tokenizer, where: str, *, truncate: bool = False) -> str:
    """The text of the unconditional half, by its name in NEGATIVE_PROMPTS or as it was given, where it fits; one that
    has a name stays whole, as its author leaves it to the tokenizer to cut it.
    """
    text = NEGATIVE_PROMPTS.get(given, given)
    return text if text in NEGATIVE_PROMPTS.values() else fit(text, tokenizer, where, truncate=truncate)


def check_class_lengths(classes: Sequence[str], tokenizer: Tokenizer, own: ClassTable | None = None) -> None:
    for word in spoken(classes, own):
        count = count_tokens(word, tokenizer)
        if count > token_limit(tokenizer):
            raise Refused(
                f"--classes: {shown(word)} has {count} tokens, at most {token_limit(tokenizer)} fit",
                "Use a shorter name for the class.",
            )


def token_limit(tokenizer: Tokenizer) -> int:
    return min(tokenizer.model_max_length, 77)


def count_tokens(prompt: str, tokenizer: Tokenizer) -> int:
    """Tokens of a prompt, its start and end marks among them."""
    return len(tokenizer(prompt, truncation=False).input_ids)


def fit(
    prompt: str,
    tokenizer: Tokenizer,
    where: str,
    words: Sequence[str] = (),
    *,
    truncate: bool | None = None,
    own: ClassTable | None = None,
) -> str:
    """The prompt where the text encoder takes it whole; with `truncate` its longest beginning, cut between words. None
    stands for a command without that flag.
    """
    limit = token_limit(tokenizer)
    head = prompt[:LONGEST_LINE]
    count = count_tokens(head, tokenizer)
    if count <= limit and head == prompt:
        return prompt
    if not truncate:
        remedy = "Shorten it." if truncate is None else "Shorten it, or pass --truncate-prompts."
        if count > MOST_PIECES * len(head.split()):
            remedy = (
                "The model's tokenizer knows few of its words. For the demo model write prompts with "
                "python -m datasetdm_fast.prompts --set demo; others need another --model."
            )
        raise Refused(f"{where}: {count} tokens, at most {limit} fit: {shown(prompt)}", remedy)
    shortest, longest = 0, len(head)
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        shortest, longest = (
            (middle, longest) if count_tokens(head[:middle], tokenizer) <= limit else (shortest, middle - 1)
        )
    kept = head[:shortest]
    is_inside_word = not prompt[shortest : shortest + 1].isspace() and not kept[-1:].isspace()
    if is_inside_word and re.search(r"\s", kept):
        kept = kept.rsplit(None, 1)[0]
    kept = kept.strip()
    lost = [word for word in find_classes(prompt, words, own) if word not in find_classes(kept, words, own)]
    if lost or not kept:
        what = (
            f"cutting it to {limit} tokens would lose the class word {shown(lost[0])}"
            if lost
            else f"nothing of it fits into {limit} tokens"
        )
        raise Refused(f"{where}: {what}: {shown(prompt)}", "Name the classes earlier in the prompt.")
    return kept


def shown(text: str) -> str:
    """The text for a message: short, and nothing in it can steer a terminal."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
