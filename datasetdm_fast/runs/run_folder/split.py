"""split.json: which part of a data set each sample of a run is in; pictures that were made of one are never parted."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused, quote, refusing_form
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.seal import SPLIT, resealed
from datasetdm_fast.untrusted import documents

LARGEST_SPLIT = 2**28  # bytes
SPLIT_FORM = {"seed": int, "by_source": bool, "parts": dict}


@dataclass(frozen=True)
class Split:
    """The parts of a run by name, each the indices of its samples."""

    seed: int
    by_source: bool
    parts: Mapping[str, tuple[int, ...]]

    @property
    def content(self) -> bytes:
        """The bytes of the file."""
        parts = {name: [f"{index:08d}" for index in indices] for name, indices in self.parts.items()}
        value = {"seed": self.seed, "by_source": self.by_source, "parts": parts}
        return (json.dumps(value, indent=0, ensure_ascii=False) + "\n").encode()

    def names(self) -> dict[int, str]:
        """The part of each sample."""
        return {index: name for name, indices in self.parts.items() for index in indices}


def read_split(folder: Path) -> Split | None:
    """How a run folder is split, None where it is not."""
    path = folder / SPLIT
    if not path.exists():
        return None
    remedy = f"Run python -m datasetdm_fast.split {quote(folder)} --undo, then split again."
    with refusing_form(path, "split", remedy):
        value = documents.read_object(path, most=LARGEST_SPLIT)
        documents.check_form(value, SPLIT_FORM)
        documents.check_form(list(value["parts"].values()), [[str]])
        parts = {name: tuple(map(int, ids)) for name, ids in value["parts"].items()}
        return Split(value["seed"], value["by_source"], parts)


def part_of(folder: Path, parts: Mapping[int, str], row: Row) -> str:
    """The part of a sample; one that was made after the run was split is in none."""
    if (part := parts.get(row.request.index)) is None:
        raise Refused(
            f"{folder}: sample {row.request.id} is in no part of its split",
            f"Split the run again: python -m datasetdm_fast.split {quote(folder)}",
        )
    return part


def write_split(folder: Path, document: Mapping[str, Any], split: Split | None) -> None:
    """Writes down how a run is split, or that it is not; nothing else is changed."""
    with resealed(folder, document, removed="" if split else SPLIT):
        if split:
            storage.publish({folder / SPLIT: split.content})


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


def dealt(keys: Sequence[Sequence[str]], shares: Mapping[str, float], seed: int) -> list[str]:
    """The part of each sample; samples with a key in common are in one part, whose share is met as nearly as they let.

    Groups come in an order drawn from the seed and their own keys, each to the part that lacks most.
    """
    members = defaultdict(list)
    for place, group in enumerate(groups(keys)):
        members[group].append(place)
    drawn = sorted(
        members.values(), key=lambda places: hashlib.sha256(f"{seed}/{min(keys[places[0]])}".encode()).digest()
    )
    total = sum(shares.values())
    lacking = {name: share * len(keys) / total for name, share in shares.items()}
    found = [""] * len(keys)
    for places in sorted(drawn, key=len, reverse=True):  # the largest first, while every part can still hold them
        name = max(lacking, key=lacking.__getitem__)
        lacking[name] -= len(places)
        for place in places:
            found[place] = name
    return found
