"""GPUs that this process may use, and the memory of a device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasetdm_fast.errors import Missing, Refused

if TYPE_CHECKING:
    import torch


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def select_gpus(selection: str, visible: Sequence[str]) -> list[str]:
    """The visible GPUs that the value of --gpus selects."""
    if selection == "all":
        numbers = list(range(len(visible)))
    elif selection.isdecimal() and int(selection):
        numbers = list(range(int(selection)))
    else:
        words = [word.strip() for word in selection.split(",") if word.strip()]
        if selection == "0" or not words or not all(map(str.isdecimal, words)) or len(set(words)) < len(words):
            raise Refused(
                f"--gpus {selection}: expected all, a number from 1, or a list of different numbers such as 0,2,5",
                "Write a list of one GPU with a comma, as 3,",
            )
        numbers = [int(word) for word in words]
    if not visible or max(numbers, default=0) >= len(visible):
        raise Missing(
            f"--gpus {selection}: there are {len(visible)} GPUs here",
            "Ask for fewer, or see CUDA_VISIBLE_DEVICES; --ranks N shares a CPU.",
        )
    return [visible[number] for number in numbers]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return names[:count] if names else [str(number) for number in range(count)]
