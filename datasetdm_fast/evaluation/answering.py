"""What a student network says of images, as labels: once, or as the mean over six scales and their mirror images."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.data import Annotation
from datasetdm_fast.evaluation.examples import Examples, as_tensor
from datasetdm_fast.evaluation.metrics import METRICS
from datasetdm_fast.evaluation.networks import MULTIPLE
from datasetdm_fast.evaluation.networks.network import StudentNetwork
from datasetdm_fast.evaluation.student_data import Vocabulary
from datasetdm_fast.truth.labelled import Labelled

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@torch.inference_mode()
def answered(
    network: StudentNetwork, model: nn.Module, items: Sequence[Labelled], vocabulary: Vocabulary, is_averaged: bool
) -> list[Annotation]:
    """The labels of images, at their size."""
    images = as_tensor(items, network.colours).to(next(model.parameters()).device)
    raw = _mean(network, model, images, vocabulary) if is_averaged else network.predict(model, images)
    return network.read(raw, vocabulary)


def _mean(network: StudentNetwork, model: nn.Module, images: Tensor, vocabulary: Vocabulary) -> Tensor:
    other, total = list(network.mirror(vocabulary)), torch.zeros(())
    for scale in SCALES:
        sides = [max(1, round(scale * side / MULTIPLE)) * MULTIPLE for side in images.shape[-2:]]
        some = F.interpolate(images, size=sides, mode="bilinear", align_corners=False, antialias=True)
        both = network.predict(model, some), network.predict(model, some.flip(-1)).flip(-1)[:, other]
        total = total + F.interpolate(sum(both), size=images.shape[-2:], mode="bilinear", align_corners=False)
    return total / (2 * len(SCALES))


def scored(
    network: StudentNetwork,
    model: nn.Module,
    exam: Examples,
    vocabulary: Vocabulary,
    batch_size: int,
    is_averaged: bool = False,
) -> dict[str, Any]:
    """The figures of a student; of a map of classes also the mean over the things."""
    meter = METRICS[network.task](exam.names)
    for items in _batches(exam, batch_size):
        for item, answer in zip(items, answered(network, model, items, vocabulary, is_averaged)):
            meter.add(item, answer)
    found = meter.result()
    if network.task == "semantic" and (
        things := [value for name, value in found["per_class"].items() if name in vocabulary.things]
    ):
        found["miou_of_things"] = sum(things) / len(things)
    return found


def _batches(exam: Examples, batch_size: int) -> Iterator[list[Labelled]]:
    for start in range(0, len(exam), batch_size):
        yield [exam[k] for k in range(start, min(start + batch_size, len(exam)))]
