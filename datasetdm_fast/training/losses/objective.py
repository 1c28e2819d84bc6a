"""The training objective of one batch for each kind of decoder."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.checkpoint import DecoderConfig
from datasetdm_fast.kernels.transfer import to_device
from datasetdm_fast.training.captures.targets import TrainingTarget
from datasetdm_fast.training.losses import losses
from datasetdm_fast.training.recipes import TrainingSchedule

# Mask logits whose losses are computed together: small decoders are bound by the number of calls, large ones by memory.
LOGITS_AT_ONCE = 2**22
PRESENT = 0.8  # share of open-vocabulary queries whose word the image shows; the others train its absence


def loss_of(
    config: DecoderConfig,
    outputs: Mapping,
    targets: Sequence[TrainingTarget],
    truths: Sequence[tuple[Tensor, Tensor]],
    schedule: TrainingSchedule,
    generators: Sequence[torch.Generator] | None = None,
    totals: losses.Totals | None = None,
) -> Tensor:
    """The loss of a decoder's raw outputs; `truths` are the ids and masks that its queries should predict, `totals`
    count the whole step where this is one gradient accumulation step of it.
    """
    images = totals.images if totals else len(targets)
    if config.has_queries:
        layers = [outputs, *outputs.get("aux", ())]
        totals = totals or losses.totals([len(ids) for ids, _ in truths], config.queries)
        group = max(LOGITS_AT_ONCE // outputs["pred_masks"].numel(), 1)
        total = sum(
            _layers_loss(layers[k : k + group], truths, schedule.points, generators, totals)
            for k in range(0, len(layers), group)
        )
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


def _layers_loss(
    layers: Sequence[Mapping], truths: Sequence[tuple[Tensor, Tensor]], points: int, generators, totals: losses.Totals
) -> Tensor:
    """The sum of the set losses of some layers, computed as one batch of as many times the images."""
    logits, masks = (torch.cat([layer[name].float() for layer in layers]) for name in ("pred_logits", "pred_masks"))
    ids, shapes = zip(*truths)
    copies = len(layers)
    return losses.set_loss(
        logits, masks, ids * copies, shapes * copies, points, list(generators) * copies if generators else None, totals
    )


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
