"""The work of one process of a run in shards: it claims shards that are missing, makes them and commits each by an
entry of the manifest. Processes meet only in the place of the run; a shard that two of them make has equal bytes.
"""

import hashlib
import json
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasetdm_fast.cores import in_threads
from datasetdm_fast.data import Quarantined, Sample
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.jobs.job import Job, build_job, check_room
from datasetdm_fast.runs.jobs.run import check_rows, merge_with_stored
from datasetdm_fast.runs.jobs.writing import WRITERS, DomainGate, batch_facts, make_samples
from datasetdm_fast.runs.run_folder.document import (
    CLAIMS,
    DOCUMENT,
    MANIFEST,
    SHARDS,
    check_config,
    grows,
    is_sharded,
    pretty,
    quarantines,
    shard_size,
)
from datasetdm_fast.runs.run_folder.folder import write_samples
from datasetdm_fast.runs.run_folder.ledger import DONE, QUARANTINED, Row
from datasetdm_fast.runs.run_folder.shard_places import ShardFolder, ShardPlace
from datasetdm_fast.runs.run_folder.shards import (
    RECORD,
    Places,
    ShardEntry,
    ShardLedger,
    count_classes,
    encode_index,
    entry_name,
    index_name,
    instance_classes,
    list_shards,
    read_stored,
    require_pyarrow,
    sample_record,
    tar_name,
    write_tar,
)
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.claims import Claims
from datasetdm_fast.runs.workers.worker import Callbacks
from datasetdm_fast.untrusted import documents

SECONDS_BETWEEN_TRIES = 2.0  # to take a shard where all that are missing are claimed
Encoded = tuple[Row, Mapping[str, bytes]]  # a row and its files by role


class ShardAbandoned(Exception):
    """A shard that is not to be completed here: another process has committed it, or the run is to stop."""


@dataclass(frozen=True)
class ShardRank:
    """Which of the processes that were started together this one is."""

    rank: int = 0
    world: int = 1
    name: str = ""  # by which whatever started it knows its claims


def open_shards(spec: RunSpec, place: ShardPlace) -> Job:
    """The job of a run in shards; the first process writes its run.json, and other settings than its are refused."""
    if (stored := open_place(place)) is not None:
        check_settings(spec, place, stored)
    job = build_job(spec, stored)
    if isinstance(place, ShardFolder):
        done = len(list_shards(place)) * shard_size(job.document["config"])
        check_room(job.folder, replace(job, done=done).bytes_needed)
    if stored is None:
        place.create(DOCUMENT, pretty(job.document))
    # which another process may have begun or let grow since the first look
    stored = read_stored(place) or json.loads(pretty(job.document))
    check_settings(spec, place, stored)
    merged = merge_with_stored(job, stored)
    if grows(stored["config"], spec.identity):
        ledger = ShardLedger(place, shard_size(merged.document["config"]), number=merged.plan.number)
        check_rows(merged, ledger.rows(DONE, QUARANTINED, parts=()))
        ledger.remove_short()
        place.replace(DOCUMENT, pretty(merged.document))
    return merged


def open_place(place: ShardPlace) -> dict[str, Any] | None:
    """run.json, None where a run may be begun; a place that holds anything else is refused."""
    require_pyarrow()
    if (stored := read_stored(place)) is not None:
        return stored
    names = place.names()
    # Another process may have begun the run since the first look, and a network disk may list run.json before it lets
    # it be read.
    others = [name for name in names if name not in (DOCUMENT, MANIFEST, SHARDS, CLAIMS)]
    if names and (stored := read_stored(place)) is None and others:
        raise Refused(
            f"{place.name}: it holds something other than a run in shards ({documents.quote(others[0])})",
            "Choose another --out or --store; nothing is ever overwritten.",
        )
    return stored


def check_settings(spec: RunSpec, place: ShardPlace, stored: Mapping[str, Any]) -> None:
    """Refuses a run folder, and other settings than those of the run."""
    if not is_sharded(stored):
        raise Refused(
            f"{place.name}: it is a run folder, not a run in shards",
            "Continue it without --layout shards and --cluster, or choose another --out.",
        )
    size = {"shard_size": shard_size(stored["config"])}  # which a run has whether or not it is asked for
    check_config(place.name, {**stored, "config": stored["config"] | size}, {**size, **spec.identity})


def files_of_shard(shard: int) -> tuple[str, ...]:
    return tar_name(shard), index_name(shard), entry_name(shard)


class ShardWorker:
    """Makes the missing shards of a run, beginning with those of its rank."""

    def __init__(self, job: Job, place: ShardPlace, rank: ShardRank, callbacks: Callbacks):
        self.job, self.place, self.callbacks = job, place, callbacks
        self.size = shard_size(job.document["config"])
        first = replace(job, stops_outside=job.stops_outside and not list_shards(place))  # a run is judged once
        self.gate, self.claims = DomainGate(first, largest=self.size), Claims(place, rank.name, files_of_shard)
        self.made = 0
        count = -(-job.plan.number // self.size)
        self.order = sorted(range(count), key=lambda shard: ((shard - rank.rank) % rank.world, shard))
        self.names = instance_classes(job.document)

    def work(self) -> Iterator[int]:
        """Makes shards until none is missing, or until it is to stop; yields the samples of each that it commits."""
        while missing := self._missing():
            made = 0
            for shard in missing:
                if self.callbacks.is_stopping() or self.job.limit and self.made >= self.job.limit:
                    return
                if self.claims.take(shard):
                    made += 1
                    if not (count := self._make(shard)):
                        break  # others have made shards since, this one among them
                    yield count
            if not made:
                time.sleep(SECONDS_BETWEEN_TRIES)
        self.claims.release_left(self.order)

    def _missing(self) -> list[int]:
        done = {name.removesuffix(".json") for name in self.place.names(MANIFEST)}
        return [shard for shard in self.order if f"{shard:05d}" not in done]

    def _make(self, shard: int) -> int:
        """The samples that this process committed: none where another was faster, or where it is to stop."""
        try:
            if self.place.read(entry_name(shard)) is not None:
                return 0
            entry = self._write(shard)
            if not self.place.create(entry_name(shard), entry.encode()):
                if self.place.read(entry_name(shard)) != entry.encode():
                    self.place.remove(entry_name(shard))  # its files may be those of this process by now
                    raise GateFailed(
                        f"{self.place.name}: two processes made shard {shard:05d} with other bytes, so it is missing",
                        "Run the command again, with the same device and versions everywhere.",
                    )
                return 0
        except ShardAbandoned:
            return 0
        finally:
            self.claims.release(shard)
        self.made += entry.stop - entry.first
        return entry.stop - entry.first

    def _write(self, shard: int) -> ShardEntry:
        """The entry of a shard whose files are written."""
        first = shard * self.size
        stop = min(first + self.size, self.job.plan.number)
        made: list[tuple[Row, Places]] = []
        tar = self.place.write(tar_name(shard), write_tar(self._files(shard, first, stop, made)))
        rows, places = zip(*sorted(made, key=lambda pair: pair[0].request.index))
        counts = [count_classes(row, self.names) for row in rows]
        index = self.place.write(index_name(shard), [encode_index(rows, places, counts)])
        reasons: dict[str, list[int]] = {}
        for row in rows:
            if row.status == QUARANTINED:
                reasons.setdefault(row.reason, []).append(row.request.index)
        trusts = [row.trust for row in rows if row.trust]
        domains = [trust.domain for trust in trusts if trust.domain is not None]
        has_others = quarantines(self.job.document["config"])  # in the place of doubtful ones
        return ShardEntry(
            first,
            stop,
            doubtful=self.rejections if has_others else sum(not trust.is_trusted for trust in trusts),
            outside=sum(domain > 1 for domain in domains),
            measured=len(domains),
            quarantined=reasons,
            classes=dict(sum(counts, Counter())),
            files={tar_name(shard): tar, index_name(shard): index},
        )

    def _files(self, shard: int, first: int, stop: int, made: list[tuple[Row, Places]]) -> Iterator[tuple[str, bytes]]:
        """The files of a shard; the rows of its samples and where their files come to lie are added to the list."""
        end = 0
        for row, contents in self._encode_samples(range(first, stop)):
            places: dict[str, tuple[int, int]] = {}
            made.append((row, places))
            record = {RECORD: sample_record(row, row.request.id)} if row.files else {}
            for role, content in {**contents, **record}.items():
                ending = RECORD if role == RECORD else row.files[role].path.rpartition(".")[2]
                ending = ending if role in ("image", RECORD) else f"{role}.{ending}"
                begin, size = end + tarfile.BLOCKSIZE, len(content)
                places[role], end = (begin, size), begin + size + -size % tarfile.BLOCKSIZE
                yield f"{row.request.id}.{ending}", content
        if self.place.read(entry_name(shard)) is not None:
            raise ShardAbandoned

    def _encode_samples(self, indices: Sequence[int]) -> Iterator[Encoded]:
        """The samples of a shard, encoded in threads while the next are made."""
        made, document = self._make_taken(indices), self.job.document
        for encoded in in_threads(lambda each: encode_batch(*each[0], document), made, 1, WRITERS, lambda: False):
            yield from encoded

    def _make_taken(self, indices: Sequence[int]) -> Iterator[tuple[list[Sample | Quarantined], dict[str, Any]]]:
        """Batches of samples with how they were made. In the place of a sample that the run rejects others are made,
        turn by turn; without one that it takes, the last is quarantined.
        """
        job, self.rejections = self.job, 0

        for turn in range(turns := job.plan.most // job.plan.number):
            rejected: list[int] = []
            for batch, results in make_samples(job, job.plan.batches_of(indices, turn), self.claims.renew):
                self.gate.evaluate(results)
                self.gate.check()
                if self.callbacks.is_stopping():
                    raise ShardAbandoned
                facts, taken = batch_facts(job.recipe, batch), []
                if turn:
                    facts["turn"] = turn
                for place, result in enumerate(results):
                    if isinstance(result, Sample) and result.rejection:
                        rejected.append(result.request.index)
                        if turn < turns - 1:
                            continue
                        result = Quarantined(result.request, result.rejection)
                    elif turn and isinstance(result, Sample):
                        result = replace(result, provenance={**result.provenance, "place": place})
                    taken.append(result)
                yield taken, facts
            self.rejections, indices = self.rejections + len(rejected), rejected


def encode_batch(
    results: Iterable[Sample | Quarantined], recipe: Mapping[str, Any], document: Mapping[str, Any]
) -> list[Encoded]:
    """Rows of the results with their files by role, as those of a run folder are encoded."""
    written: dict[str, bytes] = {}

    def collect(files: Mapping[str, bytes]) -> dict[str, StoredFile]:
        written.update(files)
        return {name: StoredFile(hashlib.sha256(each).hexdigest(), len(each)) for name, each in files.items()}

    rows = write_samples(list(results), recipe, document, collect)
    return [(row, {role: written[file.path] for role, file in row.files.items()}) for row in rows]


def work_on_shards(spec: RunSpec, place: ShardPlace, rank: ShardRank, callbacks: Callbacks) -> ShardWorker:
    """The worker of this process, once no shard is missing or it was to stop."""
    job = open_shards(spec, place)
    for line in callbacks.describe(job) if callbacks.describe else ():
        callbacks.on_message(line)
    worker = ShardWorker(job, place, rank, callbacks)
    for count in worker.work():
        callbacks.on_commit(count)
    return worker
