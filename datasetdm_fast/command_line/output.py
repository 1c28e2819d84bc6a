"""Output of commands: lines on stderr, the result on stdout, the end of a dry run, and the check of output paths."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import OutputSettings
from datasetdm_fast.untrusted.documents import quote

NOTHING_WRITTEN = "--dry-run: nothing is written"


def print_lines(settings: OutputSettings, *lines: str) -> None:
    """Prints lines on stderr, unless the command is quiet."""
    if lines and not settings.quiet:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def print_result(settings: OutputSettings, facts: Mapping[str, Any], line: str) -> None:
    """Prints the result on stdout: with --json all facts as one object, else the line, unless it is empty."""
    if result := json.dumps(facts) if settings.json else line:
        print(result, flush=True)


def print_unfinished(done: int, number: int, command: str, noun: str = "samples") -> None:
    """Prints on stderr, even if quiet, how much of a run is done, and that the same command resumes it."""
    print(f"{done} of {number} {noun} {'is' if done == 1 else 'are'} there; resume with: {command}", file=sys.stderr)


def print_plan(settings: OutputSettings, facts: Mapping[str, Any], line: str, *plan: str) -> int:
    """The exit code of a dry run, after printing the plan; `line` is its result without --json."""
    print_lines(settings, *plan, NOTHING_WRITTEN)
    print_result(settings, facts, line)
    return 0


def print_end(settings: OutputSettings, facts: Mapping[str, Any], line: str, *lines: str) -> int:
    """The exit code of a command, after printing what it did or would do; `line` is its result without --json."""
    if settings.dry_run:
        return print_plan(settings, facts, line, *lines)
    print_lines(settings, *lines)
    print_result(settings, facts, line)
    return 0


def remake_sample(settings: OutputSettings, folder: str, id: str, remake: Callable[[], list[str]]) -> int:
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


PLACE = "place"  # a folder, or the URL of one in an object store
LONGEST_PART = 255 - 32  # bytes of a name between two slashes, less what a file has added while it is written
LONGEST_PATH = 4096 - 512  # bytes, less those of the files inside


def check_output(flag: str, text: str, kind: str) -> None:
    """Refuses a name that no file or folder can have."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        cause = f"{flag} {quote(text)}: control characters in the name of a {kind}, or letters that the locale lacks"
        raise Refused(cause, "Choose another name, or set PYTHONUTF8=1.")
    if "://" in text and kind == PLACE:
        return
    if "://" in text:
        raise Refused(
            f"{flag} {quote(text)}: expected a {kind} on this machine, not a URL",
            "Name a path. Object stores are written to by generate --store, convert --out and merge --out.",
        )
    kind = "folder" if kind == PLACE else kind
    if not text.strip():
        raise Refused(f"{flag} is empty, expected the name of a {kind}", "Name one, or leave the flag out.")
    path = Path(text)
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > LONGEST_PART or len(os.fsencode(path.absolute())) > LONGEST_PATH:
        raise Refused(
            f"{flag} {quote(text)}: {longest} bytes between two slashes and {len(os.fsencode(text))} in all, "
            f"expected at most {LONGEST_PART} and {LONGEST_PATH}",
            "Choose a shorter name.",
        )
    try:
        _check_place(flag, path, kind)
    except OSError as error:
        raise Missing(
            f"{flag} {text}: {error.strerror}", "Check the folders above it and their permissions."
        ) from error


def _check_place(flag: str, path: Path, kind: str) -> None:
    """Refuses a path that cannot be created, or is something else."""
    for place in chain([path], path.parents):
        if place.is_symlink() and not place.exists():
            raise Refused(f"{flag} {path}: {place} is a symbolic link that leads nowhere", "Repair or delete the link.")
    if path.exists():
        if path.is_dir() != (kind == "folder") or not (path.is_dir() or path.is_file()):
            kind_there = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or a pipe"
            raise Refused(
                f"{flag} {path}: there is {kind_there} of that name, expected a {kind}", f"Choose another {flag}."
            )
        return
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise Refused(f"{flag} {path}: {above} is a file, expected a folder", f"Choose another {flag}.")
    if not os.access(above, os.W_OK | os.X_OK) or not os.statvfs(above).f_blocks:  # /proc and /sys take no files
        raise Missing(f"{flag} {path}: {above} cannot be written to", "Check its permissions, or choose another.")
