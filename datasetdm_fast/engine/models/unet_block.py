"""The whole UNet of a small model in one call of csrc: a thread takes its images from the first layer to the last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datasetdm_fast import _C
from datasetdm_fast.engine.models.blocks import LARGEST_BLOCK, Block, Packing, TransformerBlock, blockwise, empty_image
from datasetdm_fast.engine.models.capture import CaptureHook, Slot
from datasetdm_fast.engine.models.layers import split_heads
from datasetdm_fast.engine.models.unet import UNet, double_halves


def has_blocks(config: Mapping[str, Any]) -> bool:
    """Whether csrc has blocks of a UNet: where a pooled text adds to the timestep they are of another kind."""
    return not config.get("addition_embed_type")


def is_narrow(config: Mapping[str, Any]) -> bool:
    """Whether a UNet is one block: its largest layer is a resnet that reads a skip."""
    return has_blocks(config) and 29 * max(config["block_out_channels"]) ** 2 <= LARGEST_BLOCK


def with_blocks(unet: UNet, in_pairs: bool = False) -> nn.Module:
    """`unet` with every block of csrc whose weights are fp32 and few enough; one block where all are. They multiply in
    fp32 or, where `in_pairs`, in bf16, with fp32 sums and fp32 between products.
    """
    blockwise(unet)
    blocks = unet.conv_in, unet.conv_out, *(step.block for step in steps_of(unet))
    is_whole = all(isinstance(block, Block) for block in blocks) and unet.norm_out.weight.dtype == torch.float32
    for module in unet.modules():
        if isinstance(module, Block):
            module.in_pairs = in_pairs
    return UNetBlock(unet) if is_whole else unet


class UNetBlock(Block):
    """A UNet of blocks alone in one call of csrc, whose hook reads everything at its end. A hook of self-attention
    has the blocks called one by one.
    """

    def __init__(self, plain: UNet):
        super().__init__(plain)
        self.plain = [plain]  # in a list, as its layers are this module's own
        self.text_layers, self.entry = plain.text_layers, plain.entry
        self.sides = [2**depth for depth in range(len(plain.down))]

    def pack(self, packing: Packing) -> _C.UNet:
        parting = next(step.block for step in steps_of(self) if isinstance(step.block, TransformerBlock))
        steps = [_C.Step(step.block.native(), step.joins, step.keeps, step.block is parting) for step in steps_of(self)]
        return _C.UNet(self.conv_in.native(), steps, packing.norm(self.norm_out), self.conv_out.native())

    def forward(self, latents: Tensor, biases: Tensor, text: Sequence[Tensor], hook: CaptureHook) -> Tensor:
        batch, _, height, width = latents.shape
        if any(hook.reads_self(height * width // side**2) for side in self.sides):
            return self.plain[0](latents, biases, text, hook)
        if text[0].shape[1] != 2 * batch:  # csrc would read beyond its end
            raise ValueError(
                f"unet: keys and values of {text[0].shape[1]} texts for {batch} latents, expected {2 * batch}"
            )
        latents, text = latents.contiguous(memory_format=torch.channels_last), [table.contiguous() for table in text]
        native, threads = self.native(), torch.get_num_threads()
        out = empty_image(2 * batch, len(self.conv_out.bias), height, width)
        entry, steps, outputs, queries = None, [], [], []
        if not hook.is_idle:
            first, *sizes = native.sizes(height, width)
            entry, steps = empty_image(batch, *first), list(steps_of(self))
            outputs = [None if step.slot is None else empty_image(2 * batch, *size) for step, size in zip(steps, sizes)]
            queries = self.room_for_queries(batch, steps, sizes)
        native.run(
            latents.data_ptr(),
            biases.data_ptr(),
            [table.data_ptr() for table in text],
            out.data_ptr(),
            [0 if x is None else x.data_ptr() for x in (entry, *outputs)] if outputs else [],
            [q.data_ptr() for q in queries],
            batch,
            height,
            width,
            text[0].shape[-2],
            threads,
        )
        if outputs:
            self.notify(hook, steps, entry, outputs, queries, text)
        return out

    @property
    def deep(self) -> Slot:
        return self.plain[0].deep

    def forward_from(
        self, latents: Tensor, biases: Tensor, text: Sequence[Tensor], deep: Tensor, hook: CaptureHook
    ) -> Tensor:
        return self.plain[0].forward_from(latents, biases, text, deep, hook)

    def room_for_queries(
        self, batch: int, steps: Sequence[BlockStep], sizes: Sequence[tuple[int, int, int]]
    ) -> list[Tensor]:
        """For every attention over the text; the halves are one up to the first, whose block parts them."""
        queries: list[Tensor] = []
        for step, (_, height, width) in zip(steps, sizes):
            if isinstance(step.block, TransformerBlock):
                queries.append(torch.empty(2 * batch if queries else batch, height * width, step.block.width))
        return queries

    def notify(
        self,
        hook: CaptureHook,
        steps: Sequence[BlockStep],
        entry: Tensor,
        outputs: Sequence[Tensor | None],
        queries: Sequence[Tensor],
        text: Sequence[Tensor],
    ) -> None:
        """Calls a hook as single blocks do."""
        hook.feature(self.entry, double_halves(entry))
        for step, x in zip(steps, outputs):
            if x is not None:
                hook.feature(step.slot, x)
        blocks = [step.block for step in steps if isinstance(step.block, TransformerBlock)]
        for block, q, (k, _) in zip(blocks, queries, text):
            (q,) = split_heads(q if len(q) == len(k) else double_halves(q), 1, block.heads)
            hook.on_queries(block.slot, q, k)


class BlockStep(NamedTuple):
    block: Block
    slot: Slot | None  # the feature that its output is
    joins: bool = False  # it reads its input beside the last output that was kept
    keeps: bool = False


def steps_of(unet: UNet) -> Iterator[BlockStep]:
    """The blocks in the order of the forward pass."""
    for down in unet.down:
        pairs = zip_longest(down.resnets, down.transformers)
        for slot, (resnet, transformer) in zip(down.features, pairs):
            yield from _pair(resnet, transformer, slot, keeps=True)
        if down.shrink is not None:
            yield BlockStep(down.shrink, down.entry, keeps=True)
    yield BlockStep(unet.middle.first, None)
    yield BlockStep(unet.middle.transformer, unet.middle.transformer.feature)
    yield BlockStep(unet.middle.last, unet.middle.slot)
    for up in unet.up:
        for slot, (resnet, transformer) in zip(up.features, zip_longest(up.resnets, up.transformers)):
            yield from _pair(resnet, transformer, slot, joins=True)
        if up.grow is not None:
            yield BlockStep(up.grow, up.grown)


def _pair(
    resnet: Block, transformer: Block | None, slot: Slot, joins: bool = False, keeps: bool = False
) -> list[BlockStep]:
    if transformer is None:
        return [BlockStep(resnet, slot, joins, keeps)]
    return [BlockStep(resnet, None, joins), BlockStep(transformer, transformer.feature, False, keeps)]
