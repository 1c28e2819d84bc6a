"""How many prompts each class gets, which classes share one, and how varied a list of prompts is."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.runs.prompting.grammar import Sentence, SentenceGrammar
from datasetdm_fast.untrusted import documents

MOST_PROMPTS = 10_000_000
MOST_TRIES = 100  # sentences of one class until one is new
LARGEST_COUNTS = 2**24  # bytes of a file of counts
COUNTS_REMEDY = 'Write a whole number for each class: {"cat": 40, "dog": 25}.'


def count_prompts(
    classes: Sequence[str], per_class: int = 0, file: str = "", images: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The number of prompts for each class: of a file, so many that labelled images get balanced, or `per_class`."""
    if file:
        counts = _read_counts(file, classes)
    elif images is not None:
        most = max((images.get(name, 0) for name in classes), default=0)
        counts = {name: most - images.get(name, 0) for name in classes}
        if not most:
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
    """The classes of each prompt, spread evenly; `pairs` is the share of prompts that name two."""
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
    grammar: SentenceGrammar, planned: Iterable[tuple[str, ...]], on_sentence: Callable[[int], None] = lambda done: None
) -> list[Sentence]:
    """A sentence of each planned choice of classes; hardly any prompt comes twice while the grammar has another."""
    sentences, prompts, numbers, failures = [], set(), Counter[str](), Counter[str]()
    for name, *others in planned:
        for _ in range(MOST_TRIES - failures[name]):
            sentence = grammar.sentence(name, numbers[name], others)
            numbers[name] += 1
            if is_new := sentence.prompt not in prompts:
                break
        failures[name] = max(failures[name] - 1, 0) if is_new else min(failures[name] + 1, MOST_TRIES - 1)
        prompts.add(sentence.prompt)
        sentences.append(sentence)
        on_sentence(len(sentences))
    return sentences


SHINGLE = 5  # words
NEAR = 0.8  # Jaccard similarity of the five-word pieces of two near duplicates


def measure(sentences: Sequence[Sentence]) -> dict[str, Any]:
    """distinct-2, the share of near duplicates within a class, images of each class, and classes named together."""
    groups = defaultdict(list)
    for sentence in sentences:
        groups[sentence.group].append(sentence.prompt)
    repeated = sum(len(near_duplicates(prompts)) for prompts in groups.values())
    together = Counter(pair for sentence in sentences for pair in combinations(sentence.classes, 2))
    return {
        "prompts": len(sentences),
        "distinct_2": round(distinct_2([sentence.prompt for sentence in sentences]), 4),
        "near_duplicates": round(repeated / max(len(sentences), 1), 4),
        "classes": dict(Counter(name for sentence in sentences for name in sentence.classes)),
        "together": [[*pair, count] for pair, count in sorted(together.items(), key=lambda item: (-item[1], item[0]))],
    }


def report_lines(measures: Mapping[str, Any], rejected: Mapping[str, int]) -> Iterator[str]:
    """The figures of `measure` for a reader, and how many prompts of a language model were rejected for what reason."""
    classes, repeated = measures["classes"], measures["near_duplicates"]
    yield f"prompts    {measures['prompts']:,}, {repeated:.1%} near duplicates, distinct-2 {measures['distinct_2']:.3f}"
    if classes:
        rarest, commonest = min(classes, key=classes.get), max(classes, key=classes.get)
        least, most = classes[rarest], classes[commonest]
        each = f"{least:,} {'prompt' if least == 1 else 'prompts'} each"
        yield f"classes    {len(classes)}, " + (
            each if least == most else f"from {least:,} ({rarest}) to {most:,} ({commonest})"
        )
    for first, second, count in measures["together"][:3]:
        yield f"together   {first} and {second}: {count:,}"
    for reason, count in sorted(rejected.items(), key=lambda item: -item[1]):
        yield f"left out   {count:,}: {reason}"


def distinct_2(prompts: Sequence[str]) -> float:
    """Different pairs of neighbouring words, as a share of all pairs."""
    pairs = [pair for words in map(_words, prompts) for pair in zip(words, words[1:])]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def near_duplicates(prompts: Sequence[str]) -> list[int]:
    """The positions of prompts that repeat an earlier one but for a few words."""
    shingles = [_shingles(prompt) for prompt in prompts]
    common = Counter(shingle for of_prompt in shingles for shingle in of_prompt)
    positions: dict[tuple[str, ...], list[int]] = defaultdict(list)
    duplicates = []
    for position, these in enumerate(shingles):
        # Two sets this alike share one of their rarest shingles, so only those are looked up.
        rarest = sorted(these, key=lambda shingle: (common[shingle], shingle))[
            : len(these) - ceil(NEAR * len(these)) + 1
        ]
        earlier = {other for shingle in rarest for other in positions[shingle]}
        if any(len(these & shingles[other]) > NEAR * len(these | shingles[other]) for other in earlier):
            duplicates.append(position)
        for shingle in rarest:
            positions[shingle].append(position)
    return duplicates


def _shingles(prompt: str) -> frozenset[tuple[str, ...]]:
    words = _words(prompt)
    return frozenset(tuple(words[k : k + SHINGLE]) for k in range(max(len(words) - SHINGLE + 1, 1)))


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())
