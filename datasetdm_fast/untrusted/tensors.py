"""Safetensors files of unknown origin: the header is checked before a byte of the tensors is read."""

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted.documents import GET_AGAIN, LONGEST_NAME, parse_json, quote

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_HEADER = 16 * 2**20  # bytes of a safetensors header
MOST_TENSORS = 20_000
MOST_LISTED = 8  # tensors that a message names one by one
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8},
}


def check_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a safetensors file whose header, sizes and ranges are consistent."""
    with storage.refusing(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise Refused(
                f"{path} is truncated or not a safetensors file (a header of {length} bytes in a file of {size})",
                GET_AGAIN,
            )
        header = parse_json(file.read(length), f"{path}: its header")
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise Refused(
            f"{path} is truncated or not a safetensors file (its header is no table of at most {MOST_TENSORS} tensors)",
            GET_AGAIN,
        )
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise Refused(f"{path}: its metadata holds something other than texts", GET_AGAIN)
    tensors, ranges = {}, []
    for name, entry in header.items():
        kind, shape, begin, end = _tensor(entry, name, path)
        tensors[name] = (kind, shape)
        ranges.append((begin, end))
    place = 0
    for begin, end in sorted(ranges):
        if begin != place:
            raise Refused(f"{path}: tensors overlap or leave a gap at byte {place} of the data", GET_AGAIN)
        place = end
    if place != size - 8 - length:
        raise Refused(
            f"{path} is truncated or not a safetensors file ({size - 8 - length} bytes of data, the header tells of "
            f"{place})",
            GET_AGAIN,
        )
    return tensors


def _tensor(entry: Any, name: str, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        holds = (
            len(name) <= LONGEST_NAME
            and len(shape) <= 16
            and all(type(number) is int and 0 <= number < 2**48 for number in numbers)
        )
        holds = holds and end - begin == math.prod(shape) * ITEM_BYTES[kind]
    except (KeyError, TypeError, ValueError):
        holds = False
    if not holds:
        raise Refused(f"{path}: the header's entry for {quote(name)} is inconsistent", GET_AGAIN)
    return kind, shape, begin, end


def check_finite(state: Mapping[str, "Tensor"], origin: str) -> None:
    """Refuses weights with NaN or infinite values, by the first tensor that has one."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
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
