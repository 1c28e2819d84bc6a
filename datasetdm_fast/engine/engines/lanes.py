"""Threads that compute slices of one batch in parallel: on a CPU a barrier costs more than a small operation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


class Lanes:
    """Computes several slices in parallel, each on its share of PyTorch's threads, or on one.

    The slices come from the caller and never from the number of threads, so that this number cannot change a result.
    Some of PyTorch's operations (sigmoid, softmax, single products) round differently on several threads: what uses
    them belongs on one.
    """

    def __init__(self, is_single: bool = False):
        self._is_single = is_single
        self._pool: ThreadPoolExecutor | None = None
        self._key: tuple[int, int, int] | None = None
        self._turn = threading.Lock()  # of callers, who may need other pools

    def map(self, call: Callable[..., Any], slices: Sequence[tuple[Any, ...]], most: int = 0) -> list[Any]:
        """call(*slice) of every slice, in order; at most so many in parallel, 0 = one a thread."""
        threads = torch.get_num_threads()
        lanes = min(threads, len(slices), most or threads)
        if lanes < 2:
            with _set_threads(1 if self._is_single else threads):  # here, as another thread has other memory, too
                return [call(*arguments) for arguments in slices]

        def run(arguments: tuple[Any, ...]) -> Any:
            with torch.inference_mode():
                return call(*arguments)

        with self._turn:
            results = self._start(lanes, threads).map(run, slices)
        return list(results)

    def _start(self, lanes: int, threads: int) -> ThreadPoolExecutor:
        key = (os.getpid(), lanes, threads)  # threads do not survive a fork
        if self._pool is None or self._key != key:
            if self._pool is not None and self._key is not None and self._key[0] == key[0]:
                self._pool.shutdown()
            ready = threading.Barrier(lanes)
            share = 1 if self._is_single else threads // lanes
            self._pool = ThreadPoolExecutor(lanes, "lane", initializer=_limit, initargs=(share,))
            # Once every lane has started, each has set its number of threads.
            list(self._pool.map(lambda _: ready.wait(), range(lanes)))
            torch.set_num_threads(threads)
            self._key = key
        return self._pool


@contextmanager
def _set_threads(count: int) -> Iterator[None]:
    """Within the block, this thread uses another number of threads."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _limit(threads: int) -> None:
    """Sets this thread's number of threads, after PyTorch has set the process's at its first query."""
    torch.set_num_threads(threads)
    torch.get_num_threads()
    torch.set_num_threads(threads)
