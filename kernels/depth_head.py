"""The depth head: resize in steps, 3x3 convolution, ReLU, 3x3 convolution to one plane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.launch import PRECISION, block_sizes, blocks, ceil_divide, is_served, jit, round_up, tl
from datasetdm_fast.kernels.noise import Probe, noise
from datasetdm_fast.kernels.upsample_concat import resize

DEVICES = {"cpu": "native", "untuned": "fused"}
BLOCKS = {
    "untuned": block_sizes("depth_head", 4, 3, bits=(16,), BLOCK_S=256, BLOCK_O=32)
    | block_sizes("depth_head", 4, 2, bits=(32,), BLOCK_S=128, BLOCK_O=16)
    | block_sizes("depth_head last", 4, BLOCK_S=512),
    "sm_90": block_sizes("depth_head", 4, 3, bits=(16,), BLOCK_S=128, BLOCK_O=32),
}
SLICE = 256  # hidden channels whose products are held at once: 36 MiB per image of 64 x 64 cells in fp32
CHUNK = 64  # hidden channels held at full size at once: 64 MiB per image of 512 pixels in fp32
WIDE_CHUNK = 256  # the same on a GPU: 128 MiB per image in fp16
TAPS = 9  # of the last convolution


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """Depth logits [B, 1, H, W] of `x` [B, C, h, w], resized to each of `sides` in turn before the convolutions."""
    for side in sides:
        x = resize(x, side)
    return F.conv2d(F.relu(F.conv2d(x, weight, bias, padding=1)), last_weight, last_bias, padding=1)


def resize_matrix(start: int, sides: Sequence[int], like: Tensor) -> Tensor:
    """The resizes along one axis as a matrix [H, h], with the dtype and device of `like`."""
    # [1, h, h]: row i is what cell i gives to each place
    rows = torch.eye(start, dtype=like.dtype, device=like.device)[None]
    for side in sides:
        rows = F.interpolate(rows, size=side, mode="linear", align_corners=False)
    return rows[0].T


def stack_shifted_rows(matrix: Tensor) -> Tensor:
    """Row y of the matrices [3, H, h] is row y - 1, y, y + 1 of `matrix`, zero beyond the border."""
    padded = F.pad(matrix, (0, 0, 1, 1))
    return torch.stack([padded[tap : tap + len(matrix)] for tap in range(3)])


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """`reference` logits from nine products at the resolution of `x`, each resized, shifted and added: about 30 times
    less arithmetic.

    The resize is linear along space and the taps are linear along channels, so they commute; the shifts go into the
    resize matrices.
    """
    answer = last_bias[:, None, None]
    for start, hidden in hidden_parts(x, weight, sides, CHUNK):
        hidden = (hidden + bias[start : start + CHUNK, None, None]).relu_()  # in place: a third of the time in training
        answer = answer + F.conv2d(hidden, last_weight[:, start : start + CHUNK], padding=1)
    return answer


class _TrainedEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, products: Tensor, bias: Tensor, taps: Tensor, middle: int, full: int) -> Tensor:
        arrays = tuple(tensor.detach().contiguous() for tensor in (products, bias, taps))
        ctx.save_for_backward(*arrays)
        ctx.middle, logits = middle, products.new_zeros(len(products), full, full)
        first, second, third = (tensor.numpy() for tensor in arrays)
        _C.depth_head_add(first, second, third, middle, logits.numpy(), torch.get_num_threads())
        return logits

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        back, out = tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors), gradients[0].contiguous()
        arguments: list[Any] = [tensor.numpy() for tensor in ctx.saved_tensors]
        arguments += [ctx.middle, out.numpy(), *(tensor.numpy() for tensor in back), torch.get_num_threads()]
        _C.depth_head_gradient(*arguments)
        return *back, None, None


def apply_trained(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """The result of `plain`, for training: on a CPU, where its precision is exact, csrc/depth_head.cpp does what
    follows the products, forwards and backwards, without the wide map.
    """
    if not x.is_cpu or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
        return plain(x, weight, bias, last_weight, last_bias, sides)
    products, middle = tap_products(x, weight, sides)
    taps = last_weight[0].flatten(1).T
    return (_TrainedEnd.apply(products, bias, taps, middle, sides[-1]) + last_bias[:, None, None])[:, None]


def tap_products(x: Tensor, weight: Tensor, sides: Sequence[int]) -> tuple[Tensor, int]:
    """The product of each tap and each cell [B, h, h, 9, C], and the side between the two resizes left."""
    for side in sides[:-2]:
        x = resize(x, side)
    cells = x.flatten(2).transpose(1, 2)  # [B, h h, C]
    products = F.linear(cells, weight.permute(2, 3, 0, 1).flatten(0, 2))  # of [9 d, C]
    return products.view(len(x), *x.shape[2:], TAPS, -1), sides[-2] if len(sides) > 1 else x.shape[-1]


def hidden_parts(x: Tensor, weight: Tensor, sides: Sequence[int], chunk: int) -> Iterator[tuple[int, Tensor]]:
    """The first convolution without its bias, [B, o, H, W] for each `chunk` of its channels, and where that begins."""
    side = x.shape[-1]
    matrices = stack_shifted_rows(resize_matrix(side, sides, x))
    across = matrices.permute(0, 2, 1).reshape(3 * side, -1)  # [3 w, W]
    down = matrices.permute(1, 2, 0).reshape(-1, 3 * side)  # [H, h 3], as the rows lie
    for start in range(0, len(weight), chunk):
        part = weight[start : start + chunk]
        taps = torch.einsum("bcyx,oclk->boylkx", x, part)  # y, x: cells; l, k: rows and columns of the 3x3 taps
        rows = taps.reshape(*taps.shape[:4], 3 * side) @ across  # [B, o, h, 3, W]
        yield start, down @ rows.reshape(len(x), len(part), 3 * side, -1)


@jit
def _depth_head_kernel(
    x_ptr,  # [B, O, S]: some of the hidden channels
    bias_ptr,  # [O]
    weight_ptr,  # [O, 9]
    planes_ptr,  # [B, 9, S] fp32: the product of each tap of the last convolution and every pixel
    hidden,
    cells,
    IS_FIRST: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    cell, tap = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_T)
    is_cell, is_tap = cell < cells, tap < TAPS
    place = (image * TAPS + tap)[:, None] * cells + cell[None, :]
    inside = is_tap[:, None] & is_cell[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    if not IS_FIRST:
        total = tl.load(planes_ptr + place, mask=inside, other=0.0)
    for start in range(0, hidden, BLOCK_O):
        channel = start + tl.arange(0, BLOCK_O)
        is_channel, row = channel < hidden, image * hidden + channel
        x = tl.load(
            x_ptr + row[:, None] * cells + cell[None, :], mask=is_channel[:, None] & is_cell[None, :], other=0.0
        )
        bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        y = tl.maximum(x.to(tl.float32) + bias[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)
        taps = channel[None, :] * TAPS + tap[:, None]
        weight = tl.load(weight_ptr + taps, mask=is_tap[:, None] & is_channel[None, :], other=0.0)
        total = tl.dot(weight, y, total, input_precision=PRECISION)
    tl.store(planes_ptr + place, total, mask=inside)


@jit
def _depth_head_last_kernel(
    planes_ptr,  # [B, 9, H, W] fp32
    bias_ptr,  # [1]
    out_ptr,  # [B, H, W]
    height,
    width,
    TAPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    image, cells = tl.program_id(1).to(tl.int64), height * width
    cell = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    row, column = cell // width, cell % width
    total = tl.zeros([BLOCK_S], tl.float32) + tl.load(bias_ptr).to(tl.float32)
    for tap in tl.static_range(TAPS):
        y, x = row + tap // 3 - 1, column + tap % 3 - 1
        inside = (cell < cells) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        total += tl.load(planes_ptr + (image * TAPS + tap) * cells + y * width + x, mask=inside, other=0.0)
    tl.store(out_ptr + image * cells + cell, total.to(out_ptr.dtype.element_ty), mask=cell < cells)


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """The result of `reference` from the products of `plain`, in one pass over the wide map."""
    fits = bias.shape == weight.shape[:1] and last_weight.shape == (1, len(weight), *weight.shape[2:])
    fits = fits and last_bias.shape == (1,)
    if not is_served("depth_head", x, weight, bias, last_weight, last_bias, fits=fits):
        return reference(x, weight, bias, last_weight, last_bias, sides)
    batch, side = len(x), sides[-1]
    cells = side * side
    taps = last_weight.flatten(2)[0].contiguous()  # [O, 9]
    planes = torch.empty((batch, TAPS, cells), dtype=torch.float32, device=x.device)
    out = x.new_empty((batch, 1, side, side))
    with torch.cuda.device_of(x):  # Triton launches on the current device of the thread
        for start, hidden in hidden_parts(x, weight, sides, WIDE_CHUNK):
            sizes, stop = blocks(BLOCKS, "depth_head", x), start + hidden.shape[1]
            _depth_head_kernel[ceil_divide(cells, sizes["BLOCK_S"]), batch](
                hidden.contiguous(),
                bias[start:stop],
                taps[start:stop],
                planes,
                hidden.shape[1],
                cells,
                IS_FIRST=start == 0,
                TAPS=TAPS,
                PRECISION=PRECISION,
                BLOCK_T=round_up(TAPS),
                **sizes,
            )
        sizes = blocks(BLOCKS, "depth_head last", x)
        _depth_head_last_kernel[ceil_divide(cells, sizes["BLOCK_S"]), batch](
            planes, last_bias, out, side, side, TAPS=TAPS, **sizes
        )
    return out


def native(
    x: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor, sides: Sequence[int]
) -> Tensor:
    """`reference` logits on a CPU, for inference: the nine products are matrix products, and csrc/depth_head.cpp adds
    them up without the wide map.

    Products in fp64 are added in fp64, all others in fp32.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias, last_weight, last_bias)):
        raise RuntimeError(
            "depth_head: the native form has no backward; run under torch.no_grad(), or train with the plain form"
        )
    if x.device.type != "cpu":
        raise ValueError(
            f"depth_head: the compiled form got a tensor on {x.device}, expected one on the CPU; use the plain form "
            "there"
        )
    wide, full = torch.promote_types(x.dtype, torch.float32), sides[-1]
    taps = last_weight.detach()[0].flatten(1).T.to(wide)  # [9, D]
    logits = last_bias.detach().to(wide).repeat(len(x), full, full)
    for start in range(0, len(weight), SLICE):
        part = slice(start, start + SLICE)
        products, middle = tap_products(x.detach(), weight.detach()[part], sides)
        products, some_bias = products.to(wide).numpy(), bias.detach()[part].to(wide).contiguous().numpy()
        some_taps = taps[:, part].contiguous().numpy()
        _C.depth_head_add(products, some_bias, some_taps, middle, logits.numpy(), torch.get_num_threads())
    return logits[:, None].to(x.dtype)


def probe() -> Probe:
    weights = noise(32, 32, 3, 3, scale=0.1), noise(32), noise(1, 32, 3, 3, scale=0.1), noise(1)
    return noise(1, 32, 16, 16), *weights, (40, 64)
