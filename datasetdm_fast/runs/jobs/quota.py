"""Which samples of a run are missing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from datasetdm_fast.data import Quarantined, Sample
from datasetdm_fast.runs.run_folder.goal import goal_of
from datasetdm_fast.runs.run_folder.ledger import Ledger

if TYPE_CHECKING:
    from datasetdm_fast.runs.jobs.job import Job


class Quota:
    """The missing samples of a run.

    Where some are quarantined, each makes room for another at the end, of its class where the run counts by class. So
    the run ends with the sample that is the last one needed, whatever the order in which they are made.
    """

    def __init__(self, job: Job, ledger: Ledger, first: int = 0, stop: int | None = None):
        """Of all samples, or of those from `first` to before `stop`, which alone are then taken."""
        self._goal = goal_of(job.document["config"], job.plan.number)
        self._present = ledger.indices_between(first, job.plan.most if stop is None else stop)
        self._quarantined = self._goal.tally(ledger).quarantined if job.quarantines else [0]
        self._left = job.limit or job.plan.most  # samples that this command may make

    def wants(self, index: int) -> bool:
        """Whether a sample belongs to the run, as far as is known now."""
        kind, turn = self._goal.place(index)
        return turn < self._goal.stop(self._quarantined[kind])

    def missing(self) -> list[int]:
        """Indices still to be made, as far as is known now."""
        required = (index for index in self._goal.required(self._quarantined) if index not in self._present)
        return list(islice(required, self._left))

    def take(self, results: Iterable[Sample | Quarantined]) -> list[Sample | Quarantined]:
        """The results of a batch that belong to the run, which count as present from now on."""
        taken = []
        for result in results:
            index = result.request.index
            if index not in self._present and self.wants(index) and self._left:
                taken.append(result)
                self._present.add(index)
                self._left -= 1
                if isinstance(result, Sample) and result.rejection:
                    self._quarantined[self._goal.place(index)[0]] += 1
        return taken


def batches_of(indices: Iterable[int], size: int) -> list[int]:
    """The batches that hold these samples, in the order they are handed out."""
    return sorted({index // size for index in indices})
