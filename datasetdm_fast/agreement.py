"""How far one engine is from another, stage by stage: the same requests through both, and what differs, image by image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import Annotation, Capture, DepthMap, Instances, Keypoints, ProjectedCapture, Request, SemanticMap
from datasetdm_fast.driver import Recipe, WordTable, postprocess
from datasetdm_fast.engines.torch import TorchEngine
from datasetdm_fast.kernels import pyramid
from datasetdm_fast.sampling import times, walk
from datasetdm_fast.stages import FACTOR, LEVELS

TINY = 1e-30


@dataclass(frozen=True)
class Observation:
    """What one engine said of a batch, on the CPU."""

    context: Tensor  # [2B, T, D]
    seen: tuple[Tensor, ...]  # the latents of each call
    outputs: tuple[Tensor, ...]  # [2B, 4, h, w] of each call
    latents: Tensor  # after the last call
    levels: dict[str, list[Tensor]]  # level -> what the decoders read of it, [B, F, h, w] each
    answers: dict[str, dict[str, Tensor]]  # raw outputs of each task's decoder
    labels: dict[str, list[Annotation]]
    images: np.ndarray  # [B, H, W, 3] uint8


def observe(engine, requests: Sequence[Request], recipe: Recipe, led: Observation | None = None, stepped: Callable[[], None] = lambda: None) -> Observation:
    """One batch through `engine`: on its own, or `led`, so that every stage is given what the other engine had there."""
    if led is None:
        context = torch.cat([engine.encode_text([""] * len(requests)), engine.encode_text([request.prompt for request in requests])])
        side = recipe.size // FACTOR
        noise = torch.stack([times.initial_noise(request.seed, 4, side, side) for request in requests])
    else:
        context, noise = led.context.to(engine.device, copy=True), led.seen[0]
    state, seen, outputs = walk.start(noise.to(engine.device)), [], []
    for call, timestep in enumerate(recipe.schedule.timesteps):
        latents = state.latents if led is None else led.seen[call].to(engine.device)
        if call == recipe.capture_call:
            output, capture = engine.denoise_and_capture(latents, timestep, context)
        else:
            output = engine.denoise(latents, timestep, context)
        seen.append(latents.cpu())
        outputs.append(output.float().cpu())
        state = walk.step(recipe.schedule, call, state, walk.guide(output, recipe.guidance))
        stepped()
    words = WordTable(engine, recipe.words)
    raw = {task: engine.annotate(task, capture, words.of(requests) if task == "open-vocabulary" else None) for task in recipe.tasks}
    labels = {task: postprocess(task, requests, answer, engine.decoders[task].config, recipe) for task, answer in raw.items()}
    answers = {task: {name: value.float().cpu() for name, value in answer.items()} for task, answer in raw.items()}
    latents = state.latents if led is None else led.latents.to(engine.device)
    images = engine.decode_image(latents).cpu().numpy()
    return Observation(context.cpu(), tuple(seen), tuple(outputs), latents.cpu(), level_tensors(engine, capture), answers, labels, images)


def level_tensors(engine, capture: Capture | ProjectedCapture) -> dict[str, list[Tensor]]:
    """Per level the projected sums of every decoder, or without decoders the features and maps themselves."""
    found: dict[str, list[Tensor]] = {name: [] for name in LEVELS}
    for place, level in enumerate(engine.model.levels):
        if not engine.decoders:
            found[level.name] += [value.float().cpu() for value in (*capture.features[place], *capture.maps[place])]
        for task, decoder in engine.decoders.items():
            weight = decoder.projections().get(level.name)
            if weight is None:
                continue
            is_projected = isinstance(capture, ProjectedCapture)
            total = capture.of(task).sums[place] if is_projected else pyramid.projected(capture.features[place], capture.maps[place], weight, level.side)
            found[level.name].append(total.float().cpu())
    return found


class Rounded(TorchEngine):
    """The reference engine with its UNet and autoencoder stored in fewer bits: what that precision alone costs."""

    name = "rounded"

    def __init__(self, engine: TorchEngine, dtype: torch.dtype):
        model, self.dtype = engine.model, dtype
        parts = {part: copy.deepcopy(getattr(model, part)).to(dtype) for part in ("unet", "vae")}
        super().__init__(replace(model, **parts), engine.decoders, device=str(engine.device))

    def denoise(self, latents: Tensor, timestep: float, context: Tensor) -> Tensor:
        return super().denoise(latents.to(self.dtype), timestep, context.to(self.dtype)).float()

    def denoise_and_capture(self, latents: Tensor, timestep: float, context: Tensor) -> tuple[Tensor, Capture]:
        noise, capture = super().denoise_and_capture(latents, timestep, context)
        return noise, Capture(*(tuple(tuple(value.float() for value in level) for level in kind) for kind in (capture.features, capture.maps)))

    def decode_image(self, latents: Tensor) -> Tensor:
        with torch.inference_mode():
            decoded = self.model.vae.decode(latents.to(self.dtype) / self.model.vae.config.scaling_factor, return_dict=False)[0].float()
        return ((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).to(torch.uint8)


# Distances: one number an image, 0 where both engines say the same ------------------------------------------------------------------


def relative(value: Tensor, truth: Tensor) -> np.ndarray:
    """Relative L2 of each image [B]; a value that is no number counts as infinitely far."""
    difference = (value.double() - truth.double()).flatten(1).norm(dim=1) / truth.double().flatten(1).norm(dim=1).clamp(min=TINY)
    return difference.nan_to_num(nan=float("inf")).numpy()


def by_image(noise: Tensor) -> Tensor:
    """A CFG batch [2B, ...] as [B, 2, ...]."""
    return noise.unflatten(0, (2, -1)).transpose(0, 1)


def image_distance(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root mean square difference over the range: 0.01 is a PSNR of 40 dB."""
    return np.sqrt(((images.astype(np.float64) - truth) ** 2).mean((1, 2, 3))) / 255


def label_distance(found: Annotation, truth: Annotation) -> float:
    """0 where both say the same.

    Class maps: share of pixels that differ. Depth: mean relative error. Joints: mean distance in pixels. Instances: one minus the mean
    IoU, 1 where their classes differ.
    """
    return DISTANCES[type(truth)](found, truth)


def _semantic(found: SemanticMap, truth: SemanticMap) -> float:
    return float((found.labels != truth.labels).mean())


def _depth(found: DepthMap, truth: DepthMap) -> float:
    return float((np.abs(found.metres - truth.metres) / np.maximum(truth.metres, 1e-6)).mean())


def _instances(found: Instances, truth: Instances) -> float:
    if sorted(found.class_ids) != sorted(truth.class_ids):
        return 1.0
    if not len(truth.masks):
        return 0.0
    # Instances of one class may change places where their scores are nearly equal, so each looks for the mask most like its own.
    ious = [max(_iou(mask, other) for other in found.masks[found.class_ids == kind]) for mask, kind in zip(truth.masks, truth.class_ids)]
    return 1.0 - float(np.mean(ious))


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def _keypoints(found: Keypoints, truth: Keypoints) -> float:
    if found.points.shape != truth.points.shape:
        return float("inf")
    return float(np.linalg.norm(found.points[..., :2] - truth.points[..., :2], axis=-1).mean()) if truth.points.size else 0.0


DISTANCES = {SemanticMap: _semantic, DepthMap: _depth, Instances: _instances, Keypoints: _keypoints}


def led_distances(found: Observation, truth: Observation) -> dict[str, np.ndarray]:
    """Stage by stage, every stage given the same input: name -> one number an image, or one an image and call."""
    calls = [relative(by_image(value), by_image(right)) for value, right in zip(found.outputs, truth.outputs, strict=True)]
    levels = {
        f"level {name}": np.max([relative(value, right) for value, right in zip(found.levels[name], tensors, strict=True)], 0)
        for name, tensors in truth.levels.items()
        if tensors
    }
    outputs = {
        f"outputs {task}": np.max([relative(found.answers[task][name], value) for name, value in answer.items()], 0) for task, answer in truth.answers.items()
    }
    image = {"image": image_distance(found.images, truth.images)}
    return {"call": np.concatenate(calls), **levels, **outputs, **_label_distances("", found, truth), **image}


def free_distances(found: Observation, truth: Observation) -> dict[str, np.ndarray]:
    """Each engine on its own from the same noise and prompt."""
    distances = {"text": relative(by_image(found.context), by_image(truth.context)), "free latents": relative(found.latents, truth.latents)}
    return distances | {"free image": image_distance(found.images, truth.images), **_label_distances("free ", found, truth)}


def _label_distances(prefix: str, found: Observation, truth: Observation) -> dict[str, np.ndarray]:
    return {
        f"{prefix}{task}": np.array([label_distance(value, right) for value, right in zip(found.labels[task], labels, strict=True)])
        for task, labels in truth.labels.items()
    }


# Gates ------------------------------------------------------------------------------------------------------------------------------

Limit = tuple[float, float]  # of the median, of the 99th percentile
SAME_TEXT: Limit = (1e-5, 4e-5)
EXACT: dict[str, Limit] = {  # fp32 against fp32
    "text": SAME_TEXT,
    "call": (1e-5, 4e-5),
    "level": (1e-5, 4e-5),
    "outputs": (1e-4, 1e-2),  # a mask that flips one cell of what a query may see moves its whole answer
    "image": (2e-4, 5e-4),  # 74 dB, 66 dB: one grey level at a few pixels
    "semantic": (1e-4, 1e-3),
    "open-vocabulary": (1e-4, 1e-3),
    "instance": (1e-3, 1e-2),
    "depth": (1e-4, 4e-4),
    "pose": (1e-2, 1e-1),
    "free latents": (1e-4, 4e-4),
    "free image": (5.6e-3, 1e-2),  # 45 dB, 40 dB
    "free semantic": (1e-3, 1e-2),
    "free open-vocabulary": (1e-3, 1e-2),
    "free instance": (1e-2, 1e-1),
    "free depth": (1e-3, 1e-2),
    "free pose": (5e-2, 0.5),
}
ROUNDED: dict[str, Limit] = {  # fp16 or bf16 against fp32
    "text": SAME_TEXT,
    "call": (1e-2, 4e-2),
    "level": (5e-3, 2e-2),
    "outputs": (5e-2, 0.2),
    "image": (1e-2, 2e-2),  # 40 dB, 34 dB
    "semantic": (5e-3, 2e-2),
    "open-vocabulary": (5e-3, 2e-2),
    "instance": (5e-2, 0.2),
    "depth": (5e-3, 2e-2),
    "pose": (0.5, 2.0),
    "free latents": (0.1, 0.3),
    "free image": (4e-2, 8e-2),  # 28 dB, 22 dB
    "free semantic": (2e-2, 0.1),
    "free open-vocabulary": (2e-2, 0.1),
    "free instance": (0.1, 0.5),
    "free depth": (2e-2, 0.1),
    "free pose": (1.0, 8.0),
}
MARGIN = 1.5  # times the drift of the reference against itself at the same precision


@dataclass(frozen=True)
class Row:
    """One measure over all samples."""

    measure: str
    median: float
    p99: float
    limit: Limit
    floor: Limit | None  # median and 99th percentile of the reference's own drift
    worst: int  # place of the worst sample

    @property
    def is_passed(self) -> bool:
        return self.median <= self.limit[0] and self.p99 <= self.limit[1]


def judge(distances: Mapping[str, np.ndarray], gates: Mapping[str, Limit], floors: Mapping[str, np.ndarray]) -> list[Row]:
    """A row for every measure of distances [calls or 1, images]; a gate gives way where the reference itself drifts more at that precision."""
    rows = []
    for name, values in distances.items():
        limit, floor = gates[name.split()[0] if name.startswith(("level ", "outputs ")) else name], None
        if name in floors:
            floor = summary(floors[name])
            limit = tuple(max(gate, MARGIN * drift) for gate, drift in zip(limit, floor))
        rows.append(Row(name, *summary(values), limit, floor, worst=int(values.max(0).argmax())))
    return rows


def summary(values: np.ndarray) -> Limit:
    """Median and 99th percentile; of fewer than a hundred numbers the latter is the largest."""
    finite = np.nan_to_num(values, nan=np.finfo(np.float64).max, posinf=np.finfo(np.float64).max)
    return float(np.median(finite)), float(np.quantile(finite, 0.99, method="higher"))
