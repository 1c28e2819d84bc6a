"""Small files that select samples of a run: those that a filter keeps (state/kept.json), those of each part of a split
(split.json) and, beside shards, those that are dropped (dropped.json), and the scores of each shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused, quote, refusing_form
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    from datasetdm_fast.runs.run_folder.shard_places import ShardPlace

Selection = TypeVar("Selection")
FILTER, SPLIT = "state/kept.json", "split.json"
LARGEST_FILE = 2**28  # bytes
FILTER_FORM = {"where": str, "kept": [str], "left_out": dict}
SPLIT_FORM = {"seed": int, "by_source": bool, "parts": dict}


@dataclass(frozen=True)
class Filter:
    """What a filter decided; a sample that was made after it is in neither list."""

    where: str
    remaining: tuple[int, ...]  # indices of samples
    left_out: dict[int, str]  # index -> reason

    @classmethod
    def decode(cls, value: dict[str, Any]) -> Self:
        documents.check_form(list(value["left_out"].values()), [str])
        left_out = {int(id): reason for id, reason in value["left_out"].items()}
        return cls(value["where"], tuple(map(int, value["kept"])), left_out)

    @property
    def content(self) -> bytes:
        """The bytes of the file."""
        reasons = {f"{index:08d}": reason for index, reason in self.left_out.items()}
        return _encode({"where": self.where, "kept": _ids(self.remaining), "left_out": reasons})


@dataclass(frozen=True)
class Split:
    """The parts of a run by name, each the indices of its samples."""

    seed: int
    by_source: bool
    parts: Mapping[str, tuple[int, ...]]
    shares: tuple[float, ...] = ()  # of each part; () of a folder that an earlier version split

    @classmethod
    def decode(cls, value: dict[str, Any]) -> Self:
        documents.check_form(list(value["parts"].values()), [[str]])
        parts = {name: tuple(map(int, ids)) for name, ids in value["parts"].items()}
        documents.check_form(shares := value.get("shares", []), [float], "shares")
        return cls(value["seed"], value["by_source"], parts, tuple(shares))

    @property
    def content(self) -> bytes:
        """The bytes of the file."""
        parts = {name: _ids(indices) for name, indices in self.parts.items()}
        shares = {"shares": self.shares} if self.shares else {}
        return _encode({"seed": self.seed, "by_source": self.by_source, **shares, "parts": parts})

    def part_of(self, folder: Path, row: Row) -> str:
        """The part of a sample; one that was made after the run was split is in none."""
        if (part := self.names.get(row.request.index)) is None:
            line = f"python -m datasetdm_fast.split {quote(folder)}"
            if self.shares:
                line += f" --shares {','.join(f'{share:.9g}' for share in self.shares)} --names {','.join(self.parts)}"
            line += f" --seed {self.seed}" * (self.seed != 0) + " --no-by-source" * (not self.by_source)
            raise Refused(
                f"{folder}: sample {row.request.id} is in no part of its split", f"Split the run again: {line}"
            )
        return part

    @cached_property
    def names(self) -> dict[int, str]:
        """The part of each sample."""
        return {index: name for name, indices in self.parts.items() for index in indices}


def read_filter(folder: Path) -> Filter | None:
    """What the filter of a run folder decided, None without a filter."""
    return _read(folder, FILTER, "filter", FILTER_FORM, Filter.decode)


def check_filtered(folder: Path) -> None:
    """Refuses --kept for a run folder without a filter."""
    if not (folder / FILTER).exists():
        raise Refused(
            f"--kept: {folder} has not been filtered",
            f"Drop it, or filter first with: python -m datasetdm_fast.filter {quote(folder)} --where CONDITION",
        )


def read_split(folder: Path) -> Split | None:
    """How a run folder is split, None where it is not."""
    return _read(folder, SPLIT, "split", SPLIT_FORM, Split.decode)


def _read(
    folder: Path, name: str, command: str, form: Mapping[str, Any], decode: Callable[[dict[str, Any]], Selection]
) -> Selection | None:
    """What the file of a command selects, None without one."""
    if (content := storage.read_if_there(folder / name, LARGEST_FILE)) is None:
        return None
    remedy = f"Run python -m datasetdm_fast.{command} {quote(folder)} --undo, then {command} again."
    with refusing_form(folder / name, command, remedy):
        value = documents.parse_object(content, str(folder / name))
        documents.check_form(value, form)
        return decode(value)


def _ids(indices: Iterable[int]) -> list[str]:
    return [f"{index:08d}" for index in indices]


def _encode(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=0, ensure_ascii=False) + "\n").encode()


def parse_part(part: str) -> tuple[int, int]:
    """k and n of --part k/n, which gives each of n machines a share of the samples."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    if not match or not 1 <= (k := int(match[1])) <= (n := int(match[2])):
        raise Refused(f"--part {documents.quote(part)}: expected k/n with k from 1 to n", "For example 3/16.")
    return k, n


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


DROPPED_IDS = "dropped.json"
SCORES_FOLDER = "scores"
PARALLEL_READS = 16  # of small files
Score = float | int | None


def encode_dropped(indices: Collection[int]) -> bytes | None:
    """The file that names dropped samples, None without any."""
    return json.dumps([f"{index:08d}" for index in sorted(indices)], indent=0).encode() if indices else None


def read_dropped(place: ShardPlace) -> frozenset[int]:
    """The indices of the dropped samples of a run in shards."""
    if (content := place.read(DROPPED_IDS)) is None:
        return frozenset()
    try:
        ids = documents.parse_json(content, DROPPED_IDS)
        documents.check_form(ids, [str])
        return frozenset(map(int, ids))
    except ValueError as error:
        cause = f"{place.name}/{DROPPED_IDS}: not a list of ids ({documents.reason_of(error)})"
        raise Refused(cause, "Delete it, then drop the samples again.") from error


class ShardScores:
    """The scores of samples, a file for each shard."""

    def __init__(self, place: ShardPlace):
        self._place = place
        names = [name for name in place.names(SCORES_FOLDER) if name.removesuffix(".json").isdecimal()]
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            self.shards = dict(zip((int(name.removesuffix(".json")) for name in names), pool.map(self._read, names)))

    def _read(self, name: str) -> dict[str, dict[int, Score]]:
        path = f"{SCORES_FOLDER}/{name}"
        try:
            value = documents.parse_json(self._place.read(path) or b"", "it")
            documents.check_form(value, {"indices": [int], "scores": dict})
            return {score: dict(zip(value["indices"], each, strict=True)) for score, each in value["scores"].items()}
        except (ValueError, TypeError) as error:
            cause = f"{self._place.name}/{path}: not the scores of a shard ({documents.reason_of(error)})"
            remedy = f"Delete it, then run python -m datasetdm_fast.filter {quote(self._place.name)}."
            raise Refused(cause, remedy) from error

    def write(self, shard: int, scores: Mapping[str, Mapping[int, Score]]) -> None:
        """Adds scores, by their names and indices, of samples of a shard."""
        before = self.shards.get(shard, {})
        merged = {**before, **{name: {**before.get(name, {}), **each} for name, each in scores.items()}}
        indices = sorted({index for each in merged.values() for index in each})
        columns = {name: [each.get(index) for index in indices] for name, each in merged.items()}
        content = json.dumps({"indices": indices, "scores": columns}).encode()
        self._place.replace(f"{SCORES_FOLDER}/{shard:05d}.json", content)
        self.shards[shard] = merged

    def forget(self, name: str, why: tuple[str, str]) -> None:
        """Removes a score, with a note of why."""
        for shard, scores in self.shards.items():
            if scores.pop(name, None):
                self.write(shard, {})
        self._place.replace(f"{SCORES_FOLDER}/{why[0]}", why[1].encode())

    def of(self, name: str) -> Iterator[tuple[int, Score]]:
        """Index and value of every sample that was given this score, by index."""
        return (pair for shard in sorted(self.shards) for pair in sorted(self.shards[shard].get(name, {}).items()))

    def names(self) -> list[str]:
        return sorted({name for each in self.shards.values() for name in each})
