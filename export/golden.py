"""What each exported stage must compute: one image through our own modules in fp32, stored beside a plan."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import AttentionSums, ProjectedCapture, Text
from datasetdm_fast.engine.sampling.times import initial_noise
from datasetdm_fast.export.onnx.stage_names import averaged_sides, label_of
from datasetdm_fast.stages import LEVELS

Tensors = dict[str, Tensor]

PROMPT = "a red ball beside a cube on a table"
WORD = "ball"
TIMESTEP = 401.0
STORED = 1 << 16  # values of an output that are stored, evenly spaced over it
LARGEST_ERROR = {"fp32": 2e-2, "fp16": 5e-2, "bf16": 0.15}  # relative L2 of an output that is accepted


class Reference:
    """Golden inputs and outputs of every stage, computed when they are first requested.

    `open_engine` makes the engine whose outputs are golden: the fast one in fp32.
    """

    def __init__(self, open_engine: Callable[[], Any]):
        self._open_engine = open_engine

    @functools.cached_property
    def _engine(self) -> Any:
        return self._open_engine()

    def __call__(self, stage: str) -> dict[str, np.ndarray]:
        """in.NAME and out.NAME of the stage for one image; of a large output only every n-th value."""
        with torch.inference_mode():
            inputs, outputs = self._compute(stage)
        tensors = {f"in.{name}": value.numpy().copy(order="C") for name, value in inputs.items()}
        return tensors | {f"out.{name}": sample_values(value.numpy()) for name, value in outputs.items()}

    def _compute(self, stage: str) -> tuple[Tensors, Tensors]:
        engine, call = self._engine, self._call
        if stage == "encode_text":
            ids = engine.model.token_ids([PROMPT])
            return {"tokens": ids}, {"context": engine.text_encoder.encoder(ids)}
        if stage == "decode_image":
            image, is_finite = engine.decode_and_check(call["latents"])
            return {"latents": call["latents"]}, {"image": image, "is_finite": is_finite}
        if stage == "encode_image":
            image, _ = engine.decode_and_check(call["latents"])
            pixels = image.permute(0, 3, 1, 2).float() / 127.5 - 1
            return {"image": image}, {"moments": engine.image_encoder(pixels)}
        if stage.startswith("annotate_"):
            return self._annotate(label_of(stage))
        if sides := averaged_sides(stage):
            return self._average(*sides)
        arguments = call["latents"], TIMESTEP, Text(call["context"])
        if stage == "denoise":
            return call, {"noise": engine.denoise(*arguments)}
        if stage == "denoise_and_capture":
            noise, capture = self._captured
            sums = {f"sums_{name}": total for name, total in zip(LEVELS, capture.sums) if total.shape[1]}
            return call, {"noise": noise, **sums}
        noise, raw = engine.denoise_and_capture_raw(*arguments)
        rows = {kind: zip(LEVELS, getattr(raw, kind)) for kind in ("features", "maps")}
        values = {
            f"{kind}_{name}_{place}": value
            for kind, levels in rows.items()
            for name, level in levels
            for place, value in enumerate(level)
        }
        return call, {"noise": noise, **values}

    @functools.cached_property
    def _call(self) -> Tensors:
        context = self._engine.encode_text(["", PROMPT]).context
        latents = initial_noise(0, *self._engine.model.latent_shape())[None]
        return {"latents": latents, "timestep": torch.tensor(TIMESTEP), "context": context}

    @functools.cached_property
    def _captured(self) -> tuple[Tensor, ProjectedCapture]:
        return self._engine.denoise_and_capture(self._call["latents"], TIMESTEP, Text(self._call["context"]))

    def _average(self, self_side: int, cross_side: int) -> tuple[Tensors, Tensors]:
        words = self._engine.encode_text([WORD])
        shapes = (1, self_side**2, self_side**2), (1, cross_side**2, words.context.shape[1])
        empty = AttentionSums(*map(torch.zeros, shapes))
        arguments = self._call["latents"], TIMESTEP, Text(self._call["context"]), words, empty
        noise, sums = self._engine.denoise_and_average(*arguments)
        averages = {"cells": sums.cells, "tokens": sums.tokens}
        return self._call | {"class_context": words.context}, {"noise": noise, **averages}

    def _annotate(self, task: str) -> tuple[Tensors, Tensors]:
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
