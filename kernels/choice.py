"""Which form of each operation the fast engine runs on a device.

The choice is a table and no measurement at load: two ranks, or a run and its resumption, must not round differently
because one of them was busy. Rows for a GPU are written down from what `python -m bench kernels --tune` measured there.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import torch
from torch import Tensor

from datasetdm_fast.kernels import OPS, compiled, fused
from datasetdm_fast.kernels.launch import triton
from datasetdm_fast.models.plain import PLAIN

# Device name -> operation -> form. PyTorch's own attention is tuned for every GPU it knows, so it stays until a
# measured row says otherwise.
FORMS: dict[str, dict[str, str]] = {
    "cpu": {"attention": "compiled", "geglu": "compiled", "group_norm_silu": "compiled", "layer_norm": "compiled"},
    "untuned": {"attention_capture": "fused", "geglu": "fused", "group_norm_silu": "fused", "layer_norm": "fused"},
}
BUDGETS = {
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}  # relative L2 of a kernel's probe against fp32


def operations(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    """The operations of the lean models for `device`; a kernel that fails its probe there gives way to the plain form,
    with a warning.
    """
    if device.type == "cpu":
        chosen = FORMS["cpu"]
    elif triton is None:
        chosen = {}
    else:
        chosen = FORMS.get(torch.cuda.get_device_name(device), FORMS["untuned"])
    forms = {name: FORM[form](name) for name, form in chosen.items()}
    if device.type != "cpu":
        forms = {name: form for name, form in forms.items() if is_sound(name, form, device, dtype)}
    return SimpleNamespace(**{**vars(PLAIN), **forms})


def is_sound(name: str, form, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `form` says on `device` what the reference says of the operation's last case, the largest."""
    inputs = OPS[name].cases()[-1].inputs
    truth = _tensors(OPS[name].reference(*_on(inputs, torch.device("cpu"), torch.float32)))
    try:
        found = _tensors(form(*_on(inputs, device, dtype)))
        worst = max(
            float((one.float().cpu() - right).norm() / right.norm()) for one, right in zip(found, truth, strict=True)
        )
    except Exception as error:  # whatever a compiler or driver throws: the plain form always runs
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    else:
        if worst <= BUDGETS[dtype]:
            return True
        said = f"relative error {worst:.1e}, expected at most {BUDGETS[dtype]:.0e}"
    warnings.warn(
        f"kernel {name} does not work on {device} ({said}); the plain form is used", RuntimeWarning, stacklevel=3
    )
    return False


def memory_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers' attention."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


FORM = {
    "compiled": lambda name: getattr(compiled, name),
    "fused": lambda name: getattr(fused, name),
    "plain": lambda name: getattr(PLAIN, name),
    "xformers": {"attention": memory_efficient}.__getitem__,
}


def _on(inputs, device: torch.device, dtype: torch.dtype) -> list:
    return [x.to(device, dtype) if isinstance(x, Tensor) else x for x in inputs]


def _tensors(value) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value
