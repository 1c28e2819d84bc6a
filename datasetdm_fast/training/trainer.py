"""The training loop: batches of captures against their targets.

Whatever is random in a step is sampled from the step's number and the place in its batch. So neither an interruption
nor the number of gradient accumulation steps changes what is sampled.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.data import ProjectedCapture
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.device import allow_tf32, choose_by_shape
from datasetdm_fast.errors import GateFailed, Missing, is_out_of_gpu
from datasetdm_fast.kernels.transfer import to_device
from datasetdm_fast.stages import LEVELS
from datasetdm_fast.training import losses
from datasetdm_fast.training.captures.cache import Layout
from datasetdm_fast.training.captures.targets import TrainingTarget
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.recipes import TrainingSchedule
from datasetdm_fast.training.state import TrainingState

# Mask logits whose losses are computed together: small decoders are bound by the number of calls, large ones by memory.
LOGITS_AT_ONCE = 2**22
PRESENT = 0.8  # share of open-vocabulary queries whose word the image shows; the others train its absence
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def loss_of(
    config: DecoderConfig,
    outputs: Mapping,
    targets: Sequence[TrainingTarget],
    truths: Sequence[tuple[Tensor, Tensor]],
    schedule: TrainingSchedule,
    generators: Sequence[torch.Generator],
    totals: losses.Totals,
) -> Tensor:
    """The loss of a decoder's raw outputs; `truths` are the ids and masks that its queries should predict, `totals`
    count the whole step, of which this may be one gradient accumulation step.
    """
    images = totals.images
    if config.has_queries:
        layers = [outputs, *outputs.get("aux", ())]
        group = max(LOGITS_AT_ONCE // outputs["pred_masks"].numel(), 1)
        ids, shapes = zip(*truths)
        total = 0
        for k in range(0, len(layers), group):  # each group as one batch of as many times the images
            group_layers, names = layers[k : k + group], ("pred_logits", "pred_masks")
            logits, masks = (torch.cat([layer[name].float() for layer in group_layers]) for name in names)
            copies = len(group_layers)
            streams = [*generators] * copies
            loss = losses.set_loss(logits, masks, ids * copies, shapes * copies, schedule.points, streams, totals)
            total = total + loss
        return total / len(layers)
    if config.kind == "depth":
        metres = outputs["depth"][:, 0].float()
        truth = _truth(targets, "depth", metres.device)
        loss = losses.relative_error if schedule.is_relative else losses.scale_invariant_log
        return loss(metres, truth).sum() / images
    points, weights = (_truth(targets, name, next(iter(outputs.values())).device) for name in ("points", "weights"))
    if config.kind == "simcc":
        x, y = outputs["x"].float(), outputs["y"].float()
        return losses.axis_bins(x, y, points, weights).sum() / images
    heatmaps = outputs["heatmaps"].float()
    side = heatmaps.shape[-1]
    cells = points * side / (config.side * 8) - 0.5
    truth = losses.gaussian_heatmaps(cells, side, schedule.sigma) * weights[..., None, None]
    counted = torch.ones_like(weights) if schedule.is_absence_taught else weights
    return schedule.gain * losses.joint_mse(heatmaps, truth, counted).sum() / images


def _truth(targets: Sequence[TrainingTarget], name: str, device: torch.device) -> Tensor:
    """One fp32 field of all targets."""
    return to_device(torch.stack([getattr(target, name) for target in targets]), device)


def sample_word(target: TrainingTarget, count: int, random: torch.Generator) -> int:
    """The class word that a view is queried with: mostly one that it shows, else any that it was searched for."""
    is_present = len(target.classes) and torch.rand((), generator=random) < PRESENT
    known = target.classes if is_present else target.searched
    place = torch.randint(len(known) or count, (), generator=random)
    return int(known[place] if len(known) else place)


def query_target(target: TrainingTarget, word: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and masks to predict; all things of a query word are a single mask under upstream's label 1, or nothing."""
    ids, masks = target.classes, target.masks
    if word is not None:
        masks = masks[ids == word]
        ids, masks = (
            (torch.ones(1, dtype=torch.long), masks.any(0, keepdim=True))
            if len(masks)
            else (torch.zeros(0, dtype=torch.long), masks)
        )
    return to_device(ids, device), to_device(masks, device).float()


class Trainer:
    """Takes the steps of a training; what they depend on is its state."""

    def __init__(
        self,
        config: DecoderConfig,
        schedule: TrainingSchedule,
        views: TrainingViews,
        words: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: str = "fp32",
        reads_ahead: bool | None = None,  # whether a thread reads the next step's captures; None: if they are stored
    ):
        self.schedule, self.views = schedule, views
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        self.words = None if words is None else words.clone().float().to(device)
        self.state = TrainingState(config, schedule, self.words, self.device, self.dtype)
        self._order = lru_cache(2)(self._permutation)
        reads_ahead = views.captures.is_stored if reads_ahead is None else reads_ahead
        self._reader = ThreadPoolExecutor(1, "captures") if reads_ahead else None
        self._next: tuple[int, Future] | None = None

    def batch_views(self, step: int) -> list[int]:
        """The views of a step; each epoch has all views in a new order."""
        batch = []
        for place in range(self.schedule.batch_size):
            epoch, position = divmod(step * self.schedule.batch_size + place, len(self.views))
            batch.append(int(self._order(epoch)[position]))
        return batch

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.views), generator=generator(self.schedule.seed, "turn", epoch))

    def _read(self, batch: Sequence[int]) -> tuple[list[tuple[Tensor, ...]], list[TrainingTarget]]:
        """The captures of a batch in its gradient accumulation steps, and the targets."""
        parts = np.array_split(batch, min(self.schedule.gradient_accumulation_steps, len(batch)))
        return [self.views.captures.batch(part.tolist()) for part in parts], [self.views.target(view) for view in batch]

    def _batch(self, step: int) -> tuple[list[tuple[Tensor, ...]], list[TrainingTarget]]:
        """The step's batch, read ahead during the step before where that helps."""
        batch = self.batch_views(step)
        if self._reader is None:
            return self._read(batch)
        if self._next is None or self._next[0] != step:
            self._next = (step, self._reader.submit(self._read, batch))
        read = self._next[1].result()
        if step + 1 < self.schedule.steps:
            self._next = (step + 1, self._reader.submit(self._read, self.batch_views(step + 1)))
        return read

    def rate(self, step: int) -> float:
        schedule = self.schedule
        rate = schedule.rate * min(1.0, (step + 1) / max(schedule.warmup, 1))
        if schedule.decay == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        return rate * 0.1 ** (step * schedule.batch_size // schedule.decay_every)

    def step(self) -> float:
        """Takes one step and returns its loss."""
        try:
            return self._step()
        except RuntimeError as error:
            if not is_out_of_gpu(error):
                raise
            views = -(-self.schedule.batch_size // self.schedule.gradient_accumulation_steps)
            raise Missing(
                f"memory: the GPU does not have enough memory for {views} view{'s' * (views > 1)} at once",
                "Raise --accumulate or choose a smaller --batch-size, with another --out; or free its memory.",
            ) from error

    def _step(self) -> float:
        schedule, state, step = self.schedule, self.state, self.state.step
        decoder = state.decoder
        captures, targets = self._batch(step)
        allow_tf32(self.device, self.dtype is not torch.float32)  # what an engine of another precision has just set
        choose_by_shape(self.device)
        generators = [generator(schedule.seed, step, place) for place in range(schedule.batch_size)]
        layout, dropout = self.views.captures.layout, schedule.dropout
        # which feature channels of all levels are hidden from each view
        hidden = [torch.rand(sum(layout.features), generator=random) < dropout for random in generators if dropout]
        query_words = (
            [sample_word(target, len(self.words), random) for target, random in zip(targets, generators)]
            if decoder.config.has_text
            else []
        )
        truths = [
            query_target(target, query_words[b] if query_words else None, self.device)
            for b, target in enumerate(targets)
        ]
        queries = self.state.decoder.config.queries if self.state.decoder.config.has_queries else 0
        totals = losses.totals([len(ids) for ids, _ in truths], queries)
        powers = [buffer for name, buffer in decoder.named_buffers() if name.endswith("u0")]
        statistics = [buffer for name, buffer in decoder.named_buffers() if "stored_" in name]
        starts = [buffer.clone() for buffer in (*powers, *statistics)]
        means = [torch.zeros_like(buffer) for buffer in statistics]
        state.optimiser.param_groups[0]["lr"] = self.rate(step)
        state.optimiser.zero_grad(set_to_none=True)
        total, begin = torch.zeros((), device=self.device), 0
        depth = {"auxiliary": schedule.is_deep} if decoder.config.has_queries else {}
        for levels in captures:  # one gradient accumulation step each
            part = slice(begin, begin := begin + len(levels[0]))
            for buffer, start in zip((*powers, *statistics), starts):  # every part continues from the same
                buffer.copy_(start)
            text = (torch.stack([self.words[word] for word in query_words[part]]),) if query_words else ()
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                levels = hide_channels([level.to(self.device) for level in levels], hidden[part], dropout, layout)
                outputs = decoder(project(decoder, levels), *text, **depth)
            loss = loss_of(decoder.config, outputs, targets[part], truths[part], schedule, generators[part], totals)
            state.scaler.scale(loss).backward()
            total += loss.detach()
            for mean, buffer in zip(means, statistics):
                mean += buffer / len(captures)
        for buffer, mean in zip(statistics, means):
            buffer.copy_(mean)
        state.scaler.unscale_(state.optimiser)
        if schedule.clip:
            torch.nn.utils.clip_grad_norm_(state.parameters, schedule.clip)
        state.scaler.step(state.optimiser)
        state.scaler.update()
        if schedule.average:
            with torch.no_grad():
                weight = 1 - min(schedule.average, (1 + step) / (10 + step))
                torch._foreach_lerp_(state.average, state.parameters, weight)
        state.loss = self._finite(total)  # last, so that all of the step is queued before the host waits for it
        state.step += 1
        return state.loss

    def _finite(self, loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise GateFailed(
                f"{self.state.decoder.config.task}: the loss of step {self.state.step + 1} is {value}",
                "Lower --rate, or use --dtype fp32, with another --out.",
            )
        return value

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)


def generator(*key: object) -> torch.Generator:
    """Random numbers that depend on the key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def project(decoder: Decoder, levels: Sequence[Tensor]) -> ProjectedCapture:
    """The outputs of the decoder's first layers for levels [B, calls * cells, channels]; gradients reach their
    weights, and those of the calls.
    """
    weights, sums = decoder.projections(), []
    shares = decoder.call_shares().unbind(1) if decoder.config.calls > 1 else [None] * len(levels)
    for name, level, share in zip(LEVELS, levels, shares, strict=True):
        if share is not None:
            level = torch.einsum("bkcn,k->bcn", level.unflatten(1, (len(share), -1)), share)
        side = math.isqrt(level.shape[1])
        weight = weights[name].flatten(1) if name in weights else level.new_zeros(0, level.shape[2])
        sums.append((level.flatten(0, 1) @ weight.T).unflatten(0, (len(level), side, side)).permute(0, 3, 1, 2))
    return ProjectedCapture(tuple(sums), {})


def hide_channels(levels: Sequence[Tensor], hidden: Sequence[Tensor], share: float, layout: Layout) -> list[Tensor]:
    """The levels with each view's hidden channels zeroed and the others raised to make up for it (channel dropout)."""
    if not share:
        return list(levels)
    rows = to_device(~torch.stack(list(hidden)), levels[0].device).to(levels[0].dtype) / (1 - share)
    scales = [
        F.pad(row, (0, channels - row.shape[1]), value=1.0)
        for row, (_, channels) in zip(rows.split(layout.features, 1), layout.shapes)
    ]
    return [level * row[:, None] for level, row in zip(levels, scales)]
