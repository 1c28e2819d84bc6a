"""Norms of transformers whose scale and shift are those of a timestep, with the gated residual before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.launch import block_sizes, blocks, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise

WIDEST = 8192  # a row is held in registers
DEVICES = {"untuned": "fused"}
BLOCKS = {"untuned": block_sizes("ada_norm", 8)}


def reference(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`x` [R, S, C] plus `gate` [R or 1, C] times `branch`; and its layer norm, or RMS norm times `weight` [C] where
    one is given, times 1 + `scale` plus `shift` [R or 1, C]. A `branch_weight` is that of an RMS norm of the branch.
    """
    if branch is not None:
        if branch_weight is not None:
            branch = F.rms_norm(branch, branch_weight.shape, branch_weight, eps)
        x = x + (branch if gate is None else gate[:, None] * branch)
    if weight is None:
        normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    else:
        normed = F.rms_norm(x, weight.shape, weight, eps)
    if scale is not None:
        normed = normed * (1 + scale[:, None])
    return x, normed if shift is None else normed + shift[:, None]


def plain(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`reference` in fewer passes."""
    if branch is not None and gate is not None and branch_weight is None:
        x, branch = torch.addcmul(x, branch, gate[:, None]), None
    if scale is None or shift is None:
        return reference(x, branch, gate, branch_weight, scale, shift, weight, eps)
    x, normed = reference(x, branch, gate, branch_weight, None, None, weight, eps)
    return x, torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


@jit
def _ada_norm_kernel(
    x_ptr,  # [R, S, C]
    branch_ptr,  # [R, S, C], or None
    gate_ptr,  # [R or 1, C], or None
    branch_weight_ptr,  # [C], or None
    scale_ptr,  # [R or 1, C], or None
    shift_ptr,  # [R or 1, C], or None
    weight_ptr,  # [C], or None: a layer norm
    sum_ptr,  # [R, S, C], or None
    out_ptr,  # [R, S, C]
    tokens,
    channels,
    gate_stride,  # from one of the R to the next, 0 where all share one
    scale_stride,
    shift_stride,
    eps,
    BLOCK_C: tl.constexpr,
):
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    image, inside = row // tokens, channel < channels
    place = row * channels + channel
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if branch_weight_ptr is not None:
            branch *= tl.rsqrt(tl.sum(branch * branch, 0) / channels + eps)
            branch *= tl.load(branch_weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            branch *= tl.load(gate_ptr + image * gate_stride + channel, mask=inside, other=0.0).to(tl.float32)
        x += branch
        tl.store(sum_ptr + place, x.to(sum_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is None:
        x = tl.where(inside, x - tl.sum(x, 0) / channels, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / channels + eps)
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        x *= 1.0 + tl.load(scale_ptr + image * scale_stride + channel, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + image * shift_stride + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=inside)


def fused(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The result of `reference`, in one pass."""
    (rows, tokens, channels), vectors = x.shape, (gate, scale, shift)
    fits = branch is None or branch.shape == x.shape
    fits = fits and all(vector is None or vector.shape == (channels,) for vector in (branch_weight, weight))
    fits = fits and all(part is None or part.shape in ((1, channels), (rows, channels)) for part in vectors)
    if not is_served("ada_norm", x, branch, branch_weight, *vectors, weight, fits=fits):
        return reference(x, branch, gate, branch_weight, scale, shift, weight, eps)
    if channels > WIDEST:
        raise ValueError(f"ada_norm: rows of {channels} do not fit into registers, at most {WIDEST} do")
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    gate, scale, shift = (part if part is None or part.stride(1) == 1 else part.contiguous() for part in vectors)
    strides = [0 if part is None or len(part) == 1 else part.stride(0) for part in (gate, scale, shift)]
    total, out = x if branch is None else torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        _ada_norm_kernel[(rows * tokens,)](
            x,
            branch,
            gate,
            branch_weight,
            scale,
            shift,
            weight,
            None if branch is None else total,
            out,
            tokens,
            channels,
            *strides,
            eps,
            BLOCK_C=round_up(channels, 1),
            **blocks(BLOCKS, "ada_norm", x),
        )
    return total, out


def probe() -> Probe:
    vectors = noise(2, 3, 1280)
    return noise(2, 5, 1280), noise(2, 5, 1280) + 1, vectors[:, 0], None, vectors[:, 1], vectors[:, 2], None, 1e-6
