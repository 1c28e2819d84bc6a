"""Which samples a run takes into its data set: trusted ones alone, or those that pass a condition on their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from datasetdm_fast.data import Quarantined, Sample
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.kind import LabelKind, Table
from datasetdm_fast.engine.labels.semantic import BACKGROUND
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.scores import ABSENT, SCORERS, Scored
from datasetdm_fast.runs.run_folder.where import Condition, parse_where

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


def check_accept(where: str) -> None:
    """Refuses what is no condition on scores that a sample has when it is made."""
    if where:
        parse_where(where, tuple(SCORERS), FLAG)


def check_scored(document: Mapping[str, Any]) -> None:
    """Refuses a condition on a score that no sample of these labels has."""
    tables, names = document["labels"], acceptance_of(document).names
    classes = [set(table["classes"]) - {BACKGROUND} for table in tables.values() if "classes" in table]
    if "agreement" in names and not any(first & second for k, first in enumerate(classes) for second in classes[:k]):
        raise Refused(f"{FLAG}: no sample of {', '.join(tables)} has the score agreement", ABSENT["agreement"])
    if "score" in names and all(type(kind_of(task)).certainty is LabelKind.certainty for task in tables):
        raise Refused(f"{FLAG}: no sample of {', '.join(tables)} has the score score", "Choose other labels.")
