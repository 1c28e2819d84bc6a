"""What each exported stage must answer: one image through our own modules in fp32, kept beside a plan."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import AttentionSums, ProjectedCapture
from datasetdm_fast.engine.sampling.times import initial_noise
from datasetdm_fast.export.onnx.stage_names import averaged_sides, label_of
from datasetdm_fast.stages import FACTOR, LEVELS

Golden = tuple[dict[str, Tensor], dict[str, Tensor]]  # inputs and outputs by name

PROMPT = "a red ball beside a cube on a table"
WORD = "ball"
TIMESTEP = 401.0
STORED = 1 << 16  # values of an output that are stored, evenly spaced over it
# Relative L2 of an output that is accepted.
LARGEST_ERROR = {
    "fp32": 2e-2,
    "fp16": 5e-2,
    "bf16": 0.15,
}


class Reference:
    """Golden inputs and outputs of every stage, computed when they are first asked for.

    `open_engine` makes the fp32 engine whose answers are golden: one with modules of its own for text and images.
    """

    def __init__(self, open_engine: Callable[[], Any]):
        self._open_engine = open_engine

    @functools.cached_property
    def _engine(self) -> Any:
        return self._open_engine()

    def __call__(self, stage: str) -> dict[str, np.ndarray]:
        """in.NAME and out.NAME of the stage for one image; of a large output only every n-th value."""
        with torch.inference_mode():
            if stage.startswith("annotate_"):
                inputs, outputs = self._annotate(label_of(stage))
            elif sides := averaged_sides(stage):
                inputs, outputs = self._average(*sides)
            else:
                inputs, outputs = getattr(self, f"_{stage}")()
        tensors = {f"in.{name}": value.numpy().copy(order="C") for name, value in inputs.items()}
        return tensors | {f"out.{name}": sample_values(value.numpy()) for name, value in outputs.items()}

    @functools.cached_property
    def _call(self) -> dict[str, Tensor]:
        side = self._engine.model.size // FACTOR
        context = self._engine.encode_text(["", PROMPT])
        latents = initial_noise(0, 4, side, side)[None]
        return {"latents": latents, "timestep": torch.tensor(TIMESTEP), "context": context}

    def _run_unet(self, name: str) -> Any:
        return getattr(self._engine, name)(self._call["latents"], TIMESTEP, self._call["context"])

    @functools.cached_property
    def _captured(self) -> tuple[Tensor, ProjectedCapture]:
        return self._run_unet("denoise_and_capture")

    def _encode_text(self) -> Golden:
        ids = self._engine.model.token_ids([PROMPT])
        return {"tokens": ids}, {"context": self._engine.text_encoder(ids)}

    def _denoise(self) -> Golden:
        return self._call, {"noise": self._captured[0] if self._engine.decoders else self._run_unet("denoise")}

    def _denoise_and_capture(self) -> Golden:
        noise, capture = self._captured
        sums = {f"sums_{name}": total for name, total in zip(LEVELS, capture.sums) if total.shape[1]}
        return self._call, {"noise": noise, **sums}

    def _denoise_and_keep(self) -> Golden:
        noise, capture = self._run_unet("denoise_and_capture_raw")
        captured = {
            f"{kind}_{name}_{place}": value
            for kind in ("features", "maps")
            for name, level in zip(LEVELS, getattr(capture, kind))
            for place, value in enumerate(level)
        }
        return self._call, {"noise": noise, **captured}

    def _average(self, self_side: int, cross_side: int) -> Golden:
        words = self._engine.encode_text([WORD])
        shapes = (1, self_side**2, self_side**2), (1, cross_side**2, words.shape[1])
        nothing = AttentionSums(*map(torch.zeros, shapes))
        noise, sums = self._engine.denoise_and_average(
            self._call["latents"], TIMESTEP, self._call["context"], words, nothing
        )
        return self._call | {"class_context": words}, {"noise": noise, "cells": sums.cells, "tokens": sums.tokens}

    @functools.cached_property
    def _decoded(self) -> tuple[Tensor, Tensor]:
        return self._engine.decode_and_check(self._call["latents"])

    def _decode_image(self) -> Golden:
        return {"latents": self._call["latents"]}, dict(zip(("image", "is_finite"), self._decoded))

    def _encode_image(self) -> Golden:
        image, _ = self._decoded
        pixels = image.permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"image": image}, {"moments": self._engine.image_encoder(pixels)}

    def _annotate(self, task: str) -> Golden:
        _, capture = self._captured
        levels = zip(LEVELS, capture.sums, capture.slices[task])
        inputs = {f"sums_{name}": total[:, part] for name, total, part in levels if part.stop > part.start}
        if self._engine.decoders[task].config.has_text:
            inputs["text"] = self._engine.encode_classes([WORD])[None]
        return inputs, self._engine.annotate(task, capture, inputs.get("text"))


def sample_values(value: np.ndarray) -> np.ndarray:
    """Evenly spaced values of an array, at most STORED of them, in order."""
    flat = value.reshape(-1)
    return np.ascontiguousarray(flat[:: -(-flat.size // STORED) or 1])


def relative_error(output: np.ndarray, truth: np.ndarray) -> float:
    """Relative L2; infinite where something is not a number."""
    output, truth = output.astype(np.float64), truth.astype(np.float64)
    if not np.isfinite(output).all():
        return float("inf")
    return float(np.linalg.norm(output - truth) / max(float(np.linalg.norm(truth)), 1e-12))
