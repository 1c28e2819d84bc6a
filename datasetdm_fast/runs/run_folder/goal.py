"""How many samples a run is to have, of each class where it counts by class, and which indices it makes for that."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from datasetdm_fast.data import Quarantined, Sample
from datasetdm_fast.engine.labels import BACKGROUND, LabelKind, Table, kind_of
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.document import SHARDS, most_samples
from datasetdm_fast.runs.run_folder.ledger import Tally
from datasetdm_fast.runs.run_folder.scores import ABSENT, SCORERS, Condition, Scored, parse_where


@dataclass(frozen=True)
class Goal:
    """Index k belongs to class k // number mod classes, so that no batch of a class that has enough is made."""

    number: int  # requested samples, of each class
    most: int  # that may be made, of each class
    names: tuple[str, ...] = ("",)  # of the classes; a single empty name where the run does not count by class

    def stop(self, quarantined: int) -> int:
        """How many samples of a class are to be made where so many of them are quarantined."""
        return min(self.number + quarantined, self.most)

    def required_indices(self, quarantined: Sequence[int]) -> Iterator[int]:
        """The indices that are to be made where so many of each class are quarantined, in order."""
        for block in range(-(-max(map(self.stop, quarantined)) // self.number) * len(self.names)):
            turn, kind = divmod(block, len(self.names))
            count = min(self.number, self.stop(quarantined[kind]) - turn * self.number)
            yield from range(block * self.number, block * self.number + count)

    def is_reached(self, tally: Tally) -> bool:
        """Whether nothing more is to be made."""
        return all(made >= self.stop(quarantined) for made, quarantined in tally)

    def missing(self, tally: Tally) -> dict[str, int]:
        """Class -> samples it has, of those that have too few although no more of them may be made."""
        return {
            name: made - quarantined
            for name, (made, quarantined) in zip(self.names, tally, strict=True)
            if made - quarantined < self.number and made >= self.most
        }


def counts_by_class(config: Mapping[str, Any]) -> bool:
    """Whether a run of these settings counts accepted samples of every class, which a shard takes from the plan."""
    return bool(config.get("accept") and config.get("per_class")) and config.get("layout") != SHARDS


def goal_of(config: Mapping[str, Any], number: int) -> Goal:
    """The goal of a run of these settings that is to have `number` samples."""
    names = tuple(config["classes"]) if counts_by_class(config) else ("",)
    return Goal(number // len(names), most_samples(config, number) // len(names), names)


FLAG = "--accept"


@dataclass(frozen=True)
class Acceptance:
    """The rule of one run."""

    needs_trust: bool
    condition: Condition | None
    names: tuple[str, ...]  # of the scores that the condition compares
    tables: Mapping[str, Table]  # those of run.json

    def reason(self, sample: Sample) -> str:
        """Why a sample is quarantined, empty where it is taken."""
        if self.needs_trust and sample.is_doubtful:
            return "; ".join(sample.trust.reasons)
        if self.condition is None:
            return ""
        scored = Scored.of_sample(sample, self.tables)
        values = {name: np.array([SCORERS[name](scored)], np.float64) for name in self.names}
        return "" if self.condition.passes(values)[0] else self.condition.reason(values, 0)

    def apply(self, results: Sequence[Sample | Quarantined]) -> list[Sample | Quarantined]:
        """The results of a batch, each sample with the reason why it is quarantined, if any."""
        return [
            replace(result, rejection=self.reason(result)) if isinstance(result, Sample) else result
            for result in results
        ]


def acceptance_of(document: Mapping[str, Any]) -> Acceptance:
    config = document["config"]
    where = config.get("accept", "")
    condition, names = parse_where(where, tuple(SCORERS), FLAG) if where else (None, ())
    return Acceptance(config.get("keep") == "trusted", condition, names, document["labels"])


def check_scored(document: Mapping[str, Any]) -> None:
    """Refuses a condition on a score that no sample of these labels has."""
    tables, names = document["labels"], acceptance_of(document).names
    classes = [set(table["classes"]) - {BACKGROUND} for table in tables.values() if "classes" in table]
    if "agreement" in names and not any(first & second for k, first in enumerate(classes) for second in classes[:k]):
        raise Refused(f"{FLAG}: no sample of {', '.join(tables)} has the score agreement", ABSENT["agreement"])
    if "score" in names and all(type(kind_of(task)).certainty is LabelKind.certainty for task in tables):
        raise Refused(f"{FLAG}: no sample of {', '.join(tables)} has the score score", "Choose other labels.")
