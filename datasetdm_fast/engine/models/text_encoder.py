"""CLIP's text encoder."""

from collections.abc import Callable
from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn

from datasetdm_fast.engine.models.layers import LayerNorm, Linear, Weights, frozen, join_heads, sigmoid, split_heads
from datasetdm_fast.errors import Refused

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

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.words) + self.places[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
