"""Messages on standard error for a process that ends, and the report of an unexpected error."""

import platform
import sys
import tempfile
import traceback
from contextlib import suppress

from datasetdm_fast.errors import Missing
from datasetdm_fast.plugins import loaded_packages, place_in_package
from datasetdm_fast.version import __version__


def print_error(*lines: str) -> None:
    """Prints lines on standard error; if even that fails, as on a full disk, the exit code alone remains."""
    with suppress(OSError):
        print(*lines, sep="\n", file=sys.stderr)


def report_bug(error: Exception) -> int:
    """Exit code 1, after the traceback is in a file for us; 3 and the package's name for an error in an extension."""
    place, summary = place_in_package(error), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    code = Missing.exit_code if place else 1
    versions = f"datasetdm-fast {__version__}, Python {platform.python_version()}, {platform.platform()}"
    facts = f"{versions}\ncommand: {sys.argv}\n\n"
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="datasetdm-fast-", suffix=".txt", delete=False
        ) as report:
            report.write(facts + "".join(traceback.format_exception(error)))
    except OSError:
        traceback.print_exception(error)
        return code
    if place:
        remedy = f"Update that package, or remove it; the report for its authors is {report.name}."
        print_error(f"{place} fails ({summary})", remedy)
    else:
        others = "".join(f", or of the package {package}" for package in loaded_packages())
        bug = f"this is a bug of ours{others}, the report is {report.name}"
        print_error(f"datasetdm-fast: unexpected {summary}; {bug}")
    return code
