"""3x3 convolutions on a CPU with a quarter of the products, by Winograd's minimal filtering F(4x4, 3x3).

Lavin & Gray (2016), eq. 8: Y = A^T [(G g G^T) * (B^T d B)] A, of taps g [3, 3] and tiles d [6, 6] of cells, `*` element
by element. G is here, as weights are transformed once; B^T and A^T are in csrc/winograd_rows.h.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.cpu import STORAGES, multiplies_tiles, pair_inputs, threads

PANEL = 16  # outputs that lie side by side in the weight, and what channels and outputs must be multiples of
TRAINED_CELLS = 2**7  # of an image; with fewer the weight is transformed, thrice a step, for too little
# G for the points 0, +-1/2, +-3/2 and infinity; csrc/winograd.cpp has it, too.
G = (
    (16 / 9, 0, 0),
    (-1, -1 / 2, -1 / 4),
    (-1, 1 / 2, -1 / 4),
    (1 / 9, 1 / 6, 1 / 4),
    (1 / 9, -1 / 6, 1 / 4),
    (0, 0, 1),
)
G_PAIRED = (1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)  # G of F(4x2, 3x3), along rows in bf16
_BUFFERS: dict[int, Tensor] = {}  # memory of each thread, by its number


def takes(weight: Tensor) -> bool:
    """Whether `convolve` has a form of this weight that is faster; in bf16 half a pair of panels is not, and nothing is
    where a CPU multiplies tiles (AMX).
    """
    outputs, channels, *taps = weight.shape
    if weight.dtype not in STORAGES:
        return False
    if (weight.dtype == torch.bfloat16 and outputs <= PANEL) or multiplies_tiles(weight.dtype):
        return False
    return taps == [3, 3] and outputs % PANEL == channels % PANEL == 0


def _panels(outputs: int) -> int:
    """An even number, as the widest vectors take two panels."""
    return -(-outputs // (2 * PANEL)) * 2


def transform_weight(weight: Tensor) -> Tensor:  # [36, P, I, 16] of [O, I, 3, 3]; of a bf16 weight `transform_in_pairs`
    """G g G^T of every pair of channels, as `convolve` reads it, computed in fp64."""
    if weight.dtype == torch.bfloat16:
        return transform_in_pairs(weight)
    outputs, channels = weight.shape[:2]
    transformed = torch.empty(36, _panels(outputs), channels, PANEL)
    weight = weight.detach().contiguous(memory_format=torch.channels_last)
    _C.winograd_weight(weight.data_ptr(), transformed.data_ptr(), channels, outputs, threads(transformed))
    return transformed


def transform_in_pairs(weight: Tensor) -> Tensor:  # [24, P, I / 2, 16, 2] bf16 of [O, I, 3, 3]
    """G_PAIRED g G^T in bf16, its inputs in pairs, as dot products of bf16 pairs read them."""
    taps = F.pad(weight.detach().double().permute(2, 3, 1, 0), (0, -len(weight) % (2 * PANEL))).flatten(0, 1)
    columns, rows = taps.new_tensor(G), taps.new_tensor(G_PAIRED)
    products = torch.einsum("pt,tio->pio", torch.kron(columns, rows), taps)
    return pair_inputs(products.unflatten(-1, (-1, PANEL)).transpose(1, 2))


def in_panels(weight: Tensor) -> Tensor:  # [P, 9, I, 16] of [O, I, 3, 3], in bf16 [P, 9, I / 2, 16, 2]
    """The weight as `convolve` reads it where it is transformed at every call, in the memory of the plain one."""
    outputs, channels = weight.shape[:2]
    panels = torch.empty(_panels(outputs), 9, channels, PANEL, dtype=weight.dtype)
    count = outputs // PANEL
    panels[:count].unflatten(1, (3, 3)).copy_(weight.detach().unflatten(0, (count, PANEL)).permute(0, 3, 4, 2, 1))
    panels[count:] = 0
    return pair_inputs(panels) if weight.dtype == torch.bfloat16 else panels


def from_panels(panels: Tensor, outputs: int) -> Tensor:
    """The weight that `in_panels` was given."""
    if panels.dtype == torch.bfloat16:
        panels = panels.transpose(-1, -2).flatten(-3, -2)  # see pair_inputs
    return panels.permute(0, 3, 2, 1).flatten(0, 1)[:outputs].unflatten(-1, (3, 3))


def _memory(size: int) -> Tensor:
    """So many numbers of this thread, until its next call."""
    thread = threading.get_ident()
    if (buffer := _BUFFERS.get(thread)) is None or len(buffer) < size:
        del buffer  # before the larger one is there
        _BUFFERS.pop(thread, None)
        buffer = _BUFFERS[thread] = torch.empty(size)
    return buffer


def free_buffers() -> None:
    """Frees what the threads keep."""
    _BUFFERS.clear()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, is_doubled: bool = False
) -> Tensor:
    """F.conv2d of channels-last `x` [B, I, h, w] with padding 1, plus `residual`; where `is_doubled`, of `x` with every
    cell doubled along both axes. The weight is `transform_weight` or `in_panels`, of the type of `x`.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    if is_doubled:
        height, width = 2 * height, 2 * width
    out = torch.empty((batch, len(bias), height, width), memory_format=torch.channels_last, dtype=x.dtype)
    panels, inner = weight.shape[0 if weight.shape[1] == 9 else 1], weight.shape[2] * (weight.ndim - 3)
    if x.dtype != weight.dtype or inner != channels or panels != _panels(len(bias)):
        raise ValueError(f"convolve: {x.dtype} of {channels} channels, bias of {len(bias)}, weight {[*weight.shape]}")
    if residual is not None and (residual.dtype != x.dtype or residual.shape != out.shape):
        raise ValueError(f"convolve: residual {residual.dtype} {[*residual.shape]}, expected {x.dtype} {[*out.shape]}")
    bias = bias.float().contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    places = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), 0 if residual is None else residual.data_ptr()
    sizes, count = (batch, height, width, channels, len(bias)), threads(out, 2 * channels)
    if weight.shape[1] != 9:  # the number of panels is even
        _C.winograd(*places, out.data_ptr(), *sizes, is_doubled, STORAGES[x.dtype], count)
    else:
        memory = _memory(_C.winograd_memory(*sizes[:-1], STORAGES[x.dtype], count))
        _C.winograd_taps(*places, out.data_ptr(), memory.data_ptr(), *sizes, is_doubled, STORAGES[x.dtype], count)
    return out


def gradient(x: Tensor, out: Tensor) -> Tensor:
    """The weight's gradient [O, I, 3, 3] from `x` [B, I, h, w] and that of its convolution [B, O, h, w]."""
    x, out = (image.contiguous(memory_format=torch.channels_last) for image in (x, out))
    (batch, channels, height, width), outputs = x.shape, out.shape[1]
    products, rows = torch.empty(len(G) ** 2, channels * outputs), x.new_tensor(G)
    sizes = batch, height, width, channels, outputs
    _C.winograd_gradient(x.data_ptr(), out.data_ptr(), products.data_ptr(), *sizes, threads(x, 2 * outputs))
    return (torch.kron(rows, rows).T @ products).view(3, 3, channels, outputs).permute(3, 2, 0, 1)


def transform_taps(taps: Tensor) -> Tensor:
    """`transform_weight` of a weight whose taps are given as [3, 3, I, O], in a third of its time."""
    channels, outputs = taps.shape[2:]
    taps = F.pad(taps, (0, -outputs % (2 * PANEL))).reshape(9, channels, -1, PANEL).transpose(1, 2)
    rows = taps.new_tensor(G)
    return (torch.kron(rows, rows) @ taps.reshape(9, -1)).view(len(G) ** 2, -1, channels, PANEL)


class _TrainedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, transform_taps(weight.permute(2, 3, 1, 0)), bias)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (x, weight), (out,) = ctx.saved_tensors, gradients
        back = transform_taps(weight.flip(2, 3).permute(2, 3, 0, 1))
        return convolve(out, back, weight.new_zeros(x.shape[1])), gradient(x, out), out.sum((0, 2, 3))


def convolve_trained(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d with padding 1 for training, in fp32 on a CPU with a quarter of the products."""
    is_large = x.shape[-2] * x.shape[-1] >= TRAINED_CELLS
    is_exact = x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if is_exact and is_large and takes(weight):
        return _TrainedConvolution.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)
