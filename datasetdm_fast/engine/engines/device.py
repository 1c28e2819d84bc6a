"""Which device an engine runs on, and the settings of PyTorch that decide how its calls round."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from datasetdm_fast.errors import Missing, Refused

Method = TypeVar("Method", bound=Callable[..., Any])


def resolve_device(name: str) -> torch.device:
    """The device `name` stands for; "auto" is the first GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Refused(
            f"device: {name!r} is none of auto, cpu, cuda, cuda:N", "Choose one of these with --device, such as cuda:0."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Missing(
            f"device: {name} is not available, this machine has {torch.cuda.device_count()} CUDA devices",
            "Use --device cpu or --device auto.",
        )
    return device


def half_of(device: torch.device) -> str:
    """The half precision that is fast on `device`, "" where none is."""
    if device.type == "cuda":
        return "fp16"
    return "bf16" if multiplies_bf16(device) else ""


def slow_in_fp16(setting: str) -> Refused:
    """The refusal of fp16 on a CPU."""
    return Refused(
        f"{setting}: fp16 convolutions take a CPU hundreds of times longer than fp32 ones",
        "Use --dtype bf16 or --dtype fp32.",
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for products of bf16; GPUs before Ampere only emulate them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def multiplies_fp8(device: torch.device) -> bool:
    """Whether products of fp8 run there; a CPU rounds as a GPU does, and is slow."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def allow_tf32(device: torch.device, is_allowed: bool) -> None:
    """Whether convolutions in fp32 round their factors to TF32 on a GPU, as PyTorch by itself lets them; products never
    do. The setting is the process's and is not put back: another thread of the engine may be in the middle of a call.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = is_allowed, False


def choose_by_shape(device: torch.device) -> None:
    """Lets cuDNN choose by shape and GPU alone, among algorithms that round alike every time: a choice by timing, which
    a program around the engine may have asked for, differs from rank to rank. The setting is the process's.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def engine_call(method: Method) -> Method:
    """A call of an engine: without gradients, with algorithms that round alike every time, and with TF32 only where the
    engine's precision is another than fp32.
    """

    @functools.wraps(method)
    def call(engine: Any, *arguments: Any, **options: Any) -> Any:
        allow_tf32(engine.device, engine.precision != "fp32")
        choose_by_shape(engine.device)
        with torch.inference_mode():
            return method(engine, *arguments, **options)

    return call  # type: ignore[return-value]
