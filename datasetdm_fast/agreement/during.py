"""Samples of a run go through the chosen engine and the reference while the run goes on."""

import time
from collections.abc import Callable, Sequence

from datasetdm_fast.agreement import before
from datasetdm_fast.config import REFERENCE
from datasetdm_fast.data import Sample, SetAside
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.generation.job import Job

SHARE = 0.01  # of the time of a run that its comparisons may take


class RepeatedComparison:
    """Compares the newest sample after every so many, the first time after as many, and waits where the comparisons so
    far took more than their share of the time.
    """

    def __init__(self, job: Job, every: int, told: Callable[[str], None]):
        self.job, self.every, self.told = job, every, told
        self.made, self.due, self.spent = 0, every, 0.0
        self.begun = time.perf_counter()

    def __call__(self, results: Sequence[Sample | SetAside]) -> None:
        """Takes note of samples that are about to be written; a GateFailed where the newest does not agree."""
        self.made += len(results)
        start = time.perf_counter()
        if not results or self.made < self.due or self.spent > SHARE * (start - self.begun):
            return
        request = results[-1].request
        verdict = before.compared(self.job, 1, first=request.index)
        self.spent += time.perf_counter() - start
        self.due = self.made + self.every
        if failed := [row.measure for row in verdict.rows if not row.is_passed]:
            raise GateFailed(
                f"--verify-every {self.every}: sample {request.id} of {self.job.engine.name} does not match that of "
                f"{REFERENCE} in {', '.join(failed)}; the samples before it are there",
                "Look at the device, try --dtype fp32 or another --engine; the same line goes on with the run.",
            )
        self.told(f"verified   sample {request.id}: agrees in all {len(verdict.rows)} measures")
