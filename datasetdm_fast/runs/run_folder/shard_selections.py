"""Small files beside the shards of a run: which samples are dropped, and the scores of each shard's samples."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.document import to_see_damage
from datasetdm_fast.runs.run_folder.shard_places import ShardPlace
from datasetdm_fast.untrusted import documents

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
            raise Refused(cause, to_see_damage(self._place.name)) from error

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
        """Index and value of every sample that was given this score."""
        return (pair for shard in sorted(self.shards) for pair in self.shards[shard].get(name, {}).items())

    def names(self) -> list[str]:
        return sorted({name for each in self.shards.values() for name in each})
