"""Several processes that train one decoder together, as torchrun starts them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datasetdm_fast.engine.engines.device import resolve_device
from datasetdm_fast.errors import Missing

TIMEOUT = timedelta(hours=12)  # a process may wait this long for another to fill its part of the cache


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over all processes, in place and in one message."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.detach().copy_(part.view_as(tensor))

    def broadcast(self, value: Any) -> Any:
        """The value of the first process."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def any(self, is_true: bool) -> bool:
        """Whether it is true in any process."""
        if self.world == 1:
            return is_true
        flag = torch.tensor([float(is_true)])  # of the host, so that no GPU is waited for
        self.total([flag])
        return bool(flag.item())

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.world > 1:
            dist.barrier()


SOLO = Ranks()


def join_processes(device: str) -> tuple[Ranks, str]:
    """This process's place among those of torchrun, and its device; SOLO where nothing started several."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return SOLO, device
    is_cuda = resolve_device(device).type == "cuda"
    if not dist.is_available():
        raise Missing("torchrun: this torch was built without torch.distributed", "Run the command without torchrun.")
    device = f"cuda:{_local_gpu()}" if is_cuda else "cpu"
    if is_cuda:
        torch.cuda.set_device(device)
    # Values that the host decides by go from host to host, which waits for no GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), world), device


def _local_gpu() -> int:
    """The number of this process's GPU on its machine."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise Missing(
            f"torchrun: process {number} of this machine has no GPU of its own, there are {count}",
            f"Start no more than {count} processes per machine, or use --device cpu.",
        )
    return number


def leave_processes(ranks: Ranks) -> None:
    if ranks.world > 1:
        dist.destroy_process_group()
