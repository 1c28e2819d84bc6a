"""One race of the peers that decide the claim, each at a stated batch size, in one process and within a given time:
every row is stored as soon as it is there, and again after every turn.
"""

from __future__ import annotations

import fcntl
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from bench.machine.measure import Rounds, interleaved, meter
from bench.options import say
from bench.peers import OURS, PEERS
from bench.report.results import is_settled
from bench.rows import limits, peers
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.rows.race import LASTING, Runner, add_times, prepare, to_files
from datasetdm_fast.engine.engines.device import release

NAME = "peers"
# In the order in which they are prepared: first those that decide; the last ones are given up where time runs out.
RACED = ("diffusers-compiled", OURS, "diffusers", "upstream-tf32", "ours-bf16")
TITLES = {
    "diffusers": "diffusers",
    "upstream-tf32": "DatasetDM as written, TF32",
}  # where the usual one depends on others
BATCH = {True: 2, False: 32}  # quick or not
ROUNDS = 3
TIMED = {True: 0.4, False: 30.0}  # seconds for the rounds of one peer, and its share of the limits
SLOW_ON_CPU = "torch.compile takes a CPU minutes"
LEAST_PREPARED = 2  # peers that are prepared even if others then are not
PREPARED = {True: 3.0, False: 60.0}  # seconds that the first of these leaves the next one


class OutOfTime(BaseException):
    """What stops a preparation; no library on the way takes it for an error of its own."""


def rows(run: BenchRun) -> Rows:
    found: Rows = []
    runners: list[Runner] = []
    names = run.raced or RACED
    prepared_by = run.race_end - TIMED[run.setting.quick] * len(names)
    for place, name in enumerate(names):
        moment = prepared_by
        if len(runners) < LEAST_PREPARED:
            has_next = place + 1 < min(LEAST_PREPARED, len(names))
            moment = run.race_end - has_next * (PREPARED[run.setting.quick] + 2 * TIMED[run.setting.quick])
        row, runner = prepare_by(moment, run, name)
        found.append(row)
        runners += [runner] if runner else []
        run.file.keep(NAME, found)
        say(f"{name}: {row.get('why') or 'prepared'}, {run.race_end - time.monotonic():.0f} s are left")
    own_the_device(run)
    if not is_settled(run.file.document, "limits"):
        run.file.begin("limits")
        begin = time.perf_counter()
        run.file.store("limits", limits.rows(run), time.perf_counter() - begin)
    with tempfile.TemporaryDirectory() as folder:
        take_turns(run, found, runners, Path(folder))
    del runners
    release()
    return found


def prepare_by(moment: float, run: BenchRun, name: str) -> tuple[dict[str, Any], Runner | None]:
    """The same as `prepare`, given up at that moment."""
    offer = PEERS[name]
    offer = offer._replace(batch=offer.batch or BATCH[run.setting.quick], like="", title=TITLES.get(name, offer.title))
    if name in peers.BUILT:
        offer = offer._replace(not_on_cpu=SLOW_ON_CPU)
    try:
        with stopped_at(moment):
            return prepare(run, name, offer)
    except OutOfTime:
        release()
        row = {"peer": name, "title": offer.title, "status": "absent", "why": "no time was left to prepare it"}
        return row | {"is_left": True}, None


@contextmanager
def stopped_at(moment: float) -> Iterator[None]:
    """Raises OutOfTime within the block when the moment has come, and every few seconds until the block is left."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    if time.monotonic() >= moment:
        raise OutOfTime
    before = signal.signal(signal.SIGALRM, stop)
    try:
        if moment < float("inf"):
            signal.setitimer(signal.ITIMER_REAL, moment - time.monotonic(), 5.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def own_the_device(run: BenchRun) -> None:
    """Returns once no other process uses the device; until this one ends they are kept from it."""
    if run.lock and not run.owned:
        run.owned.append(open(run.lock, "a"))  # noqa: SIM115, held until the process ends
        fcntl.flock(run.owned[0], fcntl.LOCK_EX)


def take_turns(run: BenchRun, found: Rows, runners: Sequence[Runner], folder: Path) -> None:
    """Times the peers in turn and stores the rows after each turn; a round is not begun that would end too late."""
    setting = run.setting
    calls: dict[str, Callable[[], None]] = {one.name: to_files(one.peer, setting, folder) for one in runners}
    taken = {one.name: Rounds() for one in runners}
    by_name, longest = {one.name: one for one in runners}, 0.0
    for turn in range(ROUNDS):
        begin = time.monotonic()
        if turn and begin + longest > run.race_end:
            break
        for name in tuple(calls):
            try:
                lasting = 0.0 if setting.quick else LASTING
                more = interleaved({name: calls[name]}, 0.0, meter(setting.device), least=1, lasting=lasting)
            except Exception as error:
                by_name[name].row |= {"status": "failed", "why": f"{type(error).__name__}: {error}"}
                del calls[name]
                release()
                continue
            taken[name].add(more[name])
            add_turns(run, [by_name[one] for one in calls], taken)
            run.file.keep(NAME, found)
            rate = by_name[name].peer.batch / taken[name].seconds[-1]
            say(f"{name}, turn {turn + 1} of {ROUNDS}: {rate:.3f} images/s")
        longest = max(longest, time.monotonic() - begin)
    for name in calls:
        if len(taken[name].seconds) < ROUNDS:
            by_name[name].row["is_left"] = True


def add_turns(run: BenchRun, runners: Sequence[Runner], taken: dict[str, Rounds]) -> None:
    """Times so far into the rows of those that had a turn."""
    had = [one for one in runners if taken[one.name].seconds]
    each = {one.name: [value / one.peer.batch for value in taken[one.name].seconds] for one in had}
    add_times([one.row for one in had], each, run.setting, run.limits)
    for one in had:
        joules = taken[one.name].joules
        one.row["joules_per_image"] = round(statistics.median(joules) / one.peer.batch, 2) if joules else None


MEASUREMENT = Measurement(NAME, "Ours and its peers in one race at stated batch sizes", rows, peers.MEASUREMENT.tables)
