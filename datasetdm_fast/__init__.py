"""From a text prompt to an image and its labels: `Pipeline` makes them, `open_run` reads them back."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.version import __version__

if TYPE_CHECKING:
    from datasetdm_fast.pipeline import Output, Pipeline, Run, Sample, StoredSample, TaskDataset, open_run

__all__ = [
    "GateFailed",
    "Missing",
    "Output",
    "Pipeline",
    "Refused",
    "Run",
    "Sample",
    "StoredSample",
    "TaskDataset",
    "__version__",
    "open_run",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: --help and --version must answer without importing torch.
    if name in __all__:
        return getattr(import_module("datasetdm_fast.pipeline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
