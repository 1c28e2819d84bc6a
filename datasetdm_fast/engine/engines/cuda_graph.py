"""One call of a network recorded as a CUDA graph."""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from datasetdm_fast.engine.engines.device import new_stream

MOST_GRAPHS = 64  # together; calls of ever new numbers of classes or images would fill the GPU
TURN = threading.RLock()  # held by the thread that records or replays: what others do would spoil a recording


class InOrder:
    """Buffers that several threads write and read, each on its own stream."""

    last: torch.cuda.Stream | None = None  # of the thread that used them last

    def follow(self, current: torch.cuda.Stream) -> None:
        """Orders the next work of `current` after the calls of other threads, whose buffers it overwrites."""
        if self.last is not None and self.last.cuda_stream != current.cuda_stream:
            current.wait_stream(self.last)
        self.last = current


class GraphPool(InOrder):
    """Memory that graphs share, and the one stream they are recorded on, to which PyTorch gives what it freed."""

    def __init__(self, device: torch.device):
        self.handle = torch.cuda.graph_pool_handle()
        # A stream of this GPU by name: left out, PyTorch would take the one of the process's first capture.
        self.stream = new_stream(device)


class StepGraph:
    """One call as a CUDA graph over fixed input and output buffers, on the GPU that its inputs lie on.

    Graphs of one `pool` share memory: they are replayed one after the other, by whatever thread. The first `fresh`
    inputs are copied at every call, the others where they are another tensor than before.
    """

    def __init__(
        self, run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], pool: GraphPool, fresh: int = 1
    ):
        self.fresh, self.pool = fresh, pool
        self.inputs = [torch.empty_like(value).copy_(value) for value in inputs]
        self.graph, recording = torch.cuda.CUDAGraph(), pool.stream
        # The last of them puts this thread's stream back, which PyTorch leaves exchanged where a recording fails.
        with TURN, torch.cuda.device(inputs[0].device), torch.cuda.stream(torch.cuda.current_stream()):
            pool.follow(torch.cuda.current_stream())
            recording.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(recording):
                for _ in range(2):  # lets libraries choose their algorithms and allocate before anything is recorded
                    run(*self.inputs)
            torch.cuda.current_stream().wait_stream(recording)
            # Other threads may ask for memory meanwhile: only what this one does is judged.
            with torch.cuda.graph(self.graph, pool=pool.handle, stream=recording, capture_error_mode="thread_local"):
                self.outputs = run(*self.inputs)
        self.pointers = self._pointers()
        self.held: list[Tensor | None] = [None] * len(self.inputs)

    def _pointers(self) -> list[int]:
        return [value.data_ptr() for value in (*self.inputs, *self.outputs)]

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The outputs for new inputs, as tensors that later calls leave alone."""
        assert self._pointers() == self.pointers, "a buffer of a recorded call was moved"
        with TURN, torch.cuda.device(self.inputs[0].device):
            self.pool.follow(torch.cuda.current_stream())
            for place, (buffer, value) in enumerate(zip(self.inputs, values)):
                # The others come from the engine's own tables, which are never written to.
                is_fresh = place < self.fresh
                if is_fresh or self.held[place] is not value:
                    buffer.copy_(value)
                    self.held[place] = None if is_fresh else value
            self.graph.replay()
            return tuple(value.clone() for value in self.outputs)


class RecordedCalls:
    """Calls as graphs in memory of their own, each recorded when inputs of its shapes come for the first time."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[object, ...], StepGraph] = {}  # by the name of a call and the shapes of its inputs
        self.pool: GraphPool | None = None

    def replay(
        self, name: str, run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], fresh: int = 1
    ) -> tuple[Tensor, ...]:
        """run(*inputs); see StepGraph for `fresh`."""
        key = (name, *(tuple(value.shape) for value in inputs))
        if (graph := self.graphs.get(key)) is None:
            if len(self.graphs) >= MOST_GRAPHS:
                with TURN:
                    torch.cuda.synchronize(inputs[0].device)  # replays of other threads may read their buffers still
                    self.clear()
            pool = self.pool = self.pool or GraphPool(inputs[0].device)
            graph = self.graphs[key] = StepGraph(run, inputs, pool, fresh)
        return graph(*inputs)  # which another thread may have dropped by now

    def clear(self) -> None:
        """Drops every graph, and returns their memory."""
        self.graphs.clear()
        self.pool = None
        torch.cuda.empty_cache()
