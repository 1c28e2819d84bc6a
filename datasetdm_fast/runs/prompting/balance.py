"""How many prompts each class gets, and which classes share one."""

import random
from collections.abc import Iterator, Mapping, Sequence

from datasetdm_fast.runs.prompting.grammar import Sentence


def lacking(present: Mapping[str, int], classes: Sequence[str]) -> dict[str, int]:
    """Images that each class lacks until all have as many as the one with the most."""
    most = max((present.get(name, 0) for name in classes), default=0)
    return {name: most - present.get(name, 0) for name in classes}


def planned(counts: Mapping[str, int], pairs: float, seed: int) -> Iterator[tuple[str, ...]]:
    """The classes of each prompt: every class comes up exactly counts[class] times, spread evenly over the list.

    `pairs` is the share of prompts that name two classes.
    """
    draw, left = random.Random(seed), {name: count for name, count in counts.items() if count > 0}
    total = dict(left)
    while left:
        # The class that is furthest behind its share comes next; ties go in the order of the classes.
        first = max(left, key=lambda name: left[name] / total[name])
        chosen = [first]
        if pairs and len(left) > 1 and draw.random() < pairs:
            others = [name for name in left if name != first]
            chosen.append(draw.choices(others, [left[name] for name in others])[0])
        for name in chosen:
            left[name] -= 1
            if not left[name]:
                del left[name]
        yield tuple(chosen)


def sentences(grammar, counts: Mapping[str, int], pairs: float = 0.0, seed: int = 0) -> list[Sentence]:
    """The balanced list; no prompt comes twice while the grammar has another."""
    found, seen, numbers = [], set(), dict.fromkeys(counts, 0)
    for name, *beside in planned(counts, pairs, seed):
        for _ in range(100):
            sentence = grammar.sentence(name, numbers[name], beside)
            numbers[name] += 1
            if sentence.prompt not in seen:
                break
        seen.add(sentence.prompt)
        found.append(sentence)
    return found
