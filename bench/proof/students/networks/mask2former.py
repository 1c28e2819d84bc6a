"""Mask2Former (Cheng et al. 2022): queries of a transformer, each a class and a mask, matched to the things."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.proof.students.networks.network import StudentNetwork
from bench.proof.students.student_data import Vocabulary
from datasetdm_fast.data import Instances
from datasetdm_fast.engine.pictures.labelled import Labelled
from datasetdm_fast.kernels.transfer import to_device

MOST = 100  # instances of an image
LEAST_SCORE = 0.01
SWIN_T = {"model_type": "swin", "depths": [2, 2, 6, 2], "embed_dim": 96, "num_heads": [3, 6, 12, 24], "window_size": 7}
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
TINY_SWIN = {"model_type": "swin", "depths": [1, 1, 1, 1], "embed_dim": 16, "num_heads": [1, 2, 4, 8], "window_size": 4}
TINY = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 64,
    "dim_feedforward": 64,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "num_queries": 20,
    "train_num_points": 512,
}


def _loss(model: nn.Module, images: Tensor, items: Sequence[Labelled], vocabulary: Vocabulary) -> Tensor:
    """Mask2Former's own loss over all its layers; what lies in a crowd is not taught."""
    masks = [to_device(torch.from_numpy(np.ascontiguousarray(item.masks)), images.device).float() for item in items]
    classes = [to_device(torch.from_numpy(item.mask_classes), images.device).long() for item in items]
    return model(pixel_values=images, mask_labels=masks, class_labels=classes).loss.sum()


def _predict(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """The best queries of each image: scores, classes and masks at the size of the images."""
    answer = model(pixel_values=images)
    found = []
    for classes, masks in zip(answer.class_queries_logits.float(), answer.masks_queries_logits.float()):
        likely = classes.softmax(1)[:, :-1]
        scores, places = likely.flatten().topk(min(MOST, likely.numel()))
        queries = places // likely.shape[1]
        raw = F.interpolate(masks[queries][None], size=images.shape[-2:], mode="bilinear", align_corners=False)[0]
        inside = raw > 0
        sure = (raw.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        found.append({"scores": scores * sure, "classes": places % likely.shape[1], "masks": inside})
    return found


def _read(answers: list[dict[str, Tensor]], vocabulary: Vocabulary) -> list[Instances]:
    found = []
    for answer in answers:
        scores, masks = answer["scores"].cpu().numpy(), answer["masks"].cpu().numpy()
        kept = (scores >= LEAST_SCORE) & masks.any((1, 2))
        classes = answer["classes"].cpu().numpy().astype(np.int64)
        found.append(Instances(masks[kept], classes[kept], scores[kept].astype(np.float32), vocabulary.things))
    return found


NETWORK = StudentNetwork(
    task="instance",
    model="Mask2FormerForUniversalSegmentation",
    config="Mask2FormerConfig",
    sizes={
        "swin-t": {"backbone_config": SWIN_T | STAGES},
        "tiny": TINY | {"backbone_config": TINY_SWIN | STAGES},
    },
    names=lambda vocabulary: vocabulary.things,
    body="model.",
    loss=_loss,
    predict=_predict,
    read=_read,
    rate=3e-4,
    fine_rate=1e-5,
)
