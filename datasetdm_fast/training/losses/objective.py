"""The training objective of one batch for each kind of decoder."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.checkpoint import DecoderConfig
from datasetdm_fast.kernels.to_device import to_device
from datasetdm_fast.training.captures.targets import TrainingTarget
from datasetdm_fast.training.losses import losses
from datasetdm_fast.training.schedule import TrainingSchedule

# Mask logits whose losses are computed at once: small decoders are bound by the number of calls, large ones by memory.
LOGITS_AT_ONCE = 2**22
PRESENT = 0.8  # share of open-vocabulary questions about a word that is there, so that its absence is learnt too


def loss_of(
    config: DecoderConfig,
    found: Mapping,
    targets: Sequence[TrainingTarget],
    answers: Sequence[tuple[Tensor, Tensor]],
    schedule: TrainingSchedule,
    generators: Sequence[torch.Generator] | None = None,
    whole: losses.Totals | None = None,
) -> Tensor:
    """The loss of a decoder's raw outputs; `answers` are the ids and masks its queries should have found."""
    images = whole.images if whole else len(targets)
    if config.has_queries:
        layers = [found, *found.get("aux", ())]
        whole = whole or losses.totals([len(ids) for ids, _ in answers], config.queries)
        some = max(LOGITS_AT_ONCE // found["pred_masks"].numel(), 1)
        total = sum(
            _of_layers(layers[k : k + some], answers, schedule.points, generators, whole)
            for k in range(0, len(layers), some)
        )
        return total / len(layers)
    if config.kind == "depth":
        metres = found["depth"][:, 0].float()
        truth = _truth(targets, "depth", metres.device)
        loss = losses.relative_error if schedule.is_relative else losses.scale_invariant_log
        return loss(metres, truth).sum() / images
    points, weights = (_truth(targets, name, next(iter(found.values())).device) for name in ("points", "weights"))
    if config.kind == "simcc":
        x, y = found["x"].float(), found["y"].float()
        return losses.axis_bins(x, y, points, weights).sum() / images
    heatmaps = found["heatmaps"].float()
    side = heatmaps.shape[-1]
    cells = points * side / (config.side * 8) - 0.5
    truth = losses.gaussian_heatmaps(cells, side, schedule.sigma) * weights[..., None, None]
    counted = torch.ones_like(weights) if schedule.is_absence_taught else weights
    return schedule.gain * losses.joint_mse(heatmaps, truth, counted).sum() / images


def _truth(targets: Sequence[TrainingTarget], name: str, device: torch.device) -> Tensor:
    """One fp32 field of all targets."""
    return to_device(torch.stack([getattr(target, name) for target in targets]), device)


def _of_layers(
    layers: Sequence[Mapping], answers: Sequence[tuple[Tensor, Tensor]], points: int, generators, whole: losses.Totals
) -> Tensor:
    """The sum of the set losses of some layers, worked out as those of so many times the images."""
    logits, masks = (torch.cat([one[name].float() for one in layers]) for name in ("pred_logits", "pred_masks"))
    ids, shapes = zip(*answers)
    again = len(layers)
    return losses.set_loss(
        logits, masks, ids * again, shapes * again, points, list(generators) * again if generators else None, whole
    )


def asked_word(target: TrainingTarget, count: int, source: torch.Generator) -> int:
    """Mostly one that is there, else any that the picture was searched for."""
    is_there = len(target.classes) and torch.rand((), generator=source) < PRESENT
    known = target.classes if is_there else target.searched
    drawn = torch.randint(len(known) or count, (), generator=source)
    return int(known[drawn] if len(known) else drawn)


def answer_of(target: TrainingTarget, word: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and masks to be found; all things of one word are a single mask under upstream's label 1, or nothing."""
    ids, masks = target.classes, target.masks
    if word is not None:
        masks = masks[ids == word]
        ids, masks = (
            (torch.ones(1, dtype=torch.long), masks.any(0, keepdim=True))
            if len(masks)
            else (torch.zeros(0, dtype=torch.long), masks)
        )
    return to_device(ids, device), to_device(masks, device).float()
