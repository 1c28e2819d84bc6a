"""What a run has to show: samples, quarantined samples, speed."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasetdm_fast.errors import GateFailed
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.run_folder.document import ASIDE, LEDGER, read_document, sets_aside
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.goal import Goal, goal_of
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger

LOOK = "Look at the others in its gallery; other prompts or decoders may help."
MOST_REASONS = 3  # of quarantined samples that are told


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
    goal: Goal | None = None  # None before there is a run folder
    is_complete: bool = False  # whether nothing more is to be made
    lacking: Mapping[str, int] = field(default_factory=dict)  # class -> samples it has, where it can have no more
    accept: str = ""  # the condition on the samples of the data set
    reasons: Sequence[str] = ()  # why samples were quarantined

    @property
    def told(self) -> str:
        """How many samples are doubtful or were set aside, in words; empty where none."""
        if not self.doubtful:
            return ""
        if self.accept:
            return f"accepted: {count_noun(self.done, 'sample')}; not accepted, in {self.path}/{ASIDE}: {self.doubtful}"
        if self.goal and self.goal.most > self.goal.number:
            return f"trusted: {count_noun(self.done, 'sample')}; doubtful, in {self.path}/{ASIDE}: {self.doubtful}"
        return f"{self.doubts}: --keep trusted --refill replaces {'it' if self.doubtful == 1 else 'them'}"

    @property
    def doubts(self) -> str:
        """How many samples are doubtful, of a run that keeps them all."""
        return f"{self.doubtful} of {self.done} samples {'is' if self.doubtful == 1 else 'are'} doubtful"

    def check(self) -> None:
        """Raises GateFailed where samples were set aside, or too few can be trusted."""
        if self.goal and self.lacking:
            number, most = self.goal.number, self.goal.most
            if len(self.goal.names) > 1:
                each = ", ".join(f"{name} ({count})" for name, count in self.lacking.items())
                cause = f"fewer than {number} of {most} samples with {self.accept} of these classes: {each}"
                raise GateFailed(f"{self.path}: {cause}", LOOK)
            is_what = "accepted" if self.accept else "trusted"
            raise GateFailed(f"{self.path}: {self.done} of {most} samples are {is_what}, {number} were requested", LOOK)
        if self.set_aside:
            raise GateFailed(
                f"{self.path}: {self.set_aside} of {self.number} samples were quarantined "
                f"({'; '.join(self.reasons[:MOST_REASONS])})",
                f"{LEDGER} has the reason of each; --only ID makes one again. Values that are NaN or infinite may need "
                "another --dtype.",
            )


def result_of(folder: Path, number: int, ledger: Ledger, made: int = 0, **seconds: float) -> Result:
    document = read_document(folder)
    number = max(number, document["plan"]["number"])  # more where others take the place of dropped ones
    config, goal = document["config"], goal_of(document["config"], number)
    tally, accept = goal.tally(ledger), config.get("accept", "")
    quarantined = ledger.quarantined_by_reason()
    facts = {
        "doubtful": ledger.count(DOUBTFUL) if accept else ledger.count_doubtful(),
        "goal": goal,
        "is_complete": goal.is_reached(tally),
        "lacking": goal.lacking(tally) if sets_aside(config) else {},
        "accept": accept,
        "reasons": tuple(quarantined),
    }
    aside = sum(map(len, quarantined.values()))
    return Result(folder, number, ledger.count(), made, aside, **facts, **seconds)


def closed(folder: RunFolder, number: int, made: int, begin: float) -> Result:
    """The result of a run that nobody works in any more, its index files rebuilt; `begin` is when it was started, on
    the clock of `time.perf_counter`.
    """
    closing = time.perf_counter()
    finish_run(folder)
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
