"""How many samples a run is to have, of each class where it counts by class, and which indices it makes for that."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasetdm_fast.engine.loop.plan import class_and_turn
from datasetdm_fast.runs.run_folder.document import most_samples
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.runs.run_folder.shards import ShardLedger


@dataclass(frozen=True)
class Tally:
    """Samples of each class that have a row, and those of them that were quarantined."""

    made: list[int]
    quarantined: list[int]


@dataclass(frozen=True)
class Goal:
    """Index k belongs to the class k // number mod classes, so that the samples of a class lie side by side and batches
    of a class that has enough are never made.
    """

    number: int  # requested samples, of each class
    most: int  # that may be made, of each class
    names: tuple[str, ...] = ("",)  # of the classes; a single empty name where the run does not count by class

    def place(self, index: int) -> tuple[int, int]:
        """The class of an index, and which of its samples that is."""
        return class_and_turn(index, self.number, len(self.names))

    def stop(self, quarantined: int) -> int:
        """How many samples of a class are to be made where so many of them are quarantined."""
        return min(self.number + quarantined, self.most)

    def required_indices(self, quarantined: Sequence[int]) -> Iterator[int]:
        """The indices that are to be made where so many of each class are quarantined, in order."""
        for block in range(-(-max(map(self.stop, quarantined)) // self.number) * len(self.names)):
            turn, kind = divmod(block, len(self.names))
            count = min(self.number, self.stop(quarantined[kind]) - turn * self.number)
            yield from range(block * self.number, block * self.number + count)

    def tally(self, ledger: Ledger | ShardLedger) -> Tally:
        return Tally(*ledger.tally(self.number, len(self.names)))

    def is_reached(self, tally: Tally) -> bool:
        """Whether nothing more is to be made."""
        return all(made >= self.stop(count) for made, count in zip(tally.made, tally.quarantined, strict=True))

    def missing(self, tally: Tally) -> dict[str, int]:
        """Class -> samples it has, of those that have too few although no more of them may be made."""
        return {
            name: made - quarantined
            for name, made, quarantined in zip(self.names, tally.made, tally.quarantined, strict=True)
            if made - quarantined < self.number and made >= self.most
        }


def counts_by_class(config: Mapping[str, Any]) -> bool:
    """Whether a run of these settings makes as many accepted samples of every class."""
    return bool(config.get("accept") and config.get("per_class"))


def goal_of(config: Mapping[str, Any], number: int) -> Goal:
    """The goal of a run of these settings that is to have `number` samples."""
    names = tuple(config["classes"]) if counts_by_class(config) else ("",)
    return Goal(number // len(names), most_samples(config, number) // len(names), names)
