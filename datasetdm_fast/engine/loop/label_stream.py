"""Work on a GPU while it samples: labels on a stream of their own, and U-Net calls that are reported when over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

AHEAD = 2  # batches that wait for their labels; each holds its latents and captures on the GPU


class LabelStream(AbstractContextManager["LabelStream"]):
    """Runs calls on a stream and thread of its own while the GPU samples; on a CPU, whose cores are busy, immediately.

    At most two batches wait for their results, a third makes the sampler wait.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._waiting: deque[tuple[Any, Future[Any]]] = deque()
        if device.type == "cuda":
            import torch

            self._pool, self._stream = ThreadPoolExecutor(1, "labels"), torch.cuda.Stream(device)

    def put(self, name: Any, call: Callable[..., Any], *arguments: Any) -> None:
        """Begins call(*arguments), which may read what this thread queued on the GPU; `name` comes with its result."""
        if self._pool is None:
            done: Future[Any] = Future()
            done.set_result(call(*arguments))
            self._waiting.append((name, done))
            return
        import torch

        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(self._device))
        self._waiting.append((name, self._pool.submit(self._follow, queued, call, arguments)))

    def _follow(self, queued: torch.cuda.Event, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        import torch

        assert self._stream is not None

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(queued)
            result = call(*arguments)
            # the arguments go back to the sampler's stream, which may use their memory at once
            self._stream.synchronize()
            return result

    def settle(self) -> None:
        """Waits until all calls are done; their results stay where they are."""
        wait([result for _, result in self._waiting])

    def ready(self) -> Iterator[tuple[Any, Any]]:
        """The results that are done, in order; waits for the oldest if too many are under way."""
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


class FinishedCalls(AbstractContextManager["FinishedCalls"]):
    """Calls `on_unet_call` when a U-Net call is over: a GPU gets those of a whole batch before its first one ends."""

    def __init__(self, device: torch.device, on_unet_call: Callable[[], None]):
        self._device, self._on_unet_call, self._pool = device, on_unet_call, ThreadPoolExecutor(1, "calls")
        self._waiting: deque[Future[None]] = deque()

    def on_queued(self) -> None:
        """Lets another thread wait for the call that this thread has just queued."""
        import torch

        over = torch.cuda.Event(blocking=True)
        over.record(torch.cuda.current_stream(self._device))
        self._waiting.append(self._pool.submit(self._report, over))
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _report(self, over: torch.cuda.Event) -> None:
        over.synchronize()
        self._on_unet_call()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
