"""Launches, bytes, operations and milliseconds of a noted call on a stated GPU: reckoned, not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.rehearsal.operations import ATTENTION
from bench.rehearsal.timeline import Operation
from datasetdm_fast.kernels.attention import library_width, split
from datasetdm_fast.kernels.depth_head import TAPS
from datasetdm_fast.kernels.launch import round_up

# What kernels reached on an H200, one by one (bench/README.md): bytes a second, of 4.2e12 that a copy moves; operations
# a second; and seconds a launch, what a graph took beyond its kernels.
MEMORY = 2.8e12
CONVOLUTIONS, PRODUCTS, ATTENTIONS = 700e12, 620e12, 450e12
OWN = 450e12  # Triton's tiles, without TMA
ATTENTION_CALLS = (ATTENTION, *(f"triton attention_{name}" for name in ("capture", "average", "rows", "shares")))
OWN_PRODUCTS = tuple(
    f"triton {name}" for name in ("described_product", "linear_add", "linear_geglu", "linear_norm", "mask_embedding")
)
TF32_CONVOLUTIONS, FP32_PRODUCTS = 300e12, 48e12
LAUNCH = 7e-6
TILE, CORES = 128, 132  # a product is computed in tiles of 128 x 128, 132 at a time
STATED = (
    f"{MEMORY / 1e12:g} TB/s of bandwidth, {LAUNCH * 1e6:g} µs per launch and, in TFLOP/s, {CONVOLUTIONS / 1e12:g} for "
    f"convolutions, {PRODUCTS / 1e12:g} for matrix products (our own {OWN / 1e12:g}), {ATTENTIONS / 1e12:g} for "
    f"attention on padded tiles, in fp32 {TF32_CONVOLUTIONS / 1e12:g} (convolutions, TF32) and "
    f"{FP32_PRODUCTS / 1e12:g} (products)"
)


@dataclass(frozen=True)
class Reckoning:
    """One call."""

    launches: int
    gigabytes: float
    tflop: float
    milliseconds: float


def reckon(launches: Sequence[Operation]) -> Reckoning:
    return Reckoning(
        sum(one.kernels for one in launches),
        round(sum(one.moved for one in launches) / 1e9, 3),
        round(sum(one.flops for one in launches) / 1e12, 4),
        round(sum(map(seconds, launches)) * 1e3, 3),
    )


def seconds(one: Operation) -> float:
    """The slower of its work and its traffic, and its launches."""
    return max(one.flops / rate(one) if one.flops else 0.0, one.moved / MEMORY) + LAUNCH * one.kernels


def rate(one: Operation) -> float:
    is_wide = one.dtype == "float32"
    if one.name == "convolution":
        (batch, _, height, width), (outputs, *_) = one.shapes[:2]
        return (TF32_CONVOLUTIONS if is_wide else CONVOLUTIONS) * busy(batch * height * width, outputs)
    if one.name in ATTENTION_CALLS:
        width = one.shapes[0][-1]
        return (FP32_PRODUCTS if is_wide else ATTENTIONS) * width / library_width(width)
    if one.name == "triton attention":
        width = one.shapes[0][-1]
        return (FP32_PRODUCTS if is_wide else ATTENTIONS) * width / sum(split(width))
    if one.name == "triton query_attention":  # heads that fill half a tile of such kernels
        return FP32_PRODUCTS if is_wide else ATTENTIONS / 2
    if one.name == "triton depth_head":
        return (FP32_PRODUCTS if is_wide else OWN) * TAPS / round_up(TAPS)
    if one.name in OWN_PRODUCTS:
        (*batch, _), (columns, *_) = one.shapes[:2]
        return (FP32_PRODUCTS if is_wide else OWN) * busy(math.prod(batch), columns)
    if len(one.shapes) < 2:
        return FP32_PRODUCTS
    *_, (*batch, rows, _), (*_, columns) = one.shapes
    return (FP32_PRODUCTS if is_wide else PRODUCTS) * busy(rows * math.prod(batch), columns)


def busy(rows: int, columns: int) -> float:
    """The share of the cores' time that goes into tiles: the last round of them is rarely full."""
    tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
    return max(tiles / (math.ceil(tiles / CORES) * CORES), 0.1)
