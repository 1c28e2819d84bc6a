"""Stops a run whose first batch shows what its decoders were not trained on."""

from collections.abc import Sequence
from pathlib import Path

from datasetdm_fast.data import Quarantined, Sample
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.ledger import Ledger

MOST_OUTSIDE = 0.5  # share of the samples
FEWEST = 2  # samples that are evaluated: of right ones, one in a hundred is out of the domain


def count_outside(folder: Path) -> int:
    """The samples of a run so far that are out of the domain of their decoders."""
    if not (folder / LEDGER).exists():
        return 0
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return ledger.count_out_of_domain()[0]


class DomainGate:
    """Evaluates the samples that a run has, or else those of its first batches; a run of a single batch spares none."""

    def __init__(self, job: Job):
        self._folder, self._is_open = job.folder, not job.stops_outside
        self._has_later = job.batches_left > 1
        self.outside = self.measured = 0

    @property
    def is_closed(self) -> bool:
        return self.measured >= FEWEST and self.outside > MOST_OUTSIDE * self.measured

    def evaluate_stored(self, ledger: Ledger) -> None:
        """Raises GateFailed where most stored samples are out of the domain of the decoders."""
        outside, measured = ledger.count_out_of_domain()
        if not self._is_open:
            self.outside, self.measured = outside, measured
            self._is_open = measured >= FEWEST
            self.check()

    def evaluate(self, results: Sequence[Sample | Quarantined]) -> None:
        """Evaluates a batch, until there are enough samples."""
        trusts = [result.trust for result in results if isinstance(result, Sample) and result.trust]
        distances = [trust.domain for trust in trusts if trust.domain is not None]
        if distances and self._has_later and not self._is_open:
            self.outside += sum(distance > 1 for distance in distances)
            self.measured += len(distances)
            self._is_open = self.measured >= FEWEST

    def check(self) -> None:
        """Raises GateFailed where it is closed."""
        if self.is_closed:
            raise GateFailed(
                f"{self._folder}: {self.outside} of the first {self.measured} samples are out of the domain of the "
                "decoders: the pictures are unlike those that they learned from",
                "Look at its gallery; name a --model that draws what the decoders were trained on, or add "
                "--force-domain to make the others.",
            )
