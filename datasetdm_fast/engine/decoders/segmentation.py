"""Mask decoders: a transformer whose queries attend to the trunk within their own last masks, as in Mask2Former.

It is plain as it is trained, stacked for inference (the same answers up to rounding, from fewer and larger products),
and packed for csrc on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast import _C
from datasetdm_fast.data import AnyCapture
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import MASKS, Decoder, Upscale
from datasetdm_fast.engine.models.blocks import Packed, Packing, is_small
from datasetdm_fast.engine.models.layers import tokens
from datasetdm_fast.errors import Refused
from datasetdm_fast.kernels.mask_embedding import WIDEST
from datasetdm_fast.kernels.mask_head import outside
from datasetdm_fast.kernels.upsample_concat import resize

TEMPERATURE = 10000.0


def sine_position(side: int, channels: int, like: Tensor) -> Tensor:
    """Sines and cosines of the normalised row, then of the column, of each cell [side * side, channels]."""
    half = channels // 2
    place = torch.arange(1, side + 1, dtype=torch.float32, device=like.device) / (side + 1e-6) * 2 * math.pi
    exponent = 2 * (torch.arange(half, dtype=torch.float32, device=like.device) // 2) / half
    angles = place[:, None] / TEMPERATURE**exponent
    waves = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1)  # [side, half]
    rows, columns = waves[:, None].expand(side, side, half), waves[None].expand(side, side, half)
    return torch.cat([rows, columns], 2).flatten(0, 1).to(like.dtype)


class Attention(nn.Module):
    """Multi-head attention with packed input projections."""

    def __init__(self, width: int, heads: int, ops: SimpleNamespace):
        super().__init__()
        self.heads, self.ops = heads, ops
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, blocked: Tensor | None = None) -> Tensor:
        """The answer [B, N, C] of `keys` and `values` [B, S, C] to `queries` [B, N, C]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((queries, keys, values), weights, biases)
        )
        return self.out_proj(self.ops.masked_attention(q, k, v, blocked).transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        super().__init__()
        self.self_attn = Attention(config.width, config.heads, ops)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        placed = content + position
        return self.norm(content + self.self_attn(placed, placed, content))


class CrossAttention(nn.Module):
    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        super().__init__()
        self.multihead_attn = Attention(config.width, config.heads, ops)
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, content: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor, blocked: Tensor
    ) -> Tensor:
        return self.norm(content + self.multihead_attn(content + position, memory + memory_position, memory, blocked))


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.width, config.feed_forward)
        self.linear2 = nn.Linear(config.feed_forward, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, content: Tensor) -> Tensor:
        return self.norm(content + self.linear2(F.relu(self.linear1(content))))


class MaskEmbedding(nn.Module):
    """Three linear layers with ReLU between, from a query to the mask features' channels."""

    def __init__(self, width: int, mask_dim: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, mask_dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


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

    def __init__(self, decoder: SegmentationDecoder):
        self.ops, self.level_embed = decoder.ops, decoder.level_embed.weight
        self.norm, self.class_embed = decoder.decoder_norm, decoder.class_embed
        self.mask_layers = list(decoder.mask_embed.layers)
        self.layers, shares = [], []
        for cross, itself, feed in zip(
            decoder.transformer_cross_attention_layers,
            decoder.transformer_self_attention_layers,
            decoder.transformer_ffn_layers,
        ):
            q, _, _ = products_of(cross.multihead_attn)
            own_q, own_k, own_v = products_of(itself.self_attn)
            bias = torch.cat([torch.zeros_like(own_q.bias), torch.zeros_like(own_k.bias), own_v.bias])
            packed = StackedProduct(itself.self_attn.in_proj_weight, bias)
            self.layers.append(StackedLayer(StackedProduct(q.weight), packed, cross, itself, feed))
            shares += [q, own_q, own_k]
        self.positions = join_products(shares)  # of all layers, from the positions of the queries
        count = min(len(self.level_embed), len(self.layers))  # the levels that are read
        products = [products_of(layer.cross.multihead_attn) for layer in self.layers]
        self.keys, self.memory = [], []
        for level in range(count):
            _, keys, values = map(join_products, zip(*products[level::count]))  # of all layers that read the level
            bias = torch.cat([torch.zeros_like(keys.bias), values(self.level_embed[level])])
            self.keys.append(keys)
            self.memory.append(StackedProduct(torch.cat([keys.weight, values.weight]), bias))
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
            logits = self.ops.mask_head(self.embed_masks(content), features[level], features[level].shape[-1])
            cross, itself, feed = layer.cross, layer.itself, layer.feed
            answer = self.ops.query_attention(
                layer.query(content),
                keys,
                values,
                cross.multihead_attn.heads,
                place_q,
                shares[level][:, start:last],
                logits.flatten(2),
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


def products_of(attention: Any) -> list[StackedProduct]:
    """The products of queries, keys and values of a transformer.Attention."""
    return list(map(StackedProduct, attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)))


def join_products(products: Iterable[StackedProduct]) -> StackedProduct:
    weights, biases = zip(*products)
    return StackedProduct(torch.cat(weights), torch.cat(biases))


class PackedTransformer(Packed):
    """The result of `stacked`, in one call of csrc up to the masks themselves."""

    def __init__(self, stacked: StackedTransformer):
        self.stacked = stacked
        self.features, self.logits = len(stacked.mask_layers[-1].weight), len(stacked.class_embed.weight)

    def pack(self, packing: Packing) -> _C.QueryTransformer:
        stacked, linear, layers = self.stacked, packing.linear, []
        for layer in stacked.layers:
            cross, itself, feed = layer.cross, layer.itself, layer.feed
            around = cross.multihead_attn.out_proj, layer.packed, itself.self_attn.out_proj
            parts: list[Any] = list(map(linear, (layer.query, *around, feed.linear1, feed.linear2)))
            layers.append(_C.QueryLayer(*parts, *map(packing.norm, (cross.norm, itself.norm, feed.norm))))
        return _C.QueryTransformer(
            layers,
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


MEMORY = (20 / 64, 40 / 64, 80 / 64)  # sides of the memory levels, in sides of the highest captured level


class SegmentationDecoder(Decoder):
    """`pred_logits` [B, N, K + 1], `pred_masks` [B, N, m, m], and with word heads `token_attention` [B, T, h, w]."""

    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        width, layers = config.width, range(config.layers)
        mixes = {"mid": (2 * width, width), "high": (2 * width, width), "highest": (2 * width, config.mask_dim)}
        super().__init__(config, ops, mixes)
        self.upscale = Upscale(config.mask_dim, config.mask_dim, config.upscale) if config.upscale else None
        self.query_feat = nn.Embedding(config.queries, width)
        self.query_embed = nn.Embedding(config.queries, width)
        self.level_embed = nn.Embedding(len(MEMORY), width)
        self.transformer_cross_attention_layers = nn.ModuleList([CrossAttention(config, ops) for _ in layers])
        self.transformer_self_attention_layers = nn.ModuleList([SelfAttention(config, ops) for _ in layers])
        self.transformer_ffn_layers = nn.ModuleList([FeedForward(config) for _ in layers])
        self.decoder_norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, config.logits)
        self.mask_embed = MaskEmbedding(width, config.mask_dim)
        self.stacked: StackedTransformer | PackedTransformer | None = None  # for inference

    def forward(
        self, capture: AnyCapture, text: Tensor | None = None, auxiliary: bool = False
    ) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """The last layer's outputs; `auxiliary` adds those of every earlier layer as the list `aux`, for training."""
        memory, mask_features = self.decode_pixels(capture)
        content, position = self.make_queries(mask_features.shape[0], text)
        outputs = self.decode_queries(content, position, memory, mask_features, auxiliary)
        return {**outputs, "token_attention": self.token_attention(capture)} if self.config.word_heads else outputs

    def decode_pixels(self, capture: AnyCapture) -> tuple[list[Tensor], Tensor]:
        """Three memory levels [B, C, m_i, m_i] and the mask features [B, D, m, m]."""
        side = capture.side
        low = resize(self.lowest(capture), side // 2)
        mid = resize(self.mix(capture, "mid", low, side // 2), side)
        high = self.mix(capture, "high", mid, side)
        highest = self.mix(capture, "highest", high, side)
        memory = [resize(x, round(side * share)) for x, share in zip((low, mid, high), MEMORY)]
        return memory, self.upscale(highest) if self.upscale else resize(highest, round(side * MASKS))

    def make_queries(self, batch: int, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """Content and position [B, N, C] of the queries."""
        return self.query_feat.weight.expand(batch, -1, -1), self.query_embed.weight.expand(batch, -1, -1)

    def decode_queries(
        self, content: Tensor, position: Tensor, memory: list[Tensor], mask_features: Tensor, auxiliary: bool
    ) -> dict[str, Any]:
        """The outputs after all layers, with masked attention (equation 2 of arXiv 2112.01527)."""
        if self.stacked is not None and not auxiliary:
            return self.stacked(content, position, memory, mask_features)
        levels = [
            (x.flatten(2).transpose(1, 2) + level, sine_position(x.shape[-1], x.shape[1], x), x.shape[-1])
            for x, level in zip(memory, self.level_embed.weight)
        ]
        earlier = []
        pairs = zip(self.transformer_cross_attention_layers, self.transformer_self_attention_layers)
        for i, ((cross, itself), feed) in enumerate(zip(pairs, self.transformer_ffn_layers)):
            tokens, token_position, side = levels[i % len(levels)]
            if auxiliary:
                earlier.append(self.predict(content, mask_features))
                blocked = outside(resize(earlier[-1]["pred_masks"].detach(), side))
            else:
                embedded = self.mask_embed(self.decoder_norm(content))
                blocked = self.ops.mask_head(embedded, mask_features, side, is_blocking=True)
            content = cross(content, position, tokens, token_position, blocked.flatten(2))
            content = feed(itself(content, position))
        last = self.predict(content, mask_features)
        return {**last, "aux": earlier} if auxiliary else last

    def stack(self) -> None:
        super().stack()
        if max(self.config.width, self.config.mask_dim) <= WIDEST:
            self.stacked = StackedTransformer(self)

    def pack(self) -> None:
        super().pack()
        attention = self.transformer_cross_attention_layers, self.transformer_self_attention_layers
        of_queries = self.transformer_ffn_layers, self.decoder_norm, self.mask_embed, self.class_embed
        if is_small(nn.ModuleList([*attention, *of_queries])):
            self.stacked = PackedTransformer(StackedTransformer(self))

    def predict(self, content: Tensor, mask_features: Tensor) -> dict[str, Tensor]:
        normed = self.decoder_norm(content)
        masks = self.ops.mask_head(self.mask_embed(normed), mask_features, mask_features.shape[-1])
        return {"pred_logits": self.class_embed(normed), "pred_masks": masks}


class OpenVocabularyDecoder(SegmentationDecoder):
    """A decoder of masks for words given at run time, as class embeddings in `text`.

    With `text` [B, D], one word for each image, these are `pred_logits` [B, N, 3] and `pred_masks` [B, N, m, m];
    with `text` [B, K, D], K words for each, [B, K, N, 3] and [B, K, N, m, m], and the trunk is computed once.
    """

    def __init__(self, config: DecoderConfig, ops: SimpleNamespace):
        super().__init__(config, ops)
        # Upstream feeds each layer what the other's name promises; the checkpoints keep it so.
        self.query_feat_mlp = nn.Linear(config.width + config.text_width, config.width, bias=False)
        self.query_embed_mlp = nn.Linear(config.width + config.text_width, config.width, bias=False)
        if config.text_centre:
            self.register_buffer("text_mean", torch.zeros(config.text_width))
            self.register_buffer("text_gain", torch.ones(()))

    def fit_text_centre(self, words: Tensor) -> None:
        """Centres and scales text by the embeddings [K, D] of the words to tell apart; a single one changes nothing."""
        if (words == words[0]).all():
            return
        self.text_mean.copy_(words.mean(0))
        self.text_gain.copy_(1 / (words - words.mean(0)).std())

    def forward(
        self, capture: AnyCapture, text: Tensor | None = None, auxiliary: bool = False
    ) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        batch = capture.batch
        text = self.check_text(text, batch)
        memory, mask_features = self.decode_pixels(capture)
        words = 1 if text.ndim == 2 else text.shape[1]
        content, position = self.make_queries(batch * words, text.reshape(batch * words, -1))
        memory = [x.repeat_interleave(words, 0) for x in memory]
        outputs = self.decode_queries(content, position, memory, mask_features.repeat_interleave(words, 0), auxiliary)
        return outputs if text.ndim == 2 else split_by_image(outputs, batch)

    def check_text(self, text: Tensor | None, batch: int) -> Tensor:
        """The text, which is refused where it is no class embeddings of so many images."""
        width = self.config.text_width
        if text is None or text.ndim not in (2, 3) or text.shape[0] != batch or text.shape[-1] != width:
            received = "nothing" if text is None else f"shape {list(text.shape)}"
            raise Refused(
                f"open-vocabulary decoder: text is {received}, expected class embeddings [{batch}, {width}] or "
                f"[{batch}, K, {width}]",
                "Pass the text encoder's embeddings of the class words as text.",
            )
        return text

    def make_queries(self, batch: int, text: Tensor | None) -> tuple[Tensor, Tensor]:
        assert text is not None
        content, position = super().make_queries(batch, None)
        if self.config.text_centre:
            text = (text - self.text_mean) * self.text_gain
        words = text.to(content.dtype)[:, None].expand(-1, content.shape[1], -1)
        content, position = (torch.cat([queries, words], 2) for queries in (content, position))
        return self.query_embed_mlp(content), self.query_feat_mlp(position)


def split_by_image(outputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """Outputs [B * K, ...] as [B, K, ...]."""
    return {
        name: [split_by_image(output, batch) for output in value] if name == "aux" else value.unflatten(0, (batch, -1))
        for name, value in outputs.items()
    }
