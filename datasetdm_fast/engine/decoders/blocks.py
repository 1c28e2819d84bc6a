"""Decoders that read different blocks of one transformer, from captures that hold what any of them reads."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from datasetdm_fast.engine.decoders.trunk import Decoder, with_ops
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.stages import Level


def read_together(model: Model, decoders: Mapping[str, Decoder]) -> tuple[Model, dict[str, Decoder]]:
    """The model whose captures hold the blocks of every decoder, and the decoders as they read these."""
    if not any(decoder.config.blocks for decoder in decoders.values()):
        return model, dict(decoders)
    usual = tuple(level.blocks for level in model.reading(()).levels if level.blocks)
    named = {label: decoder.config.blocks or usual for label, decoder in decoders.items()}
    union = [sorted({block for blocks in level for block in blocks}) for level in zip(*named.values())]
    model = model.reading(union)
    return model, {label: _widen(decoder, named[label], model.levels) for label, decoder in decoders.items()}


@torch.no_grad()
def _widen(decoder: Decoder, read: Sequence[tuple[int, ...]], levels: Sequence[Level]) -> Decoder:
    """The decoder, which reads its own blocks, for captures of these levels: weights of other blocks are zero."""
    if [*read] == [level.blocks for level in levels if level.blocks]:
        return decoder
    decoder, config = with_ops(decoder, decoder.ops), decoder.config
    shares, wide_shares = list(config.word_heads), list[float]()
    for level, theirs, blocks in zip(config.levels, levels, (*read, ()), strict=True):
        mine, shares = shares[: sum(level.heads)], shares[sum(level.heads) :]
        if mine:
            wide_shares += _spread(torch.tensor(mine, dtype=torch.float64), blocks, theirs.blocks).tolist()
        if blocks and level.name in decoder.levels_read:
            convolution = decoder.get_submodule(f"{level.name}_feature_conv.0")
            features = level.halves * sum(level.features)
            parts = convolution.weight[:, :features, 0, 0], convolution.weight[:, features:, 0, 0]
            wide = torch.cat([_spread(part, blocks, theirs.blocks) for part in parts], 1)[..., None, None]
            convolution.weight, convolution.in_channels = nn.Parameter(wide, requires_grad=False), theirs.channels
    wider = tuple(replace(theirs, side=level.side) for level, theirs in zip(config.levels, levels))
    decoder.config = replace(config, levels=wider, word_heads=tuple(wide_shares))
    return decoder


def _spread(values: Tensor, read: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """Numbers of each block that is read, end to end in the last axis, as numbers of all blocks."""
    parts = values.unflatten(-1, (len(read), -1))
    wide = values.new_zeros(*parts.shape[:-2], len(blocks), parts.shape[-1])
    wide[..., [*map(blocks.index, read)], :] = parts
    return wide.flatten(-2)
