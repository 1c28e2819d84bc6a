"""DatasetDM's splicers: images of an output side by side in larger ones, with their labels."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from datasetdm_fast.compat.showlab.checkout import present
from datasetdm_fast.compat.showlab.files import encoded
from datasetdm_fast.compat.showlab.lines import Flag, Line
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.document import pretty
from datasetdm_fast.untrusted import documents, images

HOLDER = "DataDiffusion"  # of all outputs, in the checkout
PLAN = ".splicing.json"  # of an output: what it is made of
GRIDS = (0, 2, 3, 5, 6, 7, 8)  # images of a side of each job's pictures; 0: two, beside or above one another
STARTS = (0, 15001, 35001, 55001, 65001, 75001, 85001)  # first id of each job
JPEG_QUALITY = 95  # OpenCV's
LARGEST_TEXT = 2**24  # bytes of contours of one image
FLAGS = (
    Flag("input_root", "./config/", help="folder in DataDiffusion with the images", is_optional=True),
    Flag("out_root", None, help="folder in DataDiffusion to write"),
    Flag("thread_num", 7, "whole", "number of jobs to do: two images, 2 x 2, 3 x 3, 5 x 5, 6 x 6, 7 x 7, 8 x 8"),
    Flag("root", ".", help="checkout of DatasetDM, which holds DataDiffusion"),
    Flag("seed", 0, "whole", "seed of the choice of images"),
    Flag("fixed", False, "switch", "correct: no id twice, masks of one channel, all jobs whatever --thread_num is"),
    Flag("limit", 0, "whole", "stop after N new pictures; the same command resumes"),
    Flag("quiet", False, "switch", "say nothing on stderr"),
)


@dataclass(frozen=True)
class Splicer:
    """A script that splices the images of one kind of output."""

    name: str
    counts: tuple[int, ...]  # pictures of each job
    folder: str  # of the labels
    suffix: str = ".png"
    flags: tuple[Flag, ...] = FLAGS

    @property
    def told(self) -> str:
        return f"Images and their labels ({self.folder}) side by side in new pictures."


SPLICERS = {
    each.name: each
    for each in (
        Splicer("splicing_augmentation_VOC", (2000, 3000, 3000, 2000, 2000, 1000, 500), "Mask"),
        Splicer("splicing_augmentation_Cityscapes", (8000, 10000, 10000, 10000, 6000, 3000, 2000), "Mask"),
        Splicer("splicing_augmentation_NYU", (5000, 7000, 8000, 6000, 5000, 3000, 2000), "Annotation"),
        Splicer("splicing_augmentation_coco", (15000, 20000, 20000, 20000, 10000, 5000, 3000), "Mask", ".txt"),
    )
}


@dataclass(frozen=True)
class Contour:
    """An instance of a label file."""

    places: np.ndarray  # [n, 2] of x, y
    number: int  # of its class
    score: float
    ending: str  # of its line: class and score as they are written there


@dataclass(frozen=True)
class Tiles:
    """One picture to make: its id, and the stems of its sources row by row."""

    id: int
    stems: tuple[tuple[str, ...], ...]


def grids_of(splicer: Splicer, jobs: int, *, fixed: bool) -> dict[int, int]:
    """The pictures of a line by their ids, each with the images of a side; of two with one id the later job's."""
    grids: dict[int, int] = {}
    for grid, start, count in list(zip(GRIDS, STARTS, splicer.counts))[: len(GRIDS) if fixed else jobs]:
        first = len(grids) if fixed else start
        grids |= dict.fromkeys(range(first, first + count), grid)
    return grids


def tiles(grids: Mapping[int, int], stems: list[str], seed: int) -> Iterator[Tiles]:
    """The sources of the pictures, drawn for each id alone."""
    for id, grid in grids.items():
        chosen = random.Random(f"{seed}/{id}")
        if not grid:
            pair = chosen.choice(stems), chosen.choice(stems)
            yield Tiles(id, (pair,) if chosen.random() > 0.5 else tuple((one,) for one in pair))
        else:
            yield Tiles(id, tuple(tuple(chosen.choice(stems) for _ in range(grid)) for _ in range(grid)))


def splice(splicer: Splicer, line: Line, is_stopping: Callable[[], bool]) -> tuple[Path, int, int]:
    """Makes the pictures that are missing: the output, how many were made and how many are left."""
    if not line["out_root"]:
        raise Refused(f"{splicer.name}: --out_root is missing", "Name the folder in DataDiffusion to write.")
    if line["thread_num"] < 1:
        raise Refused(f"--thread_num {line['thread_num']}: expected 1 to {len(GRIDS)}", "Choose another number.")
    source, out = (line.root / HOLDER / line[name] for name in ("input_root", "out_root"))
    present(source / "Image", "--input_root", "Generate the images first.")
    if source.resolve() == out.resolve():
        raise Refused(f"--out_root {line['out_root']}: it is the same folder as --input_root", "Name another folder.")
    stems = sorted(
        path.stem for path in (source / "Image").glob("*.jpg") if _label(splicer, source, path.stem).is_file()
    )
    if not stems:
        raise Refused(f"{source}: no image has a label in {splicer.folder}", "Name an output of a generator.")
    choices = {name: line[name] for name in ("thread_num", "seed", "fixed")}
    digest = hashlib.sha256("\n".join(stems).encode(errors="surrogateescape")).hexdigest()
    _begin(out, {"script": splicer.name, "source": line["input_root"], "images": digest, **choices})
    made = left = 0
    grids = grids_of(splicer, line["thread_num"], fixed=line["fixed"])
    for each in tiles(grids, stems, line["seed"]):
        names = out / "Image" / f"splicing_{each.id}.jpg", _label(splicer, out, f"splicing_{each.id}")
        if all(name.is_file() for name in names):
            continue
        if is_stopping() or (line["limit"] and made >= line["limit"]):
            left += 1
            continue
        storage.publish(dict(zip(names, spliced(splicer, source, each, is_single=line["fixed"]))))
        made += 1
    return out, made, left


def _label(splicer: Splicer, holder: Path, stem: str) -> Path:
    return holder / splicer.folder / f"{stem}{splicer.suffix}"


def _begin(out: Path, plan: dict) -> None:
    """Writes what an output is made of, or refuses one that is made of something else."""
    path = out / PLAN
    if storage.is_there(path):
        if documents.read_object(path) != plan:
            raise Refused(f"--out_root {out}: it holds pictures of another command", "Choose another --out_root.")
    elif out.is_dir() and any(not storage.is_temporary(inside) for inside in out.iterdir()):
        raise Refused(f"--out_root {out}: it holds other files, and nothing is overwritten", "Choose another.")
    else:
        storage.publish({path: pretty(plan)})


def spliced(splicer: Splicer, source: Path, each: Tiles, *, is_single: bool) -> tuple[bytes, bytes]:
    """The files of one picture and of its label."""
    picture = _joined(each, lambda stem: np.array(_read(source / "Image" / f"{stem}.jpg").convert("RGB")))
    image = encoded(Image.fromarray(picture), "JPEG", quality=JPEG_QUALITY)
    if splicer.suffix == ".txt":
        height, width = picture.shape[0] // len(each.stems), picture.shape[1] // len(each.stems[0])
        lines = [
            _moved(contour, width * column, height * row)
            for row, stems in enumerate(each.stems)
            for column, stem in enumerate(stems)
            for contour in contours_in(_label(splicer, source, stem))
        ]
        return image, "".join(lines).encode()
    plane = _joined(each, lambda stem: _plane(_label(splicer, source, stem)))
    is_single = is_single or plane.dtype == np.uint16  # of three channels PNG files are written with 8 bits alone
    return image, encoded(Image.fromarray(plane if is_single else np.stack([plane] * 3, -1)), "PNG")


def _joined(each: Tiles, read: Callable[[str], np.ndarray]) -> np.ndarray:
    planes = [[read(stem) for stem in stems] for stems in each.stems]
    if len({(plane.shape, plane.dtype) for row in planes for plane in row}) > 1:
        raise Refused(
            f"splicing_{each.id}: its sources have different sizes or depths", "Splice the output of one command."
        )
    return np.concatenate([np.concatenate(row, 1) for row in planes])


def _read(path: Path) -> Image.Image:
    return images.read_image(path)


def _plane(path: Path) -> np.ndarray:
    """A label map [H, W] of 8 bits, or of the 16 that depth has with the generators' --fixed."""
    label = _read(path)
    return np.array(label, np.uint16) if label.mode.startswith("I") else np.array(label.convert("L"))


def contours_in(path: Path) -> Iterator[Contour]:
    """The instances in a label file, a line each."""
    for text in storage.read(path, LARGEST_TEXT).decode(errors="replace").splitlines():
        try:
            *numbers, name, score = text.split(",")
            yield Contour(np.array(numbers, int).reshape(-1, 2), int(name), float(score), f"{name},{score}")
        except (ValueError, OverflowError) as error:
            raise Refused(f"{path}: {documents.quoted(text)} is not a contour", "Generate the file again.") from error


def _moved(contour: Contour, right: int, down: int) -> str:
    """A contour's line in the picture that it becomes a part of."""
    places = contour.places + (right, down)
    return f"{','.join(map(str, places.reshape(-1).tolist()))},{contour.ending}\n"
