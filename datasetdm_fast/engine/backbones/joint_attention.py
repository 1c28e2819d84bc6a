"""What is alike in the references of families whose image and text tokens attend to one another: packed latents, the
captures, and words as further tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from datasetdm_fast.data import AttentionSums, Capture, Text
from datasetdm_fast.engine.backbones import LoadedModel
from datasetdm_fast.engine.backbones.latent_space import AutoencoderReference


def pack(latents: Tensor) -> Tensor:
    """[B, S, 4C]: a token for 2 x 2 cells of latents [B, C, h, w]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: Tensor, side: int) -> Tensor:
    """[B, C, h, w] of `side` cells: the latents of packed tokens."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (side // 2, side // 2)), 2)


def grid(side: int, columns: int, device: torch.device) -> Tensor:
    """[side * side, columns] positions of the tokens of an image: row and column in the second and third, else 0."""
    positions = torch.zeros(side, side, columns, device=device)
    positions[..., 1], positions[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    return positions.flatten(0, 1)


class AttentionReader(TorchFunctionMode):
    """Keeps the input of some attentions and the probabilities that they give to text, of the last `images` rows; it
    sees the queries and keys that the library hands to the product, rotated and normalised as they are.
    """

    def __init__(self, attentions: Sequence[nn.Module]):
        super().__init__()
        self.attentions = attentions
        self.images, self.image, self.text = 0, slice(0), slice(0)  # rows, and places of the tokens in the attention
        self.inputs: dict[nn.Module, Tensor] = {}
        self.maps: dict[nn.Module, Tensor] = {}
        self._running: nn.Module | None = None

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
        cells = self.image.stop - self.image.start
        self.inputs[module] = hidden[-self.images :] if hidden.shape[1] == cells else hidden[-self.images :, self.image]
        self._running = module

    def _end(self, *_: Any) -> None:
        self._running = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._running is not None and function is F.scaled_dot_product_attention:
            self.maps[self._running] = self._image_to_text(*args, **kwargs or {})
        return function(*args, **kwargs or {})

    def _image_to_text(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """[B, heads, S, T] the share of its attention that each cell gives to each token of the text."""
        query, key = query[-self.images :, :, self.image], key[-self.images :]
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if attn_mask is not None:
            mask = attn_mask[-self.images :]
            mask = mask[:, :, self.image] if mask.shape[2] > 1 else mask  # of every query, or one for all
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1)[..., self.text].clone()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block the attentions are read."""
        hooks = [attention.register_forward_pre_hook(self._begin, with_kwargs=True) for attention in self.attentions]
        hooks += [attention.register_forward_hook(self._end) for attention in self.attentions]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


class JointReference(AutoencoderReference):
    """See BackboneReference; a family adds how its prompts are encoded and how its network is called."""

    def __init__(self, model: LoadedModel):
        self.model = model
        self.clean: Tensor | None = None  # the image that the last read call points to, in cells of 8 pixels
        self._reader: AttentionReader | None = None

    @cached_property
    def network(self) -> nn.Module:
        return self.model.modules["transformer"]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def attentions(self) -> list[nn.Module]:
        """The joint attention of every block, in order: those of two streams, then those of a single one."""
        network = self.network
        blocks = *network.transformer_blocks, *getattr(network, "single_transformer_blocks", ())
        return [block.attn for block in blocks]

    def places(self, cells: int, text: int) -> tuple[slice, slice]:
        """Where the tokens of image and text lie in the attention."""
        return slice(text, text + cells), slice(0, text)

    def call(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        """[R, C, h, w] the network's output for as many rows of latents as of text, d latents / d sigma."""
        raise NotImplementedError

    def guide(self, output: Tensor, guidance: float) -> Tensor:
        """The rows of a call with classifier-free guidance as they are; a family that does not guide by uncond + g
        (cond - uncond) returns the guided ones.
        """
        return output

    def cells(self, latents: Tensor) -> Tensor:
        """The latents in cells of 8 pixels."""
        return latents

    def predict(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        if self._reader is not None:
            side = self.model.levels[0].side
            self._reader.images = len(latents)
            self._reader.image, self._reader.text = self.places(side * side, text.context.shape[1])
        halves = len(text) // len(latents)
        output = self.call(latents.repeat(halves, 1, 1, 1), timestep, text)
        if self._reader is not None:
            self.clean = self.cells(latents - timestep / 1000 * output[-len(latents) :])
        return output if halves == 1 or text.guidance is None else self.guide(output, text.guidance)

    @contextmanager
    def reading(self, reader: AttentionReader) -> Iterator[None]:
        """Within the block calls are read by it."""
        self._reader = reader
        try:
            with reader.reading():
                yield
        finally:
            self._reader = None

    @contextmanager
    def capturing(self) -> Iterator[list[Capture]]:
        attentions = self.attentions()
        levels = [[attentions[block] for block in level.blocks] for level in self.model.levels[:-1]]
        captures: list[Capture] = []
        reader = AttentionReader([*dict.fromkeys(attention for level in levels for attention in level)])
        with self.reading(reader):
            yield captures
        captures.append(self._capture(reader, levels))

    def _capture(self, reader: AttentionReader, levels: Sequence[Sequence[nn.Module]]) -> Capture:
        tokens, side = self.model.levels[0].tokens, self.model.levels[0].side

        def pad(maps: Tensor) -> Tensor:
            return F.pad(maps, (0, tokens - maps.shape[-1]))[..., :tokens]

        features = [
            tuple(reader.inputs[attention].mT.unflatten(2, (side, side)) for attention in level) for level in levels
        ]
        maps = [tuple(pad(reader.maps[attention]) for attention in level) for level in levels]
        assert self.clean is not None
        return Capture((*features, (self.clean,)), (*maps, ()))

    def predict_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        """The output of `predict`, and the sums with the share of attention that each cell gives to each token of the
        prompt in this call, a mean over heads and blocks (Seg4Diff, Kim et al. 2025); or with the shares of concepts
        in each cell, where the class text holds these (see ConceptReader).
        """
        if class_text.concepts:
            cells, count = self.model.levels[0].side ** 2, text.context.shape[1]
            joined = with_concepts(text, class_text)
            image, whole = self.places(cells, joined.context.shape[1])
            concepts = slice(whole.start + count, whole.stop)
            with ConceptReader(self.model.defaults.attention.concept_blocks, len(latents), image, concepts) as read:
                output = self.predict(latents, timestep, joined)
            return output, AttentionSums(sums.cells, sums.tokens + read.maps)
        attentions = self.attentions()
        read = [attentions[block] for block in self.model.defaults.attention.blocks]
        reader = AttentionReader(read)
        with self.reading(reader):
            output = self.predict(latents, timestep, text)
        maps = torch.stack([reader.maps[attention].mean(1) for attention in read]).mean(0)
        return output, AttentionSums(sums.cells, sums.tokens + F.pad(maps, (0, sums.tokens.shape[2] - maps.shape[2])))


def with_concepts(text: Text, concepts: Text) -> Text:
    """The rows of text with an image's words [B, K, D] after them, in every half of a call."""
    rows = concepts.context.repeat(len(text) // len(concepts), 1, 1)
    mask = None if text.mask is None else F.pad(text.mask, (0, rows.shape[1]), value=True)
    return replace(text, context=torch.cat([text.context, rows], 1), mask=mask, concepts=rows.shape[1])


class ConceptReader(TorchFunctionMode):
    """Within this mode the words at the end of the text are concepts, in every attention over image and text: those of
    a call in the order of its blocks. `maps` [B, S, K] are the shares of the words in each cell, a mean over `blocks`.

    ConceptAttention (Helbling et al. 2025): a word attends to the image and to the other words, and nothing attends to
    it, so the image stays the same. How much a cell shows a word is the product of their attention's outputs.
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
        mask = None if self.drops_mask else named.get("attn_mask")
        if mask is not None:
            mask = torch.cat([mask[..., :start], mask[..., stop:]], -1)
            if mask.shape[2] > 1:  # of every query
                mask = torch.cat([mask[:, :, :start], mask[:, :, stop:]], 2)
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
