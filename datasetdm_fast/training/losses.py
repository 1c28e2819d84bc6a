"""The losses of the P-Decoders: set loss over matched queries, scale-invariant log depth, weighted heatmaps, axis bins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

NO_OBJECT = 0.1  # weight of "no object" in the cross-entropy
CLASS, MASK, DICE = 2.0, 5.0, 5.0
OVERSAMPLE, UNCERTAIN = 3, 0.75


@dataclass(frozen=True)
class Totals:
    """What the sums of a step are divided by: counts over the whole step, also where only a part of it is at hand."""

    images: int
    masks: int = 0
    matched: int = 0  # queries that answer for a mask
    queries: int = 0

    @property
    def weight(self) -> float:
        """Of the class cross-entropy."""
        return self.matched + NO_OBJECT * (self.queries - self.matched)


def totals(counts: Sequence[int], queries: int) -> Totals:
    """The totals of images with so many masks each."""
    return Totals(len(counts), sum(counts), sum(min(count, queries) for count in counts), len(counts) * queries)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """[N, P] bilinear values of maps [N, H, W] at points [N, P, 2] (x, y in 0..1)."""
    return F.grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """[N] one minus the soft Dice overlap along the last axis."""
    inside = logits.sigmoid()
    return 1 - (2 * (inside * targets).sum(-1) + 1) / (inside.sum(-1) + targets.sum(-1) + 1)


def drawn(*shape: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform random numbers on the device of `like`, drawn on the CPU so that they are the same everywhere."""
    return torch.rand(*shape, generator=generator).to(like.device)


@torch.no_grad()
def match(
    class_logits: Tensor, mask_logits: Tensor, classes: Tensor, masks: Tensor, points: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Query and target indices of the cheapest one-to-one assignment for one image (Mask2Former, eq. 2)."""
    places = drawn(1, points, 2, like=mask_logits, generator=generator)
    logits = sample_points(mask_logits, places.expand(len(mask_logits), -1, -1))
    truth = sample_points(masks, places.expand(len(masks), -1, -1))
    probability = class_logits.softmax(-1)[:, classes]
    outside, inside = F.softplus(logits), F.softplus(-logits)
    entropy = (inside @ truth.T + outside @ (1 - truth).T) / points
    soft = logits.sigmoid()
    overlap = 1 - (2 * soft @ truth.T + 1) / (soft.sum(-1)[:, None] + truth.sum(-1)[None] + 1)
    cost = -CLASS * probability + MASK * entropy + DICE * overlap
    queries, targets = linear_sum_assignment(cost.float().cpu().numpy())
    return torch.as_tensor(queries, device=masks.device), torch.as_tensor(targets, device=masks.device)


@torch.no_grad()
def uncertain_points(mask_logits: Tensor, points: int, generator: torch.Generator | None = None) -> Tensor:
    """[N, P, 2] points, most of them where the mask is least certain (PointRend, section 3.1)."""
    count = len(mask_logits)
    places = drawn(count, points * OVERSAMPLE, 2, like=mask_logits, generator=generator)
    certainty = sample_points(mask_logits, places).abs()
    hard = int(points * UNCERTAIN)
    chosen = certainty.topk(hard, largest=False).indices
    near = torch.gather(places, 1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([near, drawn(count, points - hard, 2, like=mask_logits, generator=generator)], 1)


def set_loss(
    class_logits: Tensor,
    mask_logits: Tensor,
    classes: Sequence[Tensor],
    masks: Sequence[Tensor],
    points: int = 12544,
    generators: Sequence[torch.Generator] | None = None,
    whole: Totals | None = None,
) -> Tensor:
    """Loss of query logits [B, Q, K+1] and [B, Q, h, w] against each image's class ids [M] and masks [M, H, W].

    Each image's points come from its own generator. Given the totals of a `whole` step, the losses of its parts add up to its own.
    """
    none = class_logits.shape[-1] - 1
    whole = whole or totals([len(ids) for ids in classes], class_logits.shape[1])
    wanted = torch.full(class_logits.shape[:2], none, device=class_logits.device)
    logits, targets, places = [], [], []
    for b, (ids, shapes) in enumerate(zip(classes, masks)):
        if len(ids) == 0:
            continue
        generator = generators[b] if generators else None
        queries, chosen = match(class_logits[b], mask_logits[b], ids, shapes, points, generator)
        wanted[b, queries] = ids[chosen]
        logits.append(mask_logits[b, queries])
        targets.append(shapes[chosen])
        places.append(uncertain_points(logits[-1], points, generator))
    weight = torch.ones(none + 1, device=class_logits.device)
    weight[none] = NO_OBJECT
    loss = CLASS * F.cross_entropy(class_logits.flatten(0, 1), wanted.flatten(), weight, reduction="sum") / whole.weight
    if logits:
        where = torch.cat(places)
        at, truth = sample_points(torch.cat(logits), where), sample_points(torch.cat(targets), where)
        entropy = F.binary_cross_entropy_with_logits(at, truth, reduction="none").mean(-1)
        loss = loss + (MASK * entropy.sum() + DICE * dice(at, truth).sum()) / max(whole.masks, 1)
    return loss


def scale_invariant_log(metres: Tensor, truth: Tensor, focus: float = 0.5) -> Tensor:
    """[B] roots of mean(d^2) - focus * mean(d)^2 over the known pixels of [B, H, W], d = ln truth - ln metres (Eigen et al. 2014)."""
    known = (truth > 0).float()
    count = known.sum((1, 2)).clamp(min=1)
    # The bounds keep a saturated sigmoid and a perfect answer from making infinite gradients.
    d = (torch.where(truth > 0, truth, 1).log() - metres.clamp(min=1e-6).log()) * known
    return (d.pow(2).sum((1, 2)) / count - focus * (d.sum((1, 2)) / count).pow(2)).clamp(min=1e-10).sqrt()


def joint_mse(heatmaps: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """[B] halves of the squared error of heatmaps [B, J, h, w], each joint's pixels weighted by [B, J]."""
    return 0.5 * ((heatmaps - truth).pow(2).mean((2, 3)) * weights.pow(2)).mean(1)


def axis_bins(x_logits: Tensor, y_logits: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """[B] negative log-likelihoods of the x and y bins of points [B, J, 2], summed over joints."""
    total = x_logits.new_zeros(len(x_logits))
    for logits, column in ((x_logits, 0), (y_logits, 1)):
        bins = points[..., column].round().long().clamp(0, logits.shape[-1] - 1)
        total = total + (F.cross_entropy(logits.flatten(0, 1), bins.flatten(), reduction="none").view_as(weights) * weights).sum(1)
    return total


def gaussian_heatmaps(points: Tensor, side: int, sigma: float) -> Tensor:
    """[B, J, side, side] of height one around points [B, J, 2] given in cells, cell centres at whole numbers."""
    axis = torch.arange(side, device=points.device, dtype=points.dtype)
    x = (axis - points[..., 0:1]).pow(2)[:, :, None, :]
    y = (axis - points[..., 1:2]).pow(2)[:, :, :, None]
    return torch.exp(-(x + y) / (2 * sigma**2))
