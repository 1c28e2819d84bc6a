"""SegFormer (Xie et al. 2021): a hierarchical transformer with a head of linear layers, a class for every pixel."""

from bench.proof.students.networks.class_maps import (
    class_loss,
    class_shares,
    mirrored_classes,
    read_classes,
)
from bench.proof.students.networks.network import StudentNetwork

WIDE = {"hidden_sizes": (64, 128, 320, 512)}
TINY = {
    "depths": (1, 1, 1, 1),
    "hidden_sizes": (16, 32, 64, 128),
    "num_attention_heads": (1, 1, 2, 4),
    "decoder_hidden_size": 64,
    "drop_path_rate": 0.0,
}
NETWORK = StudentNetwork(
    task="semantic",
    model="SegformerForSemanticSegmentation",
    config="SegformerConfig",
    sizes={
        "b0": {},
        "tiny": TINY,
        "b1": WIDE,
        "b2": WIDE | {"depths": (3, 4, 6, 3), "decoder_hidden_size": 768},
        "b5": WIDE | {"depths": (3, 6, 40, 3), "decoder_hidden_size": 768},
    },
    names=lambda vocabulary: vocabulary.classes,
    body="segformer.",
    loss=class_loss,
    predict=class_shares,
    read=read_classes,
    mirror=mirrored_classes,
)
