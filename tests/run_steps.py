"""Steps of generate by themselves, from its settings: the job of a run, and the result of a finished one."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.run_settings import read_spec, restore_settings
from datasetdm_fast.runs.jobs import remake, run
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.remake import find_remake_row
from datasetdm_fast.runs.jobs.writing import Result
from datasetdm_fast.runs.run_folder.document import read_document
from datasetdm_fast.runs.run_settings import LabelSettings, RunConfig
from datasetdm_fast.settings import EngineSettings, ModelSettings, SamplingSettings


def prepare(config: RunConfig, **options: Any) -> Job:
    spec = read_spec(config)
    return run.prepare_job(spec, read_document(spec.folder), **options)


def prepare_remake(config: RunConfig, provided: Collection[str] = ()) -> Callable[[], list[str]]:
    """The sample `config.only`; settings that were `provided` must be those of the run folder."""
    run, row = find_remake_row(config.out, config.only)
    restored = restore_settings(config, provided, run.document, row)
    groups = map(restored.group, (ModelSettings, EngineSettings, SamplingSettings, LabelSettings))
    return remake.prepare_remake(run, row, *groups, restored.classes)


def find_result(config: RunConfig) -> Result | None:
    """The result of a run with nothing left to do."""
    return run.find_result(read_spec(config), read_document(Path(config.out)))
