"""From a text prompt to an image and its labels: `Pipeline` makes them, `open_run` reads them back."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.version import __version__

if TYPE_CHECKING:
    from datasetdm_fast.data import Sample
    from datasetdm_fast.engine.pipeline import Output, Pipeline
    from datasetdm_fast.engine.sample_stream import MakeSamples, SampleStream
    from datasetdm_fast.runs.run_folder.reader import Run, StoredSample, open_run
    from datasetdm_fast.runs.run_folder.task_dataset import TaskDataset

__all__ = [
    "GateFailed",
    "MakeSamples",
    "Missing",
    "Output",
    "Pipeline",
    "Refused",
    "Run",
    "Sample",
    "SampleStream",
    "StoredSample",
    "TaskDataset",
    "__version__",
    "open_run",
]

PLACES = {
    "MakeSamples": "engine.sample_stream",
    "Output": "engine.pipeline",
    "Pipeline": "engine.pipeline",
    "Run": "runs.run_folder.reader",
    "Sample": "data",
    "SampleStream": "engine.sample_stream",
    "StoredSample": "runs.run_folder.reader",
    "TaskDataset": "runs.run_folder.task_dataset",
    "open_run": "runs.run_folder.reader",
}


def _begin_command(line: list[str]) -> None:
    """Of `python -m MODULE`: ends it where MODULE is a part of the library, which would do nothing and say nothing; a
    signal ends a command in one line, also while it is still being imported.
    """
    module = next((word for before, word in zip(line, line[1:]) if before.startswith("-") and before[-1] == "m"), "")
    package, *names = module.split(".")
    path = Path(__file__).parent.joinpath(*names)
    if package != __name__ or not (path.is_dir() or path.with_suffix(".py").exists()):
        return  # Python says it where there is no such module
    file = path.with_suffix(".py")
    is_command = (path / "__main__.py").exists() if path.is_dir() else '== "__main__"' in file.read_text("utf-8")
    if not is_command:
        print(f"python -m {module}: a part of the library, not a command", file=sys.stderr)
        print("Commands are listed by python -m datasetdm_fast --help.", file=sys.stderr)
        sys.exit(2)
    if not find_spec("PIL") and not {"doctor", "datasetdm_fast.doctor"} & {*line}:
        print(f"{sys.executable}: the libraries of datasetdm_fast are not installed in this Python", file=sys.stderr)
        print("Activate their environment (source .venv/bin/activate), which make demo sets up.", file=sys.stderr)
        sys.exit(3)
    from datasetdm_fast.command_line.interruption import end_on_signals  # only commands need it

    end_on_signals()


if sys.argv[:1] == ["-m"]:  # Python is still looking for the module that it is to run
    _begin_command(sys.orig_argv)


def __getattr__(name: str) -> Any:
    # Loaded on first use: --help and --version must answer without importing torch.
    if name in PLACES:
        return getattr(import_module(f"datasetdm_fast.{PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})  # for help() and completion
