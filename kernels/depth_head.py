"""The depth head: resize in steps, 3x3 convolution, ReLU, 3x3 convolution to one plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.bilinear import resize
from datasetdm_fast.kernels.case import BATCH, Case, noise

DEVICES = {"cpu": "native"}
SLICE = 256  # hidden channels whose products are held at once: 36 MiB per image of 64 x 64 cells in fp32
CHUNK = 64  # hidden channels held at full size at once: 64 MiB per image of 512 pixels in fp32


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """Depth logits [B, 1, H, W] of `x` [B, C, h, w], resized to each of `sides` in turn before the convolutions."""
    for side in sides:
        x = resize(x, side)
    return F.conv2d(F.relu(F.conv2d(x, weight, bias, padding=1)), last_weight, last_bias, padding=1)


def resize_matrix(start: int, sides: Sequence[int], like: Tensor) -> Tensor:
    """The resizes along one axis as a matrix [H, h], with the dtype and device of `like`."""
    rows = torch.eye(start, dtype=like.dtype, device=like.device)[
        None
    ]  # [1, h, h]: row i is what cell i gives to each place
    for side in sides:
        rows = F.interpolate(rows, size=side, mode="linear", align_corners=False)
    return rows[0].T


def shifted(matrix: Tensor) -> Tensor:
    """Row y of the three matrices [3, H, h] is row y - 1, y, y + 1 of `matrix`, zero beyond the border as the
    convolution pads.
    """
    padded = F.pad(matrix, (0, 0, 1, 1))
    return torch.stack([padded[tap : tap + len(matrix)] for tap in range(3)])


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """The same logits from nine products at the resolution of `x`, each resized, shifted and added: about 30 times less
    arithmetic.

    The resize is linear along space and the taps are linear along channels, so they commute; the shifts go into the
    resize matrices.
    """
    side = x.shape[-1]
    matrices = shifted(resize_matrix(side, sides, x))
    across = matrices.permute(0, 2, 1).reshape(3 * side, -1)  # [3 w, W]
    down = matrices.permute(1, 0, 2).reshape(-1, 3 * side)  # [H, 3 h]
    answer = last_bias[:, None, None]
    for start in range(0, len(weight), CHUNK):
        part = weight[start : start + CHUNK]
        taps = torch.einsum("bcyx,oclk->boylkx", x, part)  # y, x: cells; l, k: rows and columns of the 3x3 taps
        rows = taps.reshape(*taps.shape[:4], 3 * side) @ across  # [B, o, h, 3, W]
        hidden = down @ rows.transpose(2, 3).reshape(len(x), len(part), 3 * side, -1)
        hidden = F.relu(hidden + bias[start : start + CHUNK, None, None])
        answer = answer + F.conv2d(hidden, last_weight[:, start : start + CHUNK], padding=1)
    return answer


def native(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """The same logits on a CPU, for inference: the nine products are matrix products, and csrc/depth_head.cpp adds them
    up without the wide map.

    Products in fp64 are added in fp64, all others in fp32.
    """
    if torch.is_grad_enabled() and any(one.requires_grad for one in (x, weight, bias, last_weight, last_bias)):
        raise RuntimeError(
            "depth_head: the native form has no backward; run under torch.no_grad(), or train with the plain form"
        )
    if x.device.type != "cpu":
        raise ValueError(
            f"depth_head: the compiled form got a tensor on {x.device}, expected one on the CPU; use the plain form "
            "there"
        )
    for side in sides[:-2]:
        x = resize(x, side)
    batch, _, side, _ = x.shape
    middle, full = (sides[-2] if len(sides) > 1 else side), sides[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cells = x.detach().flatten(2).transpose(1, 2)  # [B, h h, C]
    taps = last_weight.detach()[0].flatten(1).T.to(wide)  # [9, D]
    logits = last_bias.detach().to(wide).repeat(batch, full, full)
    for start in range(0, len(weight), SLICE):
        part = weight.detach()[start : start + SLICE].permute(2, 3, 0, 1).reshape(-1, weight.shape[1])  # [9 d, C]
        products = F.linear(cells, part).to(wide).view(batch, side, side, 9, -1)
        arrays = (products, bias.detach()[start : start + SLICE].to(wide), taps[:, start : start + SLICE].contiguous())
        _C.depth_head_add(*(one.numpy() for one in arrays), middle, logits.numpy(), torch.get_num_threads())
    return logits[:, None].to(x.dtype)


def sizes(empty: Callable) -> Iterator[tuple[str, tuple]]:
    hidden = 1024
    weights = empty(hidden, hidden, 3, 3), empty(hidden), empty(1, hidden, 3, 3), empty(1)
    yield "64 cells to 512 pixels", (empty(BATCH, hidden, 64, 64), *weights, (160, 512))


def cases() -> list[Case]:
    def head(batch, channels, hidden, side, sides):
        weight, last = noise(hidden, channels, 3, 3, scale=0.1), noise(1, hidden, 3, 3, scale=0.1)
        return noise(batch, channels, side, side), weight, noise(hidden), last, noise(1), sides

    return [
        Case("smallest", head(2, 1, 1, 1, (1,)), (2, 1, 1, 1)),
        Case("two resizes, odd sides, a ragged last chunk", head(1, 5, 67, 3, (7, 17)), (1, 1, 17, 17)),
        Case("demo's cells and channels", head(1, 32, 32, 16, (40, 64)), (1, 1, 64, 64)),
    ]
