"""python -m datasetdm_fast.generate: images and their labels from prompts; without any flag, the demo run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from datasetdm_fast import cluster, peers, ranks, store
from datasetdm_fast.config import RunConfig
from datasetdm_fast.driver import Result, probe, remake, run
from datasetdm_fast.errors import Refused
from datasetdm_fast.flags import parse, run_command
from datasetdm_fast.job import Job, count_images, count_rows, finished, prepare, prepare_remake
from datasetdm_fast.summary import duration, table

PROG = "python -m datasetdm_fast.generate"
EVERY = 10.0  # seconds between two lines of progress


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(_generate, arguments)


def _generate(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, RunConfig, PROG, __doc__)
    for name in ("prompts", "classes"):
        if name in given and not getattr(config, name):
            raise Refused(f"--{name}: nothing was given after it", f"Drop the flag, or see {PROG} --help.")
    if config.only:
        return _make_again(config, given)
    store.check(config)
    peer = None if config.dry_run else peers.this_peer()
    if peer and config.cluster:
        raise Refused(f"--cluster {config.cluster}: this is one of {peer.world} processes that were started together", "Start it once.")
    if peer and peer.rank:  # the first of them tells how it ended
        config = replace(config, quiet=True)
    if result := finished(config, is_alone=peer is None):
        if peer and peer.rank:
            return 0
        if config.store and not config.dry_run:
            store.Store(config.store).complete(result.path)
        _say(config, f"{result.path}: complete with {result.done} samples, nothing to do")
        return _end(config, result)
    if config.dry_run:
        job = prepare(config)
        _say(config, *table(job))
        _show_plan(job)
        return 0
    if peer:
        result, signalled = _run_peer(config, peer)
        if peer.rank:
            return 128 + signalled if signalled else 0
    elif config.cluster:
        result, signalled = _run_cluster(config)
    else:
        places = ranks.places(config)
        result, signalled = _run_ranks(config, places) if places else _run_here(config)
    code = _end(config, result)
    if not result.is_complete:
        print(f"{result.done} of {result.number} samples are there; go on with: {PROG} {shlex.join(arguments)}".rstrip(), file=sys.stderr)
    return 128 + signalled if signalled else code


def _run_here(config: RunConfig) -> tuple[Result, int | None]:
    """How the run of this process ended, and by which signal if by one."""
    job = prepare(config)
    _say(config, *table(job, probe(job.engine, job.recipe, job.plan.batch_size)))
    images = min(job.plan.number - job.done, config.limit or job.plan.number)
    with Interruption(config.quiet) as interruption, Progress(images, config.quiet, job.plan.batch_size, len(job.recipe.schedule)) as progress:
        result = run(job, made=progress.made, stepped=progress.stepped, is_stopping=lambda: interruption.signal is not None)
    return result, interruption.signal


def _run_ranks(config: RunConfig, places: Sequence[ranks.Place]) -> tuple[Result, int | None]:
    """The same of a run of several processes."""
    left = count_images(config) - count_rows(config)
    with Interruption(config.quiet) as interruption, Progress(min(left, config.limit or left), config.quiet) as progress:
        result = ranks.run(config, places, describe=table, told=progress.tell, made=progress.made, is_stopping=lambda: interruption.signal is not None)
    return result, interruption.signal


def _run_peer(config: RunConfig, peer: peers.Peer) -> tuple[Result, int | None]:
    """The same of this process's share of a run that something else started several processes for."""
    config = peers.settle_on(config, peer)
    left = count_images(config) - count_rows(config)
    with Interruption(config.quiet) as interruption, Progress(-(-min(left, config.limit or left) // peer.world), config.quiet) as progress:
        result = peers.run(config, peer, told=lambda job: _say(config, *table(job)), made=progress.made, is_stopping=lambda: interruption.signal is not None)
    return result, interruption.signal


def _run_cluster(config: RunConfig) -> tuple[Result, int | None]:
    """The same of a run whose work a Ray cluster does."""
    left = count_images(config) - count_rows(config)
    with Interruption(config.quiet) as interruption, Progress(min(left, config.limit or left), config.quiet) as progress:
        result = cluster.run(config, describe=table, told=progress.tell, made=progress.made, is_stopping=lambda: interruption.signal is not None)
    return result, interruption.signal


def _make_again(config: RunConfig, given: set[str]) -> int:
    task = prepare_remake(config, given)
    written = remake(task)
    _say(config, f"sample {task.row.request.id}: made again, {f'{len(written)} files written' if written else 'every byte as it was'}")
    _put(config, {"path": str(task.folder), "id": task.row.request.id, "written": written}, str(task.folder))
    return 0


def _end(config: RunConfig, result: Result) -> int:
    rate = result.made / result.seconds if result.made else 0.0
    facts = {"number": result.number, "done": result.done, "made": result.made, "set_aside": result.set_aside}
    _put(config, {"path": str(result.path), **facts, "complete": result.is_complete, "images_per_second": round(rate, 4)}, str(result.path))
    if result.made:
        _say(config, f"{result.made} images in {duration(result.seconds)}, {rate:.3g} images per second; look at {result.path}/gallery/index.html")
    result.check()
    return 0


def _put(config: RunConfig, facts: dict[str, Any], line: str) -> None:
    print(json.dumps(facts) if config.json else line, flush=True)


def _say(config: RunConfig, *lines: str) -> None:
    if not config.quiet:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _show_plan(job: Job) -> None:
    if not job.config.json:
        for request in job.plan:
            print(f"{request.id}  seed {request.seed}  {request.prompt!r}")
        return
    requests = [{"id": request.id, "seed": request.seed, "prompt": request.prompt, "classes": request.classes} for request in job.plan]
    print(json.dumps({"path": str(job.folder), **job.recipe.facts, "batch_size": job.plan.batch_size, "bytes": job.bytes_needed, "requests": requests}))


class Interruption:
    """Within the block the first SIGINT or SIGTERM is remembered, so that the batch is finished; the second ends the process at once."""

    def __init__(self, is_quiet: bool):
        self.signal: int | None = None
        self._is_quiet = is_quiet
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if not self._is_quiet:
            os.write(2, b"\nfinishing this batch; once more ends at once\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing when quiet; it counts UNet calls, or images where nobody reports the calls."""

    def __init__(self, images: int, is_quiet: bool, batch: int = 1, calls: int = 0):
        self._images, self._batch, self._calls = images, batch, calls
        self._made = self._stepped = 0
        self._is_quiet, self._bar = is_quiet, None
        self._begin = self._told = time.monotonic()
        if not is_quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="call" if calls else "image", desc=self._title, file=sys.stderr)

    @property
    def _total(self) -> int:
        return -(-self._images // self._batch) * (self._calls or 1)

    @property
    def _title(self) -> str:
        return f"{self._made}/{self._images} images"

    def stepped(self, count: int = 1) -> None:
        self._stepped += count
        now = time.monotonic()
        if self._bar:
            self._bar.update(count)
        elif not self._is_quiet and now - self._told >= EVERY:
            self._told = now
            left = (now - self._begin) / self._stepped * max(self._total - self._stepped, 0)
            print(f"{self._title}, {self._stepped / max(self._total, 1):.0%}, about {duration(left)} left", file=sys.stderr, flush=True)

    def made(self, count: int) -> None:
        self._made += count
        if self._bar:
            self._bar.set_description(self._title)
        if not self._calls:
            self.stepped(count)

    def tell(self, line: str) -> None:
        """A line for the screen, above the bar."""
        if self._bar:
            self._bar.write(line, file=sys.stderr)
        elif not self._is_quiet:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
