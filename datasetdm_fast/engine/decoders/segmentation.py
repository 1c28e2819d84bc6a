"""Mask decoders: a transformer whose queries attend to the trunk within their own last masks, as in Mask2Former."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.data import AnyCapture
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.transformer import (
    CrossAttention,
    FeedForward,
    MaskEmbedding,
    PackedTransformer,
    SelfAttention,
    StackedTransformer,
    sine_position,
)
from datasetdm_fast.engine.decoders.trunk import MASKS, Decoder, Upscale
from datasetdm_fast.engine.models.blocks import is_small
from datasetdm_fast.errors import Refused
from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.kernels.mask_embedding import WIDEST
from datasetdm_fast.kernels.mask_head import outside

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
            self.stacked = self._stack_layers()

    def pack(self) -> None:
        super().pack()
        if is_small(nn.ModuleList(sum(self._transformer(), ()))):
            self.stacked = PackedTransformer(self._stack_layers())

    def _stack_layers(self) -> StackedTransformer:
        layers, (norm, mask_embed, class_embed) = self._transformer()
        return StackedTransformer(list(zip(*layers)), self.level_embed.weight, norm, mask_embed, class_embed, self.ops)

    def _transformer(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The layers by kind, and what makes outputs of the queries."""
        attention = self.transformer_cross_attention_layers, self.transformer_self_attention_layers
        return (*attention, self.transformer_ffn_layers), (self.decoder_norm, self.mask_embed, self.class_embed)

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
        width = self.config.text_width
        if text is None or text.ndim not in (2, 3) or text.shape[0] != batch or text.shape[-1] != width:
            received = "nothing" if text is None else f"shape {list(text.shape)}"
            raise Refused(
                f"open-vocabulary decoder: text is {received}, expected class embeddings [{batch}, {width}] or "
                f"[{batch}, K, {width}]",
                "Pass the text encoder's embeddings of the class words as text.",
            )
        memory, mask_features = self.decode_pixels(capture)
        words = 1 if text.ndim == 2 else text.shape[1]
        content, position = self.make_queries(batch * words, text.reshape(batch * words, -1))
        memory = [x.repeat_interleave(words, 0) for x in memory]
        outputs = self.decode_queries(content, position, memory, mask_features.repeat_interleave(words, 0), auxiliary)
        return outputs if text.ndim == 2 else split_by_image(outputs, batch)

    def make_queries(self, batch: int, text: Tensor | None) -> tuple[Tensor, Tensor]:
        assert text is not None
        content, position = super().make_queries(batch, None)
        if self.config.text_centre:
            text = (text - self.text_mean) * self.text_gain
        words = text.to(content.dtype)[:, None].expand(-1, content.shape[1], -1)
        return self.query_embed_mlp(torch.cat([content, words], 2)), self.query_feat_mlp(
            torch.cat([position, words], 2)
        )


def split_by_image(outputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """Outputs [B * K, ...] as [B, K, ...]."""
    return {
        name: [split_by_image(output, batch) for output in value] if name == "aux" else value.unflatten(0, (batch, -1))
        for name, value in outputs.items()
    }
