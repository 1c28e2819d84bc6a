"""The fast engine on a GPU: every step is the replay of a CUDA graph, with as many images as fit."""

import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.data import AnyCapture, ProjectedCapture
from datasetdm_fast.engine.decoders.trunk import copy_for_gpu, is_folded
from datasetdm_fast.engine.engines.cuda_graph import RecordedCalls
from datasetdm_fast.engine.engines.device import engine_call, halve_until_fits, suggest_batch
from datasetdm_fast.engine.engines.fast.engine import FastEngine, Inputs, Step, chunk_of
from datasetdm_fast.engine.loading.model import WeightSource
from datasetdm_fast.engine.models.fused import FusedImageDecoder, FusedUNet
from datasetdm_fast.engine.models.unet import UNet
from datasetdm_fast.engine.models.vae import ImageDecoder
from datasetdm_fast.kernels import launch
from datasetdm_fast.kernels.choice import gave_way
from datasetdm_fast.stages import FACTOR

SECONDS_BEFORE_MESSAGE = 5.0  # of compiling kernels
COMPILING = "compiling kernels for this GPU, up to a minute; Triton keeps them for the next time"


class GpuEngine(FastEngine):
    """See FastEngine."""

    _has_reported = False  # compiling, in this process
    _calls: RecordedCalls  # of the UNet
    _label_calls: RecordedCalls  # of the autoencoder and the decoders, whose stream runs beside the UNet's
    _output_names: dict[str, list[str]]  # of recorded decoders
    # images that the UNet, the autoencoder and the decoders take at once, 0 = as many as they are given
    widest = widest_chunk = widest_labelled = 0
    _suggested = 0  # images of a batch, measured before graphs of such batches take their memory

    def _operations(self, dtype: torch.dtype) -> SimpleNamespace:
        """Each is tried on the GPU, and compiled for it where Triton has not cached it."""

        def report() -> None:
            if not GpuEngine._has_reported:
                GpuEngine._has_reported = True
                print(COMPILING, file=sys.stderr, flush=True)

        slow = threading.Timer(SECONDS_BEFORE_MESSAGE, report)
        slow.daemon = True
        slow.start()
        try:
            return super()._operations(dtype)
        finally:
            slow.cancel()

    def _forms(self) -> tuple[torch.dtype, tuple[type[nn.Module], type[nn.Module]]]:
        return self.dtype, (UNet, ImageDecoder) if self.is_compiled else (FusedUNet, FusedImageDecoder)

    def _sources(self, *names: str) -> dict[str, WeightSource]:
        """In fp32: their products round alike wherever the reference engine has the modules."""
        return {name: self.model.networks[name].read() for name in names or self.model.networks}

    def _ready(self) -> None:
        # In bf16, too: labels need fp16's three further bits, and what leaves its range is retried in fp32.
        is_wide = self.is_compiled or self.dtype == torch.float32
        self.label_dtype = torch.float32 if is_wide else torch.float16
        self._stored_decoders = self.decoders
        if not is_wide:
            ops = self._operations(self.label_dtype)
            self._stored_decoders = {
                task: copy_for_gpu(decoder, self.label_dtype, ops) if is_folded(decoder) else decoder
                for task, decoder in self.decoders.items()
            }
        self.text_encoder, self.image_decoder  # noqa: B018  built before a run begins, as copies make the host wait
        self._calls, self._label_calls, self._output_names = RecordedCalls(), RecordedCalls(), {}

    def _parts(self, step: Step, slices: Callable[[int], list[Inputs]], batch: int) -> list[tuple[Tensor, ...]]:
        size = min(self.widest or batch, batch)
        parts, worked = halve_until_fits(
            lambda size: [self._calls.replay(step.__name__, step, inputs) for inputs in slices(size)],
            size,
            self._forget,
        )
        if worked < size:
            self.widest, self.adjustments = worked, self.adjustments | {"unet_batch": worked}
        return parts

    def _forget(self) -> None:
        """Drops every recorded call of the UNet and the tables of the texts."""
        self._text = None
        self._calls.clear()

    def _images(self, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Part after part: a thread of its own would work on another stream, which nothing waits for."""
        size = min(chunk_of(latents.shape[-1] * FACTOR, latents.device), self.widest_chunk or len(latents))
        parts, worked = halve_until_fits(
            lambda size: list(map(self._decode_part, latents.split(size))), size, self._label_calls.clear, times=size
        )
        if worked < size:
            self.widest_chunk, self.adjustments = worked, self.adjustments | {"image_batch": worked}
        return parts

    def _pixels(self, latents: Tensor) -> tuple[Tensor, ...]:
        return self._replay_labels("image", super()._pixels, (latents,))

    def _run_decoder(self, task: str, capture: AnyCapture, text: Tensor | None) -> dict[str, Tensor]:
        decoder = self._stored_decoders[task]
        inputs = capture.to(next(decoder.parameters()).dtype)
        if not isinstance(inputs, ProjectedCapture) or not is_folded(decoder):
            return {name: value.float() for name, value in decoder(inputs, text).items()}

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            sums, words = tensors[: len(inputs.sums)], tensors[len(inputs.sums) :]
            outputs = decoder(ProjectedCapture(sums, {}), *words)
            names[:] = outputs
            return tuple(value.float() for value in outputs.values())

        names, values = self._output_names.setdefault(task, []), (*inputs.sums, *([] if text is None else [text]))
        size = min(self.widest_labelled or inputs.batch, inputs.batch)
        parts, worked = halve_until_fits(
            lambda size: [self._replay_labels(task, run, part) for part in zip(*(x.split(size) for x in values))],
            size,
            self._label_calls.clear,
            times=size,
        )
        if worked < size:
            self.widest_labelled, self.adjustments = worked, self.adjustments | {"label_batch": worked}
        outputs = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts))
        return dict(zip(names, outputs, strict=True))

    def _replay_labels(self, name: str, run: Step, inputs: Inputs) -> tuple[Tensor, ...]:
        """One replay of a graph, unless the engine is compiled."""
        if self.is_compiled:
            return run(*inputs)
        return self._label_calls.replay(name, run, inputs, fresh=len(inputs))

    @engine_call
    def suggested_batch(self) -> int:
        if self._suggested < 2:
            self._suggested = suggest_batch(self.model.size // FACTOR, self.device, self._bytes_of)
        return self._suggested

    def _bytes_of(self, batch: int) -> int:
        """Peak memory of one captured call, and that of the decoders that read it, as graphs of both are held."""
        latents = torch.zeros(batch, *self.model.latent_shape(), device=self.device)
        text = self.encode_text([""]).expand(self.model.levels[0].halves * batch)
        called, (_, *sums) = self._measure(lambda: self._capture_projected(*self._inputs(latents, 1.0, text)))
        capture = ProjectedCapture(tuple(sums), self.projection.tasks)

        def read() -> list[dict[str, Tensor]]:
            outputs = []
            for task, decoder in self._stored_decoders.items():
                words = self.encode_classes([""]).expand(batch, -1) if decoder.config.has_text else None
                outputs.append(decoder(capture.of(task).to(next(decoder.parameters()).dtype), words))
            return outputs

        return called + self._measure(read)[0]

    def _measure(self, run: Callable[[], Any]) -> tuple[int, Any]:
        """Bytes that a call takes at most beside those held before, and its result."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = run()
        return torch.cuda.max_memory_allocated(self.device) - before, result

    def _versions(self) -> dict[str, str]:
        """With what chooses algorithms for a shape, and operations that gave way to plain ones."""
        extras = {"cudnn": str(torch.backends.cudnn.version()), "cuda": str(torch.version.cuda)}
        if (triton := getattr(launch, "triton", None)) is not None:
            extras["triton"] = triton.__version__
        if self._has_usual_ops and not self.is_compiled and (lost := gave_way(self.ops, self.device)):
            extras["plain"] = ", ".join(lost)
        return super()._versions() | extras
