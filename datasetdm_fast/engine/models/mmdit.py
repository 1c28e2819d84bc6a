"""The transformer of every family whose image and text tokens attend to one another (MM-DiT), as mmdit_plans.py says
what it is made of: a stream has one packed product for queries, keys and values, a branch is added where the next norm
reads the sum, and the vectors of all norms come from one product.

Image tokens come first throughout: attention does not see their order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.data import Text
from datasetdm_fast.engine.backbones.mmdit_plans import PADDED_TOKENS, BlockPlan, JointPlan, StreamPlan
from datasetdm_fast.engine.models.capture import CallReader
from datasetdm_fast.engine.models.layers import Linear, Weights, frozen, join_heads
from datasetdm_fast.engine.models.unet import make_waves

Vectors = Mapping[str, Tensor]  # scales, shifts and gates [R or 1, D] of the norms of a stream


class Tokens(NamedTuple):
    """A stream between layers [R, S, D]: the last branch is not added yet."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    branch_weight: Tensor | None = None  # of an RMS norm of the branch

    def total(self, eps: float) -> Tensor:
        branch = self.branch
        if branch is None:
            return self.x
        if self.branch_weight is not None:
            branch = F.rms_norm(branch, self.branch_weight.shape, self.branch_weight, eps)
        return self.x + branch if self.gate is None else torch.addcmul(self.x, branch, self.gate[:, None])


def find_weight(weights: Weights, name: str) -> nn.Parameter | None:
    return frozen(weights[name]) if name and name in weights else None


class HeadProjection(nn.Module):
    """The packed product of queries, keys and values, and the weights of the RMS norms of their heads, if any."""

    def __init__(self, weights: Weights, names: Sequence[str], norms: Sequence[str]):
        super().__init__()
        self.packed = Linear(*(weights / name for name in names))
        self.rows = len(self.packed.weight)  # without appended ones
        self.query, self.key = (find_weight(weights, f"{name}.weight") for name in norms)

    def append(self, rows: Tensor) -> None:
        """Multiplies `rows` [F, D], too, where a call is read, in place of any that an interrupted call appended."""
        linear, weight, bias = self.packed, self.packed.weight[: self.rows], self.packed.bias
        linear.weight = nn.Parameter(torch.cat([weight, rows.to(weight)]), requires_grad=False)
        if bias is not None:
            zeros = bias.new_zeros(len(rows))
            linear.bias = nn.Parameter(torch.cat([bias[: self.rows], zeros]), requires_grad=False)

    def forward(self, tokens: Tensor, images: int = 0) -> tuple[Tensor, Tensor]:
        """The packed product, and that of the last `images` rows with the appended weights."""
        weight, bias, rows = self.packed.weight, self.packed.bias, slice(self.rows)
        if images == tokens.shape[0]:
            both = F.linear(tokens, weight, bias)
            return both, both[..., self.rows :]
        product = F.linear(tokens, weight[rows], None if bias is None else bias[rows])
        return product, F.linear(tokens[-images:], weight[self.rows :]) if images else product[..., :0]


class TokenStream(nn.Module):
    """The layers of one stream of a block."""

    def __init__(self, weights: Weights, plan: StreamPlan, whole: JointPlan, ops: SimpleNamespace):
        super().__init__()
        self.vectors, self.is_gated, self.eps, self.ops = plan.vectors, plan.is_gated, whole.eps, ops
        self.modulation, self.attended = plan.modulation, 3 * whole.heads * whole.width
        self.qkv = HeadProjection(weights, plan.qkv, plan.norms)
        self.before, self.before_fed = (find_weight(weights, f"{name}.weight") for name in plan.before)
        self.after, self.after_fed = (find_weight(weights, f"{name}.weight") for name in plan.after)
        self.out = Linear(weights / plan.out) if plan.out else None
        self.wide = Linear(*(weights / name for name in plan.wide)) if plan.wide else None
        self.narrow = Linear(weights / plan.narrow) if plan.narrow else None
        self.second = self.second_out = None
        if plan.second:
            self.second = HeadProjection(weights, plan.second, ("attn2.norm_q", "attn2.norm_k"))
            self.second_out = Linear(weights / "attn2.to_out.0")

    def norm(self, tokens: Tokens, vectors: Vectors, number: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of the tokens, and its norm."""
        scale, shift = vectors.get(f"scale{number}"), vectors.get(f"shift{number}")
        x, normed = self.ops.ada_norm(*tokens, scale, shift, weight, self.eps)
        return x, normed

    def activate(self, x: Tensor) -> Tensor:
        return self.ops.geglu(x, True) if self.is_gated else F.gelu(x, approximate="tanh")

    def feed(self, tokens: Tokens, product: Tensor, vectors: Vectors) -> Tokens:
        """The stream after its feed-forward layers, which read the sum with the attention, or what the block read."""
        assert self.narrow is not None and tokens.branch is not None
        if self.wide is None:
            fed = self.activate(product[..., self.attended : self.qkv.rows])
            return tokens._replace(branch=self.narrow.add_to(tokens.branch, fed))
        x, normed = self.norm(tokens, vectors, 2, self.before_fed)
        return Tokens(x, self.narrow(self.activate(self.wide(normed))), vectors.get("gate2"), self.after_fed)


class JointBlock(nn.Module):
    """Streams that attend to one another: image and text, or one of both."""

    def __init__(self, weights: Weights, plan: BlockPlan, whole: JointPlan, ops: SimpleNamespace):
        super().__init__()
        self.plan, self.ops, self.sizes = plan, ops, (whole.heads, whole.width, whole.head_eps)
        self.streams = nn.ModuleList(TokenStream(weights / plan.prefix, stream, whole, ops) for stream in plan.streams)

    def split(
        self, products: Sequence[Tensor], layers: Sequence[HeadProjection], turns: Tensor | None
    ) -> Sequence[Tensor]:
        """Queries, keys and values [R, heads, N, d] of packed products."""
        norms = [(layer.query, layer.key) for layer in layers]
        joint: Tensor = self.ops.joint_qkv(products, norms, turns, *self.sizes)
        return joint.permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, qkv: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        if mask is None:
            return join_heads(self.ops.attention(*qkv))
        return join_heads(F.scaled_dot_product_attention(*qkv, attn_mask=mask))

    def forward(
        self,
        parts: Sequence[Tokens],
        vectors: Sequence[Vectors],
        turns: Tensor | None,
        mask: Tensor | None,
        number: int = 0,
        reader: CallReader | None = None,
    ) -> list[Tokens]:
        read = reader if reader is not None and reader.reads(number) else None
        normed = [
            stream.norm(tokens, part, 1, stream.before)
            for stream, tokens, part in zip(self.streams, parts, vectors, strict=True)
        ]
        images = 0 if read is None else read.images
        first, appended = self.streams[0].qkv(normed[0][1], images)
        products = [first, *(stream.qkv(each)[0] for stream, (_, each) in zip(self.streams[1:], normed[1:]))]
        qkv = self.split(products, [stream.qkv for stream in self.streams], turns)
        if read is None:
            attended = self.attend(qkv, mask)
        else:
            whole, sums = self.ops.attention_sums(*qkv, mask)
            read.read(number, normed[0][1], appended, qkv[0], qkv[1], sums, mask)
            attended = join_heads(whole)
        # a product with slices of rows is no single matrix product
        outputs = [part.contiguous() for part in attended.split([x.shape[1] for x, _ in normed], 1)]
        return [
            self._finish(stream, Tokens(x, stream.out(output), part.get("gate1"), stream.after), product, part)
            for stream, (x, _), product, output, part in zip(self.streams, normed, products, outputs, vectors)
            if stream.out is not None
        ]

    def _finish(self, stream: Any, tokens: Tokens, product: Tensor, vectors: Vectors) -> Tokens:
        """With a second attention, which reads the same tokens as the first and is added to it."""
        if stream.second is not None:
            _, normed = stream.norm(Tokens(tokens.x), vectors, 3, stream.before)
            qkv = self.split([stream.second(normed)[0]], [stream.second], None)
            output = stream.second_out(self.attend(qkv, None))
            tokens = Tokens(tokens.total(stream.eps), output, vectors["gate3"])
        return stream.feed(tokens, product, vectors)


class Conditioning(nn.Module):
    """[R or 1, E] what timestep, guidance and pooled texts give to the norms."""

    def __init__(self, weights: Weights, plan: JointPlan):
        super().__init__()
        self.clock = plan.clock
        self.time = nn.ModuleList(Linear(weights / name) for name in plan.time)
        self.guidance = nn.ModuleList(Linear(weights / name) for name in plan.guidance) if plan.guidance else None
        self.pooled = nn.ModuleList(Linear(weights / name) for name in plan.pooled) if plan.pooled else None

    @property
    def reads(self) -> dict[str, int]:
        """The widths of what it reads beside the timestep, 0 of a number."""
        pooled = {} if self.pooled is None else {"pooled": self.pooled[0].weight.shape[1]}
        return pooled if self.guidance is None else pooled | {"guidance": 0}

    def forward(self, timestep: Tensor, text: Text) -> Tensor:
        total = self._embed_number(self.time, self.clock(timestep))
        if self.guidance is not None:
            assert text.guidance is not None
            total = total + self._embed_number(self.guidance, (timestep * 0 + text.guidance) * 1000)
        if self.pooled is None:
            return total
        first, second = self.pooled
        return total + second(F.silu(first(text.pooled)))

    @staticmethod
    def _embed_number(layers: Any, value: Tensor) -> Tensor:
        first, second = layers
        waves = make_waves(value.reshape(1, 1), first.weight.shape[1], 0, True)
        return second(F.silu(first(waves.to(first.weight.dtype))))


def turns_of(places: Tensor, axes: Sequence[int], theta: float) -> Tensor:
    """[R or 1, N, d / 2, 2] cosine and sine by which heads turn at `places` [R or 1, N, axes]."""
    angles = [
        places[..., place, None] / theta ** (torch.arange(0, size, 2, dtype=torch.float64, device=places.device) / size)
        for place, size in enumerate(axes)
    ]
    joined = torch.cat(angles, -1)
    return torch.stack([joined.cos(), joined.sin()], -1).float()


class MMDiT(nn.Module):
    """d latents / d sigma [R, C, h, w] of latents [B, C, h, w] for R texts: B, or first B without the prompt."""

    def __init__(self, config: Any, plan: JointPlan, ops: SimpleNamespace):
        super().__init__()
        weights = Weights(plan.state)
        self.config, self.plan, self.ops = config, plan, ops

        def build(blocks: Sequence[BlockPlan]) -> nn.ModuleList:
            return nn.ModuleList(JointBlock(weights, block, plan, ops) for block in blocks)

        self.image_blocks, self.text_blocks = build(plan.image_blocks), build(plan.text_blocks)
        self.blocks = build(plan.blocks)
        blocks: list[Any] = [*self.image_blocks, *self.text_blocks, *self.blocks]
        every = [stream for block in blocks for stream in block.streams if stream.modulation]
        # streams may share one
        self.modulations = {stream.modulation: len(stream.vectors) * plan.heads * plan.width for stream in every}
        self.vectors = Linear(*(weights / name for name in self.modulations))
        self.conditioning, self.last = Conditioning(weights, plan), Linear(weights / plan.last)
        self.entry, self.exit = Linear(weights / plan.entry), Linear(weights / plan.exit)
        self.text_norm, self.text = find_weight(weights, f"{plan.text_norm}.weight"), Linear(weights / plan.text)
        self.learned = find_weight(weights, plan.learned)
        self.image_padding, self.text_padding = (find_weight(weights, name) for name in plan.padding)
        plan.state.clear()

    def append(self, block: int, rows: Sequence[Tensor]) -> None:
        """Multiplies these rows [F, D] with the tokens of a block, too, where a call is read."""
        self.blocks[block].streams[0].qkv.append(torch.cat(list(rows)))

    def forward(self, latents: Tensor, timestep: Tensor, text: Text, reader: CallReader | None = None) -> Tensor:
        plan, halves = self.plan, text.context.shape[0] // latents.shape[0]
        side = latents.shape[-1] // plan.patch
        image, words, mask, lengths = self._enter(latents, text)
        image = image.repeat(halves, 1, 1)
        count, hidden = image.shape[1], None if mask is None else mask[:, None, None]
        turns = image_turns = text_turns = None
        if plan.places is not None:
            places = plan.places(side, words.shape[1], lengths, latents.device)
            if text.concepts:
                places[:, -text.concepts :] = places[:, count + plan.concept_place, None]
            turns = turns_of(places, plan.axes, plan.theta)
            image_turns, text_turns = turns[:, :count], turns[:, count:]
        embedded = self.conditioning(timestep, text).to(image.dtype)
        vectors = self._vectors(embedded)
        parts = [Tokens(image), Tokens(words)]
        for block in self.image_blocks:
            parts[:1] = block(parts[:1], vectors(block), image_turns, None)
        for block in self.text_blocks:
            parts[1:] = block(parts[1:], vectors(block), text_turns, hidden)
        keys = None if hidden is None else F.pad(hidden, (count, 0), value=True)
        if reader is not None:
            reader.begin = count
        for number, block in enumerate(self.blocks):
            if len(block.streams) < len(parts):
                parts = [Tokens(torch.cat([part.total(plan.eps) for part in parts], 1))]
            parts = block(parts, vectors(block), turns, keys, number, reader)
        last = dict(zip(plan.final, self.last(F.silu(embedded)).chunk(len(plan.final), -1)))
        x = parts[0].total(plan.eps)[:, : side * side]
        _, normed = self.ops.ada_norm(*Tokens(x), last["scale1"], last.get("shift1"), None, plan.last_eps)
        cells = self.exit(normed).mT.unflatten(2, (side, side))
        return F.pixel_shuffle(cells, plan.patch) if plan.patch > 1 else cells

    def _enter(self, latents: Tensor, text: Text) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Tokens [B, S, D] of images and [R, T, D] of texts; which of the latter are read, and how many of a row."""
        patch, side = self.plan.patch, latents.shape[-1] // self.plan.patch
        cells = F.pixel_unshuffle(latents, patch) if patch > 1 else latents
        image, words = self.entry(cells.flatten(2).mT), text.context
        if self.learned is not None:
            largest = math.isqrt(self.learned.shape[1])
            begin = (largest - side) // 2
            grid = self.learned.unflatten(1, (largest, largest))
            image = image + grid[:, begin : begin + side, begin : begin + side].flatten(1, 2)
        if self.text_norm is not None:
            words = F.rms_norm(words, self.text_norm.shape, self.text_norm, self.plan.eps)
        words, mask = self.text(words), text.mask
        if self.image_padding is None or self.text_padding is None:
            return image, words, mask, None
        if more := -image.shape[1] % PADDED_TOKENS:
            padding = self.image_padding.to(image.dtype)
            image = torch.cat([image, padding.expand(image.shape[0], more, -1)], 1)
        more = -words.shape[1] % PADDED_TOKENS
        is_word = words.new_ones(words.shape[:2], dtype=torch.bool) if mask is None else mask
        is_word, words = F.pad(is_word, (0, more)), F.pad(words, (0, 0, 0, more))
        words = torch.where(is_word[..., None], words, self.text_padding.to(words.dtype))
        if mask is None:
            return image, words, None, None
        lengths = mask.sum(1)
        lengths = lengths + -lengths % PADDED_TOKENS
        return image, words, torch.arange(words.shape[1], device=mask.device) < lengths[:, None], lengths

    def _vectors(self, embedded: Tensor) -> Callable[[Any], list[Vectors]]:
        """What gives the vectors of the streams of a block."""
        widths, is_bounded = list(self.modulations.values()), self.plan.is_bounded
        joined = self.vectors(embedded if is_bounded else F.silu(embedded))
        parts = dict(zip(self.modulations, joined.split(widths, -1)))
        gates = dict(zip(self.modulations, joined.tanh().split(widths, -1))) if is_bounded else parts

        def of_stream(stream: Any) -> Vectors:
            named = {}
            for place, name in enumerate(stream.vectors):
                whole = (gates if name.startswith("gate") else parts)[stream.modulation]
                named[name] = whole.chunk(len(stream.vectors), -1)[place]
            return named

        return lambda block: [of_stream(stream) for stream in block.streams]
