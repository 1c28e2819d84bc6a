"""Spliced samples: several of a run side by side in one picture, with every label where its picture is."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast.data import Request
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.blocks import in_threads
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.image_files import image_bytes
from datasetdm_fast.engine.labels.kind import Placement
from datasetdm_fast.engine.labels.label_files import Files
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.compositions.grids import Grid, drawn, parse_grids
from datasetdm_fast.runs.compositions.source import Source, Tile, begun, decisive, source_path
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.run_folder.document import FORMAT, check_same, read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder, into, publish_samples
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.remaking import check_given, remakable
from datasetdm_fast.runs.run_folder.split import origins
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.images import MOST_PIXELS
from datasetdm_fast.version import __version__

BLOCK = 32  # samples written and committed together, fewer where they are large:
BLOCK_PIXELS = 2**22  # pixels of all their images
SPARE = 64 * 2**20  # bytes a run leaves free for ledger, index files and other programs
CONFIG_FORM = {"grids": [str], "number": int, "seed": int, "resize": bool, "kept": str}
PARTS = ("sampling", "model", "decoders", "engine")  # of run.json that are those of the source


@dataclass(frozen=True)
class Splicing:
    """A run of spliced samples that has been checked and has written nothing yet."""

    source: Source
    grids: tuple[Grid, ...]
    number: int
    seed: int
    is_resized: bool

    def __post_init__(self) -> None:
        height, width = max(map(self.sides, self.grids), key=math.prod)
        if height * width > MOST_PIXELS:
            raise Refused(
                f"--grids: {width} x {height} pixels, at most {MOST_PIXELS} are written",
                "Add --resize, or choose smaller grids.",
            )

    def sides(self, grid: Grid) -> tuple[int, int]:
        return grid.sides(self.source.side, self.is_resized)

    @property
    def tables(self) -> dict[str, Mapping[str, Any]]:
        """What run.json says of the labels."""
        return {task: kind_of(task).rewritten(table) for task, table in self.source.document["labels"].items()}

    @property
    def document(self) -> dict[str, Any]:
        """The content of run.json; model, decoders and their licences are those of the source."""
        source, grids = self.source.document, [str(grid) for grid in self.grids]
        how = ", resized to the size of one" if self.is_resized else ""
        shapes = sorted({self.sides(grid) for grid in self.grids})
        return {
            **{part: source[part] for part in PARTS},
            "labels": self.tables,
            **{part: source[part] for part in ("classes", "class_table", "packages", "mixed") if part in source},
            "format": FORMAT,
            "command": "splice",
            "versions": {"datasetdm_fast": __version__},
            "config": {
                **{name: source["config"][name] for name in ("task", "image_format", "sampler")},
                "grids": grids,
                "number": self.number,
                "resize": self.is_resized,
                "seed": self.seed,
                "kept": self.source.kept_digest,
            },
            "plan": {"number": self.number, "batch_size": 1, "words": source["plan"].get("words", [])},
            "composition": {
                "told": f"Spliced from the run {self.source.path.resolve().name}, grids {', '.join(grids)}{how}",
                "sides": " or ".join(f"{width} × {height}" for height, width in shapes) + " pixels",
                "source": self.source.provenance,
            },
        }

    def check_room(self, folder: Path) -> None:
        """Refuses a run that would fill the disk."""
        pixels = sum(math.prod(self.sides(grid)) for grid in self.grids) / len(self.grids)
        kinds = [kind_of(task) for task in self.source.run.tasks]
        needed = int(self.number * pixels * (3 + sum(kind.pixel_bytes for kind in kinds))) + SPARE
        if needed > (free := storage.free_bytes(folder.absolute())):
            raise Missing(
                f"{folder}: the run needs at most {needed / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} MB are free",
                "Free some space, choose another --out, or make fewer images.",
            )

    def made(self, index: int) -> tuple[Row, Files]:
        """The row of a sample, which has no files yet, and the files that are to be written."""
        grid, seed = self.grids[index % len(self.grids)], self.seed + index
        tiles = [self.source.tile(place) for place in drawn(seed, grid.cells, len(self.source.run))]
        placed = list(zip(tiles, grid.placements(self.source.side, self.is_resized), strict=True))
        requests = [tile.row.request for tile in tiles]
        known = dict.fromkeys(self.source.document["plan"].get("words", ()))
        named = {word for request in requests for word in request.classes}
        request = Request(
            index,
            "; ".join(dict.fromkeys(each.prompt for each in requests)),
            seed,
            tuple(word for word in known | dict.fromkeys(sorted(named)) if word in named),
        )
        sides = self.sides(grid)
        files, records = self._labels(request.id, placed, sides)
        form = self.source.document["config"]["image_format"]
        picture = spread("image", placed, sides)
        files = {"image": (f"images/{request.id}.{form}", image_bytes(picture, form)), **files}
        made_of = sorted({name for tile in tiles for name in origins(self.source.document, tile.row)})
        recipe = {
            "grid": str(grid),
            "sides": list(sides),
            "tiles": [each.id for each in requests],
            "groups": made_of,  # also of variants and edits of the same pictures
        }
        return Row(request, recipe, labels=records), files

    def _labels(
        self, id: str, placed: Sequence[tuple[Tile, Placement]], sides: tuple[int, int]
    ) -> tuple[Files, dict[str, Any]]:
        kinds, tables = {task: kind_of(task) for task in sorted(self.source.run.tasks)}, self.source.document["labels"]
        maps = {
            task: kind.decode(
                {role: spread(role, placed, sides) for role in kind.files(tables[task])}, None, tables[task]
            )
            for task, kind in kinds.items()
            if kind.roles
        }
        files: Files = {}
        records: dict[str, Any] = {}
        for task, kind in kinds.items():
            if kind.roles:
                contents, records[task] = kind.encode(maps[task], maps, self.tables[task])
                files |= {role: (f"{role}/{id}.png", content) for role, content in contents.items()}
            else:
                moved = (kind.moved(item, place) for tile, place in placed for item in tile.row.labels[task])
                records[task] = [item for item in moved if item is not None]
        return files, records


def resumed(folder: Path, stored: Mapping[str, Any], source: str = "") -> Splicing:
    """The splicing that a run folder tells of; `source` is where its samples come from now, if it was moved."""
    config = stored["config"]
    try:
        documents.check_form(config, CONFIG_FORM, "config")
    except ValueError as error:
        raise Refused(f"{folder}: its run.json is damaged ({error})", "Restore the file from a copy.") from error
    opened = Source(source_path(folder, stored, source), only_kept=bool(config["kept"]))
    splicing = Splicing(opened, parse_grids(config["grids"]), config["number"], config["seed"], config["resize"])
    check_same(folder, *map(decisive, (stored, splicing.document)))
    return splicing


def spread(role: str, placed: Sequence[tuple[Tile, Placement]], sides: tuple[int, int]) -> np.ndarray:
    """The pixels of a role over a whole grid."""
    first = placed[0][0].pixels[role]
    whole = np.empty((*sides, *first.shape[2:]), first.dtype)
    for tile, place in placed:
        pixels = tile.pixels[role]
        if place.is_scaled and role == "image":
            shrunk = Image.fromarray(pixels).resize((place.columns, place.rows), Image.Resampling.BICUBIC)
            pixels = np.asarray(shrunk)
        whole[place.top : place.top + place.rows, place.left : place.left + place.columns] = (
            pixels if role == "image" else place.scaled(pixels)
        )
    return whole


def begin(splicing: Splicing, folder: Path) -> int:
    """Samples that the run folder holds already; other settings, another source and a full disk are refused."""
    done = begun(folder, splicing.document)
    splicing.check_room(folder)
    return done


def run(
    splicing: Splicing,
    folder: Path,
    *,
    limit: int = 0,
    threads: int = 1,
    on_commit: Callable[[int], None] = lambda count: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> tuple[int, float]:
    """Makes the missing samples, in threads but committed in order, then the index files; how many samples it made, and
    the seconds that all of this took.
    """
    start = time.perf_counter()
    with RunFolder(folder, read_document(folder) or splicing.document) as opened:
        there, done = opened.ledger.within(0, splicing.number), 0
        wanted = islice((index for index in range(splicing.number) if index not in there), limit or None)
        largest = max(math.prod(splicing.sides(grid)) for grid in splicing.grids)
        size = min(max(BLOCK_PIXELS // largest, 1), BLOCK)
        for rows in in_threads(partial(write, splicing, folder), wanted, size, threads, is_stopping):
            opened.unseal()
            opened.commit(rows)
            done += len(rows)
            on_commit(len(rows))
        finish_run(opened)
    return done, time.perf_counter() - start


def write(splicing: Splicing, folder: Path, block: Sequence[int]) -> list[Row]:
    """The rows of some samples, once their files are on the disk."""
    return publish_samples([splicing.made(index) for index in block], into(folder))


def to_remake(folder: Path, id: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], Row]:
    """run.json and the row of a sample of a run folder that splice made, with the settings in `given`."""
    stored, row = remakable("splice", folder, id)
    asked = dict(given)
    if "grids" in given:
        asked["grids"] = [str(grid) for grid in parse_grids(given["grids"])]
    check_given(folder, stored["config"] | {"kept": bool(stored["config"].get("kept"))}, asked)
    return stored, row


def remake(folder: Path, stored: Mapping[str, Any], row: Row, source: str = "") -> list[str]:
    """Makes one sample of a run folder again; the files that were missing or damaged."""
    splicing = resumed(folder, stored, source)
    with RunFolder(folder, stored) as opened:
        again, files = splicing.made(row.request.index)
        written = opened.restore(row, files, again.labels)
        finish_run(opened)
    return written
