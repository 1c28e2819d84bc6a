"""What a run has made: samples, quarantined samples, speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.errors import GateFailed
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.document import LEDGER, MANIFEST, QUARANTINE, is_sharded, quarantines, read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.goal import Goal, goal_of
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger

if TYPE_CHECKING:
    from datasetdm_fast.runs.run_folder.shards import ShardLedger


LOOK = "Look at the others in its gallery; other prompts or decoders may help."
MOST_REASONS = 3  # of quarantined samples that a message has


@dataclass(frozen=True)
class Result:
    path: Path | str  # of its folder, or the URL of one
    number: int  # samples of the plan
    done: int
    made: int  # of these, by this process
    quarantined: int  # without finite numbers
    seconds: float = 0.0  # of this process's work, its closing included
    closing_seconds: float = 0.0  # of these, for the index files and the gallery
    doubtful: int = 0  # of those done, or where they are quarantined, of those beside them
    outside: int = 0  # of these, out of the domain of the decoders
    goal: Goal | None = None  # None before there is a run folder
    is_complete: bool = False  # whether nothing more is to be made
    missing: Mapping[str, int] = field(default_factory=dict)  # class -> samples it has, where it can have no more
    accept: str = ""  # the condition on the samples of the data set
    reasons: Sequence[str] = ()  # why samples were quarantined
    is_sharded: bool = False  # then no sample beside the data set is kept

    def facts(self) -> dict[str, Any]:
        """Counts and speed, as --json prints them."""
        return {
            "number": self.number,
            "done": self.done,
            "made": self.made,
            "set_aside": self.quarantined,
            "complete": self.is_complete,
            "doubtful": self.doubtful,
            "images_per_second": round(self.rate, 4),
            "closing_seconds": round(self.closing_seconds, 3),
        }

    @property
    def rate(self) -> float:
        """Samples that this process made in a second."""
        return self.made / self.seconds if self.made else 0.0

    @property
    def trust_message(self) -> str:
        """How many samples are doubtful or not accepted; empty if none."""
        if not self.doubtful:
            return ""
        done = count_noun(self.done, "sample")
        place = "in whose place others were made" if self.is_sharded else f"in {self.path}/{QUARANTINE}"
        if self.accept:
            return f"accepted: {done}; not accepted, {place}: {self.doubtful}"
        outside = f" ({self.outside} out of the domain of the decoders)" if self.outside else ""
        if self.goal and self.goal.most > self.goal.number:
            return f"trusted: {done}; doubtful, {place}: {self.doubtful}{outside}"
        verb, them = ("is", "it") if self.doubtful == 1 else ("are", "them")
        doubts = f"{self.doubtful} of {self.done} samples {verb} doubtful{outside}"
        return f"{doubts}: filter --where 'trust == 1' leaves {them} out"

    def check(self) -> None:
        """Raises GateFailed where samples were quarantined, or too few can be trusted."""
        if self.goal and self.missing:
            number, most = self.goal.number, self.goal.most
            if len(self.goal.names) > 1:
                counts = ", ".join(f"{name} ({count})" for name, count in self.missing.items())
                cause = f"fewer than {number} of {most} samples with {self.accept} of these classes: {counts}"
                raise GateFailed(f"{self.path}: {cause}", LOOK)
            is_what = "accepted" if self.accept else "trusted"
            raise GateFailed(f"{self.path}: {self.done} of {most} samples are {is_what}, {number} were requested", LOOK)
        if self.quarantined:
            of_folder = f"{LEDGER} has the reason of each; --only ID makes one again"
            where = f"{MANIFEST}/ has the reason of each" if self.is_sharded else of_folder
            raise GateFailed(
                f"{self.path}: {self.quarantined} of {self.number} samples were quarantined "
                f"({'; '.join(self.reasons[:MOST_REASONS])})",
                f"{where}. Values that are NaN or infinite may need another --dtype.",
            )


def result_of(
    folder: Path | str,
    document: Mapping[str, Any],
    number: int,
    ledger: Ledger | ShardLedger,
    made: int = 0,
    **seconds: float,
) -> Result:
    number = max(number, document["plan"]["number"])  # more where others take the place of dropped ones
    config, goal = document["config"], goal_of(document["config"], number)
    tally, accept = ledger.tally(goal.number, len(goal.names)), config.get("accept", "")
    quarantined = ledger.quarantined_by_reason()
    return Result(
        folder,
        number,
        ledger.count(),
        made,
        sum(map(len, quarantined.values())),
        doubtful=ledger.count(DOUBTFUL) if accept else ledger.count_doubtful(),
        outside=ledger.count_out_of_domain()[0],
        goal=goal,
        is_complete=goal.is_reached(tally),
        missing=goal.missing(tally) if quarantines(config) else {},
        accept=accept,
        reasons=tuple(quarantined),
        is_sharded=is_sharded(document),
        **seconds,
    )


def close_run(folder: RunFolder, number: int, made: int, begin: float) -> Result:
    """The result of a run that no process works on any more, its index files rebuilt; `begin` is by perf_counter."""
    closing = time.perf_counter()
    finish_run(folder)
    end = time.perf_counter()
    seconds = {"seconds": end - begin, "closing_seconds": end - closing}
    return result_of(folder.path, folder.document, number, folder.ledger, made, **seconds)


def close_folder(folder: Path, number: int, made: int, begin: float) -> Result:
    """The result where this process holds the folder and has not opened it yet."""
    document = read_document(folder)
    if document is None:
        return Result(folder, number, 0, 0, 0)
    with RunFolder(folder, document, is_member=True) as opened:
        return close_run(opened, number, made, begin)


def read_result(folder: Path, number: int, made: int, begin: float) -> Result:
    """The result of a run that others may still be busy with."""
    seconds, document = time.perf_counter() - begin, read_document(folder)
    if document is None or not (folder / LEDGER).exists():
        return Result(folder, number, 0, 0, 0, seconds)
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return result_of(folder, document, number, ledger, made, seconds=seconds)
