"""Work on a GPU beside the sampler: labels on a stream of their own, and U-Net calls that are reported when over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

AHEAD = 2  # batches that wait for their labels; each holds its latents and captures on the GPU


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

    def on_queued(self) -> None:
        """The call that this thread has just queued is waited for by another thread."""
        if self._pool is None:
            self._on_unet_call()
            return
        import torch

        over = torch.cuda.Event(blocking=True)
        over.record(torch.cuda.current_stream(self._device))
        self._waiting.append(self._pool.submit(self._report, over))
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _report(self, over: torch.cuda.Event) -> None:
        over.synchronize()
        self._on_unet_call()

    def __enter__(self) -> FinishedCalls:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=kind is not None)
