"""What libraries are told before they start, and kept from while they compute."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def without_autocast() -> Iterator[None]:
    """Work in the precision that was chosen for it, also where a program around it has switched autocast on: that would
    round weights while they are loaded, and make other images and labels without a word.
    """
    import torch

    with ExitStack() as switched:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                switched.enter_context(torch.autocast(kind, enabled=False))
        yield
