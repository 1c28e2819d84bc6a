"""Work on the blocks of a long list in threads, whose results come in order."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_threads(
    work: Callable[[Sequence[Item]], Result],
    items: Iterator[Item],
    size: int,
    threads: int,
    is_stopping: Callable[[], bool],
) -> Iterator[Result]:
    """What `work` makes of each `size` items; once it is to stop no further block is begun."""
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
