"""--images FILE: a list of the images to take from a data set, one a line or as DatasetDM published its own."""

import ast
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

LARGEST_IMAGE_LIST = 16 * 2**20  # bytes
BETWEEN = "', '"  # paths of a Python list that was cut up by hand, as DatasetDM's COCO lists were
PICTURE_ENDINGS = (*reading.PICTURES, *reading.OTHER_PICTURES)
EXPECTED = "Write one path per line, or a Python list of paths."


def read_image_list(path: Path) -> tuple[str, ...]:
    """The paths of a list, each once: one a line, or a Python list of texts."""
    storage.check_given(path, "--images", "Name a file that lists paths of images.")
    try:
        text = storage.read(path, LARGEST_IMAGE_LIST).decode("utf-8-sig").strip()
        paths = ast.literal_eval(text) if text.startswith("[") else _lines(text)
        documents.check_form(paths, [str])
    except UnicodeDecodeError as error:
        raise Refused(f"--images {path}: not UTF-8 at byte {error.start}", EXPECTED) from error
    except Refused:
        raise
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        reason = documents.one_line(documents.reason_of(error))
        raise Refused(f"--images {path}: no list of paths ({reason})", EXPECTED) from error
    names = tuple(dict.fromkeys(name.strip() for name in paths if name.strip()))
    if not names:
        raise Refused(f"--images {path}: no path in it", EXPECTED)
    return names


def _lines(text: str) -> list[str]:
    return [part.strip(" \t[]'\",") for line in text.splitlines() for part in line.split(BETWEEN)]


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
