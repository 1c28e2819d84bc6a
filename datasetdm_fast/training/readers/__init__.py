"""Readers of labelled images, one per file; `open_data("coco:PATH[val]", size)` picks by the word before the colon."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from datasetdm_fast.config import OWN_TASKS, TASK_KINDS, TASKS
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.errors import Missing, Refused, Unanswered, nearest
from datasetdm_fast.plugins import Registry, load_place
from datasetdm_fast.runs.run_folder.shard_places import is_url
from datasetdm_fast.training.readers.demo import DemoWorld
from datasetdm_fast.training.readers.folder import PARTS
from datasetdm_fast.training.truth.selection import EVERYTHING, PRESETS, DataSettings, Selection, select
from datasetdm_fast.untrusted import documents

__all__ = ["EVERYTHING", "PRESETS", "READERS", "DataSettings", "Labelled", "Selection", "LabelledSource", "open_data"]

# kind -> reader(path, split, size, tasks), or its module:class
OWN_READERS = {
    "demo": DemoWorld.read,
    "run": "datasetdm_fast.training.readers.run:RunSamples",
    "voc": "datasetdm_fast.training.readers.voc:Voc",
    "coco": "datasetdm_fast.training.readers.coco:Coco",
    "lvis": "datasetdm_fast.training.readers.coco:Lvis",
    "cityscapes": "datasetdm_fast.training.readers.cityscapes:Cityscapes",
    "nyu": "datasetdm_fast.training.readers.depth:Nyu",
    "kitti": "datasetdm_fast.training.readers.depth:Kitti",
    "vkitti2": "datasetdm_fast.training.readers.depth:VirtualKitti",
    "deepfashion-mm": "datasetdm_fast.training.readers.deepfashion:DeepFashion",
    "celebamask-hq": "datasetdm_fast.training.readers.celebamask:CelebAMask",
    "yolo-seg": "datasetdm_fast.training.readers.yolo:Yolo",
    "labelme": "datasetdm_fast.training.readers.labelme:LabelMe",
    "cvat": "datasetdm_fast.training.readers.cvat:Cvat",
    "supervisely": "datasetdm_fast.training.readers.supervisely:Supervisely",
    "label-studio": "datasetdm_fast.training.readers.label_studio:LabelStudio",
    "mask": "datasetdm_fast.training.readers.mask:Masks",
    "folder": "datasetdm_fast.training.readers.folder:Folder",
    "hf": "datasetdm_fast.training.readers.hf:HuggingFace",
}
READERS = Registry("readers", OWN_READERS)
FILE_KINDS = {"coco", "label-studio"}  # whose addresses may name a file of annotations
RENDERED_KINDS = {"demo"}  # whose addresses are COUNT@FIRST_SEED and name no folder
ADDRESSED = re.compile(r"(.+?)(?:\[([\w.,-]+)\])?", re.DOTALL)  # PATH[SPLIT]
ADDRESS = "KIND:PATH, KIND:PATH[SPLIT] or demo:COUNT@FIRST_SEED"


def parse_address(spec: str) -> tuple[str, Path, str | None] | None:
    """Kind, folder and split of an address; None of rendered scenes, and where no folder is named."""
    kind, _, rest = spec.partition(":")
    match = None if kind in RENDERED_KINDS else ADDRESSED.fullmatch(rest)
    return (kind, Path(match[1]).expanduser(), match[2]) if match else None


def is_read(spec: str, path: Path) -> bool:
    """Whether the reader of an address may take files in the folder `path` for the data set's."""
    if not (address := parse_address(spec)):
        return False
    kind, data, split = address
    data, path = data.resolve(), path.resolve()
    if not path.is_relative_to(data):
        return False
    first = path.relative_to(data).parts[:1]
    return kind != "folder" or not first or first[0] in (*PARTS, split)


def check_address(spec: str) -> tuple[str, Path | str, str | None]:
    """Kind, place and split of an address; refused where no reader is called so, or where nothing is there."""
    kind, _, rest = spec.partition(":")
    if kind not in READERS:
        known = READERS.names
        if not rest and Path(spec).expanduser().is_dir():
            raise Refused(
                f"--data {spec}: the kind of this data set is missing",
                f"Write folder:{spec} for images/ with masks/ or depth/, run:{spec} for a run; kinds: "
                f"{', '.join(known)}.",
            )
        raise Refused(
            f"--data {spec}: no reader is called {kind!r}{nearest(kind, known)}",
            f"Expected {ADDRESS}; kinds: {', '.join(known)}.",
        )
    if not (match := ADDRESSED.fullmatch(rest)):
        raise Refused(f"--data {spec}: no folder named", f"Expected {ADDRESS}.")
    if kind == "run" and is_url(match[1]):
        return kind, match[1], match[2]
    place = Path(match[1]).expanduser()
    if kind in OWN_READERS.keys() - RENDERED_KINDS and ":" not in match[1]:
        with suppress(PermissionError):  # which the reader tells
            if not place.exists() and not place.is_symlink():
                raise Refused(f"--data {spec}: {place} is not there{storage.named_alike(place)}", reading.OF_DATA)
            if place.is_file() and kind not in FILE_KINDS:
                raise Refused(f"--data {spec}: {place} is a file, expected a folder", reading.OF_DATA)
            if (place / "export.json").is_file() and (place / kind).is_dir():  # where convert put it beside others
                place /= kind
    return kind, place, match[2]


def _tasks_of_same_truth(tasks: Sequence[str]) -> list[str]:
    """Tasks of this package with the same ground truth as those of other packages, which no reader here knows."""
    if not (others := [task for task in tasks if task in TASK_KINDS.others]):
        return []
    from datasetdm_fast.engine.tasks import TASKS as KINDS

    needs = {field for task in others for field in KINDS[task].needs}
    return [task for task in OWN_TASKS if not needs.isdisjoint(KINDS[task].needs)]


def open_data(
    spec: str,
    size: int,
    *,
    tasks: Sequence[str] = (),
    selection: Selection = EVERYTHING,
    skip_bad: bool = False,
    framing: str = "fit",
) -> LabelledSource:
    """The data set of a KIND:PATH[SPLIT] address, its images at size x size pixels; the split defaults to train.

    `tasks` are those whose truth is required; without any, all that the data set has.
    """
    kind, place, split = check_address(spec)
    try:
        requested = tasks if kind in READERS.others else (*tasks, *_tasks_of_same_truth(tasks))
        entry = READERS[kind]
        reader = load_place(entry) if isinstance(entry, str) else entry
        source = reader(place, split or "train", size, tuple(requested))
        READERS.check_type(kind, source, LabelledSource)
    except (Missing, OSError) as error:
        cause = error.__cause__ if isinstance(error, Missing) else error
        stop = error if isinstance(error, Missing) else storage.refusal(error, error.filename or place)
        # a library, a right or an answer is missing
        if not isinstance(cause, OSError) or isinstance(cause, PermissionError) or isinstance(error, Unanswered):
            raise stop from cause
        raise Refused(stop.cause, stop.remedy) from error
    except Refused as stop:
        if stop.remedy == reading.REPAIR:  # nothing was skipped yet that --skip-bad could skip
            raise Refused(stop.cause, reading.REPAIR_FIRST) from stop
        raise
    except Exception as error:
        if kind not in READERS.others:
            raise
        raise READERS.failure(kind, error, "fails") from error
    for name in (*source.classes, *source.thing_classes, *source.joints):
        if not documents.is_unicode(name):
            raise Refused(f"--data {spec}: the class or joint {name!r} is not valid Unicode", "Correct its name.")
    available = {*source.tasks}
    if absent := [
        task for task in tasks if task in TASKS and available.isdisjoint((task, *_tasks_of_same_truth([task])))
    ]:
        has = ", ".join(source.tasks) or "none that decoders are taught by"
        raise Refused(f"--data {spec}: no ground truth for {', '.join(absent)}", f"It has {has}.")
    if not len(source):
        raise Refused(
            f"--data {spec}: no image has ground truth for {', '.join(tasks or source.tasks)}",
            "Name other data, or another task.",
        )
    source.skip_bad, source.framing = skip_bad, framing
    return select(source, selection)
