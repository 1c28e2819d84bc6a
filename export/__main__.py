"""python -m datasetdm_fast.export: a model and its decoders as files that other runtimes execute."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from datasetdm_fast.export_cli.command import _run


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    from datasetdm_fast.command_line.ending import run_command

    return run_command(_run, arguments)


if __name__ == "__main__":
    sys.exit(main())
