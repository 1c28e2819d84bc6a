"""How many prompts each class gets, and which classes share one."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.runs.prompting.grammar import Sentence, SentenceGrammar
from datasetdm_fast.untrusted import documents

MOST_PROMPTS = 10_000_000
MOST_TRIES = 100  # sentences of one class until one is new
LARGEST_COUNTS = 2**24  # bytes of a file of counts
COUNTS_REMEDY = 'Write a whole number for each class: {"cat": 40, "dog": 25}.'


def count_missing_images(present: Mapping[str, int], classes: Sequence[str]) -> dict[str, int]:
    """Images that each class needs until all have as many as the one with the most."""
    most = max((present.get(name, 0) for name in classes), default=0)
    return {name: most - present.get(name, 0) for name in classes}


def count_prompts(
    classes: Sequence[str], per_class: int = 0, file: str = "", images: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The number of prompts for each class: from a file of counts, or so many that labelled images, of which `images`
    show each class, become balanced, or `per_class`, by default 100.
    """
    if file:
        counts = _read_counts(file, classes)
    elif images is not None:
        counts = count_missing_images(images, classes)
        if not any(images.get(name) for name in classes):
            raise Refused("--balance: no image shows a class of this list", "Give --classes in the words of the data.")
        if not any(counts.values()):
            raise Refused("--balance: every class of this list is in as many images", "Give --per-class instead.")
    else:
        counts = dict.fromkeys(classes, per_class or 100)
    if not 0 < sum(counts.values()) <= MOST_PROMPTS:
        raise Refused(f"{sum(counts.values()):,} prompts: expected 1 to {MOST_PROMPTS:,}", "Ask for another number.")
    return counts


def _read_counts(path: str, classes: Sequence[str]) -> dict[str, int]:
    counts = documents.read_object(Path(path), most=LARGEST_COUNTS, remedy=COUNTS_REMEDY)
    for name, count in counts.items():
        if name not in classes:
            raise Refused(
                f"{path}: {name!r} is not a class of this list{nearest(name, classes)}",
                f"The classes are {', '.join(classes)}.",
            )
        if type(count) is not int or not 0 <= count <= MOST_PROMPTS:
            raise Refused(f"{path}: {name!r} has {count!r}", COUNTS_REMEDY)
    return {name: counts.get(name, 0) for name in classes}


def plan_classes(counts: Mapping[str, int], pairs: float, seed: int) -> Iterator[tuple[str, ...]]:
    """The classes of each prompt: every class comes up exactly counts[class] times, spread evenly over the list.

    `pairs` is the share of prompts that name two classes.
    """
    dice, left = random.Random(seed), {name: count for name, count in counts.items() if count > 0}
    total = dict(left)
    while left:
        # The class that is furthest behind its share comes next; ties go in the order of the classes.
        first = max(left, key=lambda name: left[name] / total[name])
        chosen = [first]
        if pairs and len(left) > 1 and dice.random() < pairs:
            others = [name for name in left if name != first]
            chosen.append(dice.choices(others, [left[name] for name in others])[0])
        for name in chosen:
            left[name] -= 1
            if not left[name]:
                del left[name]
        yield tuple(chosen)


def build_list(
    grammar: SentenceGrammar, counts: Mapping[str, int], pairs: float = 0.0, seed: int = 0
) -> list[Sentence]:
    """The balanced list of a grammar; no prompt comes twice while the grammar has another."""
    sentences, prompts, numbers = [], set(), dict.fromkeys(counts, 0)
    for name, *others in plan_classes(counts, pairs, seed):
        for _ in range(MOST_TRIES):
            sentence = grammar.sentence(name, numbers[name], others)
            numbers[name] += 1
            if sentence.prompt not in prompts:
                break
        prompts.add(sentence.prompt)
        sentences.append(sentence)
    return sentences
