"""The transformer of a decoder of masks on a CPU, where its many small operations take longer to begin than to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.engine.decoders.stacked import StackedLayer, StackedTransformer
from datasetdm_fast.engine.models.blocks import Packed, Packing
from datasetdm_fast.engine.models.layers import tokens
from datasetdm_fast.kernels.bilinear import resize


class PackedTransformer(Packed):
    """The result of `stacked`, in one call of csrc up to the masks themselves."""

    def __init__(self, stacked: StackedTransformer):
        self.stacked = stacked
        self.features, self.logits = len(stacked.mask_layers[-1].weight), len(stacked.class_embed.weight)

    def pack(self, packing: Packing) -> _C.QueryTransformer:
        stacked, linear = self.stacked, packing.linear
        return _C.QueryTransformer(
            [packed_layer(packing, layer) for layer in stacked.layers],
            [linear(layer) for layer in stacked.memory],
            linear(stacked.positions),
            packing.norm(stacked.norm),
            [linear(layer) for layer in stacked.mask_layers],
            linear(stacked.class_embed),
            stacked.layers[0].cross.multihead_attn.heads,
        )

    def __call__(
        self, content: Tensor, position: Tensor, memory: list[Tensor], mask_features: Tensor
    ) -> dict[str, Tensor]:
        (images, queries, _), memory = content.shape, memory[: len(self.stacked.memory)]
        sides = [x.shape[-1] for x in memory]
        levels = [tokens(x).contiguous() for x in memory]
        features = [tokens(resize(mask_features, side)).contiguous() for side in sides]
        places = self.stacked.cells(sides, content)
        content, position = content.contiguous(), position.contiguous()
        embedded = torch.empty(images, queries, self.features)
        logits = torch.empty(images, queries, self.logits)
        self.native().run(
            content.data_ptr(),
            position.data_ptr(),
            *([x.data_ptr() for x in group] for group in (levels, places, features)),
            [side * side for side in sides],
            embedded.data_ptr(),
            logits.data_ptr(),
            images,
            queries,
            torch.get_num_threads(),
        )
        masks = self.stacked.ops.mask_head(embedded, mask_features, mask_features.shape[-1])
        return {"pred_logits": logits, "pred_masks": masks}


def packed_layer(packing: Packing, layer: StackedLayer) -> _C.QueryLayer:
    cross, itself, feed = layer.cross, layer.itself, layer.feed
    around = cross.multihead_attn.out_proj, layer.packed, itself.self_attn.out_proj
    packed: list[Any] = list(map(packing.linear, (layer.query, *around, feed.linear1, feed.linear2)))
    packed += map(packing.norm, (cross.norm, itself.norm, feed.norm))
    return _C.QueryLayer(*packed)
