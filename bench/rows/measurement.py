"""The shape of every measurement, and one run of the bench with what its measurements share."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TextIO

from bench.peers import OURS, PEERS
from bench.report.results import ResultFile
from bench.report.tables import Table
from bench.rows.parity import ParityJudge
from bench.setting import Setting

Rows = list[dict[str, Any]]


@dataclass
class BenchRun:
    """The setting, the result file, and what the measurements of one run tell each other."""

    setting: Setting
    file: ResultFile
    seconds: float  # for the rounds of one race
    judged: int  # images every peer is judged by
    peers: tuple[str, ...] = tuple(PEERS)
    batches: dict[str, int] = field(default_factory=dict)  # peer -> the best batch size that was found
    races_ladder: bool = False  # whether the peers race together with the techniques of the ladder
    ladder: Rows = field(default_factory=list)  # the rows of the ladder from that race
    end: float = math.inf  # of what may be measured, by time.monotonic()
    race_end: float = math.inf  # of the race, where more is to follow it
    raced: tuple[str, ...] = ()  # peers of the one race, all of them where empty
    lock: str = ""  # a file that other processes lock while they use the device
    owned: list[TextIO] = field(default_factory=list)  # that file, once it is locked for this process alone

    @cached_property
    def judge(self) -> ParityJudge:
        return ParityJudge(self.setting, self.judged)

    @property
    def limits(self) -> dict[str, Any]:
        return self.file.rows("limits")[0]

    @property
    def batch(self) -> int:
        """The best batch size of our engine, as the races found it."""
        raced = [row for part in ("peers", "ladder") for row in self.file.rows(part)]
        return next((row["batch"] for row in raced if row["peer"] == OURS and row.get("batch")), 4)


@dataclass(frozen=True)
class Measurement:
    """One part of a result file: what it measures, how, and how its rows are shown."""

    name: str  # in result files and of --parts
    title: str
    rows: Callable[[BenchRun], Rows]
    tables: tuple[Table, ...] = ()  # the first one may do without a title of its own
    charts: Mapping[str, Callable[[dict[str, Any]], str]] = field(default_factory=dict)  # name -> SVG of a result file
    least_seconds: float = 0.0  # that must be left for it to be begun
