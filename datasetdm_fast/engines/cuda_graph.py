"""One UNet call recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class StepGraph:
    """One UNet call as a CUDA graph over its own input and output buffers, on the GPU that its inputs lie on."""

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], pool):
        self.inputs = [torch.empty_like(value).copy_(value) for value in inputs]
        self.graph, device = torch.cuda.CUDAGraph(), inputs[0].device
        # A stream of this GPU by name: left out, PyTorch would take the one of the process's first capture.
        recording = torch.cuda.Stream(device)
        with torch.cuda.device(device):
            recording.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(recording):
                for _ in range(2):  # lets libraries choose their algorithms and allocate before anything is recorded
                    run(*self.inputs)
            torch.cuda.current_stream().wait_stream(recording)
            with torch.cuda.graph(self.graph, pool=pool, stream=recording):
                self.outputs = run(*self.inputs)
        self.pointers = self._pointers()
        self.held: list[Tensor | None] = [None] * len(self.inputs)

    def _pointers(self) -> list[int]:
        return [value.data_ptr() for value in (*self.inputs, *self.outputs)]

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The outputs for new inputs, as tensors of the caller's own."""
        assert self._pointers() == self.pointers, "a buffer of a recorded call was moved"
        for place, (buffer, value) in enumerate(zip(self.inputs, values)):
            if (
                place == 0 or self.held[place] is not value
            ):  # all but the latents come from the engine's own tables, which are never written to
                buffer.copy_(value)
                self.held[place] = value if place else None
        with torch.cuda.device(self.inputs[0].device):
            self.graph.replay()
        return tuple(value.clone() for value in self.outputs)
