"""MobileNetV2 with the head of DeepLabV3+ as transformers has it (Sandler et al. 2018, Chen et al. 2018)."""

from torch import nn

from bench.proof.students.networks.class_maps import (
    class_loss,
    class_shares,
    mirrored_classes,
    read_classes,
)
from bench.proof.students.networks.network import HALF, StudentNetwork

MOMENTUM = 0.1
DENSE = {"output_stride": 8, "classifier_dropout_prob": 0.1}


def _in_units_of_torch(model: nn.Module) -> nn.Module:
    """Running statistics over many batches: transformers gives TensorFlow's momentum, which here keeps the last one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = MOMENTUM
    return model


NETWORK = StudentNetwork(
    task="semantic",
    model="MobileNetV2ForSemanticSegmentation",
    config="MobileNetV2Config",
    sizes={
        "1.0": DENSE,
        "tiny": DENSE | {"depth_multiplier": 0.35, "finegrained_output": False},
        "0.5": DENSE | {"depth_multiplier": 0.5, "finegrained_output": False},
    },
    names=lambda vocabulary: vocabulary.classes,
    body="mobilenet_v2.",
    loss=class_loss,
    predict=class_shares,
    read=read_classes,
    mirror=mirrored_classes,
    colours=HALF,
    prepared=_in_units_of_torch,
)
