"""What libraries are told before they start, and kept from while they compute."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # where this Linux has them


def before_torch() -> None:
    """Settings of this process that torch reads when it is first imported or takes memory; what the environment says
    already stays.
    """
    # OpenMP's waiting threads would otherwise burn the cores that other processes need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if HUGE_PAGES.exists():  # large images in pages of 2 MiB: a 512th of the page faults
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _DefaultDtype:
    """fp32 as torch's default dtype while any thread is within; that of the program is put back after the last."""

    def __init__(self) -> None:
        self._lock, self._within, self._before = Lock(), 0, None

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
    """Work in the precision and on the devices that were chosen for it, also where a program around it has switched
    autocast on, or set torch's default dtype or device: these would round weights while they are loaded, and make other
    images and labels without a word.
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
