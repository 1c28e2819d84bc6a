"""Where a data set in COCO's form has its annotations and pictures: as published, and as annotation tools export it."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

PERSONS = "person_keypoints"
KINDS = ("instances", PERSONS)  # of annotation files, as published
OTHERS = ("panoptic", "stuff_", "captions_", "image_info_")  # files of no instances
# what files are called that say no split
WHOLE = ("", "default", "annotations", "labels", "result", "instances", "coco", "data", PERSONS)
PAIR = re.compile(r"(.+\.json):(.+)", re.DOTALL)  # annotations and the folder of their pictures
KNOWN = (
    "Known are annotations/instances_SPLIT.json (COCO, CVAT), SPLIT/_annotations.coco.json (Roboflow), result.json "
    "with images (Label Studio), labels.json with data (FiftyOne), and a file for each split; or name FILE.json or "
    "FILE.json:PICTURES."
)
MOST_FILES = 1000  # of a folder; one with more has a file for each picture, which is no COCO
FOREIGN_ROOT = re.compile(r"^(.*/)?(\.\.|[^/]*:)?/", re.DOTALL)  # up to the root of a path, its drive or its last ..
SAMPLED = 50  # pictures by which their folder is found


@dataclass(frozen=True)
class CocoLayout:
    """The annotation files of things and of persons, and the folders in which their pictures may lie."""

    things: Path | None
    persons: Path | None
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class PictureFolder:
    """The folder of the pictures, and whether their entries name paths elsewhere, of which the longest end counts that
    is there.
    """

    folder: Path
    is_foreign: bool

    def path_of(self, name: str, listed_in: Path) -> Path:
        name = name.replace("\\", "/")
        parts = FOREIGN_ROOT.sub("", name, count=1).split("/") if self.is_foreign else [name]
        paths = [reading.inside(self.folder, "/".join(parts[k:]), listed_in) for k in range(len(parts))]
        return next((path for path in paths if path.exists()), paths[-1])


def find_pictures(folders: Sequence[Path], names: Sequence[str], listed_in: Path) -> PictureFolder:
    """Where most of the first pictures are; tools may have written the paths of another machine."""
    names = [name for name in names if isinstance(name, str)]
    first, counts = names[:SAMPLED], {}
    for pictures in (PictureFolder(folder, is_foreign) for is_foreign in (False, True) for folder in folders):
        counts[pictures] = len(_existing(pictures, first, listed_in))
    best = max(counts, key=lambda pictures: counts[pictures])
    if not counts[best] and first:
        looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
        raise Refused(
            f"{listed_in}: none of its pictures is there, such as {documents.quote(first[0])}; looked in {looked}",
            f"Name the folder of the pictures: coco:{listed_in}:PICTURES.",
        )
    for path, count in Counter(_existing(best, names, listed_in) if best.is_foreign else ()).most_common(1):
        if count > 1:
            raise Refused(
                f"{listed_in}: {count} of its images, named by paths of another machine, would be the picture {path}",
                f"Name a folder of pictures that has their different folders: coco:{listed_in}:PICTURES.",
            )
    return best


def _existing(pictures: PictureFolder, names: Sequence[str], listed_in: Path) -> list[Path]:
    """The pictures of these names that are there."""
    paths = []
    for name in names:
        with suppress(Refused):
            paths.append(pictures.path_of(name, listed_in))
    return [path for path in paths if path.exists()]


def find_layout(path: Path, split: str) -> CocoLayout:
    """The layout of a folder, an annotation file, or FILE.json:PICTURES; refused where several would be one."""
    if (pair := PAIR.fullmatch(str(path))) and not path.exists():
        file, pictures = Path(pair[1]), Path(pair[2]).expanduser()
        reading.first_there(file)
        return _of_file(file, (reading.first_there(pictures),))
    if path.is_file():
        return _of_file(path, _picture_folders(path, path.parent))
    return _find_published(path, split) or _find_exported(path, split)


def _of_file(file: Path, folders: Sequence[Path]) -> CocoLayout:
    is_of_persons = file.stem.startswith(PERSONS)
    return CocoLayout(None if is_of_persons else file, file if is_of_persons else None, tuple(folders))


def _find_published(path: Path, split: str) -> CocoLayout | None:
    """COCO's own: annotations/instances_SPLIT2017.json and more, with or without the year."""
    for stem in (split,) if any(letter.isdigit() for letter in split) else (f"{split}2017", split):
        files = [path / "annotations" / f"{kind}_{stem}.json" for kind in KINDS]
        if any(file.exists() for file in files):
            things, persons = (file if file.exists() else None for file in files)
            folders = (path / stem, path / "images" / stem, path / "images")
            more = _picture_folders(files[0], path)
            return CocoLayout(things, persons, tuple(dict.fromkeys((*folders, *more))))
    return None


def _find_exported(path: Path, split: str) -> CocoLayout:
    """The annotation file of a split among all below a folder; a data set of one file is its split train."""
    files = [file for file in _annotation_files(path) if not file.stem.startswith(OTHERS)]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, path), []).append(file)
    names = reading.SPLIT_NAMES.get(split, (split,))
    chosen = next((by_split[name] for name in names if name in by_split), None)
    if chosen is None and split == "train" and len(by_split) == 1:
        (chosen,) = by_split.values()
    if chosen is None:
        existing = ", ".join(sorted(by_split))
        raise Refused(
            f"{path}: no COCO annotations of the split {split!r}{f', but of {existing}' if existing else ''}",
            f"Name one of them as [SPLIT]. {KNOWN}" if existing else KNOWN,
        )
    things = [file for file in chosen if not file.stem.startswith(PERSONS)]
    persons = [file for file in chosen if file.stem.startswith(PERSONS)]
    if len(things) > 1 or len(persons) > 1:
        shown = ", ".join(str(file.relative_to(path)) for file in chosen)
        raise Refused(f"{path}: several files may be its annotations: {shown}", f"Name one of them. {KNOWN}")
    folders = _picture_folders(chosen[0], path)
    return CocoLayout(things[0] if things else None, persons[0] if persons else None, folders)


def _annotation_files(path: Path) -> Iterator[Path]:
    """The JSON files in a folder, in its folder annotations, and in folders that are splits."""
    reading.first_there(path)
    split_names = {name for names in reading.SPLIT_NAMES.values() for name in names}
    try:
        inner = sorted(folder for folder in path.iterdir() if folder.is_dir())
    except NotADirectoryError:
        raise Refused(f"{path}: neither a folder nor a JSON file", KNOWN) from None
    folders = [path, *(folder for folder in inner if folder.name in ("annotations", *split_names))]
    for folder in folders:
        files = sorted(folder.glob("*.json"))
        yield from files if len(files) <= MOST_FILES else ()


def _split_of(file: Path, root: Path) -> str:
    """What a file's name says of its split: that of its folder where it says nothing."""
    inner = file.parent.name if file.parent != root and file.parent.name != "annotations" else ""
    return inner if (name := _bare_name(file)).lower() in WHOLE else name


def _bare_name(file: Path) -> str:
    """The name of an annotation file without what all of its kind are called."""
    name = file.stem
    for kind in KINDS:
        name = name.removeprefix(f"{kind}_")
    return name.removesuffix("2017").removesuffix(".coco").removesuffix("_annotations")


def _picture_folders(file: Path, root: Path) -> tuple[Path, ...]:
    """Where the pictures of an annotation file may lie, the likeliest first."""
    above = file.parent.parent if file.parent.name == "annotations" else file.parent
    names = dict.fromkeys((_split_of(file, root), _bare_name(file), file.stem.rpartition("_")[2]))  # COCO's have a year
    splits = (above / place for name in names if name for place in (f"images/{name}", f"data/{name}", name))
    return tuple(dict.fromkeys((*splits, above / "images", above / "data", file.parent, above)))
