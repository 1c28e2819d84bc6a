"""The cores and containers of this process, what libraries are told of them, and work in blocks and in threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # where this Linux has them
CONTAINERS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
QUOTA = {  # of version 1 or not -> files with the microseconds of cores in each period, and with those of a period
    True: ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
    False: ("cpu.max",),
}


def find_groups(controller: str) -> Iterator[tuple[bool, Path]]:
    """The control groups of Linux whose limits hold for this process, and whether each is of version 1."""
    lines = CONTAINERS.read_text().splitlines() if CONTAINERS.exists() else []
    for kinds, path in (line.split(":", 2)[1:] for line in lines):
        if not kinds or controller in kinds.split(","):
            root = GROUPS / controller if kinds else GROUPS
            folder = root / path.lstrip("/")
            yield from ((bool(kinds), each) for each in (folder, *folder.parents))  # a limit of each holds


def cores_of_mask() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_cores() -> int:
    """Cores this process may keep busy: those it may run on, or fewer where a container has less of their time; macOS
    does not tell, and gives it all.
    """
    cores = cores_of_mask()
    for is_first, folder in find_groups("cpu"):
        with suppress(OSError, ValueError):  # no such file, or no limit
            quota, period = map(int, " ".join((folder / name).read_text() for name in QUOTA[is_first]).split())
            cores = min(cores, -(-quota // period)) if quota > 0 else cores
    return cores


def before_torch() -> None:
    """Sets what torch reads when it is first imported or takes memory; variables that are set already stay."""
    # OpenMP's waiting threads would otherwise burn the cores that other processes need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if HUGE_PAGES.exists():  # large images in pages of 2 MiB: a 512th of the page faults
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`, of which the last may have fewer, as itertools.batched of Python 3.12 has them."""
    remaining = iter(items)
    return iter(lambda: list(islice(remaining, size)), [])


def in_threads(
    work: Callable[[Sequence[Item]], Result],
    items: Iterator[Item],
    size: int,
    threads: int,
    is_stopping: Callable[[], bool],
) -> Iterator[Result]:
    """What `work` makes of each `size` items, in order; once it is to stop no further block is begun."""
    waiting = deque[Future[Result]]()
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            while len(waiting) <= threads and not is_stopping() and (block := list(islice(items, size))):
                waiting.append(pool.submit(work, block))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
