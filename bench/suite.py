"""The measurements in their order, each a part that is stored as soon as it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from bench.machine import limits
from bench.peers import PEERS
from bench.report.results import ResultFile, is_settled
from bench.rows import ladder, layers, ops, profile, quality, race, scale, stages, sweep
from bench.rows.parity import ParityJudge
from bench.setting import Setting
from datasetdm_fast.engines.fast import DTYPES, resolve_dtype
from datasetdm_fast.errors import GateFailed

PROFILED = ("upstream", "diffusers", "ours")


@dataclass
class Measurement:
    """One run of the bench: the setting, and what its parts learn from each other."""

    setting: Setting
    file: ResultFile
    seconds: float  # for the rounds of one race
    judged: int  # images every peer is judged by
    names: tuple[str, ...] = tuple(PEERS)
    batches: dict[str, int] = field(default_factory=dict)
    has_ladder: bool = False  # whether the peers race with the rungs of the ladder, and so once for both
    climbed: list[dict[str, Any]] = field(default_factory=list)  # the rungs of that race

    @cached_property
    def judge(self) -> ParityJudge:
        return ParityJudge(self.setting, self.judged)

    @property
    def limits(self) -> dict[str, Any]:
        return self.file.rows("limits")[0]

    @property
    def batch(self) -> int:
        """The batch ours proved best at, as the races found it."""
        found = [
            row
            for part in ("peers", "ladder")
            for row in self.file.rows(part)
            if row["peer"] == race.OURS and row.get("batch")
        ]
        return found[0]["batch"] if found else 4

    def race(
        self, names: Sequence[str], offers=PEERS, seconds: float = 0.0, draws: bool = False
    ) -> list[dict[str, Any]]:
        options = {"offers": offers, "draws": draws, "batches": self.batches}
        return race.race(self.setting, names, self.judge, self.limits, seconds or self.seconds, **options)


class Part(NamedTuple):
    name: str
    sentence: str
    run: Callable[[Measurement], list[dict[str, Any]]]
    least: float = 0.0  # seconds that must be left for it to be begun


def together(m: Measurement) -> list[dict[str, Any]]:
    """The rows of all peers, raced with the rungs of the ladder where those are asked for: several rungs are peers as
    well.
    """
    rungs = tuple(ladder.RUNGS) if m.has_ladder else ()
    found = m.race(tuple(dict.fromkeys((*m.names, *rungs))), {**ladder.RUNGS, **PEERS}, draws=not m.setting.quick)
    m.climbed = [row | {"title": ladder.RUNGS[name].title} for name in rungs for row in found if row["peer"] == name]
    return [row for row in found if row["peer"] in m.names]


def machine_limits(m: Measurement) -> list[dict[str, Any]]:
    return [limits.measure(m.setting.device, 0.15 if m.setting.quick else 0.6)]


def layer_rows(m: Measurement) -> list[dict[str, Any]]:
    dtype = resolve_dtype("auto", m.setting.device)
    name = next(name for name, value in DTYPES.items() if value == dtype)
    return layers.rows(m.setting, m.limits, name, m.batch, m.seconds / 10)


def op_rows(m: Measurement) -> list[dict[str, Any]]:
    engine = PEERS[race.OURS].build(m.setting, 1).engine
    dtype = engine.fingerprint()["dtype"]
    return ops.rows(m.setting.device, dtype, m.limits, ops.forms_of(engine), 0.02 if m.setting.quick else 0.1)


LIMITS = Part("limits", "what the machine can do at most", machine_limits)
SHARED = (
    Part(
        "stages",
        "every stage, as DatasetDM writes it and as we do",
        lambda m: stages.rows(m.setting, m.judge, m.limits, m.seconds / 6, m.batch),
        60,
    ),
    Part("ops", "every operation against its plain form", op_rows, 60),
    Part("layers", "every layer shape of the UNet by itself", layer_rows, 30),
    Part(
        "batches",
        "one UNet call by batch size",
        lambda m: sweep.batch_rows(m.setting, m.judge, m.file.rows("peers")),
        60,
    ),
    Part(
        "chunks",
        "image decoding by how many at once",
        lambda m: sweep.chunk_rows(m.setting, m.judge, m.seconds / 12),
        30,
    ),
    Part(
        "profile",
        "where the time of one call goes",
        lambda m: profile.rows(m.setting, m.judge, PROFILED, m.batches),
        60,
    ),
    Part(
        "ladder",
        "from DatasetDM to us, one technique a rung",
        lambda m: m.climbed or m.race(tuple(ladder.RUNGS), ladder.RUNGS),
        120,
    ),
    Part("quality", "ways that change the result", lambda m: quality.rows(m.setting), 60),
    Part("scale", "the driver's own cost, and ranks", lambda m: scale.rows(m.setting.quick), 60),
)
PEERS_PART = Part("peers", "who makes labelled samples how fast", together)


def one_by_one(names: Iterable[str]) -> tuple[Part, ...]:
    """Each peer against ours in a part of its own, so that a cut run has what was done."""

    def against_ours(name: str) -> Part:
        rivals = tuple(dict.fromkeys((name, race.OURS)))
        return Part(
            f"peers {name}",
            f"{PEERS[name].title}, in turn with ours",
            lambda m: m.race(rivals, draws=True),
            240 if "compiled" in name else 60,
        )

    return tuple(against_ours(name) for name in names)


def measure(m: Measurement, parts: Sequence[Part], until: float, say: Callable[[str], None]) -> list[str]:
    """Runs what is not there yet while the clock allows, and returns the names of the parts that are left."""
    m.file.give_up_broken()
    left = []
    for part in parts:
        if is_settled(m.file.document, part.name):
            continue
        if time.monotonic() + part.least > until:
            left.append(part.name)
            continue
        m.file.begin(part.name)
        begin = time.perf_counter()
        rows = part.run(m)
        m.file.store(part.name, rows, time.perf_counter() - begin)
        say(f"{part.name}: {part.sentence}, {time.perf_counter() - begin:.0f} s")
    return left


def failed(document: dict[str, Any]) -> list[str]:
    """What every failed row says, `part NAME: why`, and the parts that never ended."""
    said = [f"part {name} did not end" for name, part in document["parts"].items() if part["status"] == "broken"]
    for name, part in document["parts"].items():
        for row in part.get("rows", []):
            if row.get("status") == "failed":
                said.append(f"{name}, {row.get('peer') or row.get('stage') or row.get('op')}: {row['why']}")
    return said


def check(document: dict[str, Any]) -> None:
    """Raises GateFailed where a row failed."""
    if said := failed(document):
        for line in said:
            print(line, file=sys.stderr)
        raise GateFailed(
            f"bench: {len(said)} rows failed, first {said[0]}",
            "what failed was not timed; `python -m datasetdm_fast.verify` shows where it differs",
        )
