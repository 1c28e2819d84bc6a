"""Whether a peer's outputs match the reference engine's, before anything of it is timed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.peers import Peer
from bench.setting import Setting
from datasetdm_fast.data import Request, Sample, Text, join_texts
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.runs.agreement.observe import (
    Observation,
    Rounded,
    by_image,
    free_running_distances,
    image_distance,
    level_tensors,
    observe,
    relative,
    teacher_forced_distances,
)
from datasetdm_fast.runs.agreement.verify import EXACT, ROUNDED, GateRow, evaluate_gates

# The storage type whose drift is allowed; TF32 keeps as many bits as fp16.
STORED = {"tf32": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class ReferenceAnswers:
    """Its outputs, and its own drift at lower precision."""

    truth: Observation
    floors: dict[torch.dtype, dict[str, np.ndarray]] = field(default_factory=dict)


class ParityJudge:
    """The answers to the first `count` requests; each is computed once, or was by another process."""

    def __init__(self, setting: Setting, count: int, answers: ReferenceAnswers | None = None):
        self.setting, self.requests = setting, setting.batch(count)
        self.answers = answers or ReferenceAnswers(observe(setting.reference, self.requests, setting.recipe))
        self.truth = self.answers.truth

    def rows(self, peer: Peer, first: Sequence[Sample]) -> list[GateRow]:
        """One row a measure: stages given the reference's inputs, then the peer's own samples, of which `first` is a
        batch of the first requests.
        """
        distances = {**self._teacher_forced(peer), **self._free_running(peer, first)}
        if peer.dtype == "fp32":
            return evaluate_gates(distances, EXACT, {})
        floors = self.floors(STORED[peer.dtype])
        gates = {**ROUNDED, "text": ROUNDED["call"]} if peer.rounds_text else ROUNDED
        return evaluate_gates(distances, gates, {name: value for name, value in floors.items() if name in distances})

    def inputs(self, call: int, batch: int) -> tuple[Tensor, float, Text]:
        """Latents, timestep and text of one UNet call of the reference, for a batch of that size."""
        setting, truth = self.setting, self.truth
        latents, text = fitted(truth.seen[call], batch), truth.text.map(partial(fitted_pair, batch=batch))
        return latents.to(setting.device), setting.recipe.schedule.timesteps[call], text.to(setting.device)

    def _teacher_forced(self, peer: Peer) -> dict[str, np.ndarray]:
        truth, recipe, batch = self.truth, self.setting.recipe, peer.batch
        prompts = [request.prompt for request in self._part(0, batch)]
        text = join_texts([peer.encode_text([""] * batch), peer.encode_text(prompts)]).to("cpu")
        calls = []
        for call in sorted({0, len(recipe.schedule) // 2, recipe.captured[-1]}):
            if call == recipe.captured[-1]:
                output, capture = peer.denoise_and_capture(*self.inputs(call, batch))
            else:
                output = peer.denoise(*self.inputs(call, batch))
            right = fitted_pair(truth.outputs[call], batch)
            calls.append(relative(by_image(output.float().cpu(), batch), by_image(right, batch)))
        found = level_tensors(self.setting.reference, [capture])
        levels = {
            f"level {name}": np.max([relative(a, fitted(b, batch)) for a, b in zip(found[name], right, strict=True)], 0)
            for name, right in truth.levels.items()
            if right
        }
        texts = (by_image(rows, batch) for rows in (text.context, fitted_pair(truth.text.context, batch)))
        distances = {"text": relative(*texts), **levels}
        return {"call": np.stack(calls), **{name: values[None] for name, values in distances.items()}}

    def _free_running(self, peer: Peer, first: Sequence[Sample]) -> dict[str, np.ndarray]:
        count = max(len(self.requests) // peer.batch, 1)
        more = (sample for k in range(1, count) for sample in peer.make(self._part(k, peer.batch)))
        made, truth = [*first, *more][: len(self.requests)], self.truth
        found = {"free image": image_distance(np.stack([sample.image for sample in made]), truth.images[: len(made)])}
        for task, rights in truth.labels.items() if self.setting.is_trained else ():
            pairs = zip((sample.annotations[task] for sample in made), rights)
            found[f"free {task}"] = np.array([LABEL_KINDS[task].distance(label, right) for label, right in pairs])
        return {name: values[None] for name, values in found.items()}

    def _part(self, place: int, batch: int) -> tuple[Request, ...]:
        return tuple(self.requests[k % len(self.requests)] for k in range(place * batch, (place + 1) * batch))

    def floors(self, dtype: torch.dtype) -> dict[str, np.ndarray]:
        """How far the reference itself drifts with networks stored as `dtype`."""
        found = self.answers.floors
        if dtype not in found:
            rounded, requests, recipe = Rounded(self.setting.reference, dtype), self.requests, self.setting.recipe
            forced, free = observe(rounded, requests, recipe, self.truth), observe(rounded, requests, recipe)
            drift = teacher_forced_distances(forced, self.truth) | free_running_distances(free, self.truth)
            found[dtype] = {name: values.reshape(-1, len(requests)) for name, values in drift.items()}
        return found[dtype]


def fitted(values: Tensor, batch: int) -> Tensor:
    """The first `batch` of values [K, ...]; a larger batch repeats them."""
    return values[torch.arange(batch) % len(values)]


def fitted_pair(values: Tensor, batch: int) -> Tensor:
    """The same for a CFG batch [2K, ...]."""
    return torch.cat([fitted(half, batch) for half in values.chunk(2)])


def failures(rows: Sequence[GateRow]) -> list[str]:
    """The measures that failed, with the figure and its limit."""
    return [
        f"{row.measure} {max(row.median, row.p99):.1e} (limits {row.limit[0]:.1e}, {row.limit[1]:.1e})"
        for row in rows
        if not row.is_passed
    ]
