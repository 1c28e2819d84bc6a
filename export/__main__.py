"""python -m datasetdm_fast.export: a model and its decoders as files that other runtimes execute."""

import sys
from collections.abc import Sequence

from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.export_cli.command import EXAMPLES, run

__all__ = ["EXAMPLES", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
