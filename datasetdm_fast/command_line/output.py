"""What commands print: lines and progress on stderr, the result on stdout; and the check of output paths."""

import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.messages import count_noun, format_duration
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


def print_end(settings: OutputSettings, facts: Mapping[str, Any], line: str, *lines: str) -> int:
    """The exit code of a command, after printing what it did or would do; `line` is its result without --json."""
    print_lines(settings, *lines, *([NOTHING_WRITTEN] if settings.dry_run else []))
    print_result(settings, facts, line)
    return 0


def remake_sample(settings: OutputSettings, folder: str, id: str, remake: Callable[[], list[str]]) -> int:
    """The exit code of a command that makes one sample of a run folder again; a dry run only prints the plan."""
    written = [] if settings.dry_run else remake()
    changes = f"made again, {count_noun(len(written), 'file')} written" if written else "made again, no file changed"
    if settings.dry_run:
        changes = "would be made again, its missing or damaged files written"
    return print_end(settings, {"path": folder, "id": id, "written": written}, folder, f"sample {id}: {changes}")


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


SECONDS_PER_LINE = 10.0


class Progress(AbstractContextManager[Any]):
    """A bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""

    def __init__(self, total: int, unit: str, title: str, is_quiet: bool):
        self.total, self.is_quiet = total, is_quiet
        self._bar: Any = None  # which is false in itself where its total is 0
        self._begin = self._last_line = time.monotonic()
        self._first: int | None = None  # done at the first report, from which on time counts: loading came before it
        if shows_bar(is_quiet):
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, desc=title, file=sys.stderr)

    def is_line_due(self) -> bool:
        """Whether a line is to be printed now, which then counts as printed."""
        now = time.monotonic()
        if self._bar is not None or self.is_quiet or now - self._last_line < SECONDS_PER_LINE:
            return False
        self._last_line = now
        return True

    def seconds_each(self, done: int) -> float:
        """Mean seconds of one since the first report, which has none itself."""
        if self._first is None:
            self._first, self._begin = done, time.monotonic()
        return (time.monotonic() - self._begin) / (done - self._first) if done > self._first else 0.0

    def time_left(self, done: int, each: float) -> str:
        """The end of a line, empty where it is not known or nothing is left."""
        return f", about {format_duration(each * (self.total - done))} left" if each and done < self.total else ""

    def print(self, line: str) -> None:
        """A line for the screen, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif not self.is_quiet:
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class ImageProgress(Progress):
    """Progress of a run in UNet calls, or in images where nobody reports calls; `count_outside` takes a moment."""

    def __init__(
        self, images: int, is_quiet: bool, batch: int = 1, calls: int = 0, count_outside: Callable[[], int] = lambda: 0
    ):
        self._images, self._calls = images, calls
        self._count_outside, self._outside, self._counted = count_outside, 0, time.monotonic()
        self._images_done = self._calls_done = 0
        super().__init__(-(-images // batch) * (calls or 1), "call" if calls else "image", self._title, is_quiet)

    @property
    def _title(self) -> str:
        outside = f", {self._outside} out of domain" if self._outside else ""
        return f"{self._images_done}/{count_noun(self._images, 'image')}{outside}"

    def on_unet_call(self, count: int = 1) -> None:
        self._calls_done += count
        each = self._calls or 1
        self.total = max(self.total, -(-self._calls_done // each) * each)  # batches in place of quarantined samples
        seconds = self.seconds_each(self._calls_done)
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.update(count)
        elif self.is_line_due():
            left = self.time_left(self._calls_done, seconds)
            self.print(f"{self._title}, {self._calls_done / max(self.total, 1):.0%}{left}")

    def on_commit(self, count: int) -> None:
        self._images_done += count
        self._images = max(self._images, self._images_done)  # of processes, one may make more than its share
        if not self.is_quiet and time.monotonic() - self._counted >= SECONDS_PER_LINE:
            self._outside, self._counted = self._count_outside(), time.monotonic()
        if self._bar is not None:
            self._bar.set_description(self._title)
        if not self._calls:
            self.on_unet_call(count)


class CountProgress(Progress):
    """Progress of a comparison in U-Net calls, of an evaluation in images, or of a list in prompts."""

    def __init__(self, is_quiet: bool, title: str, total: int, unit: str = "call"):
        self._title, self._unit, self._done = title, unit, 0
        super().__init__(total, unit, title, is_quiet)

    def __call__(self) -> None:
        """Counts a call."""
        self.on_count(self._done + 1, self.total)

    def on_count(self, done: int, total: int) -> None:
        self._done, self.total, seconds = done, total, self.seconds_each(done)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif done and self.is_line_due():
            left = self.time_left(done, seconds)
            self.print(f"{self._title}, {done}/{count_noun(total, self._unit)}{left}")


class StepProgress(Progress):
    """Progress of a training, with its last figure on held-out images; `later` steps are taken after it."""

    def __init__(self, title: str, metric: str, steps: int, is_quiet: bool, later: int = 0):
        self._later = later
        self._title, self._metric, self._figure = title, metric, ""
        super().__init__(steps, "step", title, is_quiet)

    def on_step(self, step: int, loss: float, figure: float | None) -> None:
        each = self.seconds_each(step)
        if figure is not None:
            self._figure = f", held-out {self._metric} {figure:.4f}"
        later = ""
        if self._later and each:
            later = f", {format_duration(each * (self.total - step + self._later))} with what follows"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {loss:.4f}{self._figure}{later}")
        elif self.is_line_due() or step == self.total:
            left = self.time_left(step, each)
            self.print(f"{self._title} {step}/{self.total}, loss {loss:.4f}{self._figure}{left}{later}")


def shows_bar(is_quiet: bool) -> bool:
    """Whether progress is shown as a bar: on a terminal, unless TQDM_DISABLE says no."""
    return not is_quiet and sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")
