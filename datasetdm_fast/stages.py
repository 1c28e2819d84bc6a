"""The one table of everything that crosses an engine's boundary: size letters, pyramid levels, tensor names, shapes and
dtypes.

Size letters: B images, C channels, H W pixels, h w latent cells, S tokens in space, T text tokens, D text width, N
queries, K classes, J joints. A CFG batch is [uncond_0 .. uncond_{B-1}, cond_0 .. cond_{B-1}].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

LEVELS = ("low", "mid", "high", "highest")
FACTOR = 8  # pixels of a side of one cell of the highest level


@dataclass(frozen=True)
class Level:
    """One level of the captured pyramid; channels of a feature are those of one CFG half."""

    name: str
    side: int  # cells
    features: tuple[int, ...]  # channels of each captured feature, in capture order
    heads: tuple[int, ...]  # heads of each captured cross-attention layer: up blocks first, then down
    tokens: int
    halves: int = 2  # of a call: 1 for a model that is sampled without CFG
    # of a transformer, one for each feature and map; of a decoder () where they are those of the model's own level
    blocks: tuple[int, ...] = ()

    def reading(self, blocks: Sequence[int]) -> Self:
        """This level of a transformer where it reads other blocks."""
        count, blocks = len(blocks), tuple(blocks)
        return replace(self, features=self.features[:1] * count, heads=self.heads[:1] * count, blocks=blocks)

    @property
    def channels(self) -> int:
        """Channels of the concatenated level: every half of the features, then heads and tokens of the maps."""
        return self.halves * sum(self.features) + sum(self.heads) * self.tokens


Shape = tuple[str | int, ...]


@dataclass(frozen=True)
class Tensors:
    """Named tensors of one stage: name -> (shape in size letters or numbers, dtype).

    F: stacked channels of every decoder's first layer, L: logits of a query, M: side of a decoder's map.
    """

    inputs: dict[str, tuple[Shape, str]]
    outputs: dict[str, tuple[Shape, str]]


_LATENTS: tuple[Shape, str] = (("B", "C", "h", "w"), "float32")
_CALL = {"latents": _LATENTS, "timestep": ((), "float32"), "context": (("2B", "T", "D"), "float32")}
_NOISE: tuple[Shape, str] = (("2B", "C", "h", "w"), "float32")
MORE_INPUTS: dict[str, tuple[Shape, str]] = {  # of a call, in families that read them
    "pooled": (("2B", "P"), "float32"),
    "mask": (("2B", "T"), "bool"),  # the tokens of the context that are read
    "guidance": ((), "float32"),
}

STAGES = {
    "encode_text": Tensors({"tokens": (("B", "T"), "int64")}, {"context": (("B", "T", "D"), "float32")}),
    "denoise": Tensors(_CALL, {"noise": _NOISE}),
    "denoise_and_capture": Tensors(
        _CALL, {"noise": _NOISE, **{f"sums_{name}": (("B", "F", "h", "w"), "float32") for name in LEVELS}}
    ),
    "decode_image": Tensors(
        {"latents": _LATENTS}, {"image": (("B", "H", "W", 3), "uint8"), "is_finite": (("B",), "bool")}
    ),
    "encode_image": Tensors({"image": (("B", "H", "W", 3), "uint8")}, {"moments": (("B", "2C", "h", "w"), "float32")}),
}

PAIRED_TEXT = Tensors(  # of two text encoders
    {name: (("B", "T"), "int64") for name in ("tokens", "tokens_2")},
    {"context": (("B", "T", "D"), "float32"), "pooled": (("B", "P"), "float32")},
)

RAW_OUTPUTS: dict[str, dict[str, Shape]] = {  # kind of decoder -> its raw outputs
    "segmentation": {"pred_logits": ("B", "N", "L"), "pred_masks": ("B", "N", "M", "M")},
    "open-vocabulary": {"pred_logits": ("B", "K", "N", "L"), "pred_masks": ("B", "K", "N", "M", "M")},
    "depth": {"depth": ("B", 1, "H", "W")},
    "heatmap": {"heatmaps": ("B", "J", "M", "M")},
    "simcc": {"x": ("B", "J", "W"), "y": ("B", "J", "H")},
}


def of_rows(rows: int, table: Tensors, more: Sequence[str]) -> Tensors:
    """The tensors of a call with so many rows of text for each image, and with `more` of its inputs."""

    def count(tensors: dict[str, tuple[Shape, str]]) -> dict[str, tuple[Shape, str]]:
        letters = {2: "2B", 1: "B"}[rows]
        return {
            name: (tuple(letters if axis == "2B" else axis for axis in axes), dtype)
            for name, (axes, dtype) in tensors.items()
        }

    inputs = table.inputs | {name: MORE_INPUTS[name] for name in more}
    return Tensors(count(inputs), count(table.outputs))


def keep(pyramid: Sequence[Level]) -> Tensors:
    """The stage that hands out every feature and map itself: `features_LEVEL_PLACE` and `maps_LEVEL_PLACE`."""
    features = {
        f"features_{level.name}_{place}": (("B", "C", "h", "w"), "float32")
        for level in pyramid
        for place in range(len(level.features))
    }
    maps = {
        f"maps_{level.name}_{place}": (("B", "heads", "S", "T"), "float32")
        for level in pyramid
        for place in range(len(level.heads))
    }
    return Tensors(_CALL, {"noise": _NOISE, **features, **maps})


def average(self_side: int, cross_side: int) -> Tensors:
    """The stage that adds up attention: of self-attention over `self_side` x `self_side` cells, and of cross-attention
    over `cross_side` x `cross_side` cells with the tokens of a class prompt.
    """
    cells, queries = self_side**2, cross_side**2
    sums: dict[str, tuple[Shape, str]] = {
        "cells": (("B", cells, cells), "float32"),
        "tokens": (("B", queries, "T"), "float32"),
    }
    return Tensors(_CALL | {"class_context": (("B", "T", "D"), "float32")}, {"noise": _NOISE, **sums})


def annotate(kind: str, levels_read: Sequence[str], tells_words: bool = False) -> Tensors:
    """The stage of a decoder of this kind: its channels of these levels' sums and, for words, their embeddings. With
    `tells_words`, its outputs include the attention to each token of a prompt.
    """
    sums = {f"sums_{name}": (("B", "F", "h", "w"), "float32") for name in levels_read}
    text = {"text": (("B", "K", "D"), "float32")} if kind == "open-vocabulary" else {}
    outputs = dict(RAW_OUTPUTS[kind])
    if tells_words:
        outputs["token_attention"] = ("B", "T", "h", "w")
    return Tensors({**sums, **text}, {name: (shape, "float32") for name, shape in outputs.items()})
