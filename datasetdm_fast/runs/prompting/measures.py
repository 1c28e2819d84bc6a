"""How varied a list of prompts is: repeated word pairs, near duplicates, classes covered and named together."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import ceil
from typing import Any

from datasetdm_fast.runs.prompting.grammar import Sentence

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
