"""What a student network says of images, as labels: once, or as the mean over six scales and their mirror images.

Maps are scored at the images' own size: a network is shown the whole image, its shorter side as it has learnt, and its
answer is enlarged before a class is chosen.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.proof.students.examples import Examples, as_tensor
from bench.proof.students.networks import MULTIPLE
from bench.proof.students.networks.network import StudentNetwork
from bench.proof.students.student_data import Vocabulary
from datasetdm_fast.data import Annotation
from datasetdm_fast.engine.pictures.labelled import Labelled
from datasetdm_fast.kernels.transfer import to_device
from datasetdm_fast.training.evaluation.meter import check_count
from datasetdm_fast.training.evaluation.metrics import METRICS

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@torch.inference_mode()
def answered(
    network: StudentNetwork,
    model: nn.Module,
    items: Sequence[Labelled],
    vocabulary: Vocabulary,
    is_averaged: bool,
    side: int = 0,  # pixels of the shorter side that the network is shown, 0 = as the images are
) -> list[Annotation]:
    """The labels of images of one size, at this size."""
    images = to_device(as_tensor(items, network.colours), next(model.parameters()).device)
    sides = images.shape[-2:]
    if side and sides != (shown := _multiples(sides, side / min(sides))):
        images = F.interpolate(images, size=shown, mode="bilinear", align_corners=False, antialias=True)
    raw = _mean(network, model, images, vocabulary) if is_averaged else network.predict(model, images)
    if images.shape[-2:] != sides:
        raw = F.interpolate(raw, size=sides, mode="bilinear", align_corners=False)
    return network.read(raw, vocabulary)


def _multiples(sides: Sequence[int], scale: float) -> list[int]:
    """The scaled sides as networks take them."""
    return [max(1, round(scale * side / MULTIPLE)) * MULTIPLE for side in sides]


def _mean(network: StudentNetwork, model: nn.Module, images: Tensor, vocabulary: Vocabulary) -> Tensor:
    other, total = list(network.mirror(vocabulary)), torch.zeros(())
    for scale in SCALES:
        some = F.interpolate(
            images, size=_multiples(images.shape[-2:], scale), mode="bilinear", align_corners=False, antialias=True
        )
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
    meter, side = METRICS[network.task](exam.names), exam.source.size if is_map(network) else 0
    for items in _batches(exam, batch_size, is_map(network)):
        for item, answer in zip(items, answered(network, model, items, vocabulary, is_averaged, side)):
            meter.add(item, answer)
    found = check_count(meter)
    if network.task == "semantic" and (
        things := [value for name, value in found["per_class"].items() if name in vocabulary.things]
    ):
        found["miou_of_things"] = sum(things) / len(things)
    return found


def is_map(network: StudentNetwork) -> bool:
    """Whether its answers are maps, which are scored at the images' own size."""
    return network.mirror is not None


def _batches(exam: Examples, batch_size: int, is_whole: bool) -> Iterator[list[Labelled]]:
    """The images in their order; those of a batch are of one size."""
    items: list[Labelled] = []
    for k in range(len(exam)):
        item = exam.whole(k) if is_whole else exam[k]
        if items and (len(items) == batch_size or item.image.shape != items[0].image.shape):
            yield items
            items = []
        items.append(item)
    yield items
