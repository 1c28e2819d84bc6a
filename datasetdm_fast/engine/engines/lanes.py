"""Slices of one batch on cores of their own: on a CPU a barrier costs more than a small operation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


class Lanes:
    """Works on several slices at once, each on its share of PyTorch's threads, or on one.

    The slices come from the caller and never from the number of threads, so that this number cannot change a result.
    Some of PyTorch's operations (sigmoid, softmax, single products) round differently on several threads: what uses
    them belongs on one.
    """

    def __init__(self, is_single: bool = False):
        self._is_single = is_single
        self._pool: ThreadPoolExecutor | None = None
        self._key: tuple[int, int, int] | None = None
        self._turn = threading.Lock()  # of callers, who may want other pools

    def map(self, work: Callable[..., Any], slices: Sequence[tuple], most: int = 0) -> list[Any]:
        """work(*slice) of every slice, in order; of at most so many at once, 0 = of one a thread."""
        threads = torch.get_num_threads()
        lanes = min(threads, len(slices), most or threads)
        if lanes < 2:
            with _threads(1 if self._is_single else threads):  # here, as a thread of its own has memory of its own, too
                return [work(*one) for one in slices]
        with self._turn:
            found = self._started(lanes, threads).map(lambda one: _undisturbed(work, one), slices)
        return list(found)

    def _started(self, lanes: int, threads: int) -> ThreadPoolExecutor:
        key = (os.getpid(), lanes, threads)  # threads do not survive a fork
        if self._key != key:
            if self._pool is not None and self._key[0] == key[0]:
                self._pool.shutdown()
            ready = threading.Barrier(lanes)
            share = 1 if self._is_single else threads // lanes
            self._pool = ThreadPoolExecutor(lanes, "lane", initializer=_limit, initargs=(share,))
            list(
                self._pool.map(lambda _: ready.wait(), range(lanes))
            )  # every lane has started, and with it set its own number of threads
            torch.set_num_threads(threads)
            self._key = key
        return self._pool


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """This thread with another number of threads for a while."""
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
    """Gives this thread its number of threads, after PyTorch set the process's number at its first question."""
    torch.set_num_threads(threads)
    torch.get_num_threads()
    torch.set_num_threads(threads)


def _undisturbed(work: Callable[..., Any], arguments: tuple) -> Any:
    with torch.inference_mode():
        return work(*arguments)
