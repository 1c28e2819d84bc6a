"""Runs that benches and proofs make, from the settings of generate."""

from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.run import prepare_job
from datasetdm_fast.runs.run_folder.document import read_document
from datasetdm_fast.runs.run_settings import RunConfig


def prepare(config: RunConfig) -> Job:
    """The job of a run, new or resumed."""
    spec = read_spec(config)
    return prepare_job(spec, read_document(spec.folder))
