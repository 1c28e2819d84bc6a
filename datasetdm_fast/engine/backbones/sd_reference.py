"""Stable Diffusion 1.x and 2.x as the stock pipeline computes it: a U-Net with hooks and explicit attention maps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.data import AttentionSums, Capture, Text
from datasetdm_fast.engine.backbones import LoadedModel
from datasetdm_fast.engine.backbones.latent_space import AutoencoderReference
from datasetdm_fast.engine.backbones.prompt_encoders import tokenize


def feature_modules(unet: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """Per level, low to highest, the modules whose outputs are its features, in the order of the weights."""
    down, up = unet.down_blocks, unet.up_blocks
    levels = [(down[2].downsamplers[0], *down[3].resnets, unet.mid_block, *up[0].resnets)]
    for depth in (2, 1, 0):
        entry = unet.conv_in if depth == 0 else down[depth - 1].downsamplers[0]
        levels.append((entry, *down[depth].attentions, up[2 - depth].upsamplers[0], *up[3 - depth].attentions))
    return tuple(levels)


def transformers_of(unet: nn.Module) -> tuple[tuple[nn.ModuleList, ...], ...]:
    """Per level the transformers, each as its blocks: up blocks first, then down; the middle block alone for low."""
    levels = [unet.mid_block.attentions]
    levels += [(*unet.up_blocks[3 - depth].attentions, *unet.down_blocks[depth].attentions) for depth in (2, 1, 0)]
    return tuple(tuple(transformer.transformer_blocks for transformer in level) for level in levels)


class CapturingAttention:
    """Attention processor that forms the probabilities explicitly and keeps those of the last half of so many."""

    def __init__(self, halves: int) -> None:
        self.halves = halves
        self.map: Tensor | None = None  # [B, heads, h*w, T]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        # A view would keep every half alive.
        self.map = probabilities.unflatten(0, (-1, attn.heads)).chunk(self.halves)[-1].clone()
        output = attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, value)))
        return attn.to_out[1](output) / attn.rescale_output_factor


class SummingAttention:
    """Attention processor that leaves the output to `inner`, and averages the probabilities of the conditional queries
    over `text`, or over the layer's keys where that is None.
    """

    def __init__(self, inner: Callable[..., Tensor], batch: int, text: Tensor | None = None):
        self.inner, self.batch, self.text = inner, batch, text
        self.map: Tensor | None = None  # [B, S, T], the mean over heads

    def __call__(self, attn: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        conditional = hidden_states[-self.batch :]
        keys = attn.head_to_batch_dim(attn.to_k(conditional if self.text is None else self.text))
        probabilities = attn.get_attention_scores(attn.head_to_batch_dim(attn.to_q(conditional)), keys)
        self.map = probabilities.unflatten(0, (-1, attn.heads)).mean(1)
        return self.inner(attn, hidden_states, *arguments, **options)


@contextmanager
def set_processors(processors: Mapping[nn.Module, object]) -> Iterator[None]:
    """Within the block the attentions have these processors."""
    before = {attention: attention.processor for attention in processors}
    try:
        for attention, processor in processors.items():
            attention.set_processor(processor)
        yield
    finally:
        for attention, processor in before.items():
            attention.set_processor(processor)


@contextmanager
def capturing_levels(
    features: Sequence[Sequence[nn.Module]], transformers: Sequence[Sequence[nn.ModuleList]], halves: int = 2
) -> Iterator[list[Capture]]:
    """Within the block one forward of a U-Net is captured, the outputs of `features` and the maps of `transformers` of
    each level; the Capture is appended to the list on leaving.
    """
    attentions = [[[block.attn2 for block in blocks] for blocks in level] for level in transformers]
    captures: list[Capture] = []
    outputs: dict[nn.Module, Tensor] = {}

    def store(module: nn.Module, _: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # [B, 2C, h, w]: for each image the unconditional half, then its conditional half
        outputs[module] = torch.cat(hidden.chunk(halves), dim=1)

    def mean_map(layers: Sequence[nn.Module]) -> Tensor:
        maps = [layer.processor.map for layer in layers]
        return maps[0] if len(maps) == 1 else torch.stack(maps).mean(0)

    layers = [layer for level in attentions for blocks in level for layer in blocks]
    hooks = [module.register_forward_hook(store) for level in features for module in level]
    try:
        with set_processors({layer: CapturingAttention(halves) for layer in layers}):
            yield captures
            captures.append(
                Capture(
                    tuple(tuple(outputs[module] for module in level) for level in features),
                    tuple(tuple(mean_map(blocks) for blocks in level) for level in attentions),
                )
            )
    finally:
        for hook in hooks:
            hook.remove()


class SDReference(AutoencoderReference):
    """See BackboneReference."""

    def __init__(self, model: LoadedModel):
        self.model, self.unet = model, model.modules["unet"]
        self.features, self.transformers = feature_modules(self.unet), transformers_of(self.unet)

    def encode(self, prompts: Sequence[str]) -> Text:
        encoder = self.model.modules["text_encoder"]
        tokens = tokenize(self.model.tokenizers["tokenizer"], prompts, self.model.text_length, encoder.device)
        return Text(encoder(tokens["input_ids"]).last_hidden_state)

    def predict(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        return self.unet(torch.cat([latents, latents]), timestep, text.context, return_dict=False)[0]

    def capturing(self) -> AbstractContextManager[list[Capture]]:
        return capturing_levels(self.features, self.transformers, self.model.levels[0].halves)

    def predict_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        """The output of `predict`, and the sums with the attention of this call."""
        cells: dict[nn.Module, SummingAttention] = {}
        tokens: dict[nn.Module, SummingAttention] = {}
        for level, transformers in zip(self.model.levels, self.transformers):
            for block in (block for blocks in transformers for block in blocks):
                if level.side**2 == sums.cells.shape[1]:
                    cells[block.attn1] = SummingAttention(block.attn1.processor, len(latents))
                if level.side**2 == sums.tokens.shape[1]:
                    tokens[block.attn2] = SummingAttention(block.attn2.processor, len(latents), class_text.context)
        with set_processors({**cells, **tokens}):
            output = self.predict(latents, timestep, text)
        means = [torch.stack([layer.map for layer in kind.values()]).mean(0) for kind in (cells, tokens)]
        return output, AttentionSums(sums.cells + means[0], sums.tokens + means[1])

    def predict_and_keep(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Tensor]:
        """The output, and all that the last resnet reads but the first skip."""
        stored: list[Tensor] = []

        def store(deep: Tensor) -> Tensor:
            stored.append(deep)
            return deep

        with self._before_last_resnet(store):
            output = self.predict(latents, timestep, text)
        return output, torch.cat(torch.cat(stored).chunk(len(text) // len(latents)), 1)

    def predict_from(self, deep: Tensor, latents: Tensor, timestep: float, text: Text) -> Tensor:
        rows = list(torch.cat(deep.chunk(len(text) // len(latents), 1)))  # the halves may be called one after the other
        with self._before_last_resnet(lambda deep: torch.stack([rows.pop(0) for _ in deep])):
            return self.predict(latents, timestep, text)

    @contextmanager
    def _before_last_resnet(self, exchange: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the block the last resnet reads `exchange` of the deep feature, and the first skip as it is."""

        def change(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *others = inputs
            first_skip = self.unet.config.block_out_channels[0]
            return torch.cat([exchange(x[:, :-first_skip]), x[:, -first_skip:]], 1), *others

        hook = self.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(change)
        try:
            yield
        finally:
            hook.remove()
