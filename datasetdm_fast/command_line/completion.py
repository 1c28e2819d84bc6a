"""datasetdm-fast completion SHELL: prints a script by which a shell completes commands, flags and their values."""

import argparse
import io
import json
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from datasetdm_fast.command_line.flags import DESCRIBE
from datasetdm_fast.errors import Missing, Refused, nearest

SCRIPT = "datasetdm-fast"
Commands = Mapping[str, tuple[str, str]]  # name -> module with its main, what it does


def completion_script(shell: str, commands: Commands) -> str:
    """The completion script of a shell."""
    try:
        import shtab
    except ImportError as error:
        raise Missing(
            f"{SCRIPT} completion: shtab is not installed", "Install it with: pip install 'datasetdm-fast[completion]'."
        ) from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise Refused(
            f"{SCRIPT} completion: unknown shell {shell!r}{nearest(shell, shtab.SUPPORTED_SHELLS)}",
            f"Write one of {', '.join(shtab.SUPPORTED_SHELLS)}.",
        )
    parser = argparse.ArgumentParser(prog=SCRIPT)
    parsers = parser.add_subparsers()
    for name, (module, sentence) in commands.items():
        command = parsers.add_parser(name, help=sentence, add_help=False)
        for flag in describe_flags(module):
            options: dict[str, Any] = {"help": flag["help"].replace("%", "%%")}
            if not flag["takes"]:
                options["action"] = "store_true"
            elif flag["metavar"].startswith("{"):
                options["choices"] = flag["metavar"].strip("{}").split(",")
            argument: Any = command.add_argument(*flag["flags"] or [name], **options)
            if flag["takes"] and "choices" not in options:
                argument.complete = shtab.FILE
    return shtab.complete(parser, shell)


def describe_flags(module: str) -> list[dict[str, Any]]:
    """Spellings, metavar and help of every flag of a command, and whether it takes a value."""
    output = io.StringIO()
    with redirect_stdout(output):
        import_module(module).main([DESCRIBE])
    return json.loads(output.getvalue())
