"""CLIP's text encoder, and the prompts of models that read one or two of them."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.data import Text
from datasetdm_fast.engine.backbones import LoadedModel
from datasetdm_fast.engine.models.layers import LayerNorm, Linear, Weights, frozen, join_heads, sigmoid, split_heads
from datasetdm_fast.errors import Refused
from datasetdm_fast.kernels.transfer import to_device

ACTIVATIONS = {"quick_gelu": lambda x: x * sigmoid(1.702 * x), "gelu": F.gelu}


class TextLayer(nn.Module):
    def __init__(
        self, weights: Weights, heads: int, eps: float, activation: Callable[[Tensor], Tensor], ops: SimpleNamespace
    ):
        super().__init__()
        itself = weights / "self_attn"
        self.heads, self.activation = heads, activation
        self.norm1 = LayerNorm(weights / "layer_norm1", eps, ops)
        self.qkv = Linear(itself / "q_proj", itself / "k_proj", itself / "v_proj")
        self.out = Linear(itself / "out_proj")
        self.norm2 = LayerNorm(weights / "layer_norm2", eps, ops)
        self.wide, self.narrow = Linear(weights / "mlp" / "fc1"), Linear(weights / "mlp" / "fc2")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(self.norm1(x)), 3, self.heads)
        x = x + self.out(join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return x + self.narrow(self.activation(self.wide(self.norm2(x))))


class TextEncoder(nn.Module):
    """Last hidden states [B, T, D] of token ids [B, T], as transformers' CLIPTextModel gives them."""

    def __init__(self, module: nn.Module, ops: SimpleNamespace):
        super().__init__()
        config = module.config
        if config.hidden_act not in ACTIVATIONS:
            raise Refused(
                f"text encoder: its activation is {config.hidden_act!r}, supported are {', '.join(ACTIVATIONS)}",
                "Name another model with --model.",
            )
        state, prefix = module.state_dict(), "text_model."
        weights = Weights(state, prefix if any(name.startswith(prefix) for name in state) else "")
        self.words = weights.parameter("embeddings.token_embedding.weight")  # the largest, and never held twice
        self.places = frozen(weights["embeddings.position_embedding.weight"])
        activation = ACTIVATIONS[config.hidden_act]
        self.layers = nn.ModuleList(
            TextLayer(
                weights / "encoder" / "layers" / k, config.num_attention_heads, config.layer_norm_eps, activation, ops
            )
            for k in range(config.num_hidden_layers)
        )
        self.norm = LayerNorm(weights / "final_layer_norm", config.layer_norm_eps, ops)

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The states [B, T, D] that the last layer reads, and its own, which are normed."""
        x = before = F.embedding(ids, self.words) + self.places[: ids.shape[1]]
        for layer in self.layers:
            before, x = x, layer(x)
        return before, self.norm(x)


def encode_prompts(encoder: Any, model: LoadedModel, prompts: Sequence[str]) -> Text:
    """The text of prompts; `encoder` has its `tokenizers`, what it makes `of_tokens`, and what it does `after`."""
    device = next(encoder.parameters()).device
    ids = (to_device(model.token_ids(prompts, part), device) for part in encoder.tokenizers)
    return encoder.after(model, prompts, encoder.of_tokens(*ids))


class PromptEncoder(nn.Module):
    """Prompts as the last states of one encoder."""

    tokenizers = ("tokenizer",)

    def __init__(self, sources: Mapping[str, Any], ops: SimpleNamespace):
        super().__init__()
        self.encoder = TextEncoder(sources["text_encoder"], ops)

    def of_tokens(self, ids: Tensor) -> Text:
        return Text(self.encoder.states(ids)[1])

    @staticmethod
    def after(model: LoadedModel, prompts: Sequence[str], text: Text) -> Text:
        return text

    forward = encode_prompts


class PairedPromptEncoder(nn.Module):
    """Prompts as states before the last layer of two encoders, and the pooled text of the second; or zeros."""

    tokenizers = ("tokenizer", "tokenizer_2")

    def __init__(self, sources: Mapping[str, Any], ops: SimpleNamespace):
        super().__init__()
        first, second = sources["text_encoder"], sources["text_encoder_2"]
        self.first, self.second = TextEncoder(first, ops), TextEncoder(second, ops)
        self.projection = Linear(Weights(second.state_dict()) / "text_projection")
        self.end = second.config.eos_token_id

    def of_tokens(self, first: Tensor, second: Tensor) -> Text:
        before, last = self.second.states(second)
        # CLIP's first configs have 2, and their end is the token with the largest id.
        ends = (second if self.end == 2 else torch.eq(second, self.end).long()).argmax(1)
        pooled = last.gather(1, ends[:, None, None].expand(-1, -1, last.shape[-1])).flatten(1)
        return Text(torch.cat([self.first.states(first)[0], before], -1), self.projection(pooled))

    @staticmethod
    def after(model: LoadedModel, prompts: Sequence[str], text: Text) -> Text:
        if not model.configs["model_index"].get("force_zeros_for_empty_prompt", True):
            return text
        has_text = to_device(torch.tensor([float(bool(prompt)) for prompt in prompts]), text.context.device)
        return text.map(lambda part: part * has_text.view(-1, *(1,) * (part.dim() - 1)))

    forward = encode_prompts
