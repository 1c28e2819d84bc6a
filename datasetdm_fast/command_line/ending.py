"""How a command ends: exit codes, messages in two lines, a report for our own bugs."""

import errno
import os
import platform
import select
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps

from datasetdm_fast.command_line.interruption import ENDED, SignalWatch
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.plugins import loaded_packages, place_in_package
from datasetdm_fast.untrusted import documents
from datasetdm_fast.version import __version__

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)  # of a file or folder, whichever command meets it


def command(function: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """The function as `main`, which returns the exit code; without arguments it takes those of the command line."""

    @wraps(function)
    def main(arguments: Sequence[str] | None = None) -> int:
        return run_command(function, arguments)

    return main


def run_command(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """The exit code of command(arguments): 0 done, 2, 3, 4 as errors.py says, 130 and 143 for signals, 1 for a bug."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the process, as services do
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    with SignalWatch(is_last=arguments is None) as watch:
        code = _ended(command, sys.argv[1:] if arguments is None else arguments, watch)
    return code


def _ended(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str], watch: SignalWatch) -> int:
    try:
        watch.open()
        code = command(arguments) or 0
        sys.stdout.flush()  # here, so that a reader that has gone away is met inside this try
        return code
    except (Refused, Missing, GateFailed) as stop:
        if watch.signal:  # the code of an extension may end in any way, so this one was made of the signal
            _say(ENDED)
            return 128 + watch.signal
        return _told(stop)
    except KeyboardInterrupt:
        _say(ENDED)
        return 130
    except SystemExit as stop:  # --help, --version, SIGTERM
        if watch.signal:
            _say(ENDED)
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BrokenPipeError as error:
        return 141 if _reader_is_gone() else report(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = "a file or standard output" if error.filename is None else documents.quote(error.filename)
            _say(f"{place}: {error.strerror}", "Free some space, then run the same command again.")
            return Missing.exit_code
        if error.errno in DENIED and error.filename is not None:
            checked = "the disk that it is on" if error.errno == errno.EIO else "its permissions"
            _say(
                f"{documents.quote(error.filename)}: {error.strerror}",
                f"Check {checked}, then run the same command again.",
            )
            return Missing.exit_code
        if error.errno != errno.ENAMETOOLONG:
            return report(error)
        _say(f"{documents.quote(error.filename)}: no file or folder has so long a name", "Choose a shorter name.")
        return Refused.exit_code
    except Exception as error:
        if watch.signal:  # a library made another error of it, as imports do
            _say(ENDED)
            return 128 + watch.signal
        return _told(stop) if (stop := _out_of_memory(error)) else report(error)
    finally:
        watch.shut()


def _told(stop: Refused | Missing | GateFailed) -> int:
    _say(documents.one_line(stop.cause), documents.one_line(stop.remedy))
    return stop.exit_code


def _say(*lines: str) -> None:
    """Lines on standard error; where even these cannot be written, as on a full disk, the exit code tells alone."""
    with suppress(OSError):
        print(*lines, sep="\n", file=sys.stderr)


def _out_of_memory(error: Exception) -> Missing | None:
    """What is said instead where an error is PyTorch's about the memory of a GPU, which is no bug."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    return Missing(
        "memory: the GPU does not have enough memory",
        "Choose a smaller --batch-size or --size, or free its memory.",
    )


def _reader_is_gone() -> bool:
    """Whether the broken pipe was our standard output; it is then pointed elsewhere, for a quiet last flush."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors and hang-ups are always reported
    except (OSError, ValueError):  # closed, or not a file at all
        return False
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def report(error: Exception) -> int:
    """Exit code 1, once what led to the error is in a file that the user can send us; 3 and the name of the package
    where the error went through an extension. Elsewhere an extension that was selected may have caused it.
    """
    place, told = place_in_package(error), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    summary = f"{place} fails ({told})" if place else f"datasetdm-fast: unexpected {told}"
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
        _say(summary, f"Update that package, or remove it; the report for its authors is {report.name}.")
    else:
        others = "".join(f", or of the package {package}" for package in loaded_packages())
        print(f"{summary}; this is a bug of ours{others}, the report is {report.name}", file=sys.stderr)
    return code
