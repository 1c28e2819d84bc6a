"""The rate of every distinct convolution and linear layer of the UNet, timed alone: what a network of such layers could
reach.
"""

from collections import Counter
from collections.abc import Callable
from itertools import cycle
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.machine.limits import TYPES, nearest_limit, rate
from bench.machine.work import HALVES, flops
from bench.peers.upstream import arithmetic
from bench.report import charts
from bench.report.tables import Table, figure, share, text
from bench.rows.measurement import BenchRun, Measurement, Rows
from bench.setting import Setting
from datasetdm_fast.engine.engines.fast.engine import DTYPES, resolve_precision
from datasetdm_fast.stages import FACTOR

UNCACHED, MOST_COPIES = 256 * 2**20, 64  # bytes no GPU's cache holds, and inputs that are made for it at most
MOST_LAYERS = 12  # that the table shows, those that most of the work is in
LIMIT_IMAGES = (1, 8)  # at which the largest layers are timed for the limits


class TimedLayer(NamedTuple):
    """One shape of layer: its input for one image, and the weight."""

    given: tuple[int, ...]  # without the batch
    weight: tuple[int, ...]
    stride: int

    @property
    def name(self) -> str:
        outputs, inputs, *kernel = self.weight
        if not kernel:
            return f"linear {inputs} to {outputs}, {self.given[0]} tokens"
        stride = " halved" if self.stride == 2 else ""
        return f"conv {kernel[0]}x{kernel[0]} {inputs} to {outputs}, {self.given[1]} cells{stride}"

    @property
    def work(self) -> int:
        """Multiplications for one image."""
        places = prod(self.given[1:]) // self.stride**2 if len(self.weight) > 2 else self.given[0]
        return places * prod(self.weight)


def rows(run: BenchRun) -> Rows:
    """One row a shape at our best batch, with the share of a call's work that it stands for; the largest first."""
    found = shapes(run.setting)
    timed = [row(layer, count, run, run.seconds / 10 / len(found)) for layer, count in found.items()]
    whole = sum(one["count"] * one["gflop"] for one in timed)
    for one in timed:
        one["of_work"] = round(one["count"] * one["gflop"] / whole, 4)
    return sorted(timed, key=lambda one: -one["of_work"])


def shapes(setting: Setting) -> Counter[TimedLayer]:
    """Every layer shape of one UNet call, with how often it comes."""
    unet, seen = setting.model.modules["unet"], Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _) -> None:
        stride = module.stride[0] if isinstance(module, nn.Conv2d) else 1
        given = tuple(inputs[0].shape[1:])
        if isinstance(module, nn.Conv2d) or len(given) == 2:  # the time embedding's are no tokens
            seen[TimedLayer(given, tuple(module.weight.shape), stride)] += 1

    layers = [module for module in unet.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [module.register_forward_hook(note) for module in layers]
    side, width = setting.recipe.size // FACTOR, setting.model.text_width
    shaped = (1, 4, side, side), (1, setting.model.levels[0].tokens, width)
    latents, context = (torch.zeros(shape, device=setting.device) for shape in shaped)
    try:
        with torch.inference_mode():
            unet(latents, 1, context)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def fastest(setting: Setting, dtype: str, seconds: float) -> float:
    """Operations a second of the fastest of the largest layers, in one of the types of limits.TYPES."""
    storage, has_tf32 = TYPES[dtype]
    rates = []
    with arithmetic(has_tf32), torch.inference_mode():
        largest = sorted(shapes(setting), key=lambda layer: layer.work, reverse=True)[:MOST_LAYERS]
        for layer in largest:
            for images in LIMIT_IMAGES:
                call, _ = prepared(layer, HALVES * images, setting.device, storage)
                rates.append(flops(call) * rate(call, setting.device, seconds / len(largest) / len(LIMIT_IMAGES)))
    return max(rates)


def row(layer: TimedLayer, count: int, run: BenchRun, seconds: float) -> dict[str, Any]:
    device, batch, dtype = run.setting.device, run.batch, resolve_precision("auto", run.setting.device)
    call, moved = prepared(layer, HALVES * batch, device, DTYPES[dtype])
    with torch.inference_mode():
        work, taken = flops(call), 1 / rate(call, device, seconds)
    facts = {"layer": layer.name, "count": count, "dtype": dtype, "batch": batch}
    facts |= {"gflop": round(work / batch / 1e9, 4), "layer_s": taken / batch}
    return facts | nearest_limit(work, moved, 0, taken, run.limits, dtype)


def prepared(
    layer: TimedLayer, rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], int]:
    """The layer with its bias on so many inputs, and the bytes it reads and writes. On a GPU every call has inputs that
    have left the cache since they were used, as in a network.
    """
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, *layer.given), layer.weight))
    bias = torch.randn(layer.weight[0], device=device).to(dtype)
    if len(layer.weight) > 2:
        x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))
    count = min(-(-UNCACHED // size_of(x)), MOST_COPIES) if device.type == "cuda" else 1
    inputs = cycle([x, *(x.clone() for _ in range(count - 1))])

    def call() -> Tensor:
        if len(layer.weight) == 2:
            return F.linear(next(inputs), weight, bias)
        return F.conv2d(next(inputs), weight, bias, stride=layer.stride, padding=layer.weight[2] // 2)

    with torch.inference_mode():
        return call, sum(map(size_of, (x, weight, bias, call())))


def size_of(value: Tensor) -> int:
    return value.numel() * value.element_size()


COLUMNS = {"layer": text("layer"), "count": text("count"), "share of work": share("of_work")}
COLUMNS |= {"precision": text("dtype"), "batch": text("batch"), "ms/image": figure("layer_s", 1e3)}
COLUMNS |= {"TFLOP/s": figure("tflops"), "GB/s": figure("gbps"), "bound by": text("bound")}
COLUMNS |= {"share of limit": share("share")}
MEASUREMENT = Measurement(
    "layers",
    "The largest layers of the UNet, timed alone",
    rows,
    (Table(COLUMNS, lambda found: found[:MOST_LAYERS]),),
    {"roofline": charts.roofline},
    least_seconds=30,
)
