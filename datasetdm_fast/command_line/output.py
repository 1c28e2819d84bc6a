"""Output shared by all commands: lines on stderr unless they are quiet, the result on stdout, the end of a dry run."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from datasetdm_fast.messages import count_noun

NOTHING_WRITTEN = "--dry-run: nothing is written"


class OutputFlags(Protocol):
    """Settings of every command that writes."""

    @property
    def dry_run(self) -> bool: ...
    @property
    def json(self) -> bool: ...
    @property
    def quiet(self) -> bool: ...


def print_lines(settings: OutputFlags, *lines: str) -> None:
    """Prints lines on stderr, unless the command is quiet."""
    if lines and not settings.quiet:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def print_result(settings: OutputFlags, facts: Mapping[str, Any], line: str) -> None:
    """Prints the result on stdout: with --json all facts as one object, else the line, unless it is empty."""
    if result := json.dumps(facts) if settings.json else line:
        print(result, flush=True)


def print_unfinished(done: int, number: int, remedy: str, noun: str = "samples") -> None:
    """Prints on stderr, even if quiet, how much of a run is done and how to resume it."""
    print(f"{done} of {number} {noun} {'is' if done == 1 else 'are'} there; {remedy}", file=sys.stderr)


def print_plan(settings: OutputFlags, facts: Mapping[str, Any], line: str, *plan: str) -> int:
    """The exit code of a dry run, after printing the plan; `line` is its result without --json."""
    print_lines(settings, *plan, NOTHING_WRITTEN)
    print_result(settings, facts, line)
    return 0


def print_end(settings: OutputFlags, facts: Mapping[str, Any], line: str, *lines: str) -> int:
    """The exit code of a command, after printing what it did or, on a dry run, would do; `line` is its result without
    --json.
    """
    if settings.dry_run:
        return print_plan(settings, facts, line, *lines)
    print_lines(settings, *lines)
    print_result(settings, facts, line)
    return 0


def remake_sample(settings: OutputFlags, folder: str, id: str, remake: Callable[[], list[str]]) -> int:
    """The exit code of a command that makes one sample of a run folder again; a dry run only prints the plan."""
    facts = {"path": folder, "id": id, "written": []}
    if settings.dry_run:
        return print_plan(
            settings, facts, folder, f"sample {id}: would be made again, its missing or damaged files written"
        )
    written = remake()
    changes = f"{count_noun(len(written), 'file')} written" if written else "no file changed"
    print_lines(settings, f"sample {id}: made again, {changes}")
    print_result(settings, facts | {"written": written}, folder)
    return 0
