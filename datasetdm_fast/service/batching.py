"""Images that several clients wait for, joined into batches of one engine."""

from __future__ import annotations

import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import Condition, Thread

from datasetdm_fast.data import Batch, Quarantined, Request, Sample
from datasetdm_fast.engine.loop.driver import BatchGenerator
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.errors import GateFailed, Stop
from datasetdm_fast.messages import count_noun


class QueueFull(Exception):
    """More images wait than the service takes; `seconds` says when to ask again."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; ask again in {count_noun(seconds, 'second')}")
        self.seconds = seconds


@dataclass(eq=False)
class PendingImage:
    """One image that a client waits for; those of one `group` have one recipe and may share a batch."""

    recipe: Recipe
    request: Request
    group: str
    is_alone: bool = False  # in a batch of one, whose bytes no other request can change
    label: Callable[[], Sample] | None = None  # in the place of sampling, where the picture exists
    future: Future[Sample] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    is_left: bool = False  # by its client

    def leave(self) -> None:
        """To be called once its client is gone."""
        self.is_left = True
        self.future.cancel()

    def finish(self, result: Sample | Quarantined) -> None:
        if isinstance(result, Quarantined):
            self.future.set_exception(GateFailed(result.reason, "Try another seed."))
        else:
            self.future.set_result(result)


class Batcher(AbstractContextManager["Batcher"]):
    """A thread that makes what is submitted, the oldest first. A batch leaves when it is full, or when its oldest item
    has waited for `wait` seconds.
    """

    def __init__(self, pipeline: Pipeline, size: int, wait: float, most_waiting: int):
        self.pipeline, self.size, self.wait, self.most_waiting = pipeline, size, wait, most_waiting
        self.images, self.batches = 0, 0
        self.failure = ""  # of the last batch, where the engine could not make it
        self._waiting: list[PendingImage] = []
        self._seconds = 1.0  # that the last batch took
        self._changed, self._is_closed = Condition(), False
        self._thread = Thread(target=self._work, name="batches", daemon=True)

    def __enter__(self) -> Batcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        return sum(not item.future.cancelled() for item in list(self._waiting))

    def submit(self, items: Sequence[PendingImage]) -> None:
        """Puts all of the items into the queue, or none; an empty one takes any number, which would never fit else."""
        with self._changed:
            if (waiting := self.waiting) and waiting + len(items) > self.most_waiting:
                raise QueueFull(math.ceil(waiting / self.size * self._seconds))
            self._waiting.extend(items)
            self._changed.notify()

    def _work(self) -> None:
        while items := self._take():
            under_way: deque[list[PendingImage]] = deque()
            make = partial(BatchGenerator, on_step=partial(_end_if_left, under_way))
            try:
                if items[0].label is not None:
                    under_way.append(self._begin(items))
                    items[0].finish(items[0].label())
                else:
                    batches = self._batches(items, under_way)
                    for results in self.pipeline.generate_batches(batches, items[0].recipe, make):
                        for item, result in zip(under_way.popleft(), results, strict=True):
                            item.finish(result)
                self.failure = ""
            except Exception as error:
                stop = error
                if not isinstance(error, Stop):
                    traceback.print_exc()
                    self.failure = f"the engine failed ({type(error).__name__})"
                    stop = RuntimeError(self.failure)
                for item in (item for batch in under_way for item in batch):
                    item.future.set_exception(stop)

    def _batches(self, items: list[PendingImage], under_way: deque[list[PendingImage]]) -> Iterator[Batch]:
        """Batches of one group as long as it has the oldest item; the engine is not kept waiting for the next."""
        first, begin = items[0], time.monotonic()
        for index in count():
            under_way.append(self._begin(items))
            padding = 0  # on a GPU, whose graphs are recorded for each batch size, sizes are powers of two, or full
            if len(items) > 1 and self.pipeline.engine.device.type != "cpu":
                padding = min(1 << (len(items) - 1).bit_length(), self.size) - len(items)
            yield Batch(index, tuple(item.request for item in items), padding)
            self._seconds, begin = time.monotonic() - begin, time.monotonic()
            if first.is_alone or not (items := self._take(first.group)):
                return

    def _begin(self, items: list[PendingImage]) -> list[PendingImage]:
        self.images, self.batches = self.images + len(items), self.batches + 1
        return items

    def _take(self, group: str | None = None) -> list[PendingImage]:
        """The next batch, once it may leave; of a `group` only if that is due now. Nothing once the service ends."""
        with self._changed:
            while True:
                self._waiting = [item for item in self._waiting if not item.future.cancelled()]
                seconds = None
                if self._waiting:
                    first = self._waiting[0]
                    items = [first]
                    if not first.is_alone:
                        items = [each for each in self._waiting if each.group == first.group and not each.is_alone]
                    items = items[: self.size]
                    if group is not None and (first.is_alone or first.group != group):
                        return []
                    seconds = first.arrived + self.wait - time.monotonic()
                    if seconds <= 0 or first.is_alone or len(items) == self.size or self._is_closed:
                        self._waiting = [each for each in self._waiting if each not in items]
                        if items := [item for item in items if item.future.set_running_or_notify_cancel()]:
                            return items
                        continue
                if group is not None or (self._is_closed and not self._waiting):
                    return []
                self._changed.wait(seconds)


def _end_if_left(under_way: Iterable[list[PendingImage]], *_: object) -> None:
    """Ends the sampling, between two calls, of batches that no client waits for any more."""
    if all(item.is_left for batch in under_way for item in batch):
        raise GateFailed("all clients of this batch have left", "Ask again.")
