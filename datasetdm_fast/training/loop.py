"""The fit: batches of cached captures against their targets, AdamW, cosine, an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datasetdm_fast.data import Capture
from datasetdm_fast.kernels import rearranged
from datasetdm_fast.models.decoders import Decoder, DecoderConfig, build_decoder
from datasetdm_fast.training import losses
from datasetdm_fast.training.cache import CaptureCache
from datasetdm_fast.training.targets import Target


@dataclass(frozen=True)
class Schedule:
    steps: int = 1500
    batch_size: int = 16
    rate: float = 1e-3
    weight_decay: float = 0.05
    average: float = 0.995
    points: int = 2048  # sampled on each mask; upstream takes 12544 at 512 pixels
    sigma: float = 1.0  # heatmap width in its own cells; upstream 2 at 64 cells
    dropout: float = 0.3  # share of feature channels hidden from each view, so that a hundred images are not learnt by heart
    seed: int = 0


def fit(
    config: DecoderConfig,
    cache: CaptureCache,
    targets: Sequence[Target],
    schedule: Schedule,
    words: Tensor | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Decoder:
    """A trained decoder; targets[v] belongs to view v of the cache, `words` [K, D] are class embeddings for open vocabulary."""
    torch.manual_seed(schedule.seed)
    decoder = build_decoder(config, rearranged).train()
    if config.text_centre:
        decoder.centre(words)
    trained = list(decoder.parameters())
    optimiser = torch.optim.AdamW(trained, lr=schedule.rate, weight_decay=schedule.weight_decay)
    average = [parameter.detach().clone() for parameter in trained]
    for step in range(schedule.steps):
        rate = schedule.rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        optimiser.param_groups[0]["lr"] = rate
        views = torch.randint(len(targets), (schedule.batch_size,)).tolist()
        loss = loss_of(decoder, thinned(cache.batch(views), schedule.dropout), [targets[v] for v in views], schedule, words)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, trained, 1 - min(schedule.average, (1 + step) / (10 + step)))
        report(step + 1, loss.item())
    with torch.no_grad():
        for parameter, value in zip(trained, average):
            parameter.copy_(value)
        decoder(cache.batch([0]), *(() if words is None else (words[:1],)))  # settles the spectral norms on the averaged weights
    return decoder


def thinned(capture: Capture, share: float) -> Capture:
    """The capture with a random share of each feature's channels zeroed and the others raised to make up for it."""

    def some(feature: Tensor) -> Tensor:
        return feature * (torch.rand(*feature.shape[:2], 1, 1) >= share) / (1 - share)

    return Capture(tuple(tuple(some(feature) for feature in level) for level in capture.features), capture.maps) if share else capture


def loss_of(decoder: Decoder, capture: Capture, targets: Sequence[Target], schedule: Schedule, words: Tensor | None) -> Tensor:
    kind = decoder.config.kind
    if kind == "segmentation":
        return _layers(decoder(capture, auxiliary=True), [t.classes for t in targets], [t.masks for t in targets], schedule)
    if kind == "open-vocabulary":
        asked = [_word(target, len(words)) for target in targets]
        classes, masks = zip(*(_answer(target, word) for target, word in zip(targets, asked)))
        return _layers(decoder(capture, words[asked], auxiliary=True), classes, masks, schedule)
    if kind == "depth":
        return losses.scale_invariant_log(decoder(capture)["depth"][:, 0], torch.stack([t.depth for t in targets]))
    points, weights = torch.stack([t.points for t in targets]), torch.stack([t.weights for t in targets])
    found = decoder(capture)
    if kind == "simcc":
        return losses.axis_bins(found["x"], found["y"], points, weights)
    side = found["heatmaps"].shape[-1]
    cells = points * side / (decoder.config.side * 8) - 0.5
    truth = losses.gaussian_heatmaps(cells, side, schedule.sigma) * weights[..., None, None]
    return 100 * losses.joint_mse(found["heatmaps"], truth, torch.ones_like(weights))


def _layers(found: dict, classes: Sequence[Tensor], masks: Sequence[Tensor], schedule: Schedule) -> Tensor:
    """The set loss of the last layer and of every earlier one."""
    answers = [found, *found["aux"]]
    return sum(losses.set_loss(a["pred_logits"], a["pred_masks"], classes, masks, schedule.points) for a in answers) / len(answers)


def _word(target: Target, count: int) -> int:
    """A class to ask for: mostly one that is there, so that its absence is learnt too."""
    is_there = len(target.classes) and torch.rand(()) < 0.8
    return int(target.classes[torch.randint(len(target.classes), ())]) if is_there else int(torch.randint(count, ()))


def _answer(target: Target, word: int) -> tuple[Tensor, Tensor]:
    """All things of one class as a single mask under upstream's label 1, or nothing."""
    masks = target.masks[target.classes == word]
    return (torch.ones(1, dtype=torch.long), masks.amax(0, keepdim=True)) if len(masks) else (torch.zeros(0, dtype=torch.long), masks)
