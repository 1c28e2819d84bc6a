"""The prompt lists of Dataset Diffusion: JSON entries with a file name, a caption and a class prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.class_tables import spoken
from datasetdm_fast.engine.labels.semantic import BACKGROUND
from datasetdm_fast.engine.loop.class_prompts import further_words, match_phrases
from datasetdm_fast.engine.loop.prompts import PromptLine, PromptSource, check_line
from datasetdm_fast.errors import Missing, Refused, nearest
from datasetdm_fast.runs.jobs.prompt_files import LARGEST_FILE
from datasetdm_fast.untrusted import documents

KINDS = ("voc", "coco")
FORM = {"filename": str, "caption": str, "class_prompt": str}
EXAMPLE = '{"filename": "0.jpg", "caption": "a dog on a sofa; dog sofa", "class_prompt": "dog sofa"}'


@dataclass(frozen=True)
class PromptList:
    """A part of a list: prompts in their order, and the names of their files without the ending."""

    kind: str  # of KINDS
    prompts: tuple[PromptLine, ...]
    names: tuple[str, ...]
    length: int  # of the whole list
    first: int  # place of the part in it

    @property
    def classes(self) -> tuple[str, ...]:
        return classes_of(self.kind)

    @property
    def is_whole(self) -> bool:
        return len(self.prompts) == self.length

    def source(self, path: Path, negative: str, *, tokenizer_cuts: bool) -> PromptSource:
        return PromptSource(
            self.prompts, str(path), self.classes, 0, negative, is_part=True, tokenizer_cuts=tokenizer_cuts
        )


def classes_of(kind: str) -> tuple[str, ...]:
    """The classes of a data set in the order of their numbers, 1 and up."""
    return tuple(name for name in class_tables.builtin_table(kind).names if name != BACKGROUND)


def read_list(path: Path, kind: str, start: int, end: int) -> PromptList:
    """The entries from `start` to before `end` (-1: the last included); an empty `kind` is inferred from the class
    prompts.
    """
    if not storage.is_there(path):
        raise Missing(f"--json-path: {path} is not there{storage.named_alike(path)}", "Name the list of prompts.")
    remedy = f"Write a JSON list of entries such as {EXAMPLE}."
    entries = documents.read_json(path, most=LARGEST_FILE, remedy=remedy)
    if not isinstance(entries, list) or not entries:
        raise Refused(f"{path}: not a list of prompts", remedy)
    for place, entry in enumerate(entries):
        try:
            documents.check_form(entry, FORM)
            name = documents.check_inside(entry["filename"])
            if "/" in name or PurePosixPath(name).stem.startswith("."):
                raise ValueError(f"filename {documents.quote(name)} is no plain file name")
        except ValueError as error:
            raise Refused(f"{path}: entry {place}: {error}", f"Write entries such as {EXAMPLE}.") from error
    names = [PurePosixPath(entry["filename"]).stem for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise Refused(f"{path}: two entries have the file name {twice}", "Give each entry a name of its own.")
    first, stop = max(start, 0), len(entries) if end == -1 else min(end, len(entries))
    if first >= stop:
        raise Refused(
            f"--start {start} --end {end}: no entry of {path} lies between, it has {len(entries)}",
            "Leave both out, or name a part of the list.",
        )
    texts = [entry["class_prompt"] for entry in entries]
    kind = kind or _kind_of(texts)
    known = {name: _phrases(name) for name in classes_of(kind)}
    prompts = []
    for place in range(first, stop):
        where = f"{path}: entry {place}"
        words = check_line(texts[place], f"{where}: class_prompt")
        classes = _classes(words, known, kind, where)
        text = check_line(entries[place]["caption"], f"{where}: caption")
        if not text:
            raise Refused(f"{where}: the caption is empty", "Say what the picture shows.")
        prompts.append(PromptLine(place + 1, text, classes, class_prompt=words if classes else ""))
    return PromptList(kind, tuple(prompts), tuple(names[first:stop]), len(entries), first)


def _phrases(name: str) -> list[list[str]]:
    """How a class prompt lists a class: by its name, as it is spoken, or as in "tv monitor"."""
    phrases = dict.fromkeys((name, *spoken((name,))))
    phrases |= dict.fromkeys(word for word in further_words(name, None) if word.replace(" ", "") == name)
    return [each.split() for each in phrases]


def _classes(text: str, known: dict[str, list[list[str]]], kind: str, where: str) -> tuple[str, ...]:
    """The classes that a class prompt lists; every word of it must belong to one."""
    words = text.lower().split()
    matches = match_phrases(words, known)
    covered = {at + k for _, at, length in matches for k in range(length)}
    if (other := next((k for k in range(len(words)) if k not in covered), None)) is not None:
        raise Refused(
            f"{where}: {documents.quote(words[other])} of its class prompt is not a class of {kind}"
            f"{nearest(words[other], known)}",
            f"Name classes of {kind} alone, or choose another --data-type.",
        )
    return tuple(dict.fromkeys(name for name, _, _ in matches))


def _kind_of(texts: Sequence[str]) -> str:
    """The first data set that has all classes of the class prompts, else the first."""
    for kind in KINDS:
        known = {name: _phrases(name) for name in classes_of(kind)}
        try:
            for text in dict.fromkeys(texts):
                _classes(text, known, kind, "")
        except Refused:
            continue
        return kind
    return KINDS[0]
