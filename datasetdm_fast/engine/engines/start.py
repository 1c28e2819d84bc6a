"""Settings of libraries before they start, and while they compute."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # where this Linux has them


def before_torch() -> None:
    """Sets what torch reads when it is first imported or takes memory; variables that are set already stay."""
    # OpenMP's waiting threads would otherwise burn the cores that other processes need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if HUGE_PAGES.exists():  # large images in pages of 2 MiB: a 512th of the page faults
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _DefaultDtype:
    """fp32 as torch's default dtype while any thread is within; the last one restores that of the program."""

    def __init__(self) -> None:
        self._lock, self._within = Lock(), 0
        self._before: Any = None

    def __enter__(self) -> None:
        import torch

        with self._lock:
            if not self._within:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._within += 1

    def __exit__(self, *_: object) -> None:
        import torch

        with self._lock:
            self._within -= 1
            if not self._within:
                torch.set_default_dtype(self._before)


_FP32 = _DefaultDtype()  # of the process, as torch's is


@contextmanager
def in_own_precision() -> Iterator[None]:
    """Within the block, torch's autocast, default dtype and default device are PyTorch's own, also where a program
    around it has changed them: they would silently round weights, and change images and labels.
    """
    import torch

    with ExitStack() as switched:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                switched.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            switched.enter_context(torch.device("cpu"))
        switched.enter_context(_FP32)
        yield
