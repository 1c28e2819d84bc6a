"""Capture hooks: nothing, every feature and map, what the decoders make of them, or averages of the attention;
the last classes read the attention of an MMDiT.

A decoder's first layer is a 1x1 convolution over a level, which commutes with resizing: each tensor is multiplied by
its slice of the weight and added to the level's sum, so that the concatenated level never exists.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.data import AttentionSums, Capture
from datasetdm_fast.engine.models.layers import frozen, tokens
from datasetdm_fast.kernels.attention import probabilities
from datasetdm_fast.kernels.attention_shares import shares
from datasetdm_fast.stages import Level

Slot = tuple[int, int]  # level, place within it


class AttentionSlot(NamedTuple):
    """An attention layer, by the map that it is part of: the mean over the blocks of a transformer."""

    level: int
    place: int  # of the map within its level
    block: int = 0
    blocks: int = 1  # of the transformer


@dataclass(eq=False)
class CaptureHook:
    """What reads along in a UNet call; this one reads nothing, as in every call but the captured one."""

    ops: SimpleNamespace

    def feature(self, slot: Slot, x: Tensor) -> None:
        """Reads the output [R, C, h, w] that is the feature `slot`."""

    def attend(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output [R, heads, S, d] of that cross-attention."""
        self.on_queries(slot, q, k)
        return self.ops.attention(q, k, v)

    def on_queries(self, slot: AttentionSlot, q: Tensor, k: Tensor) -> None:
        """Reads the queries and keys of that cross-attention where its output is already known."""

    def attend_self(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of that layer's self-attention [R or, before the halves differ, B, heads, S, d]."""
        return self.ops.attention(q, k, v)

    def reads_self(self, cells: int) -> bool:
        """Whether it reads self-attention over so many cells, whoever computes its output."""
        return False


class KeptFeature(CaptureHook):
    """Keeps one feature [R, C, h, w]."""

    def __init__(self, slot: Slot, ops: SimpleNamespace):
        super().__init__(ops)
        self.slot = slot
        self.value: Tensor | None = None

    def feature(self, slot: Slot, x: Tensor) -> None:
        if slot == self.slot:
            self.value = x


class RawCapture(CaptureHook):
    """Keeps every feature and map as the reference engine does, of a call of so many rows an image: of the features the
    last ones that a level reads, of the maps the last one, which sees the prompt.
    """

    def __init__(self, levels: Sequence[Level], ops: SimpleNamespace, rows: int = 2):
        super().__init__(ops)
        self.levels, self.rows = levels, rows
        self.features: dict[Slot, Tensor] = {}
        self.maps: dict[Slot, Tensor] = {}

    def feature(self, slot: Slot, x: Tensor) -> None:
        self.features[slot] = torch.cat(x.chunk(self.rows)[-self.levels[slot[0]].halves :], 1)

    def on_queries(self, slot: AttentionSlot, q: Tensor, k: Tensor) -> None:
        self.add_map(slot, probabilities(q.chunk(self.rows)[-1], k.chunk(self.rows)[-1]))

    def add_map(self, slot: AttentionSlot, maps: Tensor) -> None:
        part, place = maps if slot.blocks == 1 else maps * (1 / slot.blocks), (slot.level, slot.place)
        self.maps[place] = self.maps[place] + part if slot.block else part

    def result(self) -> Capture:
        def order_values(values: Mapping[Slot, Tensor], counts: Sequence[int]) -> tuple[tuple[Tensor, ...], ...]:
            return tuple(
                tuple(values[level, place].float() for place in range(count)) for level, count in enumerate(counts)
            )

        features = order_values(self.features, [len(level.features) for level in self.levels])
        return Capture(features, order_values(self.maps, [len(level.heads) for level in self.levels]))


class Projection(nn.Module):
    """The first layers of all decoders, stacked along their outputs, as one matrix per captured tensor: held where they
    are few, else put together of the decoders' own weights whenever one is read.
    """

    def __init__(self, levels: Sequence[Level], decoders: Mapping[str, Any], *, largest_held: float = math.inf):
        super().__init__()
        # which of the sums are a task's own, per level
        self.tasks: dict[str, tuple[slice, ...]] = dict.fromkeys(decoders, ())
        read = [decoder.projections() for decoder in decoders.values()]
        is_held = sum(weight.numel() for named in read for weight in named.values()) <= largest_held
        self.features, self.maps, self.widths = nn.ModuleList(), nn.ModuleList(), []
        self.levels, self.sides = tuple(levels), [level.side for level in levels]
        for level in levels:
            empty = torch.zeros(0, level.channels)
            weights = [named.get(level.name, empty).flatten(1).cpu() for named in read]
            stops = list(accumulate(map(len, weights), initial=0))
            for task, start, stop in zip(decoders, stops, stops[1:]):
                self.tasks[task] += (slice(start, stop),)
            self.widths.append(stops[-1])
            rows = [level.halves] * len(level.features) + list(level.heads)
            widths = [level.halves * channels for channels in level.features]
            widths += [heads * level.tokens for heads in level.heads]
            parts = list(zip(*(weight.split(widths, 1) for weight in (empty, *weights))))
            matrices = [
                [part.unflatten(1, (count, -1)).permute(1, 2, 0) for part in row] for count, row in zip(rows, parts)
            ]
            count = len(level.features)
            # [halves, C, F], a matrix for each half of a call, and [heads, T, F]
            for stacked, several in ((self.features, matrices[:count]), (self.maps, matrices[count:])):
                held = (frozen(torch.cat(parts, -1)) for parts in several)
                stacked.append(nn.ParameterList(held) if is_held else _ReadAtNeed(several))


class _ReadAtNeed(nn.Module):
    """Matrices that are concatenated each time one is read."""

    def __init__(self, parts: Sequence[Sequence[Tensor]]):
        super().__init__()
        self._parts = parts

    def __getitem__(self, place: int) -> Tensor:
        return torch.cat(self._parts[place], -1)


class ProjectedSums(CaptureHook):
    """Keeps the level sums of a Projection, in fp32 whatever the arithmetic."""

    def __init__(self, projection: Projection, latents: Tensor, ops: SimpleNamespace):
        super().__init__(ops)
        self.projection, self.batch = projection, len(latents)
        self.sums = [
            torch.zeros(self.batch * side**2, width, device=latents.device)
            for side, width in zip(projection.sides, projection.widths)
        ]

    def feature(self, slot: Slot, x: Tensor) -> None:
        (level, place), total = slot, self.sums[slot[0]]
        if self.projection.widths[level]:
            matrices = self.projection.features[level][place].to(x.dtype)
            for half, weight in zip(tokens(x).chunk(len(x) // self.batch)[-len(matrices) :], matrices):
                cells = half.flatten(0, 1)
                if total.dtype == cells.dtype:
                    total.addmm_(cells, weight)
                else:
                    total.add_(cells @ weight)

    def attend(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        level, place, _, blocks = slot
        if not self.projection.widths[level]:
            return self.ops.attention(q, k, v)
        weight = self.projection.maps[level][place].to(q.dtype)
        output, projected = self.ops.attention_capture(*(part[-self.batch :] for part in (q, k, v)), weight)
        self.sums[level].add_(projected.flatten(0, 1), alpha=1 / blocks)
        if len(q) == self.batch:
            return output
        return torch.cat([self.ops.attention(*(part[: -self.batch] for part in (q, k, v))), output])

    def on_queries(self, slot: AttentionSlot, q: Tensor, k: Tensor) -> None:
        level, place, _, blocks = slot
        if self.projection.widths[level]:
            maps = probabilities(q[-self.batch :], k[-self.batch :]).transpose(1, 2).flatten(2).flatten(0, 1)
            self.sums[level].addmm_(maps, self.projection.maps[level][place].flatten(0, 1), alpha=1 / blocks)

    def result(self) -> tuple[Tensor, ...]:
        """Per level the sums [B, F, h, w] of all tasks."""
        return tuple(
            total.unflatten(0, (self.batch, side, side)).permute(0, 3, 1, 2)
            for total, side in zip(self.sums, self.projection.sides)
        )


class SummedAttention(CaptureHook):
    """Adds the attention probabilities of the conditional half to running sums: those of every self-attention of one
    side, and at every cross-attention of another those of the same queries over a class prompt, whose values are not
    used. The answers stay those of CaptureHook.
    """

    def __init__(
        self,
        sides: Sequence[int],
        sums: AttentionSums,
        class_keys: Mapping[AttentionSlot, Tensor],
        ops: SimpleNamespace,
    ):
        super().__init__(ops)
        self.cells, self.tokens, self.class_keys = sums.cells, sums.tokens, class_keys
        self.layers = Counter(side**2 for side in sides)  # cells -> how many layers have so many

    def reads_self(self, cells: int) -> bool:
        return cells == self.cells.shape[1]

    def attend_self(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = len(self.cells)
        if q.shape[2] != self.cells.shape[1]:
            return self.ops.attention(q, k, v)
        conditional = (part[-batch:] for part in (q, k, v))
        answer, self.cells = self.ops.attention_average(*conditional, self.cells, 1 / self.layers[q.shape[2]])
        if len(q) == batch:
            return answer
        return torch.cat([self.ops.attention(*(part[:-batch] for part in (q, k, v))), answer])

    def on_queries(self, slot: AttentionSlot, q: Tensor, k: Tensor) -> None:
        if q.shape[2] == self.tokens.shape[1]:
            keys = self.class_keys[slot]
            conditional = q[-len(keys) :]
            _, self.tokens = self.ops.attention_average(
                conditional, keys, keys[..., :0], self.tokens, 1 / self.layers[q.shape[2]]
            )


def slots_read(projection: Projection) -> dict[int, list[tuple[int, int]]]:
    """What the decoders read of each block: level and place."""
    slots: dict[int, list[tuple[int, int]]] = {}
    for number, level in enumerate(projection.levels):
        for place, block in enumerate(level.blocks):
            if projection.widths[number]:
                slots.setdefault(block, []).append((number, place))
    return slots


def append_rows(network: Any, projection: Projection) -> None:
    """Appends the rows by which decoders multiply the tokens of a block to the product of its queries and keys."""
    for block, read in slots_read(projection).items():
        network.append(block, [projection.features[level][place][0].T for level, place in read])


class CallReader:
    """Has `keep` read some attentions of a call: of the last `images` rows, from the cells of the image to the text."""

    def __init__(self, blocks: Iterable[int], images: int, cells: int, keep: Callable[..., None]):
        """`keep` takes a block's number, the tokens [B, S, D], their product with the appended rows [B, S, F], and
        queries, keys, logarithms of sums and mask of the attention to the text.
        """
        self.blocks, self.images, self.cells, self.keep = frozenset(blocks), images, cells, keep
        self.begin = 0  # of the text's tokens, set by the network

    def reads(self, block: int) -> bool:
        return block in self.blocks

    def read(self, block: int, *seen: Tensor | None) -> None:
        """`seen` are the tokens [R, S, D] that the first stream multiplies, the image's first; the product [B, S, F] of
        the last rows with the appended weights; queries and keys [R, heads, N, d] of all tokens; logarithms [R, heads,
        N] of the sums of exponentials; and a mask [R, 1, 1, N], or None.
        """
        parts: list[Any] = [None if part is None else part[-self.images :] for part in seen]
        (tokens, appended, query, key, sums, mask), cells = parts, slice(self.cells)
        text = key[:, :, self.begin :], sums[:, :, cells], None if mask is None else mask[..., self.begin :]
        self.keep(block, tokens[:, cells], appended[:, cells], (query[:, :, cells], *text))


class RawReader(CallReader):
    """Keeps the tokens and every share."""

    def __init__(self, levels: Sequence[Level], images: int, cells: int):
        tokens: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}

        def keep(block: int, seen: Tensor, _: Tensor, attention: tuple[Any, ...]) -> None:
            tokens[block], maps[block] = seen, shares(*attention)

        super().__init__((block for level in levels for block in level.blocks), images, cells, keep)
        self.levels, self.tokens, self.maps = levels, tokens, maps

    def capture(self, clean: Tensor) -> Capture:
        """What the levels read, and the image that the call points to."""
        low, *_ = self.levels
        read = [level.blocks for level in self.levels[:-1]]

        def pad(maps: Tensor) -> Tensor:
            return F.pad(maps, (0, low.tokens - maps.shape[-1]))[..., : low.tokens]

        features = [
            tuple(self.tokens[block].float().mT.unflatten(2, (low.side, low.side)) for block in level) for level in read
        ]
        maps = [tuple(pad(self.maps[block]) for block in level) for level in read]
        return Capture((*features, (clean,)), (*maps, ()))


class ProjectingReader(CallReader):
    """Adds up what the first layers of the decoders make of tokens and attentions: [B, S, F] for each level."""

    def __init__(self, projection: Projection, images: int, cells: int, ops: SimpleNamespace):
        slots = slots_read(projection)
        sums: dict[int, Tensor] = {}

        def project(block: int, tokens: Tensor, appended: Tensor, attention: tuple[Any, ...]) -> None:
            query, key, logarithms, mask = attention
            parts = appended.split([projection.widths[level] for level, _ in slots[block]], -1)
            for (level, place), part in zip(slots[block], parts, strict=True):
                weight = projection.maps[level][place]  # [heads, T, F]
                count = min(weight.shape[1], key.shape[2])
                texts = key[:, :, :count], logarithms, None if mask is None else mask[..., :count]
                total = ops.attention_shares(query, *texts, weight[:, :count]) + part.float()
                sums[level] = sums[level] + total if level in sums else total

        super().__init__(slots, images, cells, project)
        self.projection, self.sums = projection, sums

    def level_sums(self, clean: Tensor) -> dict[int, Tensor]:
        """The sums [B, F, h, w] of each level that is read, that of the image which the call points to among them."""
        sides, last = self.projection.sides, len(self.projection.sides) - 1
        if self.projection.widths[last]:
            self.sums[last] = clean.flatten(2).mT @ self.projection.features[last][0][0]
        return {level: total.mT.unflatten(2, (sides[level], sides[level])) for level, total in self.sums.items()}
