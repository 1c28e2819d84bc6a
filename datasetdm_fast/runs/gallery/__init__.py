"""gallery/: a page to look at a run, opened from the disk or served; it loads nothing but what lies in the run folder.

index.html, gallery.css and the scripts logic.js and gallery.js are the same for every run. Scripts that hold data say
what a run has to show: run.js for all samples, pages/ for a thousand each, details/ for as many as a sheet of
thumbnails has; left-out.js says what a filter decided. A browser loads scripts from a disk, which it does not do with
JSON files.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import locks, storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.gallery import sheets
from datasetdm_fast.runs.gallery.drawn import draw_missing, drawn_layer, picture_name, pictures, tracings
from datasetdm_fast.runs.gallery.facts import RunFacts, layers_of, script
from datasetdm_fast.runs.gallery.sheets import (
    draw_early,
    is_thumbnail,
    remove_thumbnails,
    thumbnail,
    thumbnail_name,
)
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.kept import Kept, read_kept
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, PARTS, Ledger, Row

__all__ = [
    "FOLDERS",
    "PAGE",
    "PageWriter",
    "draw_early",
    "drawn_layer",
    "expected",
    "is_thumbnail",
    "mark",
    "missing",
    "picture_name",
    "pictures",
    "remove_thumbnails",
    "thousands",
    "thumbnail",
    "thumbnail_name",
    "tracings",
    "written",
]

PAGE = "gallery/index.html"
FIXED = ("gallery.css", "logic.js", "gallery.js", "index.html")  # the same for every run, the page itself last
RUN, LEFT_OUT = "gallery/run.js", "gallery/left-out.js"
FOLDERS = ("gallery/pages", "gallery/details", "gallery/sheets")
PAGE_SAMPLES = 1000  # of an index page: those of the indices PAGE_SAMPLES * k to PAGE_SAMPLES * (k + 1) - 1
HERE = Path(__file__).parent
LOCKED = "gallery/lock"  # held by whoever writes the page: the process that finishes a run, or one that looks at it
PATIENCE, SECONDS_BETWEEN_TRIES = 900.0, 0.1  # seconds that one of them waits for the other


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the page of a run folder for this process, as nobody else may write it meanwhile."""
    storage.make_folder(folder / "gallery")
    end = time.monotonic() + PATIENCE
    with ExitStack() as lock:
        while True:
            try:
                lock.enter_context(locks.locked(folder / LOCKED))
                break
            except Refused:
                if time.monotonic() > end:
                    raise
                time.sleep(SECONDS_BETWEEN_TRIES)
        yield


class PageWriter(AbstractContextManager):
    """Writes the page and, where the folder has the samples, the pictures for it that are missing; within the block it
    is given the rows of every thousand.
    """

    def __init__(
        self,
        folder: Path,
        document: Mapping[str, Any],
        ledger: Ledger,
        *,
        has_samples: bool = True,
        is_in_progress: bool = False,
    ):
        self._folder, self._has_samples, self._facts = folder, has_samples, RunFacts(document, ledger)
        self._is_in_progress = is_in_progress
        self._shown: dict[str, str] = {}
        self._names: set[str] = set()
        for role in [layer.role for layer in layers_of(document) if layer.picture and has_samples]:
            draw_missing(folder, ledger, role)
        self._before = sheets.read_shown(folder)
        self._beside = ThreadPoolExecutor(1)  # the sheets of one thousand are drawn while the next is read
        self._drawing: Future[dict[str, str]] | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """Writes what the page reads of the samples of one thousand, all that there are."""
        number = rows[0].request.index // PAGE_SAMPLES
        self._facts.pages.append((number, len(rows)))
        contents = {_page(number): script("page", number, self._facts.index(rows))}
        for place, few in sheets.grouped(rows):
            contents[_details(place)] = script("details", place, self._facts.details(few))
        storage.publish({self._folder / name: content for name, content in contents.items()})
        self._names |= contents.keys()
        if self._has_samples:
            self._wait()
            self._drawing = self._beside.submit(sheets.draw, self._folder, rows, self._before)

    def _wait(self) -> None:
        self._shown |= self._drawing.result() if self._drawing else {}

    def end(self) -> None:
        """Writes the page itself, once all rows were added."""
        self._wait()
        folder, shown = self._folder, self._shown
        if self._has_samples:
            sheets.write_shown(folder, shown)
        for name in set(_scattered(folder)) - self._names - {sheets.sheet_name(int(number)) for number in shown}:
            storage.remove(folder / name)
        whole = self._facts.whole(has_sheets=self._has_samples, is_in_progress=self._is_in_progress)
        contents = {RUN: script("run", 0, whole)}
        contents |= {LEFT_OUT: _left_out(read_kept(folder))}
        contents |= {f"gallery/{name}": (HERE / name).read_bytes() for name in FIXED}
        storage.publish({folder / name: content for name, content in contents.items()})

    def __exit__(self, *_: object) -> None:
        self._beside.shutdown()


def thousands(ledger: Ledger) -> Iterator[list[Row]]:
    """The rows of the data set and those set aside, with all their parts: of an index page each."""
    rows = ledger.rows(DONE, DOUBTFUL, parts=(*PARTS, "tracings"))
    for _, group in groupby(rows, lambda row: row.request.index // PAGE_SAMPLES):
        yield list(group)


def write(folder: Path, document: Mapping[str, Any], ledger: Ledger) -> None:
    """Writes the page alone."""
    with PageWriter(folder, document, ledger) as page:
        for rows in thousands(ledger):
            page.add(rows)
        page.end()


def mark(folder: Path, document: Mapping[str, Any], decided: Kept | None) -> None:
    """Writes down for the page, where there is one, which samples a filter left out."""
    if not (folder / PAGE).exists():
        return
    if (folder / RUN).exists():
        storage.publish({folder / LEFT_OUT: _left_out(decided)})
        return
    with held(folder), Ledger(folder / LEDGER, read_only=True) as ledger:  # the page of an earlier version
        write(folder, document, ledger)


def missing(folder: Path, ledger: Ledger, *, has_samples: bool = True) -> list[str]:
    """The files of the page that are not there, though its samples are; pictures of single samples aside."""
    return sorted(expected(ledger, has_samples=has_samples) - set(written(folder)))


def expected(ledger: Ledger, *, has_samples: bool = True) -> set[str]:
    """The files that the page of these samples has, pictures of single samples aside."""
    indices = [*ledger.indices(), *ledger.indices(DOUBTFUL)]
    wanted = {f"gallery/{name}" for name in FIXED} | {RUN, LEFT_OUT, LOCKED}
    wanted |= {_page(number) for number in {index // PAGE_SAMPLES for index in indices}}
    groups = {index // sheets.GROUP for index in indices}
    wanted |= {_details(number) for number in groups}
    if has_samples:
        wanted |= {sheets.SHOWN, *(sheets.sheet_name(number) for number in groups)}
    return wanted


def written(folder: Path) -> list[str]:
    """The files of the page that are there, pictures of single samples aside."""
    single = [*(f"gallery/{name}" for name in FIXED), RUN, LEFT_OUT, LOCKED, sheets.SHOWN]
    return sorted([*(name for name in single if (folder / name).exists()), *_scattered(folder)])


def _scattered(folder: Path) -> Iterator[str]:
    """The files of which there are more, the more samples there are."""
    for place in FOLDERS:
        if (folder / place).is_dir():
            for path in (folder / place).iterdir():
                if not storage.is_temporary(path):
                    yield f"{place}/{path.name}"


def _page(number: int) -> str:
    return f"gallery/pages/{number:06d}.js"


def _details(number: int) -> str:
    return f"gallery/details/{number:06d}.js"


def _left_out(decided: Kept | None) -> bytes:
    """Index and reason of every sample that a filter left out."""
    return script("leftOut", 0, list(decided.left_out.items()) if decided else [])
