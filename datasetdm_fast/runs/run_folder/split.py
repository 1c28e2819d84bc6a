"""Which part of a data set each sample is in; samples that were made of the same picture are never separated."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Refused, quote
from datasetdm_fast.runs.run_folder.ledger import Row


def part_of(folder: Path, parts: Mapping[int, str], row: Row) -> str:
    """The part of a sample; one that was made after the run was split is in none."""
    if (part := parts.get(row.request.index)) is None:
        raise Refused(
            f"{folder}: sample {row.request.id} is in no part of its split",
            f"Split the run again: python -m datasetdm_fast.split {quote(folder)}",
        )
    return part


def origins(document: Mapping[str, Any], row: Row) -> tuple[str, ...]:
    """What a sample and all others that were made of the same pictures have in common: names of these pictures.

    A picture is named by the begin of its SHA-256, a tile of a splice by its run and its number there, and by the
    pictures that it was made of.
    """
    if "origins" in row.recipe:
        return tuple(row.recipe["origins"])
    source = document.get("composition", {}).get("source", {}).get("digests", {}).get("samples.jsonl", "")
    tiles = row.recipe.get("tiles", ())  # those of a splice; of a picture that was labelled in tiles, their number
    numbers = tiles if isinstance(tiles, list) else ()
    return (row.group, *(f"{source[:16]}/{id}" for id in numbers), *row.recipe.get("groups", ()))


def groups(origins: Sequence[Sequence[str]]) -> list[int]:
    """The number of the group of each sample; samples that share an origin are in one group."""
    parents, first = list(range(len(origins))), {}

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    for number, names in enumerate(origins):
        for name in names:
            parents[root(number)] = root(first.setdefault(name, number))
    return [root(number) for number in range(len(origins))]


def assign_parts(keys: Sequence[Sequence[str]], shares: Mapping[str, float], seed: int) -> list[str]:
    """The part of each sample; samples with a key in common are in one part, whose share is met as nearly as they let.

    Groups come in an order drawn from the seed and their own keys, each to the part that lacks most.
    """
    members = defaultdict(list)
    for place, group in enumerate(groups(keys)):
        members[group].append(place)
    shuffled = sorted(
        members.values(), key=lambda places: hashlib.sha256(f"{seed}/{min(keys[places[0]])}".encode()).digest()
    )
    total = sum(shares.values())
    missing = {name: share * len(keys) / total for name, share in shares.items()}
    parts = [""] * len(keys)
    for places in sorted(shuffled, key=len, reverse=True):  # the largest first, while every part can still hold them
        name = max(missing, key=missing.__getitem__)
        missing[name] -= len(places)
        for place in places:
            parts[place] = name
    return parts
