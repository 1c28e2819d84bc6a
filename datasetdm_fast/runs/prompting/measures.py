"""How varied a list of prompts is: repeated word pairs, near duplicates, classes covered and named together."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from math import ceil

from datasetdm_fast.runs.prompting.grammar import Sentence

SHINGLE = 5  # words
NEAR = 0.8  # Jaccard similarity of the five-word pieces of two near duplicates


def measure(sentences: Sequence[Sentence]) -> dict[str, object]:
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


def distinct_2(prompts: Sequence[str]) -> float:
    """Different pairs of neighbouring words, as a share of all pairs."""
    pairs = [pair for words in map(_words, prompts) for pair in zip(words, words[1:])]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def near_duplicates(prompts: Sequence[str]) -> list[int]:
    """The places of prompts that repeat an earlier one but for a few words."""
    pieces = [_pieces(prompt) for prompt in prompts]
    common = Counter(piece for one in pieces for piece in one)
    seen: dict[tuple[str, ...], list[int]] = defaultdict(list)
    found = []
    for place, one in enumerate(pieces):
        # Two sets this alike share one of their rarest pieces, so only those are looked up.
        rarest = sorted(one, key=lambda piece: (common[piece], piece))[: len(one) - ceil(NEAR * len(one)) + 1]
        earlier = {other for piece in rarest for other in seen[piece]}
        if any(len(one & pieces[other]) > NEAR * len(one | pieces[other]) for other in earlier):
            found.append(place)
        for piece in rarest:
            seen[piece].append(place)
    return found


def _pieces(prompt: str) -> frozenset[tuple[str, ...]]:
    words = _words(prompt)
    return frozenset(tuple(words[k : k + SHINGLE]) for k in range(max(len(words) - SHINGLE + 1, 1)))


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())
