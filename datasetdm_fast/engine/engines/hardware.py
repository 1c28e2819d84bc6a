"""GPUs that this process may use."""

from __future__ import annotations

import os
from collections.abc import Sequence

from datasetdm_fast.errors import Missing, Refused


def choose(asked: str, visible: Sequence[str]) -> list[str]:
    """The GPUs that `asked` means, out of those that are visible."""
    if asked == "all":
        wanted = list(range(len(visible)))
    elif asked.isdecimal() and int(asked):
        wanted = list(range(int(asked)))
    else:
        words = [word.strip() for word in asked.split(",") if word.strip()]
        if asked == "0" or not words or not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
            raise Refused(
                f"--gpus {asked}: expected all, a number from 1, or a list of different numbers such as 0,2,5",
                "Write a list of one GPU with a comma, as 3,",
            )
        wanted = [int(word) for word in words]
    if not visible or max(wanted, default=0) >= len(visible):
        raise Missing(
            f"--gpus {asked}: there are {len(visible)} GPUs here",
            "Ask for fewer, or see CUDA_VISIBLE_DEVICES; --ranks N shares a CPU.",
        )
    return [visible[k] for k in wanted]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(k) for k in range(count)]
