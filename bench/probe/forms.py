"""Single operations in every form a library or our kernels have of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernels.inputs import HEADS, LEVELS, TOKENS
from bench.machine.work import HALVES
from bench.probe.timing import Build, Inputs, row
from datasetdm_fast.engine.engines import device
from datasetdm_fast.engine.models.layers import Upsample, Weights
from datasetdm_fast.kernels import fused, reference

GROUPS, EPS = 32, 1e-5
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CONVOLUTIONS = (  # channels in and out, cells of a side, of the UNet
    (320, 320, 64),
    (640, 320, 64),
    (960, 320, 64),
    (640, 640, 32),
    (1280, 640, 32),
    (1920, 640, 32),
    (1280, 1280, 16),
    (2560, 1280, 16),
    (1280, 1280, 8),
)
UPSAMPLINGS = ((640, 32, HALVES), (1280, 16, HALVES), (512, 128, 1), (256, 256, 1))  # channels, side, rows an image

Rows = Iterator[dict[str, Any]]


def attention(inputs: Inputs) -> Rows:
    """Self-attention of every level, and attention to a text, per backend of PyTorch and as our kernel."""
    usual = F.scaled_dot_product_attention
    for side, channels in LEVELS:
        width, cells = channels // HEADS, (side // inputs.scale) ** 2
        for keys in (cells, TOKENS):

            def build(
                form: Callable[..., Tensor],
                within: Callable[[], AbstractContextManager],
                cells=cells,
                keys=keys,
                width=width,
            ):
                q = inputs.tensor(inputs.rows, cells, HEADS, width).transpose(1, 2)  # as products leave heads
                k, v = inputs.tensor(2, inputs.rows, keys, HEADS, width).transpose(2, 3)

                def call() -> Tensor:
                    with within():
                        return form(q, k, v)

                return call

            forms = {"usual": partial(build, usual, nullcontext)}
            if inputs.device.type == "cuda":
                forms |= {name: partial(build, usual, partial(sdpa_kernel, one)) for name, one in BACKENDS.items()}
                forms["ours"] = partial(build, fused.attention, nullcontext)
            yield row(f"attention of {cells} cells to {keys}, {width} wide", forms, inputs.device)


def convolutions(inputs: Inputs) -> Rows:
    """3x3 convolutions with the algorithm that cuDNN chooses for the engine, with the one of all that timing chooses,
    and with a bias.
    """
    for channels, out, side in CONVOLUTIONS:
        sizes = channels // inputs.scale, out // inputs.scale, side // inputs.scale

        def build(is_timed: bool, has_bias: bool, sizes=sizes):
            channels, out, side = sizes
            x, weight = inputs.image(inputs.rows, channels, side, side), inputs.image(out, channels, 3, 3)
            bias = inputs.tensor(out) if has_bias else None

            def call() -> Tensor:
                with timed_choice(is_timed):
                    return F.conv2d(x, weight, bias, padding=1)

            return call

        forms = {"cuDNN's choice": (False, False), "timed choice": (True, False), "with bias": (False, True)}
        built = {name: partial(build, *given) for name, given in forms.items()}
        yield row(f"convolution {channels} to {out}, {side} cells", built, inputs.device, sets=2)


@contextmanager
def timed_choice(is_timed: bool) -> Iterator[None]:
    """Within the block cuDNN chooses by timing among all algorithms, whatever an engine asks for, or by shape among
    deterministic ones, as an engine does.

    PyTorch keeps an algorithm by shape and by whether it had to be deterministic, not by how it was chosen: with the
    same wish, a choice by timing that follows one by shape would be that one.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    usual = mock.patch.object(device, "choose_by_shape") if is_timed else nullcontext()
    try:
        with usual:
            cudnn.benchmark, cudnn.deterministic = is_timed, not is_timed
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def upsampling(inputs: Inputs) -> Rows:
    """Doubling and a 3x3 convolution, as four 2x2 convolutions and as it is written."""
    for channels, side, halves in UPSAMPLINGS:
        width, images = channels // inputs.scale, inputs.rows * halves // HALVES
        side //= inputs.scale

        def folded(width=width, side=side, images=images):
            taps = {"weight": torch.randn(width, width, 3, 3), "bias": torch.randn(width)}
            layer = Upsample(Weights(taps)).to(inputs.device, inputs.dtype).to(memory_format=torch.channels_last)
            return partial(layer, inputs.image(images, width, side, side))

        def written(width=width, side=side, images=images):
            x, weight = inputs.image(images, width, side, side), inputs.image(width, width, 3, 3)
            bias = inputs.tensor(width)
            return lambda: F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)

        forms = {"four 2x2": folded, "as written": written}
        yield row(f"upsampling {channels} channels, {side} cells", forms, inputs.device, sets=2)


def products(inputs: Inputs) -> Rows:
    """The linear layers: bias, residual after it, residual inside the product, and in fp8."""
    for side, channels in LEVELS:
        cells, width = inputs.rows * (side // inputs.scale) ** 2, channels // inputs.scale
        for given, out in ((width, 8 * width), (4 * width, width), (width, width)):

            def build(kind: str, cells=cells, given=given, out=out):
                x, weight, bias = inputs.tensor(cells, given), inputs.tensor(out, given), inputs.tensor(out)
                rest = inputs.tensor(cells, out)
                if kind == "fp8":
                    one = torch.ones((), device=inputs.device)
                    x, weight = (value.to(torch.float8_e4m3fn) for value in (x, weight))
                    return lambda: torch._scaled_mm(x, weight.T, one, one, out_dtype=inputs.dtype, use_fast_accum=True)
                return {
                    "bias": lambda: F.linear(x, weight, bias),
                    "bias, then residual": lambda: F.linear(x, weight, bias).add_(rest),
                    "residual in the product": lambda: torch.addmm(rest, x, weight.T),
                }[kind]

            kinds = ["bias", "bias, then residual", "residual in the product"]
            kinds += ["fp8"] if inputs.device.type == "cuda" else []
            forms = {kind: partial(build, kind) for kind in kinds}
            yield row(f"product of {cells} rows, {given} to {out}", forms, inputs.device)


def norms(inputs: Inputs) -> Rows:
    """Group norm with SiLU, layer norm and GEGLU: our kernels and PyTorch's operations."""
    spaces = {"ours": fused, "PyTorch": reference} if inputs.device.type == "cuda" else {"PyTorch": reference}
    for side, channels in (*LEVELS, (8, 1280)):
        side //= inputs.scale
        width, cells = channels // inputs.scale, inputs.rows * side**2
        groups = GROUPS // inputs.scale

        def group_norm(space: Any, width=width, side=side, groups=groups):
            x, weight, bias = (
                inputs.image(inputs.rows, width, side, side),
                inputs.tensor(width),
                inputs.tensor(width),
            )
            return lambda: space.group_norm_silu(x, weight, bias, groups, EPS)

        def layer_norm(space: Any, width=width, cells=cells):
            x, weight, bias = inputs.tensor(1, cells, width), inputs.tensor(width), inputs.tensor(width)
            return lambda: space.layer_norm(x, weight, bias, EPS)

        def geglu(space: Any, width=width, cells=cells):
            return partial(space.geglu, inputs.tensor(1, cells, 8 * width))

        for name, op in {"group_norm_silu": group_norm, "layer_norm": layer_norm, "geglu": geglu}.items():
            found = {who: space for who, space in spaces.items() if hasattr(space, name)}
            forms: dict[str, Build] = {who: partial(op, space) for who, space in found.items()}
            yield row(f"{op.__name__}, {channels} channels, {side} cells", forms, inputs.device)
