"""Throughput of peers that do not fit into memory side by side: every image is made in a process that holds one peer
alone, and the peers take turns.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine.measure import CpuShare, mib, reset_peak, spread, status, watched
from bench.machine.processes import another_process
from bench.options import say
from bench.peers import PEERS, Peer, beside
from bench.peers.samples import noise_of
from bench.report.results import ResultFile
from bench.report.tables import Row
from bench.rows.measurement import BenchRun, Rows
from bench.rows.parity import STORED, ParityJudge
from bench.rows.race import add_times, of_error, prepare, write
from bench.setting import Setting, open_setting
from datasetdm_fast.data import Request, join_texts
from datasetdm_fast.engine.engines.device import release
from datasetdm_fast.engine.labels import Table
from datasetdm_fast.engine.loop.recipe import Recipe, label_tables

CALLS = 2  # that are timed in a turn
TURNS, IMAGES = 4, 2  # and images that are timed in each


@dataclass(frozen=True)
class TurnConfig:
    """What every process is told, so that all measure the same."""

    model: str
    steps: int
    threads: int

    def open(self) -> Setting:
        torch.set_num_threads(self.threads)
        return open_setting(self.model, "cpu", steps=self.steps, number=1)


@dataclass(frozen=True)
class PeerAlone:
    """A peer and what it makes an image from, without the networks that it was built from."""

    peer: Peer
    load_s: float
    requests: Sequence[Request]
    recipe: Recipe
    tables: Mapping[str, Table]


@dataclass(frozen=True)
class Turn:
    """What one process took."""

    load_s: float
    first_s: float  # the first image
    images_s: list[float]  # those after it
    calls_s: list[float]
    peak: int  # bytes of the process while it made them
    attention: CpuShare


def taking_turns(run: BenchRun, names: Sequence[str], config: TurnConfig) -> Rows:
    """A row for every name: failed where a gate failed, absent where it cannot run here, else with its times."""
    let_go(run.setting)  # this process would hold its networks beside those of the peer whose turn it is
    try:
        answers = answered(config, sorted({PEERS[name].dtype for name in names} & STORED.keys()))
    except BrokenProcessPool:
        return [{"peer": name, "title": PEERS[name].title} | killed(name) for name in names]
    rows = [compared(config, name, answers) for name in names]
    racing = {row["peer"]: row for row in rows if row["status"] == "ok"}
    turns: dict[str, list[Turn]] = {name: [] for name in racing}
    for count in range(TURNS):
        for name in list(racing):
            try:
                turns[name].append(in_own_process(timed, config, name))
            except Exception as error:
                is_killed, must_run = isinstance(error, BrokenProcessPool), PEERS[name].must_run
                racing.pop(name).update(ended := killed(name) if is_killed else of_error(error, must_run=must_run))
                say(f"{name}: {ended['why']}")
                continue
            found = ", ".join(f"{seconds:.1f}" for seconds in turns[name][-1].images_s)
            say(f"{name}, turn {count + 1} of {TURNS}: {found} s an image")
    images = {name: [seconds for one in turns[name] for seconds in one.images_s] for name in racing}
    add_times(list(racing.values()), images, run.setting, run.limits)
    for name, row in racing.items():
        own = beside(name, racing)
        row |= of_turns(turns[name], turns[own] if own in racing else ())
    return rows


def of_turns(taken: Sequence[Turn], ours: Sequence[Turn]) -> Row:
    """What turns say beside the times of images; `call_over` is how many times as long a call takes as one of ours."""
    calls, own = ([min(one.calls_s) for one in each] for each in (taken, ours))
    found: Row = {name: statistics.median(getattr(one, name) for one in taken) for name in ("load_s", "first_s")}
    found = {name: round(seconds, 3) for name, seconds in found.items()}
    found |= {"call_s": spread(calls), "peak_mib": mib(max(one.peak for one in taken))}
    if own:
        found["call_over"] = spread([theirs / one for theirs, one in zip(calls, own)])
    shares = [one.attention for one in taken]
    cores = round(statistics.fmean(one.cpu_per_wall for one in shares), 3)
    others = max(one.others for one in shares)
    return found | {"attention": asdict(CpuShare(shares[0].load_average, cores, others))}


def in_own_process(answer: Callable[..., Any], config: TurnConfig, *asked: Any) -> Any:
    with another_process() as pool:
        return pool.submit(answer, config, *asked).result()


def answered(config: TurnConfig, dtypes: Sequence[str]) -> bytes:
    """What the peers are judged by, pickled: the reference's answers and its drift in these types, computed by a
    process that holds no peer.
    """
    answers: bytes = in_own_process(_answered, config, dtypes)
    return answers


def _answered(config: TurnConfig, dtypes: Sequence[str]) -> bytes:
    judge = ParityJudge(config.open(), 1)
    for dtype in dtypes:
        judge.floors(STORED[dtype])
    return pickle.dumps(judge.answers)


def compared(config: TurnConfig, name: str, answers: bytes) -> Row:
    """The row of a peer that is not timed yet: whether its outputs are the reference's."""
    try:
        return in_own_process(_compared, config, name, answers)
    except BrokenProcessPool:
        return {"peer": name, "title": PEERS[name].title} | killed(name)


def killed(name: str) -> Row:
    why = "its process was killed, as it is where memory ends"
    return {"status": "failed" if PEERS[name].must_run else "absent", "why": why}


def _compared(config: TurnConfig, name: str, answers: bytes) -> Row:
    run = BenchRun(config.open(), ResultFile(None, {}), 0.0, judged=1, batches={name: 1})
    run.judge = ParityJudge(run.setting, 1, pickle.loads(answers))
    let_go(run.setting)
    return prepare(run, name, PEERS[name])[0]


def timed(config: TurnConfig, name: str) -> Turn:
    """Some images and calls, after one image that is the first of its process."""
    one = built(config, name)
    reset_peak()
    with tempfile.TemporaryDirectory() as folder:

        def image() -> float:
            begin = time.perf_counter()
            write(one.peer.make(one.requests), one.tables, Path(folder))
            return time.perf_counter() - begin

        first = image()
        with watched() as attention:
            images = [image() for _ in range(IMAGES)]
    return Turn(one.load_s, first, images, calls(one), status("VmHWM"), attention)


def built(config: TurnConfig, name: str) -> PeerAlone:
    setting = config.open()
    let_go(setting)
    begin = time.perf_counter()
    peer = PEERS[name].build(setting, 1)
    load_s = time.perf_counter() - begin
    let_go(setting)  # what it was built from
    return PeerAlone(peer, load_s, setting.batch(1), setting.recipe, label_tables(setting.reference, setting.recipe))


def let_go(setting: Setting) -> None:
    """Drops the reference's networks; who asks for them builds them again."""
    vars(setting.reference).pop("reference", None)
    for network in setting.model.networks.values():
        network.unload()
    release()


def calls(one: PeerAlone) -> list[float]:
    """Seconds of UNet calls."""
    context = join_texts([one.peer.encode_text([""]), one.peer.encode_text([one.requests[0].prompt])])
    latents, timestep, found = noise_of(one.requests, one.recipe), one.recipe.schedule.timesteps[0], []
    for _ in range(CALLS):
        begin = time.perf_counter()
        one.peer.denoise(latents, timestep, context)
        found.append(time.perf_counter() - begin)
    return found
