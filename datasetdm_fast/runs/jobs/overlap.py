"""Work beside the sampler: labels on a stream of their own, files and rows in threads, all in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from datasetdm_fast.data import Sample, Quarantined
from datasetdm_fast.runs.run_folder.ledger import Row

if TYPE_CHECKING:
    import torch

    from datasetdm_fast.runs.run_folder.folder import RunFolder

AHEAD = 2  # batches that wait for their labels; each holds its latents and captures on the GPU
WRITERS = 2  # threads that encode and write, a batch each


class LabelStream(AbstractContextManager):
    """Runs work on its own stream and thread beside the GPU's sampler; on a CPU, whose cores are busy, at once.

    Whatever comes out later than it was put in is bounded: two batches wait, a third makes the sampler wait.
    """

    def __init__(self, device: torch.device):
        self._device, self._pool, self._stream = device, None, None
        self._waiting: deque[tuple[Any, Future]] = deque()
        if device.type == "cuda":
            import torch

            self._pool, self._stream = ThreadPoolExecutor(1, "labels"), torch.cuda.Stream(device)

    def put(self, name: Any, work: Callable[..., Any], *arguments: Any) -> None:
        """Begins work(*arguments), which may read what this thread queued on the GPU; it comes out with `name`."""
        if self._pool is None:
            done: Future = Future()
            done.set_result(work(*arguments))
            self._waiting.append((name, done))
            return
        import torch

        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(self._device))
        self._waiting.append((name, self._pool.submit(self._follow, queued, work, arguments)))

    def _follow(self, queued: torch.cuda.Event, work: Callable[..., Any], arguments: tuple) -> Any:
        import torch

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(queued)
            found = work(*arguments)
            # the arguments go back to the sampler's stream, which may use their memory at once
            self._stream.synchronize()
            return found

    def settle(self) -> None:
        """Waits until nothing is under way; the results stay where they are."""
        wait([result for _, result in self._waiting])

    def ready(self) -> Iterator[tuple[Any, Any]]:
        """The results that are there, in order; the oldest is waited for where too many are under way."""
        while self._waiting and (self._waiting[0][1].done() or len(self._waiting) > AHEAD):
            name, result = self._waiting.popleft()
            yield name, result.result()

    def rest(self) -> Iterator[tuple[Any, Any]]:
        while self._waiting:
            name, result = self._waiting.popleft()
            yield name, result.result()

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class FinishedCalls:
    """Passes on each UNet call when it is over: a GPU is given those of a whole batch before its first one ends."""

    def __init__(self, device: torch.device, on_unet_call: Callable[[], None]):
        self._device, self._on_unet_call = device, on_unet_call
        self._pool = ThreadPoolExecutor(1, "calls") if device.type == "cuda" else None
        self._waiting: deque[Future] = deque()

    def queued(self) -> None:
        """The call that this thread has just queued is waited for by another thread."""
        if self._pool is None:
            self._on_unet_call()
            return
        import torch

        over = torch.cuda.Event(blocking=True)
        over.record(torch.cuda.current_stream(self._device))
        self._waiting.append(self._pool.submit(self._finished, over))
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _finished(self, over: torch.cuda.Event) -> None:
        over.synchronize()
        self._on_unet_call()

    def __enter__(self) -> FinishedCalls:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=kind is not None)


class BackgroundWriter(AbstractContextManager):
    """Encodes and writes batches in threads and commits their rows in order; `committed` hears of every commit.

    Leaving the block waits for all of it; after an error nothing more is begun.
    """

    def __init__(self, folder: RunFolder, committed: Callable[[list[Row]], None]):
        folder.unseal()
        self._folder, self._committed = folder, committed
        self._writers, self._committer = ThreadPoolExecutor(WRITERS, "writer"), ThreadPoolExecutor(1, "committer")
        self._waiting: deque[Future] = deque()
        self._is_whole = True

    def put(self, results: Sequence[Sample | Quarantined], recipe: Mapping[str, Any]) -> None:
        """Hands over one batch, waiting where too many are under way already."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > WRITERS + 1):
            self._waiting.popleft().result()
        written = self._writers.submit(self._folder.write, results, recipe)
        self._waiting.append(self._committer.submit(self._commit, written))

    def _commit(self, written: Future[list[Row]]) -> None:
        is_whole, self._is_whole = self._is_whole, False
        rows = written.result()
        if is_whole:  # after a batch that could not be written nothing more is added
            self._folder.commit(rows)
            self._committed(rows)
            self._folder.draw_sheets(rows)
            self._is_whole = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            for pool in (self._writers, self._committer):
                pool.shutdown(cancel_futures=True)
