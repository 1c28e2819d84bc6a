"""Samples of a run go through the chosen engine and the reference while the run proceeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from datasetdm_fast.config import REFERENCE
from datasetdm_fast.data import Quarantined, Sample
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.runs.jobs.job import Job

if TYPE_CHECKING:
    from datasetdm_fast.engine.engines.engine import Engine

SHARE = 0.01  # of the time of a run that its comparisons may take


class RepeatedComparison:
    """Compares the newest sample after every so many, the first time after as many, and waits where the comparisons
    would come to take more than their share of the time.

    The reference engine is built at the first comparison and kept; where memory would not hold another one of its size
    it is freed, and rebuilt at the next.
    """

    def __init__(
        self,
        job: Job,
        *,
        every: int,
        on_message: Callable[[str], None],
        on_unet_call: Callable[[], None] = lambda: None,
        sharing: Callable[[], int] = lambda: 1,
    ):
        """`sharing` returns how many processes make the run, or 0 where another of them compares its samples."""
        self.job, self.every, self.sharing = job, every, sharing
        self.on_message, self.on_unet_call = on_message, on_unet_call
        self.made, self.due, self.spent, self.longest = 0, every, 0.0, 0.0
        self.begun = time.perf_counter()
        self.held = ExitStack()
        self.reference: Engine | None = None

    def __call__(self, results: Sequence[Sample | Quarantined]) -> None:
        """Counts samples that are about to be written, and compares the newest if due; GateFailed if it differs."""
        self.made += len(results) * self.sharing()  # the others make as many in the same time
        start = time.perf_counter()
        if not results or self.made < self.due or self.spent + self.longest > SHARE * (start - self.begun):
            return
        request = results[-1].request
        failed, measures = self._compare(request.index)
        taken = time.perf_counter() - start
        self.spent, self.longest = self.spent + taken, max(self.longest, taken)
        self.due = self.made + self.every
        if failed:
            raise GateFailed(
                f"--verify-every {self.every}: sample {request.id} of {self.job.engine.name} does not match that of "
                f"{REFERENCE} in {', '.join(failed)}; earlier samples are kept",
                "Check the device, or try --dtype fp32 or another --engine; the same command resumes the run.",
            )
        self.on_message(f"verified   sample {request.id}: agrees in all {measures} measures")

    def _compare(self, index: int) -> tuple[list[str], int]:
        """The measures in which a sample does not agree, and how many there are."""
        from datasetdm_fast.engine.engines.memory import free_bytes, weight_bytes
        from datasetdm_fast.runs.agreement.comparing import compare_with_reference, reference_of

        if self.reference is None:
            self.reference = self.held.enter_context(reference_of(self.job.engine))
        verdict = compare_with_reference(self.job, 1, self.on_unet_call, first=index, reference=self.reference)
        if free_bytes(self.job.engine.device) < weight_bytes(self.reference):
            self.reference = None
            self.held.close()
        return verdict.failed, len(verdict.rows)
