"""The losses of the P-Decoders: matched queries, scale-invariant log depth, weighted heatmaps, axis bins."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from datasetdm_fast.kernels.transfer import to_device

NO_OBJECT = 0.1  # weight of "no object" in the cross-entropy
CLASS, MASK, DICE = 2.0, 5.0, 5.0
OVERSAMPLE, UNCERTAIN = 3, 0.75


@dataclass(frozen=True)
class Totals:
    """Denominators of the losses: counts over the whole step, also in one gradient accumulation step of it."""

    images: int
    masks: int = 0
    weight: float = 0.0  # of the class cross-entropy


def totals(counts: Sequence[int], queries: int) -> Totals:
    matched = sum(min(count, queries) for count in counts)  # queries with a mask
    return Totals(len(counts), sum(counts), matched + NO_OBJECT * (len(counts) * queries - matched))


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """[N, P] bilinear values of maps [N, H, W] at points [N, P, 2] (x, y in 0..1)."""
    return F.grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """[N] one minus the soft Dice overlap along the last axis."""
    inside = logits.sigmoid()
    return 1 - (2 * (inside * targets).sum(-1) + 1) / (inside.sum(-1) + targets.sum(-1) + 1)


def sample_places(count: int, points: int, like: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Places [1, P, 2] to match at, [count, 3P, 2] to choose from and [count, R, 2] to take; sampled on the CPU."""
    sizes = [points, count * points * OVERSAMPLE, count * (points - int(points * UNCERTAIN))]
    parts = to_device(torch.rand(sum(sizes), 2, generator=generator), like.device).split(sizes)
    return [parts[0][None], *(part.view(count, -1, 2) for part in parts[1:])] if count else [parts[0][None], *parts[1:]]


def sample_together(maps: Tensor, points: Tensor) -> Tensor:
    """[B, N, P] bilinear values of maps [B, N, H, W] at points [B, P, 2] that all maps of an image share."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


@torch.no_grad()
def match(
    class_logits: Tensor, mask_logits: Tensor, classes: Sequence[Tensor], masks: Sequence[Tensor], places: Tensor
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Query and target indices of each image's cheapest one-to-one assignment at `places` (Mask2Former, eq. 2)."""
    logits = sample_together(mask_logits, places)
    ids = torch.nn.utils.rnn.pad_sequence(list(classes), batch_first=True)
    truth = logits.new_zeros(len(logits), ids.shape[1], logits.shape[2])
    for b, shapes in enumerate(masks):
        if len(shapes):
            truth[b, : len(shapes)] = sample_together(shapes[None], places[b : b + 1])[0]
    probability = class_logits.softmax(-1).take_along_dim(ids[:, None], 2)
    # The entropy of a logit x is softplus(x) outside a mask and softplus(-x) = softplus(x) - x inside.
    entropy = (F.softplus(logits).sum(-1, keepdim=True) - logits @ truth.mT) / logits.shape[2]
    soft = logits.sigmoid()
    overlap = 1 - (2 * soft @ truth.mT + 1) / (soft.sum(-1, keepdim=True) + truth.sum(-1)[:, None] + 1)
    cost = -CLASS * probability + MASK * entropy + DICE * overlap
    cost = cost.float().nan_to_num().cpu().numpy()  # NaN makes the loss NaN, which ends the training
    return [linear_sum_assignment(cost[b, :, : len(ids)]) for b, ids in enumerate(classes)]


@torch.no_grad()
def uncertain_points(mask_logits: Tensor, places: Tensor, others: Tensor) -> Tensor:
    """[N, P, 2]: of `places` [N, 3P, 2] where masks [N, h, w] are least certain, then `others` (PointRend, 3.1)."""
    hard = places.shape[1] // OVERSAMPLE - others.shape[1]
    chosen = sample_points(mask_logits, places).abs().topk(hard, largest=False, sorted=False).indices
    return torch.cat([places.take_along_dim(chosen[..., None], 1), others], 1)


def set_loss(
    class_logits: Tensor,
    mask_logits: Tensor,
    classes: Sequence[Tensor],
    masks: Sequence[Tensor],
    points: int,
    generators: Sequence[torch.Generator],
    whole: Totals,
) -> Tensor:
    """Loss of query logits [B, Q, K+1] and [B, Q, h, w] against each image's class ids [M] and masks [M, H, W].

    Each image's points have their own generator; `whole` are the totals of the step, whose gradient accumulation steps
    have losses that add up.
    """
    queries, none = class_logits.shape[1], class_logits.shape[-1] - 1
    class_targets = torch.full(class_logits.shape[:2], none, device=class_logits.device)
    counts = [min(len(ids), queries) for ids in classes]
    matched_masks = None
    if any(counts):
        each = [
            sample_places(count, points, mask_logits, generator)
            for count, generator in zip(counts, generators, strict=True)
        ]
        pairs = match(class_logits, mask_logits, classes, masks, torch.cat([places for places, _, _ in each]))
        firsts = np.cumsum([0, *map(len, classes)])
        rows = [np.stack((np.full_like(query, b), query, place + firsts[b])) for b, (query, place) in enumerate(pairs)]
        # Image, query, and place of the target among those of all images, in one copy: every copy to a GPU costs as
        # much as a kernel.
        images, chosen, matched = to_device(torch.from_numpy(np.concatenate(rows, 1)), class_targets.device)
        matched_masks = mask_logits[images, chosen]
        class_targets[images, chosen] = torch.cat(list(classes))[matched]
    weight = torch.ones(none + 1, device=class_logits.device)
    weight[none:] = NO_OBJECT  # the host would copy a single element, and wait
    entropy = F.cross_entropy(class_logits.flatten(0, 1), class_targets.flatten(), weight, reduction="sum")
    loss = CLASS * entropy / whole.weight
    if matched_masks is not None:
        shapes = torch.cat(list(masks))[matched]
        where = uncertain_points(
            matched_masks, *(torch.cat([places[k] for places, count in zip(each, counts) if count]) for k in (1, 2))
        )
        at, truth = sample_points(matched_masks, where), sample_points(shapes, where)
        entropy = F.binary_cross_entropy_with_logits(at, truth, reduction="none").mean(-1)
        loss = loss + (MASK * entropy.sum() + DICE * dice(at, truth).sum()) / max(whole.masks, 1)
    return loss


def scale_invariant_log(metres: Tensor, truth: Tensor, focus: float = 0.5) -> Tensor:
    """[B] roots of mean(d^2) - focus * mean(d)^2, d = ln truth - ln metres where known (Eigen et al. 2014)."""
    known = (truth > 0).float()
    count = known.sum((1, 2)).clamp(min=1)
    # The bounds keep a saturated sigmoid and a perfect answer from making infinite gradients.
    d = (torch.where(truth > 0, truth, 1).log() - metres.clamp(min=1e-6).log()) * known
    return (d.pow(2).sum((1, 2)) / count - focus * (d.sum((1, 2)) / count).pow(2)).clamp(min=1e-10).sqrt()


def relative_error(metres: Tensor, truth: Tensor) -> Tensor:
    """[B] means of |metres - truth| / truth where the truth is known."""
    known = (truth > 0).float()
    each = (metres - truth).abs() / torch.where(truth > 0, truth, 1) * known
    return each.sum((1, 2)) / known.sum((1, 2)).clamp(min=1)


def joint_mse(heatmaps: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """[B] halves of the squared error of heatmaps [B, J, h, w], each joint's pixels weighted by [B, J]."""
    return 0.5 * ((heatmaps - truth).pow(2).mean((2, 3)) * weights.pow(2)).mean(1)


def axis_bins(x_logits: Tensor, y_logits: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """[B] negative log-likelihoods of the x and y bins of points [B, J, 2], summed over joints."""
    total = x_logits.new_zeros(len(x_logits))
    for logits, column in ((x_logits, 0), (y_logits, 1)):
        bins = points[..., column].round().long().clamp(0, logits.shape[-1] - 1)
        each = F.cross_entropy(logits.flatten(0, 1), bins.flatten(), reduction="none").view_as(weights)
        total = total + (each * weights).sum(1)
    return total


def gaussian_heatmaps(points: Tensor, side: int, sigma: float) -> Tensor:
    """[B, J, side, side] of height one around points [B, J, 2] given in cells, cell centres at whole numbers."""
    axis = torch.arange(side, device=points.device, dtype=points.dtype)
    x = (axis - points[..., 0:1]).pow(2)[:, :, None, :]
    y = (axis - points[..., 1:2]).pow(2)[:, :, :, None]
    return torch.exp(-(x + y) / (2 * sigma**2))
