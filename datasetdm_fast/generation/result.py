"""What a run has to show: samples, quarantined samples, speed."""

from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.errors import GateFailed
from datasetdm_fast.run_folder.document import LEDGER, read_document
from datasetdm_fast.run_folder.folder import RunFolder
from datasetdm_fast.run_folder.ledger import SET_ASIDE, Ledger


@dataclass(frozen=True)
class Result:
    path: Path
    number: int  # samples of the plan
    done: int
    made: int  # of these, by this process
    set_aside: int
    seconds: float

    @property
    def is_complete(self) -> bool:
        return self.done + self.set_aside >= self.number

    def check(self) -> None:
        """Raises GateFailed where samples were set aside."""
        if self.set_aside:
            raise GateFailed(
                f"{self.path}: {self.set_aside} of {self.number} samples were set aside because a number was not "
                "finite",
                "Their rows in state/ledger.sqlite say where; try another --dtype.",
            )


def result_of(folder: Path, number: int, ledger: Ledger, made: int = 0, seconds: float = 0.0) -> Result:
    return Result(folder, number, ledger.count(), made, ledger.count(SET_ASIDE), seconds)


def close(folder: Path, number: int, made: int, seconds: float) -> Result:
    """The result of a run whose folder this process holds and nobody works in any more, its index files rebuilt."""
    document = read_document(folder)
    if document is None:
        return Result(folder, number, 0, 0, 0, seconds)
    with RunFolder(folder, document, is_member=True) as opened:
        opened.rebuild()
        return result_of(folder, number, opened.ledger, made, seconds)


def look(folder: Path, number: int, made: int, seconds: float) -> Result:
    """The result of a run that others may still be busy with."""
    if not (folder / LEDGER).exists():
        return Result(folder, number, 0, 0, 0, seconds)
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return result_of(folder, number, ledger, made, seconds)
