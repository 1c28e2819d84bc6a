"""Attention that also returns the log-sum-exp of each row of scores, from which any probability is known afterwards."""

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast.kernels.noise import Probe, noise

ROW = 16  # numbers of which rows of a bias are multiples in memory


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v [R, heads, N, d] over the keys that `mask` [R, 1, 1, S] has, and the log-sum-exp [R,
    heads, N] of its scores.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.mT).to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.matmul(scores.softmax(-1).to(q.dtype), v), scores.logsumexp(-1)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference` by PyTorch's own fused attention: of a GPU flash attention, or where keys are hidden and in fp32 the
    one that is called memory-efficient; heads of odd widths have their sums computed apart.
    """
    operations, (_, heads, queries, width) = torch.ops.aten, q.shape
    wide, bias = torch.promote_types(q.dtype, torch.float32), as_bias(mask, q.dtype)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # which the operations do not check
    if q.device.type == "cpu":
        output, sums = operations._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    elif width % 8 == 0 and (q.dtype == torch.float32 or is_flash(q)):
        if bias is None and q.dtype != torch.float32 and width <= 256:
            output, sums = operations._scaled_dot_product_flash_attention(q, k, v)[:2]
        else:
            bias = None if bias is None else bias.expand(-1, heads, queries, -1)
            output, sums = operations._scaled_dot_product_efficient_attention(q, k, v, bias, True)[:2]
    else:
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        sums = sum_exponentials(q, k, bias)
    return output, sums[..., : q.shape[2]].to(wide)


def is_flash(x: Tensor) -> bool:
    """Whether a GPU runs flash attention in this precision; it takes one since Ampere."""
    return x.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What hides the masked keys when it is added to scores; its rows begin where fused attention reads them."""
    if mask is None:
        return None
    keys = mask.shape[-1]
    rows = torch.zeros(*mask.shape[:-1], keys + -keys % ROW, dtype=dtype, device=mask.device)
    return rows[..., :keys].masked_fill_(~mask, -torch.inf)


def sum_exponentials(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The log-sum-exp of the scores where no attention returns it; the scores of one image at a time are held."""
    parts = []
    for row in range(len(q)):
        scores = q[row].float() @ k[row].float().mT / q.shape[-1] ** 0.5
        parts.append((scores if bias is None else scores + bias[row % len(bias)]).logsumexp(-1))
    return torch.stack(parts)


def probe() -> Probe:
    q, k, v = noise(3, 1, 2, 130, 64)
    return q, k, v
