"""Writes the page of a run, its facts, sheets of thumbnails and pictures, and the index files, all from one reading of
the ledger; then the folder is sealed.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.cores import count_cores, in_blocks
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import LabelName, by_kind, by_task, kind_of, mean_certainty
from datasetdm_fast.engine.labels.class_tables import OURS, colour_in
from datasetdm_fast.engine.labels.label_files import encode_picture, picture_bytes
from datasetdm_fast.engine.labels.trust import NO_THING
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder import folder as run_folder
from datasetdm_fast.runs.run_folder.document import (
    COMMANDS,
    DROPPED,
    QUARANTINE,
    engine_names,
    made_by,
    maker,
    pretty,
    sampler_in_words,
    sides,
    size_in_words,
    speed_in_words,
)
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.indexes import writers
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, PARTS, Ledger, Row, RowFile, canonical
from datasetdm_fast.runs.run_folder.scores import LEAST_SHARE
from datasetdm_fast.runs.run_folder.selections import read_filter
from datasetdm_fast.untrusted import documents, images

FIXED_FILES = {f"gallery/{name}": Path(__file__).with_name(name).read_bytes() for name in run_folder.PAGE_FIXED}
PATIENCE = 900.0  # seconds that a process waits for another that writes the page


def lock_page(folder: Path) -> AbstractContextManager[None]:
    """Holds the page of a run folder for this process, as one process writes it at a time."""
    storage.make_folder(folder / "gallery")
    return storage.hold_lock(folder / run_folder.PAGE_LOCK, patience=PATIENCE)


def finish_run(run: RunFolder) -> None:
    """Writes index files and page, unless they show the ledger's rows already, and seals the folder."""
    with lock_page(run.path):
        if not run_folder.has_indexes(run.path, run.document, run.ledger):
            run_folder.unseal(run.path)
            if (run.path / DROPPED).is_dir():
                run.remove_leftovers()
            with run_folder.refusing_rows(run.path):
                write_indexes(run.path, run.document, run.ledger)
            shutil.rmtree(run.path / "gallery/thumbnails", ignore_errors=True)  # of runs that an earlier version began,
            storage.remove(run.path / "statistics.png")  # and so is this
            run.ledger.note("indexed", "yes")
        elif not run_folder.is_sealed(run.path):  # a filter may have been killed before it marked the page
            run_folder.mark_left_out(run.path, read_filter(run.path))
        if not run_folder.is_sealed(run.path) and run.ledger.settle():
            run_folder.seal(run.path, run.document)


def write_indexes(folder: Path, document: Mapping[str, Any], ledger: Ledger, *, is_in_progress: bool = False) -> None:
    """Writes every index file and the page; that of a run in progress looks for later ones."""
    files = {folder / name: writer(document, ledger) for name, writer in writers(document).items()}
    page = PageWriter(folder, document, ledger)
    with storage.Publication(files) as publication:
        for path, file in files.items():
            publication.write(path, file.begin())
        shown = ledger.rows(DONE, DOUBTFUL, parts=(*PARTS, "tracings"))
        for number, group in groupby(shown, lambda row: row.request.index // run_folder.PAGE_SAMPLES):
            rows = list(group)
            done = [row for row in rows if row.status == DONE]
            for path, file in files.items():
                publication.write(path, file.add(done))
            page.add(number, rows)
        for path, file in files.items():
            publication.write(path, file.end())
        page.end(is_in_progress=is_in_progress)


class PageWriter:
    """Writes the page of a run; it gets the rows of the data set and the doubtful ones by thousands, then `end`."""

    def __init__(self, folder: Path, document: Mapping[str, Any], ledger: Ledger):
        self._folder, self._document, self._ledger = folder, document, ledger
        self._facts = RunFacts(document, ledger)
        self._shown_before = read_shown(folder)
        self._existing = set(run_folder.existing_files(folder, document))
        self._shown: dict[str, str] = {}

    def add(self, number: int, rows: Sequence[Row]) -> None:
        """Writes what the page reads of the samples of the thousand of this number, all of these."""
        self._facts.pages.append((number, len(rows)))
        contents = {run_folder.PAGE_NAME.format(number): run_folder.script("page", number, self._facts.index(rows))}
        by_sheet = groupby(rows, lambda row: row.request.index // run_folder.SHEET_SAMPLES)
        groups = {place: list(group) for place, group in by_sheet}
        for place, group in groups.items():
            details = run_folder.script("details", place, self._facts.details(group))
            contents[run_folder.DETAILS_NAME.format(place)] = details
        storage.publish({self._folder / name: content for name, content in contents.items()})
        for role in run_folder.picture_roles(self._document):
            missing = [row for row in rows if run_folder.picture_name(role, row.request.id) not in self._existing]
            draw_pictures(self._folder, missing, role)
        self._shown |= draw_sheets(self._folder, groups, self._shown_before)

    def end(self, *, is_in_progress: bool = False) -> None:
        """Writes the page itself, once all rows were added, and removes files of samples that are no longer shown."""
        expected = run_folder.expected_files(self._document, self._ledger)
        for name in self._existing - expected:
            storage.remove(self._folder / name)
        run = self._facts.whole(has_sheets=True, is_in_progress=is_in_progress)
        contents = {
            run_folder.SHEETS: pretty(self._shown),
            run_folder.RUN_SCRIPT: run_folder.script("run", 0, run),
            run_folder.LEFT_OUT_SCRIPT: run_folder.left_out_script(read_filter(self._folder)),
            **FIXED_FILES,
        }
        storage.publish({self._folder / name: content for name, content in contents.items()})


# pixels of a thumbnail's longer side, thumbnails of a sheet
SIDE, COLUMNS, ROWS = 128, 10, run_folder.SHEET_SAMPLES // 10
QUALITY = 82  # of the JPEG
UNKNOWN = ""  # digest of a sheet that lacks some of its images: it is drawn again by the next process that writes
LARGEST_SHOWN = 2**26  # bytes
BLOCK = 16  # sheets drawn and published together


def thumbnail_sides(height: int, width: int) -> tuple[int, int]:
    """Height and width of a thumbnail: the longer side has SIDE pixels, or fewer where the image has."""
    longest = max(height, width, SIDE)
    return max(height * SIDE // longest, 1), max(width * SIDE // longest, 1)


def read_shown(folder: Path) -> dict[str, str]:
    """Sheet -> digest of the images that it shows; empty where that is unknown, as all sheets are then drawn again."""
    try:
        path = folder / run_folder.SHEETS
        return documents.read_object(path, most=LARGEST_SHOWN) if path.exists() else {}
    except (Refused, Missing):
        return {}


def draw_sheets(folder: Path, groups: Mapping[int, Sequence[Row]], before: dict[str, str]) -> dict[str, str]:
    """Draws sheets, each of a group, apart from those that show the same images `before`; sheet -> digest of all."""
    images = {number: {row.request.index: row.files["image"] for row in rows} for number, rows in groups.items()}
    shown = {}
    for number, group in images.items():
        parts = [SIDE, COLUMNS, ROWS, QUALITY, [(index, stored.sha256) for index, (_, stored) in group.items()]]
        shown[str(number)] = hashlib.sha256(canonical(parts).encode()).hexdigest()[:32]
    outdated = [
        number
        for number in images
        if before.get(str(number)) != shown[str(number)] or not (folder / run_folder.SHEET_NAME.format(number)).exists()
    ]
    with ThreadPoolExecutor(count_cores()) as pool:
        for block in in_blocks(outdated, BLOCK):
            sheets = dict(zip(block, pool.map(partial(_draw_sheet, folder), (images[number] for number in block))))
            named = {run_folder.SHEET_NAME.format(number): sheet for number, (sheet, _) in sheets.items()}
            storage.publish({folder / name: sheet for name, sheet in named.items()})
            shown |= {str(number): UNKNOWN for number, (_, is_whole) in sheets.items() if not is_whole}
    return shown


def _draw_sheet(folder: Path, group: Mapping[int, RowFile]) -> tuple[bytes, bool]:
    """A sheet, and whether it shows all of its images; one that cannot be shown leaves its place empty."""
    sheet, is_whole = Image.new("RGB", (COLUMNS * SIDE, ROWS * SIDE)), True
    for index, (name, _) in group.items():
        if (read := _read_image(folder / name, SIDE)) is None:
            is_whole = False
            continue
        image = read.convert("RGB")
        height, width = thumbnail_sides(image.height, image.width)
        if image.width % width or image.height % height:
            image = image.resize((width, height), Image.Resampling.BOX)
        else:  # the same pixels, several times faster
            image = image.reduce((image.width // width, image.height // height))
        down, across = divmod(index % run_folder.SHEET_SAMPLES, COLUMNS)
        sheet.paste(image, (across * SIDE, down * SIDE))
    return encode_picture(sheet, "JPEG", quality=QUALITY), is_whole


def _read_image(path: Path, least_side: int = 0) -> Image.Image | None:
    """The image in a file, None where that is missing or no whole image, as `audit` says; a failing disk is refused."""
    try:
        return images.decode_image(storage.read(path, images.LARGEST_IMAGE_FILE), str(path), least_side=least_side)
    except (Refused, Missing) as error:
        if isinstance(error, Missing) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        return None


PICTURES_TOGETHER = 64  # pictures published together


def draw_pictures(folder: Path, rows: Sequence[Row], role: str) -> None:
    """Draws the pictures of a role; a file that is missing or is no whole image gets none."""
    with ThreadPoolExecutor(count_cores()) as pool:
        for block in in_blocks(rows, PICTURES_TOGETHER):
            pictures = zip(block, pool.map(partial(_picture_of_sample, folder, role), block), strict=True)
            named = {run_folder.picture_name(role, row.request.id): picture for row, picture in pictures if picture}
            storage.publish({folder / name: picture for name, picture in named.items()})


def _picture_of_sample(folder: Path, role: str, row: Row) -> bytes:
    """The picture of a sample's file, empty where that cannot be shown."""
    image = _read_image(folder / row.files[role].path)
    return b"" if image is None else picture_of(role, image)


def picture_of(role: str, image: Image.Image) -> bytes:
    """The picture that the page shows in place of a file."""
    return picture_bytes(run_folder.layer_with_picture(role).picture(np.array(image)))


def fetch_or_draw(fetch: Callable[[str], Path | None], folder: Path, name: str) -> Path | None:
    """A file of a run in an object store, which has no pictures: these are drawn of the files that they stand for."""
    place, _, file = name.rpartition("/")
    role = place.removeprefix("gallery/")
    if not place.startswith("gallery/") or run_folder.layer_with_picture(role) is None:
        return fetch(name)
    source = fetch(f"{role}/{file}") or fetch(f"{QUARANTINE}{role}/{file}")
    if source is None:
        return None
    storage.publish({folder / name: picture_of(role, images.decode_image(source.read_bytes(), role))})
    return folder / name


SAFE = 2**53  # below it a script's numbers are exact
NO_FIGURE = "hash"  # the score of `filter` that no number can be compared with


class RunFacts:
    """Collects what all samples share, while the index of each thousand is made; classes are numbers in its words."""

    def __init__(self, document: Mapping[str, Any], ledger: Ledger):
        self.document = document
        self.scores = {name: dict(ledger.scores(name)) for name in ledger.score_names() if name != NO_FIGURE}
        self.tasks = [*by_kind(document["config"]["task"])]
        labels = by_task(document["config"]["task"])
        self.layers = {layer: label for label in labels for layer in kind_of(label).layers}
        tables = document["labels"]
        words = dict.fromkeys(word for task in self.tasks for word in tables.get(task, {}).get("classes", ()))
        self._numbers, self._known = {word: number for number, word in enumerate(words)}, set(words)
        self.named: Counter[str] = Counter()
        self.shown: Counter[str] = Counter()
        self.missing = self.doubtful = self.excluded = 0
        self.pages: list[tuple[int, int]] = []
        self.figures: dict[str, None] = {}

    def number(self, word: str) -> int:
        return self._numbers.setdefault(word, len(self._numbers))

    def index(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        """One column a fact: what the page filters and sorts a thousand samples by."""
        samples = [self._sample(row) for row in rows]
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        return {name: column for name, column in columns.items() if name != "picture" or any(column)}

    def _sample(self, row: Row) -> dict[str, Any]:
        request, tables = row.request, self.document["labels"]
        height, width = sides(self.document, row.recipe)
        shown, things, figures = {}, [], {}
        for task in self.tasks:
            if task not in row.labels:
                continue
            kind, record, table = kind_of(task), row.labels[task], tables.get(task, {})
            shown |= dict.fromkeys(kind.words(record, table, height * width * LEAST_SHARE))
            things += kind.things(record, table, (height, width))
            decoder = LabelName.parse(task).decoder
            figures |= {
                f"{name}: {decoder}" if decoder else name: value for name, value in kind.figures(record).items()
            }
        if (certainty := mean_certainty(row.labels)) is not None:
            figures["score"] = round(certainty, 4)
        if row.trust:
            figures["disagreeing"] = row.trust.disagreeing
            if row.trust.domain is not None:
                figures["domain"] = row.trust.domain
        figures |= {name: each[request.index] for name, each in self.scores.items() if request.index in each}
        self.figures |= dict.fromkeys(figures)
        visible = [word for word in shown if word not in NO_THING]
        missing = (
            row.trust.missing if row.trust else [w for w in request.classes if w in self._known and w not in shown]
        )
        reasons = row.trust.reasons if row.trust else ()
        if row.status == DOUBTFUL and row.reason != "; ".join(reasons):
            reasons = (row.reason,)
        self.named.update(request.classes)
        self.shown.update(visible)
        self.missing += bool(missing)
        self.doubtful += bool(reasons)
        self.excluded += row.status == DOUBTFUL
        return {
            "index": request.index,
            "prompt": request.prompt,
            "seed": request.seed if abs(request.seed) < SAFE else str(request.seed),
            "sides": [height, width],
            "named": [self.number(word) for word in request.classes],
            "shown": sorted(map(self.number, visible)),
            "missing": [self.number(word) for word in missing],
            "reasons": list(reasons),
            "aside": int(row.status == DOUBTFUL),
            "picture": str(row.recipe.get("picture", "")),
            "source": int(row.recipe["source"]) if str(row.recipe.get("source", "")).isdecimal() else request.index,
            "things": [
                [self.number(word), round(100 * score), *(round(1000 * share) for share in (area, x, y))]
                for word, score, area, x, y in things
            ],
            "figures": [figures.get(name) for name in self.figures],
        }

    def details(self, rows: Sequence[Row]) -> list[Any]:
        """What is drawn over the pictures of some samples, each with its index."""
        return [
            [
                row.request.index,
                {
                    layer.name: layer.values(
                        row.labels[task],
                        self.document["labels"][task],
                        row.tracings.get(layer.name, []) if layer.trace else [],
                    )
                    for layer, task in self.layers.items()
                    if layer.values and task in row.labels
                },
            ]
            for row in rows
        ]

    def whole(self, *, has_sheets: bool, is_in_progress: bool) -> dict[str, Any]:
        """What all samples share."""
        document, words = self.document, list(self._numbers)
        config = document["config"]
        layers = [
            {
                "name": layer.name,
                "label": task,
                "title": layer.title,
                "drawing": layer.drawing,
                "file": layer.role and f"{layer.role}/ID.png",
                "is_drawn": layer.picture is not None,
                "unit": layer.unit,
                "classes": {
                    number: self.number(word) for number, word in kind_of(task).names(document["labels"][task]).items()
                },
                "ignored": f"#{bytes(colour).hex()}"
                if (colour := kind_of(task).ignored_colour(document["labels"][task]))
                else "",
                "steps": kind_of(task).steps(document["labels"][task]),
                "limbs": document["labels"][task].get("limbs", []),
            }
            for layer, task in self.layers.items()
        ]
        facts = {
            "Model": document["model"]["name"],
            "Sampler": sampler_in_words(document),
            "Speed": speed_in_words(document),
            "Engine": ", ".join(engine_names(document)),
            "Composition": document.get("composition", {}).get("told", ""),
        }
        return {
            "key": key_of(document),
            "pixels": size_in_words(document),
            "format": config["image_format"],
            "layers": layers,
            "first": next((kind_of(label).layers[0].name for label in self.tasks), ""),
            "words": words,
            "colours": self._colours(words),
            "named": [self.named[word] for word in words],
            "shown": [self.shown[word] for word in words],
            "missing": self.missing,
            "doubtful": self.doubtful,
            "aside": self.excluded,
            "figures": list(self.figures),
            "pages": self.pages,
            "samples": sum(count for _, count in self.pages),
            "planned": document["plan"]["number"],
            "is_in_progress": is_in_progress,
            "sheet": {"side": SIDE, "columns": COLUMNS, "rows": ROWS} if has_sheets else None,
            "group": run_folder.SHEET_SAMPLES,
            "summary": ", ".join(config["task"]),
            "facts": [[name, fact] for name, fact in facts.items() if fact],
            "command": maker(document) if made_by(document) == COMMANDS[0] else "",  # that makes one sample again
        }

    def _colours(self, words: Sequence[str]) -> list[str]:
        """One colour a class word, that of its pixels where a label map shows it."""
        tables, numbers, others = self.document["labels"], {}, []
        for label in self.tasks:
            if kind_of(label).is_map:
                numbers |= {name: number for number, name in kind_of(label).names(tables[label]).items()}
            else:
                others += tables[label].get("classes", [])
        for name in [*others, *words]:
            numbers.setdefault(name, len(numbers) + 1)
        palette = next((table["palette"] for table in tables.values() if "palette" in table), OURS)
        custom = {
            name: each
            for table in tables.values()
            for name, each in zip(table.get("classes", ()), table.get("colours", ()))
        }
        usual = OURS if custom else palette
        colours = (custom.get(word) or colour_in(usual, word, numbers[word]) for word in words)
        return [f"#{bytes(colour).hex()}" for colour in colours]


def key_of(document: Mapping[str, Any]) -> str:
    """What a browser keeps the marks of a run under: the same where it is given more images, another where it was made
    of other runs or pictures.
    """
    growing = ("number", "per_class", "keep")
    settings = {name: value for name, value in document["config"].items() if name not in growing}
    plan = {name: value for name, value in document["plan"].items() if name != "number"}
    sources = [document["composition"]["source"]["digests"]] if "composition" in document else []
    return hashlib.sha256(canonical([settings, plan, document["decoders"], *sources]).encode()).hexdigest()[:16]
