"""Which images of a data set are chosen, and the classes of PASCAL VOC in their order."""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.class_tables import builtin_table
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.settings import setting
from datasetdm_fast.training.truth.windows import UPSTREAM_SIDE
from datasetdm_fast.untrusted import documents

VOC_CLASSES = builtin_table("voc").names
LARGEST_IMAGE_LIST = 16 * 2**20  # bytes
BETWEEN_PATHS = "', '"  # paths of a Python list that was cut up by hand, as DatasetDM's COCO lists were
PICTURE_ENDINGS = (*reading.PICTURES, *reading.OTHER_PICTURES)
LIST_FORM = "Write one path per line, or a Python list of paths."


@dataclass(frozen=True)
class Selection:
    """Images are taken in order; each counts for the first class that is large enough in it and still wanted."""

    per_class: int = 0  # images for each class, 0 = no limit
    min_area: int = 0  # pixels; a class counts where it covers more
    most: int = 0  # images in all, 0 = no limit
    classes: tuple[str, ...] = ()  # the only ones that may be shown, apart from the background
    is_single: bool = False  # images of one class alone
    by_map: bool = False  # all classes of a label map count, and not things alone
    tail: tuple[str, ...] = ()  # classes with a limit of their own
    tail_per_class: int = 0
    is_shuffled: bool = False
    is_centred: bool = False  # persons whose joints lie around the centre of their box
    min_instance: int = 0  # pixels at 512 x 512: smaller masks are dropped
    seed: int = 42
    images: tuple[str, ...] = ()  # the paths or ids of the only ones to choose from, in their order

    @property
    def is_everything(self) -> bool:
        limits = self.per_class, self.min_area, self.most, self.classes, self.tail, self.images
        return not any((*limits, self.is_single, self.is_shuffled, self.is_centred))


EVERYTHING = Selection()
SEEN = VOC_CLASSES[1:16]
PRESETS = {
    "voc": Selection(per_class=11, min_area=18000, is_single=True),
    "voc-zero-shot": Selection(per_class=30, min_area=18000, classes=SEEN),
    "voc-long-tail": Selection(per_class=20, min_area=18000, tail=VOC_CLASSES[11:], tail_per_class=2),
    "cityscapes": Selection(per_class=10, min_area=10000, by_map=True),
    "deepfashion": Selection(per_class=5),
    "coco": Selection(per_class=50, min_area=10000, min_instance=500),
    "lvis": Selection(per_class=1, min_area=50, min_instance=500),
    "kitti": Selection(most=200, is_shuffled=True),
    "vkitti2": Selection(),
    "nyu": Selection(most=250, is_shuffled=True),
    "coco-pose": Selection(most=800, is_centred=True),
}


@dataclass(frozen=True)
class DataSettings:
    """The flags of every command that reads labelled images."""

    select: str = setting(
        "",
        "DatasetDM's selection of images for a data set: " + ", ".join(PRESETS),
        choices=tuple(PRESETS),
        metavar="NAME",
    )
    images: str = setting(
        "",
        "the only images to take: a file with one path or id per line, or a Python list of them as DatasetDM published",
        metavar="FILE",
    )
    limit_per_class: int = setting(0, "images for each class, 0 = as --select says or all", metavar="N", least=0)
    min_area: int = setting(
        0, "smallest area in pixels for a class to count, 0 = as --select says", metavar="N", least=0
    )
    limit_images: int = setting(0, "images in all, 0 = as --select says or all", metavar="N", least=0)
    only_classes: tuple[str, ...] = setting(
        (), "leave out images that show any other class, comma-separated", metavar="LIST"
    )
    framing: str = setting("fit", "crop: centre square, or DatasetDM's random crop", choices=("fit", "upstream"))
    skip_bad: bool = setting(False, "skip and list images that cannot be read instead of stopping at the first")

    def selection(self) -> Selection:
        """The preset with what other flags change of it."""
        changes = {
            "per_class": self.limit_per_class,
            "min_area": self.min_area,
            "most": self.limit_images,
            "classes": self.only_classes,
            "images": read_image_list(Path(self.images)) if self.images else (),
        }
        return replace(
            PRESETS.get(self.select, EVERYTHING), **{name: value for name, value in changes.items() if value}
        )


def least_mask(selection: Selection, size: int) -> float:
    """Pixels that a mask has at least, of an image of size x size."""
    return max(1.0, selection.min_instance * (size / UPSTREAM_SIDE) ** 2)


def select(source: LabelledSource, selection: Selection) -> LabelledSource:
    """The data set narrowed to what the selection chooses; images are read one by one, and no further than needed."""
    source.least_mask = least_mask(selection, source.size)
    if selection.is_everything:
        return source
    if selection.images:
        source = source.subset(find_listed(source, selection.images))
    known = source.thing_classes or source.classes
    by_class = {"--limit-per-class": selection.per_class, "--min-area": selection.min_area}
    by_class |= {"--only-classes": selection.classes}
    if not known and (flags := [flag for flag, value in by_class.items() if value]):
        raise Refused(
            f"selection: the data set names no classes, by which {flags[0]} or --select would choose images",
            "Choose by --limit-images or --images.",
        )
    if unknown := [name for name in (*selection.classes, *selection.tail) if name not in known]:
        raise Refused(
            f"selection: the data set has no class {unknown[0]!r}{nearest(unknown[0], known)}",
            f"It has {', '.join(known[:20])}{' ...' if len(known) > 20 else ''}.",
        )
    chosen = source.subset(list(_choose(source, selection)))
    if not len(chosen):
        raise Refused(f"selection: none of {len(source)} images is chosen", "Allow smaller areas or more classes.")
    return chosen


def _choose(source: LabelledSource, selection: Selection) -> Iterator[int]:
    order = (
        np.random.default_rng(selection.seed).permutation(len(source)) if selection.is_shuffled else range(len(source))
    )
    mapped = source.classes if selection.by_map else ()
    known = selection.classes or mapped or source.thing_classes or source.classes
    measure = source.map_areas if selection.by_map else source.areas
    limits = {name: selection.tail_per_class if name in selection.tail else selection.per_class for name in known}
    has_limits = any(limits.values())
    needs_areas = has_limits or selection.min_area or selection.classes or selection.is_single
    must_read = source.skip_bad and (has_limits or selection.most)  # a bad image would take the place of another
    counts, total = Counter(), 0
    for index in map(int, order):
        if selection.most and total == selection.most:
            return
        if has_limits and all(limits.values()) and all(counts[name] == limit for name, limit in limits.items()):
            return
        record = source.order[index]
        try:
            areas = source.guard(measure, record) if needs_areas else {}
            is_centred = not selection.is_centred or source.guard(source.is_centred, record)
        except Refused as stop:
            if not source.skip_bad:
                raise
            source.skipped[source.name(record)] = stop.cause
            continue
        if (
            not is_centred
            or (selection.classes and set(areas) - set(selection.classes))
            or (selection.is_single and len(areas) > 1)
        ):
            continue
        large = (name for name in known if areas.get(name, 0) > selection.min_area)
        fitting = (name for name in large if not 0 < limits[name] <= counts[name])
        name = next(fitting, None) if needs_areas else ""
        if name is None or must_read and not source.is_readable(index):
            continue
        counts[name] += 1
        total += 1
        yield index


def read_image_list(path: Path) -> tuple[str, ...]:
    """The paths of a list, each once: one a line, or a Python list of texts."""
    storage.check_given(path, "--images", "Name a file that lists paths of images.")
    try:
        text = storage.read(path, LARGEST_IMAGE_LIST).decode("utf-8-sig").strip()
        paths = ast.literal_eval(text) if text.startswith("[") else _lines(text)
        documents.check_form(paths, [str])
    except UnicodeDecodeError as error:
        raise Refused(f"--images {path}: not UTF-8 at byte {error.start}", LIST_FORM) from error
    except Refused:
        raise
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        reason = documents.one_line(documents.reason_of(error))
        raise Refused(f"--images {path}: no list of paths ({reason})", LIST_FORM) from error
    names = tuple(dict.fromkeys(name.strip() for name in paths if name.strip()))
    if not names:
        raise Refused(f"--images {path}: no path in it", LIST_FORM)
    return names


def _lines(text: str) -> list[str]:
    return [part.strip(" \t[]'\",") for line in text.splitlines() for part in line.split(BETWEEN_PATHS)]


def find_listed(source: LabelledSource, names: Sequence[str]) -> list[int]:
    """The items of a data set that a list names, in its order.

    A path is matched by as many of its last parts as name no two images: the path to its folder may differ, and its
    ending may be missing.
    """
    images, items = defaultdict(set), defaultdict(list)  # name -> paths; path -> items
    for number, record in enumerate(source.order):
        image = _parts(source.path_of(record))
        items[image].append(number)
        images[image[-1]].add(image)
    chosen, missing = [], []
    for name in names:
        parts = _parts(name)
        if not name.lower().endswith(PICTURE_ENDINGS) and (whole := _parts_with_ending(name))[-1] in images:
            parts = whole  # the ending is missing, and what follows the last dot is of the name: frame.10
        common = {image: _count_common(image, parts) for image in images.get(parts[-1], ())}
        best = [image for image, count in common.items() if count == max(common.values())]
        if len(best) > 1:
            raise Refused(
                f"--images: {documents.quote(name)} may be {len(best)} images of the data set",
                "Write more of its path.",
            )
        missing += [name] if not best else []
        chosen += items[best[0]] if best else []
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Refused(
            f"--images: the data set has no image {documents.quote(missing[0])}{rest}",
            "Compare the list with the data set and its split, or take the lines out.",
        )
    return list(dict.fromkeys(chosen))


def _parts(path: str) -> tuple[str, ...]:
    """The parts of a path with slashes of either kind, without the ending of its file."""
    *folders, name = _parts_with_ending(path)
    stem, dot, ending = name.rpartition(".")
    return (*folders, stem if dot and stem and len(ending) <= 4 else name)


def _parts_with_ending(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.replace("\\", "/").split("/") if part not in ("", ".")) or ("",)


def _count_common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many last parts two paths have in common."""
    shorter = min(len(first), len(second))
    return next((k for k in range(shorter) if first[-1 - k] != second[-1 - k]), shorter)
