"""Runs in shards become one: a manifest whose entries name the shards of others, of which none is copied."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions.composition import Source, identity_of
from datasetdm_fast.runs.compositions.merging import CONVERT, Merging
from datasetdm_fast.runs.run_folder.document import DOCUMENT, SHARDS, check_same, pretty, shard_size
from datasetdm_fast.runs.run_folder.selections import DROPPED_IDS, encode_dropped
from datasetdm_fast.runs.run_folder.shard_audit import find_sharded
from datasetdm_fast.runs.run_folder.shard_places import ShardPlace, is_url, shard_place
from datasetdm_fast.runs.run_folder.shards import PARALLEL_READS, ShardEntry, entry_name, list_shards


class ShardMerging(Merging):
    """A merged run in shards at `out`."""

    def __init__(self, sources: Sequence[Source], out: str):
        if folders := [source.place for source in sources if source.run.shards is None]:
            raise Refused(f"{folders[0]}: it is a run folder, and others are in shards", CONVERT)
        self.place = shard_place(out)
        size = max(shard_size(source.document["config"]) for source in sources)
        self.layout = {"layout": SHARDS, "shard_size": size}
        super().__init__(sources)

    def _read_samples(self) -> None:
        self.entries: list[ShardEntry] = []
        self.dropped: set[int] = set()
        sizes = {source.document["sampling"]["size"] for source in self.sources}
        if len(sizes) > 1:
            raise Refused(f"{self.sources[0].place} and the others: their images have different sizes", CONVERT)
        self.sides = {(size, size) for size in sizes}
        known = set()
        for source in self.sources:
            ledger = source.run.shards
            assert ledger is not None
            remaining = set(source.run.indices) if source.filter_digest or ledger.dropped else None
            for shard, entry in sorted(ledger.entries.items()):
                files = frozenset(file.sha256 for file in entry.files.values())
                if files in known:
                    self.duplicates += len(entry.indices)
                    continue
                known.add(files)
                place, number = ledger.source_of(shard)
                first = len(self.entries) * self.layout["shard_size"]
                self.entries.append(entry.renumber(first, {"place": self._name(place), "shard": number}))
                if remaining is not None:
                    self.dropped |= {first + k - entry.first for k in entry.indices if k not in remaining}
        self.number = sum(entry.stop - entry.first for entry in self.entries)

    def _name(self, place: ShardPlace) -> str:
        """A place as the manifest names it: a folder by its path from that of the merged run."""
        if is_url(self.place.name):
            return place.name if is_url(place.name) else str(Path(place.name).resolve())
        if is_url(place.name):
            raise Refused(f"--out {self.place.name}: a run in a folder names no URL ({place.name})", "Give a URL.")
        return os.path.relpath(Path(place.name).resolve(), Path(self.place.name).resolve())

    def count_existing(self) -> int:
        """Samples of the entries that are there; a place that holds another run is refused."""
        document = find_sharded(self.place.name)
        if document is not None:
            check_same(Path(self.place.name), *map(identity_of, (document, self.document)))
        elif self.place.names():
            raise Refused(f"{self.place.name}: it is not empty", "Choose another --out; nothing is ever overwritten.")
        existing = set(list_shards(self.place))
        return sum(entry.stop - entry.first for shard, entry in enumerate(self.entries) if shard in existing)

    def write_missing(self, on_commit: Callable[[int], None], is_stopping: Callable[[], bool]) -> int:
        """Writes the entries that are missing, behind run.json and the list of samples that are left out; how many
        samples they have.
        """
        existing = set(list_shards(self.place))
        missing = [shard for shard in range(len(self.entries)) if shard not in existing]
        if missing:
            self.place.create(DOCUMENT, pretty(self.document))
            if content := encode_dropped(self.dropped):
                self.place.replace(DROPPED_IDS, content)

        def write(shard: int) -> int:
            if is_stopping():
                return 0
            self.place.create(entry_name(shard), self.entries[shard].encode())
            return self.entries[shard].stop - self.entries[shard].first

        count = 0
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            for samples in pool.map(write, missing):
                count += samples
                on_commit(samples)
        return count
