"""What commands say alike: lines on stderr unless they are quiet, their result on stdout, and the end of a dry run."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from datasetdm_fast.messages import count_noun

NOTHING_WRITTEN = "--dry-run: nothing is written"


class TellingSettings(Protocol):
    """What every command that writes can be asked for."""

    @property
    def dry_run(self) -> bool: ...
    @property
    def json(self) -> bool: ...
    @property
    def quiet(self) -> bool: ...


def say(settings: TellingSettings, *lines: str) -> None:
    """Prints lines on stderr, unless all is to be quiet."""
    if not settings.quiet:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def put(settings: TellingSettings, facts: Mapping[str, Any], line: str) -> None:
    """Prints the result on stdout: with --json all facts as one object, else its lines, if there are any."""
    if told := json.dumps(facts) if settings.json else line:
        print(told, flush=True)


def unfinished(done: int, number: int, remedy: str, noun: str = "samples") -> None:
    """Says on stderr, also where all is to be quiet, how much of a run is there and how it is continued."""
    print(f"{done} of {number} {noun} {'is' if done == 1 else 'are'} there; {remedy}", file=sys.stderr)


def planned(settings: TellingSettings, facts: Mapping[str, Any], line: str, *told: str) -> int:
    """The exit code of a dry run, once it told what would be done; `line` is its result without --json."""
    say(settings, *told, NOTHING_WRITTEN)
    put(settings, facts, line)
    return 0


def remade(settings: TellingSettings, folder: str, id: str, remake: Callable[[], list[str]]) -> int:
    """The exit code of a command that makes one sample of a run folder again, which is there; not on a dry run."""
    facts = {"path": folder, "id": id, "written": []}
    if settings.dry_run:
        return planned(
            settings, facts, folder, f"sample {id}: would be made again, its missing or damaged files written"
        )
    written = remake()
    told = f"{count_noun(len(written), 'file')} written" if written else "every byte as it was"
    say(settings, f"sample {id}: made again, {told}")
    put(settings, facts | {"written": written}, folder)
    return 0
