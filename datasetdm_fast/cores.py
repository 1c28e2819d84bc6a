"""The cores of this process, and work in blocks and in threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar


def count_cores() -> int:
    """Cores this process may run on; macOS does not tell, and gives it all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
