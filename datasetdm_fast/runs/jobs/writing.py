"""The missing samples of a run: which they are, how one process makes and writes them, and the result."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.data import Batch, Quarantined, Sample
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.prompts import class_and_turn
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.run_folder.document import LEDGER, MANIFEST, QUARANTINE, is_sharded, quarantines, read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder, unseal
from datasetdm_fast.runs.run_folder.goal import Goal, acceptance_of, goal_of
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger, Row

if TYPE_CHECKING:
    from datasetdm_fast.runs.run_folder.shards import ShardLedger


LOOK = "Look at the others in its gallery; other prompts or decoders may help."
MOST_REASONS = 3  # of quarantined samples that a message has


@dataclass(frozen=True)
class Result:
    path: Path | str  # of its folder, or the URL of one
    number: int  # samples of the plan
    done: int
    made: int  # of these, by this process
    quarantined: int  # without finite numbers
    seconds: float = 0.0  # of this process's work, its closing included
    closing_seconds: float = 0.0  # of these, for the index files and the gallery
    doubtful: int = 0  # of those done, or where they are quarantined, of those beside them
    outside: int = 0  # of these, out of the domain of the decoders
    goal: Goal | None = None  # None before there is a run folder
    is_complete: bool = False  # whether nothing more is to be made
    missing: Mapping[str, int] = field(default_factory=dict)  # class -> samples it has, where it can have no more
    accept: str = ""  # the condition on the samples of the data set
    reasons: Sequence[str] = ()  # why samples were quarantined
    is_sharded: bool = False  # then no sample beside the data set is kept

    def facts(self) -> dict[str, Any]:
        """Counts and speed, as --json prints them."""
        return {
            "number": self.number,
            "done": self.done,
            "made": self.made,
            "set_aside": self.quarantined,
            "complete": self.is_complete,
            "doubtful": self.doubtful,
            "images_per_second": round(self.rate, 4),
            "closing_seconds": round(self.closing_seconds, 3),
        }

    @property
    def rate(self) -> float:
        """Samples that this process made in a second."""
        return self.made / self.seconds if self.made else 0.0

    @property
    def trust_message(self) -> str:
        """How many samples are doubtful or not accepted; empty if none."""
        if not self.doubtful:
            return ""
        done = count_noun(self.done, "sample")
        place = "in whose place others were made" if self.is_sharded else f"in {self.path}/{QUARANTINE}"
        if self.accept:
            return f"accepted: {done}; not accepted, {place}: {self.doubtful}"
        outside = f" ({self.outside} out of the domain of the decoders)" if self.outside else ""
        if self.goal and self.goal.most > self.goal.number:
            return f"trusted: {done}; doubtful, {place}: {self.doubtful}{outside}"
        verb, them = ("is", "it") if self.doubtful == 1 else ("are", "them")
        doubts = f"{self.doubtful} of {self.done} samples {verb} doubtful{outside}"
        return f"{doubts}: filter --where 'trust == 1' leaves {them} out"

    def check(self) -> None:
        """Raises GateFailed where samples were quarantined, or too few can be trusted."""
        if self.goal and self.missing:
            number, most = self.goal.number, self.goal.most
            if len(self.goal.names) > 1:
                counts = ", ".join(f"{name} ({count})" for name, count in self.missing.items())
                cause = f"fewer than {number} of {most} samples with {self.accept} of these classes: {counts}"
                raise GateFailed(f"{self.path}: {cause}", LOOK)
            is_what = "accepted" if self.accept else "trusted"
            raise GateFailed(f"{self.path}: {self.done} of {most} samples are {is_what}, {number} were requested", LOOK)
        if self.quarantined:
            of_folder = f"{LEDGER} has the reason of each; --only ID makes one again"
            where = f"{MANIFEST}/ has the reason of each" if self.is_sharded else of_folder
            if self.accept or (self.goal and self.goal.most > self.goal.number):
                where += ". A run with other prompts or a larger --most-tries may find accepted samples for all places"
            raise GateFailed(
                f"{self.path}: {self.quarantined} of {self.number} samples were quarantined "
                f"({'; '.join(self.reasons[:MOST_REASONS])})",
                f"{where}. Values that are NaN or infinite may need another --dtype.",
            )


def result_of(
    folder: Path | str,
    document: Mapping[str, Any],
    number: int,
    ledger: Ledger | ShardLedger,
    made: int = 0,
    **seconds: float,
) -> Result:
    number = max(number, document["plan"]["number"])  # more where others take the place of dropped ones
    config, goal = document["config"], goal_of(document["config"], number)
    tally, accept = ledger.tally(goal.number, len(goal.names)), config.get("accept", "")
    quarantined, (doubtful, outside, _) = ledger.quarantined_by_reason(), ledger.count_trust()
    return Result(
        folder,
        number,
        ledger.count(),
        made,
        sum(map(len, quarantined.values())),
        doubtful=ledger.count(DOUBTFUL) if accept else doubtful,
        outside=outside,
        goal=goal,
        is_complete=goal.is_reached(tally),
        missing=goal.missing(tally) if quarantines(config) else {},
        accept=accept,
        reasons=tuple(quarantined),
        is_sharded=is_sharded(document),
        **seconds,
    )


def close_run(folder: RunFolder, number: int, made: int, begin: float) -> Result:
    """The result of a run that no process works on any more, its index files rebuilt; `begin` is by perf_counter."""
    closing = time.perf_counter()
    finish_run(folder)
    end = time.perf_counter()
    seconds = {"seconds": end - begin, "closing_seconds": end - closing}
    return result_of(folder.path, folder.document, number, folder.ledger, made, **seconds)


def close_folder(folder: Path, number: int, made: int, begin: float) -> Result:
    """The result where this process holds the folder and has not opened it yet."""
    document = read_document(folder)
    if document is None:
        return Result(folder, number, 0, 0, 0)
    with RunFolder(folder, document, is_member=True) as opened:
        return close_run(opened, number, made, begin)


def read_result(folder: Path, number: int, made: int, begin: float) -> Result:
    """The result of a run that others may still be busy with."""
    seconds, document = time.perf_counter() - begin, read_document(folder)
    if document is None or not (folder / LEDGER).exists():
        return Result(folder, number, 0, 0, 0, seconds)
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return result_of(folder, document, number, ledger, made, seconds=seconds)


WRITERS = 2  # threads that encode and write, a batch each


def write_missing(
    job: Job,
    *,
    on_commit: Callable[[int], None] = lambda count: None,
    on_unet_call: Callable[[], None] = lambda: None,
    is_stopping: Callable[[], bool] = lambda: False,
    before_commit: Callable[[list[Sample | Quarantined]], None] = lambda results: None,
) -> Result:
    """Makes the missing samples batch by batch; `before_commit` receives what is about to be committed."""
    begin, new = time.perf_counter(), 0
    with RunFolder(job.folder, job.document) as folder:
        quota, gate = Quota(job, folder.ledger), DomainGate(job, folder.ledger)

        def ends() -> bool:
            return gate.is_closed or is_stopping()

        def next_batches() -> Iterator[Batch]:
            for k in batches_of(missing, job.plan.batch_size):
                yield job.plan.batch(k)
                if ends():
                    return

        with BackgroundWriter(folder, lambda rows: on_commit(sum(row.status != DOUBTFUL for row in rows))) as writer:
            while missing := quota.missing():
                for batch, results in make_samples(job, next_batches(), on_unet_call):
                    taken = quota.take(results)
                    before_commit(taken)
                    gate.evaluate(taken)
                    writer.put(taken, batch_facts(job.recipe, batch))
                    new += len(taken)
                if ends():
                    break
        result = close_run(folder, job.plan.number, new, begin)
    gate.check()
    return result


def make_samples(
    job: Job, batches: Iterable[Batch], on_unet_call: Callable[[], None]
) -> Iterator[tuple[Batch, list[Sample | Quarantined]]]:
    """Every batch with its samples, in order; those that the run quarantines have their reason."""
    rule = acceptance_of(job.document) if quarantines(job.document["config"]) else None
    for batch, results in driver.generate(batches, job.engine, job.recipe, on_unet_call, job.generator):
        yield batch, results if rule is None else rule.apply(results)


def batch_facts(recipe: Recipe, batch: Batch) -> dict[str, Any]:
    """How a batch was made, for its rows."""
    return {**recipe.facts, "word_slots": max(len(recipe.query_words(request)) for request in batch.requests)}


class Quota:
    """The missing samples of a run.

    Where some are quarantined, each makes room for another at the end, of its class where the run counts by class. So
    the run ends with the sample that is the last one needed, whatever the order in which they are made.
    """

    def __init__(self, job: Job, ledger: Ledger, first: int = 0, stop: int | None = None):
        """Of all samples, or of those from `first` to before `stop`, which alone are then taken."""
        config = job.document["config"]
        self._goal = goal_of(config, job.plan.number)
        self._present = ledger.indices_between(first, job.plan.most if stop is None else stop)
        tally = ledger.tally(self._goal.number, len(self._goal.names))
        self._quarantined = [count for _, count in tally] if quarantines(config) else [0]
        self._left = job.limit or job.plan.most  # samples that this command may make

    def missing(self) -> list[int]:
        """Indices still to be made, as far as is known now."""
        required = (index for index in self._goal.required_indices(self._quarantined) if index not in self._present)
        return list(islice(required, self._left))

    def take(self, results: Iterable[Sample | Quarantined]) -> list[Sample | Quarantined]:
        """The results of a batch that belong to the run, which count as present from now on."""
        taken = []
        for result in results:
            index = result.request.index
            kind, turn = class_and_turn(index, self._goal.number, len(self._goal.names))
            is_needed = turn < self._goal.stop(self._quarantined[kind])  # as far as is known now
            if index not in self._present and is_needed and self._left:
                taken.append(result)
                self._present.add(index)
                self._left -= 1
                if isinstance(result, Sample) and result.rejection:
                    self._quarantined[kind] += 1
        return taken


def batches_of(indices: Iterable[int], size: int) -> list[int]:
    """The batches that hold these samples, in the order they are handed out."""
    return sorted({index // size for index in indices})


class BackgroundWriter(AbstractContextManager):
    """Encodes and writes batches in threads and commits their rows in order; `on_commit` is called after every commit.

    Leaving the block waits for all of it; after an error nothing more is begun.
    """

    def __init__(self, folder: RunFolder, on_commit: Callable[[list[Row]], None]):
        unseal(folder.path)
        self._folder, self._on_commit = folder, on_commit
        self._writers, self._committer = ThreadPoolExecutor(WRITERS, "writer"), ThreadPoolExecutor(1, "committer")
        self._waiting: deque[Future] = deque()
        self._is_whole = True

    def put(self, results: Sequence[Sample | Quarantined], recipe: Mapping[str, Any]) -> None:
        """Hands over one batch, waiting where too many are under way already."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > WRITERS + 1):
            self._waiting.popleft().result()
        written = self._writers.submit(self._folder.write, results, recipe)
        self._waiting.append(self._committer.submit(self._commit, written))

    def _commit(self, written: Future[list[Row]]) -> None:
        is_whole, self._is_whole = self._is_whole, False
        rows = written.result()
        if is_whole:  # after a batch that could not be written nothing more is added
            self._folder.ledger.commit(rows)
            self._on_commit(rows)
            self._is_whole = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            for pool in (self._writers, self._committer):
                pool.shutdown(cancel_futures=True)


MOST_OUTSIDE = 0.5  # share of the samples
FEWEST = 2  # samples that are evaluated: of right ones, one in a hundred is out of the domain


def count_outside(folder: Path) -> int:
    """The samples of a run so far that are out of the domain of their decoders."""
    if not (folder / LEDGER).exists():
        return 0
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return ledger.count_trust()[1]


class DomainGate:
    """Evaluates the samples of a run's first batches, stored or new; a run of a single batch spares none."""

    def __init__(self, job: Job, ledger: Ledger | None = None, largest: int = 0):
        """Raises GateFailed where most of the first samples of the ledger are out of the domain of the decoders; no
        batch has more samples than `largest`, where that is given.
        """
        self._place, self.outside, self.measured = job.place, 0, 0
        if job.stops_outside and ledger is not None:
            _, self.outside, self.measured = ledger.count_trust(max(job.plan.batch_size, FEWEST))
            self.check()
        most = job.plan.most - job.done  # more than were requested where others replace the doubtful ones
        has_later = min(most, job.limit or most) > min(job.plan.batch_size, largest or job.plan.batch_size)
        self._is_open = not (job.stops_outside and has_later) or self.measured >= FEWEST

    @property
    def is_closed(self) -> bool:
        return self.measured >= FEWEST and self.outside > MOST_OUTSIDE * self.measured

    def evaluate(self, results: Sequence[Sample | Quarantined]) -> None:
        """Evaluates a batch, until there are enough samples."""
        trusts = [result.trust for result in results if isinstance(result, Sample) and result.trust]
        distances = [trust.domain for trust in trusts if trust.domain is not None]
        if distances and not self._is_open:
            self.outside += sum(distance > 1 for distance in distances)
            self.measured += len(distances)
            self._is_open = self.measured >= FEWEST

    def check(self) -> None:
        """Raises GateFailed where it is closed."""
        if self.is_closed:
            raise GateFailed(
                f"{self._place}: {self.outside} of the first {self.measured} samples are out of the domain of the "
                "decoders: the pictures are unlike those that they learned from",
                "Look at its stored pictures, if any; name a --model that draws what the decoders were trained on, or "
                "add --force-domain to make the others.",
            )
