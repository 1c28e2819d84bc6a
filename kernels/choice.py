"""Which form of each operation runs on a device.

The choice is written in each op's file, in its DEVICES, and not measured at load: two ranks, or a run and its
resumption, must not round differently because one of them was busy. Rows for a GPU are written down from what
`python -m bench kernels --tune` measured there.
"""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.kernels import OPS, fused, native, plain, reference
from datasetdm_fast.kernels.launch import names_of

FORM = {"reference": reference, "plain": plain, "native": native, "fused": fused}
OF_THE_LOOP = ("guided_step",)  # fp32 whatever the networks are stored as
BUDGETS = {
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}  # relative L2 of a kernel's probe against fp32


def form_on(op: str, *names: str) -> str:
    """The name of the form of `op` on the device of these names, the first that has a row; see `names_of`."""
    rows = getattr(OPS[op], "DEVICES", {})
    return next((rows[name] for name in names if name in rows), "plain")


def form_of(op: str, device: torch.device) -> Callable[..., Any]:
    return getattr(FORM[form_on(op, *names_of(device))], op)


def operations(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    """The operations for `device`; a kernel that fails its probe there warns and gives way to the plain form."""
    forms = {op: form_of(op, device) for op in OPS if op not in OF_THE_LOOP}
    for op, form in forms.items():
        if device.type != "cpu" and form is not getattr(plain, op) and not is_sound(op, form, device, dtype):
            forms[op] = getattr(plain, op)
    return SimpleNamespace(**forms)


def gave_way(operations: SimpleNamespace, device: torch.device) -> list[str]:
    """The operations whose kernel failed its probe on `device`."""
    return [op for op, form in vars(operations).items() if form is not form_of(op, device)]


def is_sound(name: str, form: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `form` returns on `device` the result of the reference, for the inputs of the operation's probes."""
    module, errors = OPS[name], list[float]()
    probes = [module.probe(), *([module.described_probe()] if hasattr(module, "described_probe") else [])]
    truths = [_tensors(module.reference(*_on(inputs, torch.device("cpu"), torch.float32))) for inputs in probes]
    try:
        for inputs, truth in zip(probes, truths, strict=True):
            pairs = zip(_tensors(form(*_on(inputs, device, dtype))), truth, strict=True)
            errors += [float((output.float().cpu() - right).norm() / right.norm()) for output, right in pairs]
        worst = max(errors, key=lambda error: (error != error, error))  # no number is the worst of all
    except Exception as error:  # whatever a compiler or driver throws: the plain form always runs
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    else:
        if worst <= BUDGETS[dtype]:
            return True
        reason = f"relative error {worst:.1e}, expected at most {BUDGETS[dtype]:.0e}"
    warnings.warn(
        f"kernel {name} does not work on {device} ({reason}); the plain form is used", RuntimeWarning, stacklevel=3
    )
    return False


def _on(inputs, device: torch.device, dtype: torch.dtype) -> Any:
    """`inputs` of an op on a device, floating tensors in `dtype`."""
    return type(inputs)(
        x.to(device, dtype) if isinstance(x, Tensor) else _on(x, device, dtype) if isinstance(x, (list, tuple)) else x
        for x in inputs
    )


def _tensors(value) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value
