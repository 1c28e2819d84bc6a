"""Whether a peer says what the oracle says, before anything of it is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers import Peer
from bench.setting import Setting
from datasetdm_fast.agreement.distances import (
    by_image,
    free_running_distances,
    image_distance,
    relative,
    teacher_forced_distances,
)
from datasetdm_fast.agreement.gates import EXACT, ROUNDED, GateRow, judge
from datasetdm_fast.agreement.observe import Observation, Rounded, level_tensors, observe
from datasetdm_fast.data import Request, Sample
from datasetdm_fast.labels import LABEL_KINDS

STORED = {
    "tf32": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}  # whose drift is allowed; TF32 keeps as many bits as fp16


class ParityJudge:
    """The oracle's answers to the first `count` requests, and the drift of its own at lower precision; each is computed
    once.
    """

    def __init__(self, setting: Setting, count: int):
        self.setting, self.requests = setting, setting.batch(count)
        self.truth = observe(setting.reference, self.requests, setting.recipe)
        self._floors: dict[torch.dtype, dict[str, np.ndarray]] = {}

    def rows(self, peer: Peer, first: Sequence[Sample]) -> list[GateRow]:
        """One row a measure: stages fed with what the oracle had there, then the peer's own samples, of which `first`
        is a batch of the first requests.
        """
        distances = {**self._led(peer), **self._free(peer, first)}
        if peer.dtype == "fp32":
            return judge(distances, EXACT, {})
        floors = self.floors(STORED[peer.dtype])
        gates = {**ROUNDED, "text": ROUNDED["call"]} if peer.rounds_text else ROUNDED
        return judge(distances, gates, {name: value for name, value in floors.items() if name in distances})

    def _led(self, peer: Peer) -> dict[str, np.ndarray]:
        setting, truth, recipe = self.setting, self.truth, self.setting.recipe
        prompts = [request.prompt for request in self._part(0, peer.batch)]
        context = torch.cat([peer.encode_text([""] * peer.batch), peer.encode_text(prompts)]).cpu()
        given = fitted_pair(truth.context, peer.batch).to(setting.device)
        calls = []
        for call in sorted({0, len(recipe.schedule) // 2, recipe.capture_call}):
            latents, timestep = fitted(truth.seen[call], peer.batch).to(setting.device), recipe.schedule.timesteps[call]
            if call == recipe.capture_call:
                output, capture = peer.denoise_and_capture(latents, timestep, given)
            else:
                output = peer.denoise(latents, timestep, given)
            calls.append(
                relative(by_image(output.float().cpu()), by_image(fitted_pair(truth.outputs[call], peer.batch)))
            )
        found = level_tensors(setting.reference, capture)
        levels = {
            f"level {name}": np.max(
                [relative(value, fitted(right, peer.batch)) for value, right in zip(found[name], tensors, strict=True)],
                0,
            )[None]
            for name, tensors in truth.levels.items()
            if tensors
        }
        return {"text": relative(by_image(context), by_image(given.cpu()))[None], "call": np.stack(calls), **levels}

    def _free(self, peer: Peer, first: Sequence[Sample]) -> dict[str, np.ndarray]:
        count = max(len(self.requests) // peer.batch, 1)
        made = [*first, *(sample for k in range(1, count) for sample in peer.make(self._part(k, peer.batch)))][
            : len(self.requests)
        ]
        return (
            free_of(made, self.truth)
            if self.setting.is_trained
            else {"free image": free_of(made, self.truth)["free image"]}
        )

    def _part(self, place: int, batch: int) -> tuple[Request, ...]:
        return tuple(self.requests[k % len(self.requests)] for k in range(place * batch, (place + 1) * batch))

    def floors(self, dtype: torch.dtype) -> dict[str, np.ndarray]:
        """How far the oracle itself drifts with networks stored as `dtype`."""
        if dtype not in self._floors:
            rounded, requests, recipe = Rounded(self.setting.reference, dtype), self.requests, self.setting.recipe
            led, free = observe(rounded, requests, recipe, self.truth), observe(rounded, requests, recipe)
            found = teacher_forced_distances(led, self.truth) | free_running_distances(free, self.truth)
            self._floors[dtype] = {name: values.reshape(-1, len(requests)) for name, values in found.items()}
        return self._floors[dtype]


def free_of(made: Sequence[Sample], truth: Observation) -> dict[str, np.ndarray]:
    """Images and labels of samples against those of the oracle, which may be more."""
    images = np.stack([sample.image for sample in made])
    labels = {
        f"free {task}": np.array(
            [LABEL_KINDS[task].distance(sample.annotations[task], right) for sample, right in zip(made, rights)]
        )[None]
        for task, rights in truth.labels.items()
    }
    return {"free image": image_distance(images, truth.images[: len(made)])[None], **labels}


def fitted(values: Tensor, batch: int) -> Tensor:
    """The first `batch` of values [K, ...]; beyond those there are, they come round again."""
    return values[torch.arange(batch) % len(values)]


def fitted_pair(values: Tensor, batch: int) -> Tensor:
    """The same for a CFG batch [2K, ...]."""
    return torch.cat([fitted(half, batch) for half in values.chunk(2)])


def document(rows: Sequence[GateRow]) -> list[dict[str, Any]]:
    return [asdict(row) | {"passed": row.is_passed} for row in rows]


def failures(rows: Sequence[GateRow]) -> list[str]:
    """The measures that failed, with the figure and its limit."""
    return [
        f"{row.measure} {max(row.median, row.p99):.1e} (limits {row.limit[0]:.1e}, {row.limit[1]:.1e})"
        for row in rows
        if not row.is_passed
    ]
