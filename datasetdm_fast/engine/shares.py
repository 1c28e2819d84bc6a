"""Which part of a data set a process reads, among ranks and the worker processes of their loaders."""

import os
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info


def find_rank() -> tuple[int, int] | None:
    """The number of this rank and how many there are, of torch.distributed or else of its launcher; None of one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "WORLD_SIZE" in os.environ:
        return int(os.environ.get("RANK", 0)), int(os.environ["WORLD_SIZE"])
    return None


class SharedDataset(IterableDataset[Any]):
    """A data set of which each loader worker of each rank reads a share of its own."""

    _sender: tuple[int, int] | None = None  # rank of the process that pickled it, which spawned workers do not know

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sender": find_rank()}

    def find_share(self) -> tuple[int, int]:
        """The number of this process's share, and how many there are."""
        worker = get_worker_info()
        rank, ranks = find_rank() or (self._sender if worker else None) or (0, 1)
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return rank * workers + number, ranks * workers
