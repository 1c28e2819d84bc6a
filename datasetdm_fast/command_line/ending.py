"""How a command ends: exit codes, messages in two lines, a report for our own bugs."""

import errno
import os
import select
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, wraps
from typing import TypeVar

from datasetdm_fast.bug_report import print_error, report_bug
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import ENDED, SignalWatch
from datasetdm_fast.cores import before_torch
from datasetdm_fast.errors import Missing, Refused, Stop, is_out_of_gpu, is_out_of_ram
from datasetdm_fast.untrusted import documents

Settings = TypeVar("Settings")
OURS = "datasetdm_fast"  # what cannot be imported from it is a bug
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)  # of a file or folder, whichever command meets it


def command(function: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """The function as `main`, which returns the exit code; without arguments it takes those of the command line."""
    return wraps(function)(partial(run_command, function))


@dataclass(frozen=True)
class CommandLine:
    """A command line as it was given."""

    prog: str
    arguments: Sequence[str]
    provided: set[str]  # the settings that it names

    @property
    def text(self) -> str:
        """The whole line, which resumes the command."""
        return f"{self.prog} {shlex.join(self.arguments)}".rstrip()


def command_with(
    settings: type[Settings], examples: Sequence[str]
) -> Callable[[Callable[[Settings, CommandLine], int]], Callable[..., int]]:
    """`main` of a function of the parsed settings; the docstring of its module begins with the program's name."""

    def decorate(function: Callable[[Settings, CommandLine], int]) -> Callable[..., int]:
        @command
        @wraps(function)
        def main(arguments: Sequence[str]) -> int:
            description = function.__globals__["__doc__"] or f"python -m {function.__globals__['__spec__'].name}:"
            prog = " ".join(description.split()[:3]).rstrip(":")
            config, provided = parse(arguments, settings, prog, description, examples)
            return function(config, CommandLine(prog, arguments, provided))

        return main

    return decorate


def run_command(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """The exit code of command(arguments): 0 done, 2, 3, 4 as errors.py says, 130 and 143 for signals, 1 for a bug."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the process that started this one, as services do
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    if arguments is None:
        before_torch()
    with SignalWatch(is_last=arguments is None) as watch:
        try:
            watch.open()
            code = command(sys.argv[1:] if arguments is None else arguments) or 0
            sys.stdout.flush()  # here, so that a closed pipe raises inside this try
            return code
        except KeyboardInterrupt:
            print_error(ENDED)
            return 130
        except SystemExit as stop:  # --help, --version, SIGTERM
            if watch.signal:
                print_error(ENDED)
            elif isinstance(stop.code, str):  # a library's last words
                print_error(documents.one_line(stop.code))
            return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except Exception as error:
            if watch.signal and not isinstance(error, OSError):  # extensions and imports may raise others instead
                print_error(ENDED)
                return 128 + watch.signal
            return _report_error(error)
        finally:
            watch.is_open = False


def _report_error(error: Exception) -> int:
    """Prints cause and remedy of an error; its exit code."""
    if isinstance(error, BrokenPipeError) and _is_output_closed():
        return 141
    stop = error if isinstance(error, Stop) else _as_stop(error)
    if stop is None:
        return report_bug(error)
    print_error(documents.one_line(stop.cause), documents.one_line(stop.remedy))
    return stop.exit_code


def _as_stop(error: Exception) -> Refused | Missing | None:
    """The refusal for an error of the machine or the disk; None for a bug."""
    if (is_of_gpu := is_out_of_gpu(error)) or is_out_of_ram(error):
        return Missing(
            f"memory: the {'GPU' if is_of_gpu else 'machine'} does not have enough memory",
            "Choose a smaller --batch-size or --size, or free its memory.",
        )
    if isinstance(error, ImportError) and (error.name or OURS).partition(".")[0] != OURS:
        return Missing(
            f"a library cannot be loaded: {error}",
            "Install it anew, or free memory; `datasetdm-fast doctor` lists the libraries.",
        )
    if "can't start new thread" in str(error) or isinstance(error, BlockingIOError):
        return Missing(
            "this machine or container starts no more threads or processes",
            "Raise its limits (ulimit -u, ulimit -v, --pids-limit), then run the same command again.",
        )
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = "a file or standard output" if error.filename is None else error.filename
        return Missing(f"{place}: {error.strerror}", "Free some space, then run the same command again.")
    if error.errno in DENIED and error.filename is not None:
        checked = "the disk that it is on" if error.errno == errno.EIO else "its permissions"
        return Missing(f"{error.filename}: {error.strerror}", f"Check {checked}, then run the same command again.")
    if error.errno == errno.ENAMETOOLONG:
        name = documents.quote(error.filename)
        return Refused(f"{name}: no file or folder has so long a name", "Choose a shorter name.")
    if error.errno == errno.ENOENT and _is_current_folder_there():
        place = "" if error.filename is None else f"{error.filename}: "  # as of a temporary folder that is none
        return Missing(f"{place}{error.strerror}", "Put it back, then run the same command again.")
    if error.errno == errno.ENOENT:  # os.getcwd names no file
        return Missing("the current folder is no longer there", "Change to another, then run the same command again.")
    return None


def _is_current_folder_there() -> bool:
    with suppress(OSError):
        return bool(os.getcwd())
    return False


def _is_output_closed() -> bool:
    """Whether the broken pipe was our standard output or error; it is then redirected, for a quiet last flush."""
    is_closed = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or not a file at all
            poll = select.poll()
            poll.register(stream.fileno(), 0)  # errors and hang-ups are always reported
            if poll.poll(0):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                is_closed = True
    return is_closed
