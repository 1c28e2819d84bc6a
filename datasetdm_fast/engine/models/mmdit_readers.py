"""What reads some attentions of a call of MMDiT: every token and share, or what the decoders make of them."""

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.data import Capture
from datasetdm_fast.engine.models.capture import Projection
from datasetdm_fast.kernels.attention_shares import shares
from datasetdm_fast.stages import Level


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
                total = ops.attention_shares(query, *texts, weight[:, :count]) + part
                sums[level] = sums[level] + total if level in sums else total

        super().__init__(slots, images, cells, project)
        self.projection, self.sums = projection, sums

    def level_sums(self, clean: Tensor) -> dict[int, Tensor]:
        """The sums [B, F, h, w] of each level that is read, that of the image which the call points to among them."""
        sides, last = self.projection.sides, len(self.projection.sides) - 1
        if self.projection.widths[last]:
            self.sums[last] = clean.flatten(2).mT @ self.projection.features[last][0][0]
        return {level: total.mT.unflatten(2, (sides[level], sides[level])) for level, total in self.sums.items()}
