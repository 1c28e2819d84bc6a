"""Processes that a measurement starts."""

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def begin() -> None:
    """The first thing in such a process: it ends with the one that started it, which alone hears of Ctrl-C."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def another_process() -> Iterator[ProcessPoolExecutor]:
    """One new process, which is killed where the block is left early."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin) as pool:
        try:
            yield pool
        except BaseException:
            kill_all()
            raise


def kill_all() -> None:
    """Ends what this process has started, in the middle of it."""
    for process in multiprocessing.active_children():
        process.kill()
