"""The training loop: batches of captures against their targets; its whole state can be saved and resumed to the bit.

Whatever is random in a step is drawn from the step's number and the place in its batch, so neither an interruption nor
the number of processes or parts a batch is divided into changes what is drawn.
"""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.data import ProjectedCapture
from datasetdm_fast.engine.decoders.checkpoint import Decoder, DecoderConfig, build_decoder
from datasetdm_fast.engine.decoders.layers import SpectralConv2d
from datasetdm_fast.engine.engines.device import allow_tf32, choose_by_shape
from datasetdm_fast.errors import GateFailed, Missing
from datasetdm_fast.kernels import plain
from datasetdm_fast.kernels.to_device import to_device
from datasetdm_fast.stages import LEVELS
from datasetdm_fast.training.captures.cache import Layout
from datasetdm_fast.training.captures.targets import TrainingTarget
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.losses import losses
from datasetdm_fast.training.losses.objective import answer_of, asked_word, loss_of
from datasetdm_fast.training.processes import SOLO, Ranks
from datasetdm_fast.training.schedule import TrainingSchedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTLING = 8  # power iterations that bring a spectral norm to averaged weights


class Trainer:
    """A decoder on its way, with everything its next step depends on."""

    def __init__(
        self,
        config: DecoderConfig,
        schedule: TrainingSchedule,
        training_views: TrainingViews,
        words: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: str = "fp32",
        ranks: Ranks = SOLO,
        is_ahead: bool | None = None,  # whether a thread reads the next step's captures; None: where they are stored
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(schedule.seed)
            self.decoder = build_decoder(config, plain).train().to(device)
        self.schedule, self.training_views, self.ranks = schedule, training_views, ranks
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        self.words = None if words is None else words.clone().float().to(device)
        if config.text_centre:
            self.decoder.centre(self.words)
        self.named = dict(self.decoder.named_parameters())
        self.trained = list(self.named.values())
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[schedule.optimiser]
        # In one kernel, which on a GPU also decides by itself whether the gradients of fp16 are finite.
        self.optimiser = kind(self.trained, lr=schedule.rate, weight_decay=schedule.weight_decay, fused=True)
        self.average = [parameter.detach().clone() for parameter in self.trained]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == "fp16")
        self.done = 0
        self._order = lru_cache(2)(self._permutation)
        is_ahead = training_views.captures.is_stored if is_ahead is None else is_ahead
        self._reader = ThreadPoolExecutor(1, "captures") if is_ahead else None
        self._next: tuple[int, Future] | None = None

    def views(self, step: int) -> list[tuple[int, int]]:
        """Place in the batch and view of what this process does in a step: all views, in a new order each epoch."""
        places = np.array_split(np.arange(self.schedule.batch_size), self.ranks.world)[self.ranks.rank].tolist()
        found = []
        for place in places:
            turn, position = divmod(step * self.schedule.batch_size + place, len(self.training_views))
            found.append((place, int(self._order(turn)[position])))
        return found

    def _permutation(self, turn: int) -> Tensor:
        return torch.randperm(len(self.training_views), generator=generator(self.schedule.seed, "turn", turn))

    def _read(self, views: Sequence[tuple[int, int]]) -> tuple[list[tuple[Tensor, ...]], list[TrainingTarget]]:
        parts = [[view for _, view in part] for part in self._parts(views)]
        return [self.training_views.captures.batch(part) for part in parts], [
            self.training_views.target(view) for _, view in views
        ]

    def _parts(self, views: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
        parts = -(-self.schedule.parts // self.ranks.world)
        cuts = np.array_split(np.arange(len(views)), min(parts, max(len(views), 1)))
        return [[views[k] for k in cut] for cut in cuts if len(cut)]

    def _examples_of(self, step: int) -> tuple[list[tuple[int, int]], list[tuple[Tensor, ...]], list[TrainingTarget]]:
        """The step's examples, read while the step before was computed where that helps."""
        views = self.views(step)
        if self._reader is None:
            return views, *self._read(views)
        if self._next is None or self._next[0] != step:
            self._next = (step, self._reader.submit(self._read, views))
        captures, targets = self._next[1].result()
        if step + 1 < self.schedule.steps:
            self._next = (step + 1, self._reader.submit(self._read, self.views(step + 1)))
        return views, captures, targets

    def rate(self, step: int) -> float:
        schedule = self.schedule
        rate = schedule.rate * min(1.0, (step + 1) / max(schedule.warmup, 1))
        if schedule.decay == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        return rate * 0.1 ** (step * schedule.batch_size // schedule.decay_every)

    def step(self) -> float:
        """Takes one step; its loss."""
        try:
            return self._taken()
        except torch.OutOfMemoryError as error:
            views = -(-self.schedule.batch_size // self.schedule.parts)
            raise Missing(
                f"memory: the GPU does not have enough memory for {views} view{'s' * (views > 1)} at once",
                "Raise --accumulate or choose a smaller --batch-size, with another --out; or free its memory.",
            ) from error

    def _taken(self) -> float:
        schedule, step = self.schedule, self.done
        views, captures, targets = self._examples_of(step)
        allow_tf32(self.device, self.dtype is not torch.float32)  # what an engine of another precision has just set
        choose_by_shape(self.device)
        generators = [generator(schedule.seed, step, place) for place, _ in views]
        layout, share = self.training_views.captures.layout, schedule.dropout
        # which feature channels of all levels each view does not see
        hidden = [torch.rand(sum(layout.features), generator=source) < share for source in generators if share]
        asked = (
            [asked_word(target, len(self.words), source) for target, source in zip(targets, generators)]
            if self.decoder.config.has_text
            else []
        )
        answers = [answer_of(target, asked[b] if asked else None, self.device) for b, target in enumerate(targets)]
        whole = self._whole(answers)
        powers = [buffer for name, buffer in self.decoder.named_buffers() if name.endswith("u0")]
        statistics = [buffer for name, buffer in self.decoder.named_buffers() if "stored_" in name]
        starts = [buffer.clone() for buffer in (*powers, *statistics)]
        sums = [torch.zeros_like(buffer) for buffer in statistics]
        self.optimiser.param_groups[0]["lr"] = self.rate(step)
        self.optimiser.zero_grad(set_to_none=True)
        total, begin = torch.zeros((), device=self.device), 0
        depth = {"auxiliary": schedule.is_deep} if self.decoder.config.has_queries else {}
        for levels in captures:
            part = slice(begin, begin := begin + len(levels[0]))
            for buffer, start in zip((*powers, *statistics), starts):  # every part goes on from the same
                buffer.copy_(start)
            text = (self._said(asked[part]),) if asked else ()
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                shown = without([level.to(self.device) for level in levels], hidden[part], share, layout)
                found = self.decoder(projected(self.decoder, shown), *text, **depth)
            loss = loss_of(self.decoder.config, found, targets[part], answers[part], schedule, generators[part], whole)
            self.scaler.scale(loss).backward()
            total += loss.detach()
            for mean, buffer in zip(sums, statistics):
                mean += buffer / len(captures)
        self._joined(total, sums)
        for buffer, mean in zip(statistics, sums):
            buffer.copy_(mean)
        self.scaler.unscale_(self.optimiser)
        if schedule.clip:
            torch.nn.utils.clip_grad_norm_(self.trained, schedule.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if schedule.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.trained, 1 - min(schedule.average, (1 + step) / (10 + step)))
        value = self._value_of(total)  # last, so that all of the step is queued before the host waits for it
        self.done += 1
        return value

    def _value_of(self, loss: Tensor) -> float:
        """The loss of a step, which has to be a number."""
        step, value = self.done + 1, loss.item()
        if not math.isfinite(value):
            raise GateFailed(
                f"{self.decoder.config.task}: the loss of step {step} is {value}",
                "Lower --rate, or use --dtype fp32, with another --out.",
            )
        return value

    def _said(self, asked: Sequence[int]) -> Tensor:
        """The class embedding that each view is asked for."""
        return torch.stack([self.words[0 if self.schedule.first_word_only else word] for word in asked])

    def _whole(self, answers: Sequence[tuple[Tensor, Tensor]]) -> losses.Totals:
        config = self.decoder.config
        own = losses.totals([len(ids) for ids, _ in answers], config.queries if config.has_queries else 0)
        numbers = torch.tensor(astuple(own), dtype=torch.float32)  # of the host, as it needs them at once
        self.ranks.total([numbers])
        return losses.Totals(*map(int, numbers.tolist()))

    def _joined(self, total: Tensor, means: Sequence[Tensor]) -> None:
        """Adds up loss and gradients over all processes; running statistics become their mean."""
        if self.ranks.world == 1:
            return
        for mean in means:
            mean /= self.ranks.world
        # Views without things give the layers of masks no gradient, those of another process may; asked of the hosts.
        reached = torch.tensor([float(parameter.grad is not None) for parameter in self.trained])
        self.ranks.total([reached])
        shared = [parameter for parameter, count in zip(self.trained, reached.tolist()) if count]
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.total([total, *means, *(parameter.grad for parameter in shared)])

    def finished(self) -> Decoder:
        """A decoder with the averaged weights, to be saved or folded; the training can go on."""
        decoder = copy.deepcopy(self.decoder)
        if not self.schedule.average:
            return decoder
        with torch.no_grad():
            for parameter, value in zip(decoder.parameters(), self.average):
                parameter.copy_(value)
            for module in decoder.modules():
                if isinstance(module, SpectralConv2d):
                    for _ in range(SETTLING):
                        module.normalised()
        return decoder

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Everything the next step depends on: tensors by name, and numbers."""
        tensors = {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in zip(self.named, self.average)}
        for name, parameter in self.named.items():
            tensors |= {
                f"optimiser.{name}.{part}": value for part, value in self.optimiser.state.get(parameter, {}).items()
            }
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {
            "done": self.done,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        """Takes up a state."""
        self.decoder.load_state_dict(
            {name.removeprefix("decoder."): value for name, value in tensors.items() if name.startswith("decoder.")}
        )
        for value, name in zip(self.average, self.named):
            value.copy_(tensors[f"average.{name}"])
        for name, parameter in self.named.items():
            start = f"optimiser.{name}."
            own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            if own:
                self.optimiser.state[parameter] = {key: value.to(parameter, copy=True) for key, value in own.items()}
        self.scaler.load_state_dict(dict(numbers["scaler"]))
        self.done = numbers["done"]

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)


def fit(
    config: DecoderConfig,
    training_views: TrainingViews,
    schedule: TrainingSchedule,
    words: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A trained decoder; `words` [K, D] are class embeddings for open vocabulary."""
    trainer = Trainer(config, schedule, training_views, words, device)
    try:
        while trainer.done < schedule.steps:
            trainer.step()
    finally:
        trainer.close()
    return trainer.finished()


def generator(*key: object) -> torch.Generator:
    """Random numbers that depend on the key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def projected(decoder: Decoder, levels: Sequence[Tensor]) -> ProjectedCapture:
    """What the decoder's first layers make of levels [B, cells, channels]; gradients reach their weights."""
    weights, sums = decoder.projections(), []
    for name, level in zip(LEVELS, levels):
        side = math.isqrt(level.shape[1])
        weight = weights[name].flatten(1) if name in weights else level.new_zeros(0, level.shape[2])
        sums.append((level.flatten(0, 1) @ weight.T).unflatten(0, (len(level), side, side)).permute(0, 3, 1, 2))
    return ProjectedCapture(tuple(sums), {})


def without(levels: Sequence[Tensor], hidden: Sequence[Tensor], share: float, layout: Layout) -> list[Tensor]:
    """The levels with each view's hidden channels zeroed and the others raised to make up for it."""
    if not share:
        return list(levels)
    rows = to_device(~torch.stack(list(hidden)), levels[0].device).to(levels[0].dtype) / (1 - share)
    kept = [
        F.pad(row, (0, channels - row.shape[1]), value=1.0)
        for row, (_, channels) in zip(rows.split(layout.features, 1), layout.shapes)
    ]
    return [level * row[:, None] for level, row in zip(levels, kept)]
