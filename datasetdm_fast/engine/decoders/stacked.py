"""Decoders for inference: the same answers up to rounding, from fewer and larger products; a CPU packs them further."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.engine.decoders.layers import SegBlock
from datasetdm_fast.engine.decoders.transformer import (
    CrossAttention,
    FeedForward,
    MaskEmbedding,
    SelfAttention,
    sine_position,
)
from datasetdm_fast.engine.models.layers import image, tokens
from datasetdm_fast.kernels.bilinear import resize


class StackedProduct(NamedTuple):
    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, *self)


class StackedLayer(NamedTuple):
    """One layer, whose positions have been taken out of its products."""

    query: StackedProduct  # of the cross-attention
    packed: StackedProduct  # queries, keys and values of the self-attention
    cross: CrossAttention
    itself: SelfAttention
    feed: FeedForward


class StackedTransformer:
    """Every layer of a decoder of masks.

    Positions enter attention through linear maps only, so their shares are made once and added where queries and keys
    are read. Layers that read the same memory level have their keys and values from one product. The mask features are
    resized to each memory level once, as resizing commutes with the product of an embedding and the features.
    """

    def __init__(
        self,
        layers: list[tuple[CrossAttention, SelfAttention, FeedForward]],
        level_embed: Tensor,
        norm: nn.LayerNorm,
        mask_embed: MaskEmbedding,
        class_embed: nn.Linear,
        ops: SimpleNamespace,
    ):
        self.ops, self.norm, self.class_embed, self.level_embed = ops, norm, class_embed, level_embed
        self.mask_layers = list(mask_embed.layers)
        self.layers, shares = [], []
        for cross, itself, feed in layers:
            q, k, v = parts(cross.multihead_attn)
            own_q, own_k, own_v = parts(itself.self_attn)
            bias = torch.cat([torch.zeros_like(own_q.bias), torch.zeros_like(own_k.bias), own_v.bias])
            packed = StackedProduct(itself.self_attn.in_proj_weight, bias)
            self.layers.append(StackedLayer(StackedProduct(q.weight), packed, cross, itself, feed))
            shares += [q, own_q, own_k]
        self.positions = join_products(shares)  # of all layers, from the positions of the queries
        count = min(len(level_embed), len(layers))  # the levels that are read
        products = [parts(layer.cross.multihead_attn) for layer in self.layers]
        self.keys = [join_products([k for _, k, _ in products[level::count]]) for level in range(count)]
        self.memory = [
            StackedProduct(
                torch.cat([self.keys[level].weight, values.weight]),
                torch.cat([torch.zeros_like(self.keys[level].bias), values(level_embed[level])]),
            )
            for level, values in (
                (level, join_products([v for _, _, v in products[level::count]])) for level in range(count)
            )
        ]
        self.places: dict[tuple[int, ...], list[Tensor]] = {}  # sides of the memory levels -> shares of their cells

    def __call__(
        self, content: Tensor, position: Tensor, memory: list[Tensor], mask_features: Tensor
    ) -> dict[str, Tensor]:
        memory = memory[: len(self.memory)]
        places, shares = self.positions(position), self.cells([x.shape[-1] for x in memory], content)
        packed = [product(tokens(x)) for product, x in zip(self.memory, memory)]
        features = [resize(mask_features, x.shape[-1]) for x in memory]
        channels, levels, content = content.shape[-1], len(memory), content.contiguous()
        for i, layer in enumerate(self.layers):
            level, start = i % levels, i // levels * channels
            last, count = start + channels, shares[level].shape[-1]
            place_q, place_own_q, place_own_k = places[..., 3 * i * channels :][..., : 3 * channels].chunk(3, -1)
            keys, values = packed[level][..., start:last], packed[level][..., count + start : count + last]
            logits = self.ops.mask_head(self.embed_masks(content), features[level], features[level].shape[-1]).flatten(
                2
            )
            cross, itself, feed = layer.cross, layer.itself, layer.feed
            answer = self.ops.query_attention(
                layer.query(content),
                keys,
                values,
                cross.multihead_attn.heads,
                place_q,
                shares[level][:, start:last],
                logits,
            )
            content = self.add_and_normalise(answer, cross.multihead_attn.out_proj, content, cross.norm)
            q, k, v = layer.packed(content).chunk(3, -1)
            answer = self.ops.query_attention(q, k, v, itself.self_attn.heads, place_own_q, place_own_k)
            content = self.add_and_normalise(answer, itself.self_attn.out_proj, content, itself.norm)
            content = self.add_and_normalise(feed.linear1(content), feed.linear2, content, feed.norm, has_relu=True)
        masks = self.ops.mask_head(self.embed_masks(content), mask_features, mask_features.shape[-1])
        return {"pred_logits": self.class_embed(self.norm(content)), "pred_masks": masks}

    def embed_masks(self, content: Tensor) -> Tensor:
        norm, weights = self.norm, [layer.weight for layer in self.mask_layers]
        biases = [layer.bias for layer in self.mask_layers]
        return self.ops.mask_embedding(content, norm.weight, norm.bias, norm.eps, weights, biases)

    def add_and_normalise(
        self, x: Tensor, linear: nn.Linear, content: Tensor, norm: nn.LayerNorm, has_relu: bool = False
    ) -> Tensor:
        affine = norm.weight, norm.bias, norm.eps
        return self.ops.linear_norm(x, linear.weight, linear.bias, content, *affine, has_relu=has_relu)

    def cells(self, sides: list[int], like: Tensor) -> list[Tensor]:
        """What the places of each level's cells give to the keys of all its layers [S, layers * C]."""
        if (encoding := self.places.get(tuple(sides))) is None:
            encoding = [
                keys(sine_position(side, like.shape[-1], like) + level)
                for side, keys, level in zip(sides, self.keys, self.level_embed)
            ]
            self.places[tuple(sides)] = encoding
        return encoding


def parts(attention: Any) -> list[StackedProduct]:
    """The products of queries, keys and values of a transformer.Attention."""
    return [StackedProduct(*parts) for parts in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))]


def join_products(products: list[StackedProduct]) -> StackedProduct:
    return StackedProduct(
        torch.cat([product.weight for product in products]), torch.cat([product.bias for product in products])
    )


class StackedSegBlock(nn.Module):
    """A folded SegBlock whose norms are of each image: these take out the bias of the first convolution, those of the
    others are added with the shortcut.
    """

    def __init__(self, block: SegBlock):
        super().__init__()
        self.ops, self.first, self.second = block.ops, block.conv1.weight, block.conv2.weight
        self.shortcut = None if isinstance(block.conv_sc, nn.Identity) else block.conv_sc.weight.flatten(1)
        self.bias = block.conv2.bias.detach() + (0 if self.shortcut is None else block.conv_sc.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = self.ops.image_norm(x, has_relu=True)
        h = self.ops.image_norm(F.conv2d(x, self.first, padding=1), has_relu=True)
        h = F.conv2d(h, self.second, padding=1)
        if self.shortcut is None:
            return self.ops.add_statistics(h, x, self.bias)[0]
        return image(self.ops.linear_add([tokens(x)], self.shortcut, self.bias, tokens(h))[0], *h.shape[-2:])
