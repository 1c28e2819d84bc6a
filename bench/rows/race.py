"""Throughput of labelled samples: every peer is compared with the reference first, then timed in turn with the others
in one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.machine.limits import peak_tflops
from bench.machine.measure import held, interleaved, meter, mib, peak, spread, undisturbed, wait, watched
from bench.peers import OURS, PEERS, Offer, Peer, beside
from bench.report.tables import Row
from bench.rows import parity
from bench.rows.measurement import BenchRun, Rows
from bench.setting import Setting
from datasetdm_fast.data import Sample
from datasetdm_fast.engine.engines.device import is_out_of_memory, release
from datasetdm_fast.engine.labels import Table, label_files
from datasetdm_fast.engine.loop.recipe import label_tables
from datasetdm_fast.errors import GateFailed, Missing

CANDIDATES = {True: (4, 16), False: (1, 2, 4, 8, 16, 32)}  # quick or not
SAME = 1.01  # a batch size is not better than a smaller one that takes at most so many times as long
LEAST_ROUNDS, LASTING = 5, 2.0  # seconds of a round and peer


@dataclass
class Runner:
    """A peer that was built and compared."""

    name: str
    peer: Peer
    row: dict[str, Any] = field(default_factory=dict)
    held: int = 0  # bytes of a GPU that it holds between batches
    must_run: bool = True

    @property
    def is_running(self) -> bool:
        return bool(self.row["status"] == "ok")

    def noting(self, call: Callable[[], object]) -> Callable[[], None]:
        """The call; one that raises is noted in the row, and none is made after it."""

        def noted() -> None:
            try:
                if self.is_running:
                    call()
            except Exception as error:
                self.row |= of_error(error, must_run=self.must_run)

        return noted


def of_error(error: Exception, *, must_run: bool) -> dict[str, str]:
    """What a row says of a peer that raised."""
    if isinstance(error, (GateFailed, Missing)):
        return {"status": "failed" if isinstance(error, GateFailed) else "absent", "why": error.cause}
    status = "failed" if must_run and not is_out_of_memory(error) else "absent"
    return {"status": status, "why": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def race(
    run: BenchRun,
    names: Sequence[str],
    offers: Mapping[str, Offer] = PEERS,
    without_labels: bool = False,
    is_of_first: bool = False,
) -> Rows:
    """A row for every name: failed where a gate failed, absent where it cannot run here, else with its times; those of
    images alone too where `without_labels` asks for them. Where the race `is_of_first`, the others are there to compare
    it with: without it there are no rows of them.
    """
    setting, device = run.setting, run.setting.device
    prepared: list[tuple[dict[str, Any], Runner | None]] = []
    for name in names:
        prepared.append(prepare(run, name, offers[name]))
        if is_of_first and prepared[0][1] is None:
            release()
            return [prepared[0][0]]
    runners = [runner for _, runner in prepared if runner]
    with tempfile.TemporaryDirectory() as folder:
        whole = {one.name: one.noting(to_files(one.peer, setting, Path(folder))) for one in runners}
        for one in runners:  # a round that does not count: memory that nobody had before comes slowly
            most = peak(device, whole[one.name], held(device) - one.held)[1]
            if device.type == "cuda":  # the first batch also tuned, in memory of its own
                one.row["peak_mib"] = mib(most)
        begins = True
        while begins:  # anew where a peer has failed meanwhile
            runners = [one for one in runners if one.is_running]
            calls, lasting = {one.name: whole[one.name] for one in runners}, 0.0 if setting.quick else LASTING
            with watched() as attention:
                rounds, again = undisturbed(calls, run.seconds, meter(device), least=LEAST_ROUNDS, lasting=lasting)
            begins = not all(one.is_running for one in runners)
        each = {one.name: [value / one.peer.batch for value in rounds[one.name].seconds] for one in runners}
        add_times([one.row for one in runners], each, setting, run.limits)
        for one in runners:
            joules = rounds[one.name].joules
            one.row["joules_per_image"] = round(statistics.median(joules) / one.peer.batch, 2) if joules else None
            one.row |= {"attention": asdict(attention), "rounds_made_again": again}
    if without_labels:
        drawn = [one for one in runners if offers[one.name].draws]
        images = {one.name: one.noting(lambda one=one: one.peer.draw(setting.batch(one.peer.batch))) for one in drawn}
        taken = interleaved(images, run.seconds / 6, meter(device), least=LEAST_ROUNDS)
        for one in (one for one in drawn if one.is_running):
            one.row["images_alone_s"] = spread([value / one.peer.batch for value in taken[one.name].seconds])
    found = [row for row, _ in prepared]
    del prepared, runners
    release()
    return found


def prepare(run: BenchRun, name: str, offer: Offer) -> tuple[dict[str, Any], Runner | None]:
    """The row of a peer so far, and the peer itself where it may be timed."""
    row: dict[str, Any] = {"peer": name, "title": offer.title}
    if why := offer.not_on_cpu if run.setting.device.type == "cpu" else offer.not_on_gpu:
        return row | {"status": "absent", "why": why}, None
    known, others = offer.batch or run.batches.get(offer.like or name, 0), held(run.setting.device)
    if offer.like and not known:  # every size that is tried would be compiled
        known = CANDIDATES[run.setting.quick][-1]
    try:
        begin = time.perf_counter()
        peer = offer.build(run.setting, known or 1)
        wait(run.setting.device)
        row |= {"dtype": peer.dtype, "load_s": round(time.perf_counter() - begin, 3)}
        if not known:
            peer.batch, row["tried"] = best_batch(peer, run, others)
        first, row["first_s"], most = first_batch(peer, run.setting, others)
        row |= {"batch": peer.batch, "peak_mib": mib(most)}
        run.batches.setdefault(name, peer.batch)
        judged = run.judge.rows(peer, first)
    except Exception as error:
        return row | of_error(error, must_run=offer.must_run), None
    row["parity"] = [asdict(one) | {"passed": one.is_passed} for one in judged]
    if failed := parity.failures(judged):
        why = "its outputs do not match the reference's: " + "; ".join(failed)
        return row | {"status": "failed", "why": why}, None
    row["status"] = "ok"
    return row, Runner(name, peer, row, held(run.setting.device) - others, offer.must_run)


def first_batch(peer: Peer, setting: Setting, others: int) -> tuple[list[Sample], float, int]:
    """The first batch, its seconds and the most bytes it took; while it does not fit into memory, the batch is
    halved.
    """
    while True:
        begin = time.perf_counter()
        try:
            made, most = peak(setting.device, lambda: peer.make(setting.batch(peer.batch)), others)
            return made, round(time.perf_counter() - begin, 3), most
        except Exception as error:
            if peer.batch == 1 or not is_out_of_memory(error):
                raise
        peer.batch //= 2
        release()


def best_batch(peer: Peer, run: BenchRun, others: int) -> tuple[int, Rows]:
    """The batch size with the least time an image and UNet call, and for each that was tried these seconds and the
    memory of a call; `others` is what was held before the peer was there.
    """
    tried, device, quick = [], run.setting.device, run.setting.quick
    for size in CANDIDATES[quick]:
        inputs = run.judge.inputs(0, size)

        def call(inputs=inputs) -> None:
            peer.denoise(*inputs)

        try:
            _, most = peak(device, call, others)
            rounds = interleaved({"call": call}, 0.2 if quick else 0.3, meter(device), least=2)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        tried.append({"batch": size, "call_s": round(min(rounds["call"].seconds) / size, 6), "peak_mib": mib(most)})
    least = min(row["call_s"] for row in tried)
    return next(row["batch"] for row in tried if row["call_s"] <= SAME * least), tried


def to_files(peer: Peer, setting: Setting, folder: Path) -> Callable[[], None]:
    """One batch from prompts to files."""
    tables = label_tables(setting.reference, setting.recipe)
    return lambda: write(peer.make(setting.batch(peer.batch)), tables, folder)


def write(samples: Iterable[Sample], tables: Mapping[str, Table], folder: Path) -> None:
    """Every file of the samples, without waiting for the disk."""
    for sample in samples:
        files, _ = label_files.encode(sample, "png", tables)
        for name, content in files.values():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def add_times(rows: Rows, each: Mapping[str, Sequence[float]], setting: Setting, limits: dict[str, Any]) -> None:
    """Rates and ratios into the rows, from the seconds that `each` peer took for an image in every round; `ours_over`
    is how many times as many images ours makes, pair by pair, and `beside` and `ours_dtype` say which of ours, unless
    it is the usual one and in fp32.
    """
    dtypes = {row["peer"]: row["dtype"] for row in rows}
    for row in rows:
        taken = each[row["peer"]]
        rate = 1 / statistics.median(taken)
        row["seconds_per_image"] = spread(taken)
        row["images_per_second"] = round(rate, 4)
        row["tflops"] = float(f"{rate * setting.flops / 1e12:.4g}")
        is_known = row["dtype"] in limits["tflops"]
        row["share_of_products"] = round(row["tflops"] / peak_tflops(limits, row["dtype"]), 4) if is_known else None
        if (own := beside(row["peer"], each)) in each:
            row["ours_over"] = spread([theirs / ours for theirs, ours in zip(taken, each[own])])
            row |= {"beside": own} if own != OURS else {}
            row |= {"ours_dtype": dtypes[own]} if dtypes[own] != "fp32" else {}


def ratio(first: Row, second: Row) -> float:
    """How many times as many images the first makes as the second: the median over pairs of neighbours in time."""
    rounds = zip(first["seconds_per_image"]["rounds"], second["seconds_per_image"]["rounds"])
    return round(statistics.median(theirs / own for own, theirs in rounds), 3)
