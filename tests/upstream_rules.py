"""DatasetDM's own rules from a decoder's raw tensors to labels, beside those of datasetdm_fast.engine.tasks; and
its checkpoints in decoders.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from datasetdm_fast.engine.decoders.checkpoint import UNUSED, fill
from datasetdm_fast.engine.decoders.trunk import Decoder, fold
from datasetdm_fast.engine.tasks.instance import candidates
from datasetdm_fast.engine.tasks.pose import neighbours, peaks
from datasetdm_fast.engine.tasks.semantic import evidence, without_small
from datasetdm_fast.kernels.upsample_concat import resize
from datasetdm_fast.untrusted import pickles


def load_upstream(decoder: Decoder, source: Path | Mapping[str, Tensor], *, strict: bool = False) -> Decoder:
    """The decoder with the weights of a DatasetDM checkpoint, for inference; `strict` keeps its spectral norms."""
    state = source if isinstance(source, Mapping) else load_file(pickles.safe_copy(source))
    state = {name.removeprefix("module."): value for name, value in state.items()}
    unread = UNUSED.get(decoder.config.kind, ())
    fill(decoder, {name: value for name, value in state.items() if not name.startswith(unread)}, "state dict")
    return decoder.requires_grad_(False) if strict else fold(decoder)


def labels(class_logits: Tensor, mask_logits: Tensor, min_area: float = 5000) -> Tensor:
    """DatasetDM's label map [B, H, W] int64 from masks already at image size; ties go to the lowest id."""
    return without_small(evidence(class_logits, mask_logits), min_area).argmax(1)


def instances(class_logits: Tensor, mask_logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """DatasetDM's masks [B, k, H, W] bool, class ids [B, k] and scores [B, k], from masks already at image size; in no
    order.
    """
    queries, classes, scores = candidates(class_logits.softmax(-1)[..., :-1], mask_logits, count)
    images = torch.arange(len(queries), device=queries.device)[:, None]
    return (mask_logits > 0)[images, queries], classes, scores


def kept(scores: Tensor, best: int = 20, threshold: float = 0.4) -> Tensor:
    """Which of the scores [B, k] DatasetDM's COCO generator writes: those among the best 20 that reach 0.4."""
    among = torch.zeros_like(scores, dtype=torch.bool)
    among.scatter_(1, scores.topk(min(best, scores.shape[1])).indices, True)
    return among & (scores >= threshold)


def mask(class_logits: Tensor, mask_logits: Tensor, class_id: int) -> Tensor:
    """DatasetDM's VOC label map [B, H, W]: `class_id` inside the best-scored of three candidates, 0 elsewhere; masks
    already at image size.
    """
    found, _, scores = instances(class_logits, mask_logits, 3)
    return found[torch.arange(len(found), device=found.device), scores.argmax(1)].long() * class_id


def depth_bytes(metres: np.ndarray, max_depth: float) -> np.ndarray:
    """DatasetDM's 8-bit depth: metres / max_depth * 256, rounded half to even, saturated at 255."""
    return np.clip(np.rint(metres / max_depth * 256), 0, 255).astype(np.uint8)


def keypoints(heatmaps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """DatasetDM's joints [B, J, 3] (column, row, score) and which of them it writes: those not within a pixel of the
    border, moved a quarter pixel uphill.
    """
    planes = resize(heatmaps, size)
    height, places = peaks(planes)
    places = places * (height > 0)[..., None]
    around = neighbours(planes, places)
    uphill = torch.stack([around[..., 1, 2] - around[..., 1, 0], around[..., 2, 1] - around[..., 0, 1]], -1).sign()
    is_written = ((places > 1) & (places < size - 1)).all(-1)
    moved = places + 0.25 * uphill * is_written[..., None]
    return torch.cat([moved, height[..., None]], -1), is_written


def bins(x: Tensor, y: Tensor) -> Tensor:
    """DatasetDM's joints [B, J, 2] (column, row) from bin logits [B, J, W] and [B, J, H]."""
    return torch.stack([logits.softmax(-1).argmax(-1) for logits in (x, y)], -1)
