"""What libraries are told before they start."""

import os
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # where this Linux has them


def before_torch() -> None:
    """Settings of this process that torch reads when it is first imported or takes memory; what the environment says
    already stays.
    """
    # OpenMP's waiting threads would otherwise burn the cores that other processes need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if HUGE_PAGES.exists():  # large images in pages of 2 MiB: a 512th of the page faults
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
