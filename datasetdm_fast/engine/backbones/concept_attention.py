"""Where words lie in an image, also words that its prompt does not name: ConceptAttention (Helbling et al. 2025).

Each word is a further token of the text's stream. It attends to the image and to the other words, and nothing attends
to it, so the image stays the same. How much a cell shows a word is the product of their attention's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from datasetdm_fast.data import Text


def with_concepts(text: Text, concepts: Text) -> Text:
    """The rows of text with an image's words [B, K, D] after them, in every half of a call."""
    rows = concepts.context.repeat(len(text) // len(concepts), 1, 1)
    mask = None if text.mask is None else F.pad(text.mask, (0, rows.shape[1]), value=True)
    return replace(text, context=torch.cat([text.context, rows], 1), mask=mask, concepts=rows.shape[1])


class ConceptReader(TorchFunctionMode):
    """Within this mode the words at the end of the text are concepts, in every attention over image and text: those of
    a call in the order of its blocks. `maps` [B, S, K] are the shares of the words in each cell, a mean over `blocks`.
    """

    def __init__(self, blocks: Sequence[int], images: int, image: slice, concepts: slice, *, drops_mask: bool = False):
        super().__init__()
        self.blocks, self.images, self.image, self.concepts = frozenset(blocks), images, image, concepts
        self.drops_mask = drops_mask  # as it leaves nothing out
        self.length = max(image.stop, concepts.stop)  # of an attention over all tokens
        self.block, self.maps = 0, torch.zeros(())

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **named)
        query, key, value = args[:3] if args else (named[name] for name in ("query", "key", "value"))
        if query.shape[2] != self.length:  # of the image alone
            return function(*args, **named)
        start, stop = self.concepts.start, self.concepts.stop
        others = [torch.cat([part[:, :, :start], part[:, :, stop:]], 2) for part in (query, key, value)]
        mask = None if self.drops_mask else named.get("attn_mask")  # [R, 1, 1, N]
        if mask is not None:
            mask = torch.cat([mask[..., :start], mask[..., stop:]], -1)
        usual = function(*others, attn_mask=mask)
        read = [torch.cat([part[:, :, self.image], part[:, :, start:stop]], 2) for part in (key, value)]
        words = function(query[:, :, start:stop], *read)
        output = torch.cat([usual[:, :, :start], words, usual[:, :, start:]], 2)
        if self.block in self.blocks:
            cells, named_words = (part[-self.images :].float() for part in (output[:, :, self.image], words))
            shares = torch.einsum("bhsd,bhkd->bsk", cells, named_words).softmax(-1)
            self.maps = self.maps + shares / len(self.blocks)
        self.block += 1
        return output
