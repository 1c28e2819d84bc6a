"""The operations the models are exported with: each in the form in which ONNX Runtime and TensorRT look for it.

Attention is MatMul, Softmax, MatMul over [B, heads, S, d] with the scale on the queries; group normalisation is
InstanceNormalization over groups; norms and softmax are computed in fp32 whatever the storage.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.engine.models.layers import Upsample
from datasetdm_fast.export.onnx.graph import MICROSOFT, Value
from datasetdm_fast.export.onnx.operators import BLOCKED
from datasetdm_fast.kernels import reference
from datasetdm_fast.kernels.attention_shares import project, shares
from datasetdm_fast.kernels.depth_head import CHUNK, resize_matrix, stack_shifted_rows
from datasetdm_fast.kernels.image_norm import EPS
from datasetdm_fast.kernels.upsample_concat import resize


def instance_norm(x: Value, eps: float) -> Value:  # [B, G, S]
    """Zero mean and unit biased variance along S."""
    affine = (x.graph.constant(make(x.shape[1])) for make in (torch.ones, torch.zeros))
    return x.emit("InstanceNormalization", *affine, epsilon=eps)


def group_norm_silu(x: Value, weight: Value, bias: Value, groups: int, eps: float, has_silu: bool = True) -> Value:
    wide = x.to(torch.float32)
    normed = instance_norm(wide.reshape(x.shape[0], groups, -1), eps).reshape(*x.shape)
    scaled = normed * weight.reshape(-1, 1, 1) + bias.reshape(-1, 1, 1)
    return (scaled * scaled.sigmoid() if has_silu else scaled).to(x.dtype)


def layer_norm(x: Value, weight: Value, bias: Value, eps: float) -> Value:
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def attention_shares(q: Value, k: Value, sums: Value, mask: Value | None, weight: Value) -> Value:
    """See kernels.attention_shares."""
    return project(shares(q, k, sums, mask), weight)


def probabilities(q: Value, k: Value, scale: float) -> Value:
    scores = (q * scale) @ k.transpose(2, 3)
    return scores.softmax(-1, torch.float32).to(q.dtype)


def attention(q: Value, k: Value, v: Value) -> Value:
    return probabilities(q, k, q.shape[-1] ** -0.5) @ v


def attention_maps(q: Value, k: Value, v: Value) -> tuple[Value, Value]:
    """The answer [B, heads, S, d] and the probabilities [B, heads, S, T] themselves.

    A second reader of the softmax would cost TensorRT its one kernel, and so would values wider than keys. So all three
    are made as wide as both results together: zeros beside queries and keys change no score, and the unit matrix beside
    the values hands out the maps.
    """
    width, count = q.shape[3], k.shape[2]
    padding = (0, count)
    unit = nn.functional.pad(torch.eye(count), (width, 0))  # [T, d + T]
    both = probabilities(nn.functional.pad(q, padding), nn.functional.pad(k, padding), width**-0.5) @ (
        nn.functional.pad(v, padding) + unit
    )
    return tuple(both.split([width, count], 3))


def image_norm(x: Value, has_relu: bool = False) -> Value:
    y = instance_norm(x.flatten(2), EPS).reshape(*x.shape)
    return nn.functional.relu(y) if has_relu else y


def masked_attention(q: Value, k: Value, v: Value, blocked: Value | None = None) -> Value:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if blocked is not None:
        closed = blocked.to(torch.float32)
        # A query that blocked every cell sees all: then the smallest of them is 1, and taking it away leaves none.
        smallest = closed.emit("ReduceMin", closed.graph.integers([-1]), shape=(*closed.shape[:-1], 1), keepdims=1)
        scores = scores + ((closed - smallest) * BLOCKED).unsqueeze(1)
    return scores.softmax(-1) @ v


def mask_head(queries: Value, features: Value, side: int, is_blocking: bool = False) -> Value:
    logits = resize((queries @ features.flatten(2)).unflatten(2, features.shape[2:]), side)
    return logits.sigmoid() < 0.5 if is_blocking else logits


def depth_head(
    x: Value, weight: Value, bias: Value, last_weight: Value, last_bias: Value, sides: Sequence[int]
) -> Value:
    """See kernels.depth_head.plain: nine products at the resolution of `x`, resized, shifted, added."""
    side, (hidden, channels) = x.shape[-1], weight.shape[:2]
    matrices = stack_shifted_rows(resize_matrix(side, sides, torch.zeros(())))  # [3, H, h]
    across = x.graph.constant(matrices.permute(0, 2, 1).reshape(3 * side, -1).contiguous())  # [3 w, W]
    down = x.graph.constant(matrices.permute(1, 0, 2).reshape(-1, 3 * side).contiguous())  # [H, 3 h]
    cells: Value = x.flatten(2)
    total: Any = None
    for start in range(0, hidden, CHUNK):
        stop = min(start + CHUNK, hidden)
        part = weight[start:stop]
        taps = part.permute(0, 2, 3, 1).reshape(-1, channels) @ cells  # [B, o 3 3, h w]
        # [B, o, h, l, k, w]: rows l and columns k
        taps = taps.unflatten(1, (stop - start, 3, 3)).unflatten(4, (side, side)).permute(0, 1, 4, 2, 3, 5)
        rows = taps.flatten(4) @ across  # [B, o, h, 3, W]
        wide = down @ rows.transpose(2, 3).flatten(2, 3)  # [B, o, H, W]
        wide = nn.functional.relu(wide + bias[start:stop].reshape(-1, 1, 1))
        output = nn.functional.conv2d(wide, last_weight[:, start:stop], None if start else last_bias, padding=1)
        total = output if total is None else total + output
    return total


class Doubled(nn.Module):
    """See layers.Upsample: its four 2x2 convolutions are one transposed convolution, 4x4 at stride 2."""

    def __init__(self, upsample: Upsample):
        super().__init__()
        (top_left, top_right), (bottom_left, bottom_right) = (row.chunk(2) for row in upsample.weight.chunk(2))
        left, right = _interleave(top_left, bottom_left, 2), _interleave(top_right, bottom_right, 2)
        self.weight = nn.Parameter(_interleave(left, right, 3).transpose(0, 1), requires_grad=False)  # [in, out, 4, 4]
        self.bias = nn.Parameter(upsample.bias.chunk(4)[0], requires_grad=False)

    def forward(self, x: Value) -> Value:
        batch, _, height, width = x.shape
        inputs = (Value(x.graph, value.name, value.shape, x.dtype, value.tensor) for value in (self.weight, self.bias))
        shape = (batch, self.weight.shape[1], 2 * height, 2 * width)
        return x.emit("ConvTranspose", *inputs, shape=shape, kernel_shape=(4, 4), strides=(2, 2), pads=(1, 1, 1, 1))


def _interleave(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """The four taps along `axis` of a transposed convolution, from the pairs of both places of a doubled cell."""
    (before, here), (same, after) = first.unbind(axis), second.unbind(axis)
    return torch.stack([after, here, same, before], axis)


def exportable(module: nn.Module) -> nn.Module:
    """`module` with its upsamplers as transposed convolutions."""
    for name, child in list(module.named_children()):
        setattr(module, name, Doubled(child) if isinstance(child, Upsample) else exportable(child))
    return module


FORMS: tuple[Callable[..., Any], ...] = (group_norm_silu, layer_norm, attention, attention_maps, image_norm)
FORMS += (masked_attention, mask_head, depth_head, attention_shares)
PORTABLE = SimpleNamespace(**{**vars(reference), **{form.__name__: form for form in FORMS}})


# For ONNX Runtime alone: its own attention, which on no device writes the scores to memory.
def one_node_attention(q: Value, k: Value, v: Value) -> Value:
    """See attention."""
    heads, cells, width = q.shape[1:]
    first, *others = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    out = first.emit("MultiHeadAttention", *others, domain=MICROSOFT, num_heads=heads, scale=width**-0.5)
    return out.unflatten(2, (heads, width)).transpose(1, 2)


def plain_attention_maps(q: Value, k: Value, v: Value) -> tuple[Value, Value]:
    """See attention_maps; texts are short, so nothing is lost by reading the probabilities twice."""
    maps = probabilities(q, k, q.shape[-1] ** -0.5)
    return maps @ v, maps


ONNX_RUNTIME = SimpleNamespace(
    **{**vars(PORTABLE), "attention": one_node_attention, "attention_maps": plain_attention_maps}
)
