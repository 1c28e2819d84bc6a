"""What networks share that answer with a map of scores for each class."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.proof.students.student_data import IGNORED, Vocabulary
from datasetdm_fast.data import SemanticMap
from datasetdm_fast.engine.labels.class_tables import mirrored_names
from datasetdm_fast.engine.pictures.labelled import Labelled
from datasetdm_fast.kernels.transfer import to_device


def class_loss(model: nn.Module, images: Tensor, items: Sequence[Labelled], vocabulary: Vocabulary) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored; 0 where all of them are."""
    labels = to_device(torch.from_numpy(np.stack([item.semantic for item in items])), images.device).long()
    error = F.cross_entropy(_scores(model, images), labels, ignore_index=IGNORED, reduction="sum")
    return error / (labels != IGNORED).sum().clamp(min=1)


def class_shares(model: nn.Module, images: Tensor) -> Tensor:
    """Probabilities [B, K, H, W] of the classes."""
    return _scores(model, images).softmax(1)


def _scores(model: nn.Module, images: Tensor) -> Tensor:
    found = model(pixel_values=images).logits.float()
    return F.interpolate(found, size=images.shape[-2:], mode="bilinear", align_corners=False)


def read_classes(shares: Tensor, vocabulary: Vocabulary) -> list[SemanticMap]:
    best, labels = shares.max(1)
    both = zip(labels.byte().cpu().numpy(), best.cpu().numpy())
    return [SemanticMap(numbers, confidence, vocabulary.classes) for numbers, confidence in both]


def mirrored_classes(vocabulary: Vocabulary) -> list[int]:
    return mirrored_names(vocabulary.classes)
