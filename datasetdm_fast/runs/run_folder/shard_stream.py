"""A run in shards as a torch data set that is read from its begin to its end, whole shards at a time."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

from datasetdm_fast.engine.shares import SharedDataset


class ShardStream(SharedDataset):
    """Pairs of image and label, as the map-style data set gives them. Every rank and loader worker reads its own
    shards; with a `seed` their order and that of the samples within each differ from epoch to epoch.

    `set_epoch` is to be called before each. With as many ranks and workers as before, `state_dict` of the samples that
    a trainer has read and `load_state_dict` resume in the middle of an epoch; a loader of several processes skips by
    its own count, as torchdata's StatefulDataLoader does.
    """

    def __init__(self, shards: Mapping[int, list[int]], dataset: Any, seed: int | None):
        """`shards` are the samples of each, which the map-style `dataset` reads by their ids."""
        self._shards, self._dataset, self._seed = shards, dataset, seed
        self._epoch = self._skipped = self._count = 0

    def set_epoch(self, epoch: int) -> None:
        """Which order the next iteration has."""
        self._epoch, self._skipped = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where the iteration of this process is."""
        return {"epoch": self._epoch, "samples": self._count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration begins behind the samples of a state."""
        self._epoch, self._skipped = state["epoch"], state["samples"]

    def __iter__(self) -> Iterator[Any]:
        self._count, self._skipped = self._skipped, 0
        left = self._count
        for indices in self._shares():
            if left >= len(indices):
                left -= len(indices)
                continue
            for index in indices[left:]:
                self._count += 1
                yield self._dataset[f"{index:08d}"]
            left = 0

    def _shares(self) -> Iterator[list[int]]:
        """The samples of each shard of this process, in the order of the epoch."""
        share, shares = self.find_share()
        order = list(self._shards)
        if self._seed is not None:
            random.Random(f"{self._seed} {self._epoch}").shuffle(order)
        for shard in order[share::shares]:
            indices = list(self._shards[shard])
            if self._seed is not None:
                random.Random(f"{self._seed} {self._epoch} {shard}").shuffle(indices)
            yield indices
