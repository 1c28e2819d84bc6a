"""A run folder as a command finds it, and what is to be done with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Self

from datasetdm_fast.config import ENGINES, HALF, LABELLER_KINDS
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.result import Result, result_of
from datasetdm_fast.runs.jobs.resume import count_rows, prepare_job, relocated_paths
from datasetdm_fast.runs.run_folder.document import LEDGER, check_config, grows, read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.runs.run_folder.seal import is_indexed
from datasetdm_fast.runs.run_settings import RunSpec

LEAST_MEASURED = 100  # images; comparing some with the reference would not pay in a shorter run
COMPUTING = ("engine", "dtype", "compile", "batch_size")  # settings that decide no more than how samples round
# whose versions engines name
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "onnxruntime", "openvino")


class Outcome(Enum):
    """What becomes of a run folder; everything else is refused.

    | run.json       | settings         | samples       | outcome |
    |----------------|------------------|---------------|---------|
    | there is none  | any              |               | NEW     |
    | there is one   | equal            | complete      | DONE    |
    | there is one   | equal            | some missing  | RESUME  |
    | there is one   | equal but number | some missing  | GROW    |
    | there is one   | others           |               | refused |
    """

    NEW, GROW, RESUME, DONE = "new", "grow", "resume", "done"


@dataclass(frozen=True)
class Decision:
    outcome: Outcome
    number: int  # samples of the run
    missing: int  # of these
    result: Result | None = None  # of a run with nothing left to do


@dataclass(frozen=True)
class RunQueue:
    """A run folder and its run.json, which is read once."""

    folder: Path
    stored: Mapping[str, Any] | None  # run.json; None before the run is begun

    @classmethod
    def open(cls, folder: Path) -> Self:
        return cls(folder, read_document(folder))

    def decide(self, spec: RunSpec, *, is_alone: bool = True, is_dry: bool = False) -> Decision:
        """What becomes of the run, found without a network. Index files of a complete run that are not up to date are
        rebuilt, unless other processes may be about to do it.
        """
        if self.stored is None:
            return Decision(Outcome.NEW, spec.number, spec.number)
        check_config(self.folder, self.stored, self.comparable_settings(spec))
        number = spec.number
        if result := settle(self.folder, self.stored, number, is_alone=is_alone, is_dry=is_dry):
            return Decision(Outcome.DONE, number, 0, result)
        outcome = Outcome.GROW if grows(self.stored["config"], spec.identity) else Outcome.RESUME
        return Decision(outcome, number, number - count_rows(self.folder))

    def comparable_settings(self, spec: RunSpec) -> dict[str, Any]:
        """The settings that must be those of the run folder: what merely computes its samples may be mixed."""
        config = self.stored["config"] if self.stored else {}
        model, decoder, size = spec.model.model, spec.model.decoder, spec.model.size
        settings = {**spec.identity, **(relocated_paths(model, decoder, size, self.stored) if self.stored else {})}
        if not spec.may_mix:
            return settings
        return settings | {name: config[name] for name in COMPUTING if name in config}

    def may_differ(self, spec: RunSpec) -> bool:
        """Whether it can be seen without loading the engine that it may be another than the run folder's."""
        if self.stored is None or not spec.may_mix:
            return False
        config, engine = self.stored["config"], self.stored["engine"]
        return any(config.get(name) != spec.identity.get(name) for name in COMPUTING) or any(
            _version(name) != engine[name] for name in LIBRARIES if name in engine
        )

    def tries_half(self, spec: RunSpec) -> bool:
        """Whether `--dtype auto` compares samples before this run: of a long one that is new and has no labels of other
        packages' labellers.
        """
        if self.stored is not None or spec.number < LEAST_MEASURED:
            return False
        kind = ENGINES["fast" if spec.engine.engine == "auto" else spec.engine.engine]
        is_default = spec.engine.dtype == "auto" and bool(kind.halves) and not spec.engine.compile
        return is_default and set(spec.labels.task).isdisjoint(LABELLER_KINDS.others)

    def plan(self, spec: RunSpec) -> Job:
        """The job of a dry run, which compares no engines."""
        return prepare_job(spec, self.stored, dtype=HALF if self.tries_half(spec) else "", mixes=True)


def settle(
    folder: Path, stored: Mapping[str, Any], number: int, *, is_alone: bool = True, is_dry: bool = False
) -> Result | None:
    """The result of a run folder in which none of `number` samples is missing, its index files rebuilt."""
    if not (folder / LEDGER).exists():
        return None
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        result = result_of(folder, stored, number, ledger)
        # A process that was killed while it closed the ledger leaves SQLite's own files beside it.
        is_fresh = is_indexed(folder, stored, ledger) and not any(
            (folder / f"{LEDGER}{kind}").exists() for kind in ("-wal", "-shm")
        )
    if not result.is_complete or not (is_fresh or is_alone):
        return None
    if not is_fresh and not is_dry:
        with RunFolder(folder, stored) as opened:
            finish_run(opened)
    return result


def _version(name: str) -> str:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return ""
