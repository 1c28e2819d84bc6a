"""Every operation of kernels/ in the form this machine uses, against the reference that defines it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.machine.limits import nearest_limit, rate
from bench.machine.measure import distance
from bench.machine.work import flops
from bench.peers.upstream import arithmetic
from datasetdm_fast.engines.fast import DTYPES
from datasetdm_fast.kernels import OPS
from datasetdm_fast.kernels.choice import FORM, chosen

FLOOR = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}  # relative L2 that rounding alone explains
OWN_DRIFT = 2.0  # times what the reference itself loses in the same type
SMALL = 2**24  # bytes of inputs
ATTENTIONS = ("attention", "masked_attention", "attention_capture")


def rows(device: torch.device, dtype: str, limits: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """A row for each operation and case, and on a GPU for each of its kernels; those that differ too much from the
    reference are failed and not timed.
    """
    return [row for op in OPS for row in op_rows(op, forms_of(op, device), device, dtype, limits, seconds)]


def forms_of(op: str, device: torch.device) -> dict[str, Callable]:
    """What the engine runs on the device, under the name `engine`, and on a GPU the kernel it does not run."""
    found = {"engine": chosen(op, device)}
    if device.type == "cuda" and hasattr(FORM["fused"], op):
        found["fused"] = getattr(FORM["fused"], op)
    kept, forms = {OPS[op].reference}, {}
    for name, form in found.items():
        if form not in kept:
            kept.add(form)
            forms[name] = form
    return forms


def op_rows(
    op: str,
    forms: dict[str, Callable],
    device: torch.device,
    dtype: str,
    limits: dict[str, Any],
    seconds: float,
) -> Iterator[dict[str, Any]]:
    reference = OPS[op].reference
    cases = [(reason, placed(inputs, device, DTYPES[dtype])) for reason, inputs in cases_of(op, device)]
    largest = max(moved(inputs) for _, inputs in cases)
    for name, form in forms.items():
        for reason, inputs in cases:
            try:
                row = judged(op, reference, form, inputs, dtype)
            except torch.OutOfMemoryError:
                row = {"status": "absent", "why": "not enough memory for the reference"}
            row |= {"op": op, "case": reason, "form": name, "dtype": dtype}
            if row["status"] == "ok" and (device.type == "cuda" or moved(inputs) == largest):
                row |= times(op, reference, form, inputs, device, dtype, limits, seconds)
            yield row


def cases_of(op: str, device: torch.device) -> Iterator[tuple[str, tuple]]:
    """The cases it is tested on; on a GPU also the sizes of Stable Diffusion 1.x."""
    for case in OPS[op].cases():
        yield case.reason, case.inputs
    if device.type == "cuda":
        yield from getattr(OPS[op], "sizes", lambda empty: ())(RandomInputs(device))


class RandomInputs:
    """Tensors of a shape, filled on the device."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device) * shape[-1] ** -0.5


def judged(op: str, reference: Callable, form: Callable, inputs: tuple, dtype: str) -> dict[str, Any]:
    """The distance to the reference in fp64, and what it may be, of the form as an engine calls it: where nobody wants
    gradients.
    """
    with arithmetic(has_tf32=False), torch.inference_mode():
        wide, limit = limit_of(reference, inputs, dtype)
        try:
            found = outputs(form, inputs)
        except Exception as error:  # of whatever kind: the row is what says it
            return {"status": "failed", "why": f"{op}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        error = max((distance(a, b) for a, b in zip(found, wide, strict=True)), default=0.0)
    is_right = error <= limit and all(a.shape == b.shape for a, b in zip(found, wide))
    why = {} if is_right else {"why": f"{op}: differs from its reference by {error:.1e}, expected at most {limit:.1e}"}
    return {"status": "ok" if is_right else "failed", "error": error, "limit": limit, **why}


def limit_of(reference: Callable, inputs: tuple, dtype: str) -> tuple[list[Tensor], float]:
    """The reference's answer in a wider type, and how far from it a form in `dtype` may lie."""
    exact = (
        torch.float64 if moved(inputs) < SMALL else torch.float32
    )  # at model sizes fp64 would take minutes and all of the memory
    wide, own = outputs(reference, placed(inputs, None, exact)), outputs(reference, inputs)
    return wide, OWN_DRIFT * max(distance(a, b) for a, b in zip(own, wide, strict=True)) + FLOOR[dtype]


def times(
    op: str,
    reference: Callable,
    form: Callable,
    inputs: tuple,
    device: torch.device,
    dtype: str,
    limits: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    with torch.inference_mode():
        made = outputs(form, inputs)
        work, traffic = flops(lambda: reference(*inputs)), moved(inputs) + moved(tuple(made))
        each = [1 / rate(functools.partial(one, *inputs), device, seconds) for one in (reference, form)]
    exps = inputs[0].shape[:3].numel() * inputs[1].shape[2] if op in ATTENTIONS else 0
    return {
        "plain_s": each[0],
        "form_s": each[1],
        "ratio": round(each[0] / each[1], 3),
        **nearest_limit(work, traffic, exps, each[1], limits, dtype),
    }


def placed(value: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """Inputs of an op on a device, floating tensors in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(device or value.device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(placed(one, device, dtype) for one in value)
    return value


def outputs(form: Callable, inputs: tuple) -> list[Tensor]:
    answer = form(*inputs)
    return [answer] if isinstance(answer, Tensor) else list(answer)


def moved(value: Any) -> int:
    """Bytes of all tensors of a nested tuple or list."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(moved(one) for one in value) if isinstance(value, (list, tuple)) else 0
