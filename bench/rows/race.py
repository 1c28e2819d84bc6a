"""Who makes labelled samples how fast: every peer judged first, then timed in turn with the others in one process."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.machine.machine import is_out_of_memory, joules, peak, wait
from bench.machine.measure import Rounds, interleaved
from bench.peers import PEERS, Offer, Peer
from bench.rows import parity
from bench.setting import Setting
from datasetdm_fast.data import Request, Sample
from datasetdm_fast.errors import GateFailed, Missing
from datasetdm_fast.labels import label_files

CANDIDATES = {True: (4, 16), False: (1, 2, 4, 8, 16, 32)}  # quick or not
SAME = 1.02  # a batch size is not better than a smaller one that takes at most so many times as long
OURS = "ours"
DRAWN = ("diffusers-1", "diffusers", "diffusers-compiled", "tensorrt", OURS)  # whose images alone are timed as well


@dataclass
class Runner:
    """A peer that was built and judged."""

    name: str
    peer: Peer
    row: dict[str, Any] = field(default_factory=dict)


def race(
    setting: Setting,
    names: Sequence[str],
    judge: parity.ParityJudge,
    limits: dict[str, Any],
    seconds: float,
    *,
    offers: Mapping[str, Offer] = PEERS,
    batches: dict[str, int] | None = None,
    draws: bool = False,
) -> list[dict[str, Any]]:
    """A row for every name: failed where a gate failed, absent where it cannot run here, else with its times.

    `batches` holds batch sizes that are known to be best and takes those that are found; with `draws` the images alone
    are timed as well.
    """
    batches = {} if batches is None else batches
    prepared = [prepare(setting, name, offers[name], judge, batches) for name in names]
    runners = [runner for _, runner in prepared if runner]
    with tempfile.TemporaryDirectory() as folder:
        finished = {
            runner.name: finisher(runner.peer, setting.batch(runner.peer.batch), Path(folder)) for runner in runners
        }
        for runner in (
            runners if setting.device.type == "cuda" else ()
        ):  # the first batch also tuned, in memory of its own
            runner.row["peak_mib"] = mib(peak(setting.device, finished[runner.name])[1])
        add_times(runners, interleaved(finished, seconds, meter(setting), least=2), setting, limits)
    if draws:
        drawn = [runner for runner in runners if runner.name in DRAWN]
        images = {runner.name: drawer(runner.peer, setting.batch(runner.peer.batch)) for runner in drawn}
        add_draws(drawn, interleaved(images, seconds / 6, meter(setting), least=1))
    rows = [row for row, _ in prepared]
    del prepared, runners
    release(setting.device)
    return rows


def prepare(
    setting: Setting, name: str, offer: Offer, judge: parity.ParityJudge, batches: dict[str, int]
) -> tuple[dict[str, Any], Runner | None]:
    """The row of a peer so far, and the peer itself where it may be timed."""
    row: dict[str, Any] = {"peer": name, "title": offer.title}
    known = offer.batch or batches.get(offer.like or name, 0)
    try:
        begin = time.perf_counter()
        peer = offer.build(setting, known or 1)
        wait(setting.device)
        row |= {"dtype": peer.dtype, "load_s": round(time.perf_counter() - begin, 3)}
        if not known:
            peer.batch, row["tried"] = best_batch(peer, setting, judge)
        first, row["first_s"], most = first_batch(peer, setting)
        row |= {"batch": peer.batch, "peak_mib": mib(most)}
        batches.setdefault(name, peer.batch)
        judged = judge.rows(peer, first)
    except Missing as error:
        return row | {"status": "absent", "why": error.cause}, None
    except GateFailed as error:
        return row | {"status": "failed", "why": error.cause}, None
    except Exception as error:
        status = "failed" if offer.must_run and not is_out_of_memory(error) else "absent"
        return row | {"status": status, "why": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}, None
    row["parity"] = parity.document(judged)
    if failed := parity.failures(judged):
        return row | {"status": "failed", "why": "does not say what the oracle says: " + "; ".join(failed)}, None
    row["status"] = "ok"
    return row, Runner(name, peer, row)


def first_batch(peer: Peer, setting: Setting) -> tuple[list[Sample], float, int]:
    """The first batch, its seconds and the most bytes it took; while it does not fit into memory, the batch is
    halved.
    """
    while True:
        begin = time.perf_counter()
        try:
            made, most = peak(setting.device, lambda: peer.make(setting.batch(peer.batch)))
            return made, round(time.perf_counter() - begin, 3), most
        except Exception as error:
            if peer.batch == 1 or not is_out_of_memory(error):
                raise
        peer.batch //= 2
        release(setting.device)


def best_batch(peer: Peer, setting: Setting, judge: parity.ParityJudge) -> tuple[int, list[dict[str, Any]]]:
    """The batch size with the least time an image and UNet call, and for each that was tried these seconds and the
    memory of a call.
    """
    truth, timestep, tried = judge.truth, setting.recipe.schedule.timesteps[0], []
    for size in CANDIDATES[setting.quick]:
        latents, context = (
            parity.fitted(truth.seen[0], size).to(setting.device),
            parity.fitted_pair(truth.context, size).to(setting.device),
        )

        def call(latents=latents, context=context) -> None:
            peer.denoise(latents, timestep, context)

        try:
            _, most = peak(setting.device, call)
            rounds = interleaved({"call": call}, 0.2 if setting.quick else 0.3, meter(setting), least=2)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        tried.append({"batch": size, "call_s": round(min(rounds["call"].seconds) / size, 6), "peak_mib": mib(most)})
    least = min(row["call_s"] for row in tried)
    return next(row["batch"] for row in tried if row["call_s"] <= SAME * least), tried


def meter(setting: Setting) -> Callable[[], float | None]:
    """Waits for the device and reads its energy counter."""

    def read() -> float | None:
        wait(setting.device)
        return joules(setting.device)

    return read


def finisher(peer: Peer, requests: Sequence[Request], folder: Path) -> Callable[[], None]:
    """One batch from prompts to files."""
    return lambda: write(peer.make(requests), folder)


def drawer(peer: Peer, requests: Sequence[Request]) -> Callable[[], object]:
    return lambda: peer.draw(requests)


def write(samples: Iterable[Sample], folder: Path) -> None:
    """Every file of the samples, without waiting for the disk."""
    for sample in samples:
        files, _ = label_files.encode(sample, "png")
        for name, content in files.values():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def add_times(runners: Sequence[Runner], rounds: dict[str, Rounds], setting: Setting, limits: dict[str, Any]) -> None:
    """Times, rates and ratios into the rows; `ours_over` is how many times as many images ours makes, pair by pair."""
    ours = rounds.get(OURS)
    for runner in runners:
        row, taken, batch = runner.row, rounds[runner.name], runner.peer.batch
        each = [value / batch for value in taken.seconds]
        row["seconds_per_image"] = spread(each)
        rate = 1 / statistics.median(each)
        row["images_per_second"] = round(rate, 4)
        row["tflops"] = round(rate * setting.flops / 1e12, 4)
        limit = limits["tflops"].get(row["dtype"])
        row["share_of_products"] = round(row["tflops"] / limit, 4) if limit else None
        row["joules_per_image"] = round(statistics.median(taken.joules) / batch, 2) if taken.joules else None
        if ours:
            first = next(one for one in runners if one.name == OURS).peer.batch
            row["ours_over"] = spread([a / (b / first) for a, b in zip(each, ours.seconds)])


def add_draws(runners: Sequence[Runner], rounds: dict[str, Rounds]) -> None:
    for runner in runners:
        runner.row["images_alone_s"] = spread([value / runner.peer.batch for value in rounds[runner.name].seconds])


def mib(count: int) -> float:
    return round(count / 2**20, 1)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Least, median and most, and every round."""
    kept = [float(f"{value:.5g}") for value in values]
    return {"least": min(kept), "median": float(f"{statistics.median(values):.5g}"), "most": max(kept), "rounds": kept}


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
