"""What a run has to show: samples, quarantined samples, speed."""

import time
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.errors import GateFailed
from datasetdm_fast.run_folder.document import ASIDE, LEDGER, most_samples, read_document
from datasetdm_fast.run_folder.folder import RunFolder
from datasetdm_fast.run_folder.ledger import SET_ASIDE, Ledger


@dataclass(frozen=True)
class Result:
    path: Path
    number: int  # samples of the plan
    done: int
    made: int  # of these, by this process
    set_aside: int
    seconds: float = 0.0  # of this process's work, its closing included
    closing_seconds: float = 0.0  # of these, for the index files and the gallery
    doubtful: int = 0  # of those done, or where they are set aside, of those beside them
    most: int = 0  # samples that the run may make in all
    dropped: int = 0  # samples that were made and then dropped

    @property
    def is_complete(self) -> bool:
        return self._there >= self.number or self._is_exhausted

    @property
    def _there(self) -> int:
        return self.done + self.set_aside + self.dropped

    @property
    def _is_exhausted(self) -> bool:
        return self.most > self.number and self._there + self.doubtful >= self.most

    @property
    def told(self) -> str:
        """How many samples are doubtful, in words."""
        if self.most > self.number:
            return f"{self.done} samples are trusted, {self.doubtful} are doubtful and lie in {self.path}/{ASIDE}"
        return f"{self.doubtful} of {self.done} samples are doubtful: --keep trusted leaves them out"

    def check(self) -> None:
        """Raises GateFailed where samples were set aside, or too few can be trusted."""
        if self._is_exhausted and self._there < self.number:
            raise GateFailed(
                f"{self.path}: {self.done} of {self.most} samples are trusted, {self.number} were asked for",
                "Look at the others in its gallery; other prompts or decoders may help.",
            )
        if self.set_aside:
            raise GateFailed(
                f"{self.path}: {self.set_aside} of {self.number} samples were set aside because a number was not "
                "finite",
                "Their rows in state/ledger.sqlite say where; try another --dtype.",
            )


def result_of(folder: Path, number: int, ledger: Ledger, made: int = 0, **seconds: float) -> Result:
    document = read_document(folder)
    number = max(number, document["plan"]["number"])  # more where others take the place of dropped ones
    most = most_samples(document["config"], number)
    facts = {"doubtful": ledger.count_doubtful(), "most": most, "dropped": ledger.count_dropped(), **seconds}
    return Result(folder, number, ledger.count(), made, ledger.count(SET_ASIDE), **facts)


def closed(folder: RunFolder, number: int, made: int, begin: float) -> Result:
    """The result of a run that nobody works in any more, its index files rebuilt; `begin` is when it was started, on
    the clock of `time.perf_counter`.
    """
    closing = time.perf_counter()
    folder.rebuild()
    end = time.perf_counter()
    return result_of(folder.path, number, folder.ledger, made, seconds=end - begin, closing_seconds=end - closing)


def close(folder: Path, number: int, made: int, begin: float) -> Result:
    """The same where this process holds the folder and has not opened it yet."""
    document = read_document(folder)
    if document is None:
        return Result(folder, number, 0, 0, 0)
    with RunFolder(folder, document, is_member=True) as opened:
        return closed(opened, number, made, begin)


def look(folder: Path, number: int, made: int, begin: float) -> Result:
    """The result of a run that others may still be busy with."""
    seconds = time.perf_counter() - begin
    if not (folder / LEDGER).exists():
        return Result(folder, number, 0, 0, 0, seconds)
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return result_of(folder, number, ledger, made, seconds=seconds)
