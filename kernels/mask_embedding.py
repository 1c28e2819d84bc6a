"""What the masks of a query are made with: its norm and three linear layers with ReLU between, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

WIDEST = 256  # channels of a row, which lies in registers; wider ones are left to the reference
DEVICES = {"untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("mask_embedding", 4, 2, bits=(16,), BLOCK_S=16, BLOCK_J=32)
    | block_sizes("mask_embedding", 8, 1, bits=(32,), BLOCK_S=16, BLOCK_J=16),
    "sm_90": block_sizes("mask_embedding", 4, 2, bits=(16,), BLOCK_S=8, BLOCK_J=128),
}


def reference(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """Normed rows [..., C] under `weights` [C, C], [C, C], [D, C] and `biases`, with ReLU after the first two."""
    x = F.layer_norm(x, gain.shape, gain, shift, eps)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = F.relu(F.linear(x, weight, bias))
    return F.linear(x, weights[-1], biases[-1])


@jit
def _mask_embedding_kernel(
    x_ptr,  # [S, C]
    gain_ptr,  # [C]
    shift_ptr,  # [C]
    first_ptr,  # [C, C]
    first_bias_ptr,  # [C]
    second_ptr,  # [C, C]
    second_bias_ptr,  # [C]
    last_ptr,  # [D, C]
    last_bias_ptr,  # [D]
    out_ptr,  # [S, D]
    rows,
    channels,
    features,
    eps,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel, lane = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    is_row, is_channel = row < rows, channel < channels
    inside = is_row[:, None] & is_channel[None, :]
    x = tl.load(x_ptr + row[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    distance = tl.where(inside, x - (tl.sum(x, 1) / channels)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(distance * distance, 1) / channels + eps)
    gain = tl.load(gain_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    normed = (distance * scale[:, None] * gain[None, :] + shift[None, :]).to(out_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, channels, BLOCK_J):  # a slice of the first layer is all that the second needs of it at once
        hidden = start + lane
        is_hidden = hidden < channels
        place = hidden[None, :] * channels + channel[:, None]
        first = tl.load(first_ptr + place, mask=is_hidden[None, :] & is_channel[:, None], other=0.0)
        bias = tl.load(first_bias_ptr + hidden, mask=is_hidden, other=0.0).to(tl.float32)
        y = tl.dot(normed, first, input_precision=PRECISION) + bias[None, :]
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(out_ptr.dtype.element_ty)
        place = channel[None, :] * channels + hidden[:, None]
        second = tl.load(second_ptr + place, mask=is_channel[None, :] & is_hidden[:, None], other=0.0)
        total = tl.dot(y, second, total, input_precision=PRECISION)
    total += tl.load(second_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL).to(out_ptr.dtype.element_ty)
    for start in range(0, features, BLOCK_J):
        feature = start + lane
        is_feature = feature < features
        place = feature[None, :] * channels + channel[:, None]
        last = tl.load(last_ptr + place, mask=is_feature[None, :] & is_channel[:, None], other=0.0)
        bias = tl.load(last_bias_ptr + feature, mask=is_feature, other=0.0).to(tl.float32)
        y = tl.dot(total, last, input_precision=PRECISION) + bias[None, :]
        place = row[:, None] * features + feature[None, :]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_feature[None, :])


def fused(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """The result of `reference`; the hidden layers never leave the registers."""
    channels, features = x.shape[-1], len(weights[-1])
    shapes = [(channels, channels), (channels, channels), (features, channels)]
    fits = [tuple(weight.shape) for weight in weights] == shapes
    fits = fits and [len(vector) for vector in (gain, shift, *biases)] == [channels] * 4 + [features]
    if not is_served("mask_embedding", x, gain, shift, *weights, *biases, fits=fits) or channels > WIDEST:
        return reference(x, gain, shift, eps, weights, biases)
    x = x.contiguous()
    rows, sizes = x.numel() // channels, blocks(BLOCKS, "mask_embedding", x)
    out = x.new_empty((*x.shape[:-1], features))
    layers = [part for weight, bias in zip(weights, biases) for part in (weight.contiguous(), bias)]
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _mask_embedding_kernel[(ceil_divide(rows, sizes["BLOCK_S"]),)](
            x,
            gain,
            shift,
            *layers,
            out,
            rows,
            channels,
            features,
            eps,
            PRECISION="ieee",  # three passes of TF32 would not fit into registers; no matter in 16 bits
            BLOCK_C=round_up(channels),
            **sizes,
        )
    return out


def probe() -> Probe:
    weights = [noise(256, 256, k, scale=1 / 16)[..., 0] for k in (1, 2, 3)]
    biases = [noise(256 + k)[k:] for k in (0, 1, 2)]
    return noise(1, 5, 256), noise(256) + 1, noise(257)[1:], 1e-5, weights, biases
