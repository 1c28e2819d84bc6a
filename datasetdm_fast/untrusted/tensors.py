"""Safetensors files of unknown origin: the header is checked before a tensor is read; weights are finite and fit."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted.documents import GET_AGAIN, reason_of

if TYPE_CHECKING:
    from torch import Tensor

MOST_LISTED = 8  # tensors that a message names one by one


def check_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a safetensors file, whose header, sizes and ranges its library found to hold
    together.
    """
    with storage.refusing(path), path.open("rb"):  # the library's own errors say less of a file that is not there
        pass
    try:
        with safe_open(path, "np") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in tensors.items()}
    except SafetensorError as error:
        raise Refused(f"{path} is truncated or not a safetensors file ({reason_of(error)})", GET_AGAIN) from error


def check_finite(state: Mapping[str, "Tensor"], origin: str) -> None:
    """Refuses weights with NaN or infinite values, by the first tensor that has one."""
    for name, value in state.items():
        if value.is_floating_point() and value.itemsize == 1:  # of which torch sums and asks none
            value = value.float()
        # a sum reads them once, and is finite only where all are
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
            raise Refused(f"{origin}{name} holds NaN or infinite values, so the weights are damaged", GET_AGAIN)


def check_fit(
    expected: Mapping[str, "Tensor"], state: Mapping[str, "Tensor"], origin: str, what: str, remedy: str
) -> None:
    """Refuses a state that has not exactly the expected tensors, by every one that differs."""
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "shape": [
            f"{name} {list(state[name].shape)} for {list(expected[name].shape)}"
            for name in sorted(expected.keys() & state.keys())
            if state[name].shape != expected[name].shape
        ],
    }
    if wrong := [f"{label}: {', '.join(_first_names(names))}" for label, names in problems.items() if names]:
        count = sum(map(len, problems.values()))
        raise Refused(
            f"{origin}: {count} tensor{' does' if count == 1 else 's do'} not fit {what}; {'; '.join(wrong)}", remedy
        )


def _first_names(names: list[str]) -> list[str]:
    """Tensors for a message: each, or where they are many the modules they belong to, with how many of each."""
    if len(names) <= MOST_LISTED:
        return names
    return [f"{module} ({count})" for module, count in Counter(name.split(".")[0] for name in names).items()]
