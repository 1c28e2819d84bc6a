"""coco: images/SPLIT2017 and annotations/, panoptic PNGs among them; lvis: lvis_v1_SPLIT.json over the same images."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np

from datasetdm_fast import _C
from datasetdm_fast.engine.labels import mask_rle
from datasetdm_fast.engine.labels.class_tables import colour
from datasetdm_fast.engine.labels.pictures import bounds
from datasetdm_fast.runs.exporting.classes import Classes
from datasetdm_fast.runs.exporting.format import (
    AllSamples,
    Entry,
    ExportedPerson,
    ExportedThing,
    ExportPlan,
    Files,
    Format,
    SampleView,
)
from datasetdm_fast.runs.exporting.rings import is_hole, join_rings, rings
from datasetdm_fast.runs.run_folder.ledger import canonical
from datasetdm_fast.version import __version__

YEAR = "2017"
JOINT_DIGITS = 6  # of coordinates in pixels


class CocoFormat(Format):
    """Category ids are the class numbers of the export, the same in every file; image ids are sample numbers.

    Joints are counted from the middle of the first pixel.
    """

    needs = (("instance",), ("semantic",), ("pose",))

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, content = sample.picture(self.forms)
        files: Files = {f"images/{sample.split}{YEAR}/{sample.name}.{ending}": content}
        entry: Entry = {"image": image_entry(sample, f"{sample.name}.{ending}")}
        if "instance" in plan.tasks:
            entry["instances"] = [thing_entry(thing, plan) for thing in sample.things]
        if "pose" in plan.tasks:
            entry["person_keypoints"] = [_person(person, plan.classes) for person in sample.people]
        if "semantic" in plan.tasks:
            entry["stuff"] = list(_stuff(sample.semantic, plan.classes))
        if _has_panoptic(plan):
            numbers, entry["panoptic"] = panoptic(sample, plan.classes)
            colours = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], 2).astype(np.uint8)
            files[f"annotations/panoptic_{sample.split}{YEAR}/{sample.name}.png"] = _C.png_encode(colours)
        return files, entry

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        skeleton = [[a + 1, b + 1] for a, b in plan.limbs]  # COCO counts joints from 1
        kinds = {
            "instances": ("instance", categories(plan, plan.classes.things)),
            "person_keypoints": ("pose", categories(plan, plan.people, keypoints=list(plan.joints), skeleton=skeleton)),
            "stuff": ("semantic", categories(plan, plan.classes.stuff)),
        }
        files = {}
        for kind, split in ((kind, split) for kind in kinds for split in plan.splits):
            task, rows = kinds[kind]
            if task in plan.tasks:
                annotations = number_annotations(plan, samples, kind, split)
                files[f"annotations/{kind}_{split}{YEAR}.json"] = _document(samples, split, rows, annotations)
        if _has_panoptic(plan):
            for split in plan.splits:
                files[f"annotations/panoptic_{split}{YEAR}.json"] = _panoptic(plan, samples, split)
        return files


def _has_panoptic(plan: ExportPlan) -> bool:
    return {"instance", "semantic"} <= plan.tasks


def categories(plan: ExportPlan, names: Iterable[str], **more: Any) -> list[dict[str, Any]]:
    numbers = plan.classes.numbers
    return [{"id": numbers[name], "name": name, "supercategory": "", **more} for name in names]


def image_entry(sample: SampleView, file_name: str) -> dict[str, Any]:
    return {"id": sample.number, "file_name": file_name, "width": sample.width, "height": sample.height}


def thing_entry(thing: ExportedThing, plan: ExportPlan, *, joins_holes: bool = False) -> dict[str, Any]:
    """The annotation of an instance, but for its id and image."""
    return {
        "category_id": plan.classes.numbers[thing.name],
        "segmentation": segmentation(thing, joins_holes) if plan.layout.polygons else decompress_rle(thing.rle),
        "area": thing.area,
        "bbox": list(thing.box),
        "iscrowd": 0,
        "score": thing.score,
    }


def decompress_rle(rle: mask_rle.Rle) -> dict[str, Any]:
    """The run lengths as a list, as COCO's own files have them; `frPyObjects`, which trainers call, takes no string."""
    return {"size": rle["size"], "counts": mask_rle.run_lengths(rle).tolist()}


def segmentation(thing: ExportedThing, joins_holes: bool) -> list[list[float]] | dict[str, Any]:
    """Polygons of an instance; if it has holes, which COCO's polygons cannot, one polygon with bridges or its RLE."""
    outline = rings(thing.mask)
    if outline and not any(map(is_hole, outline)):
        return [ring.ravel().tolist() for ring in outline]
    return [join_rings(outline).ravel().tolist()] if outline and joins_holes else decompress_rle(thing.rle)


def _person(person: ExportedPerson, classes: Classes) -> dict[str, Any]:
    joints = [[round(x, JOINT_DIGITS), round(y, JOINT_DIGITS), int(seen)] for x, y, seen in person.joints.tolist()]
    return {
        "category_id": classes.numbers[person.name],
        "keypoints": list(chain(*joints)),
        "num_keypoints": int((person.joints[:, 2] > 0).sum()),
        "keypoint_scores": list(person.joint_scores),
        "score": person.score,
        "area": round(person.area, 3),
        "bbox": [round(value, 3) for value in person.box],
        "iscrowd": 0,
    }


def _stuff(labels: np.ndarray, classes: Classes) -> Iterator[dict[str, Any]]:
    """An annotation for each class that only maps show."""
    numbers = [classes.numbers[name] for name in classes.stuff]
    shown = [number for number in numbers if (labels == number).any()]
    if shown:
        encoded = mask_rle.encode(np.stack([labels == number for number in shown]))
        for number, rle, area, box in zip(shown, encoded.rles, encoded.areas, encoded.boxes, strict=True):
            yield {
                "category_id": number,
                "segmentation": decompress_rle(rle),
                "area": int(area),
                "bbox": box.tolist(),
                "iscrowd": 0,
            }


def panoptic(sample: SampleView, classes: Classes) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Segment of each pixel [H, W] int32, 0 where it has none, and the segments.

    Of two instances that of the higher score has a pixel; other pixels go to the classes that only maps show. Pixels
    that the run ignores have no segment.
    """
    numbers, is_known = np.zeros((sample.height, sample.width), np.int32), ~sample.ignored
    things = ((thing.name, thing.mask & is_known) for thing in sorted(sample.things, key=lambda thing: -thing.score))
    stuff = ((name, sample.semantic == classes.numbers[name]) for name in classes.stuff)
    categories = []
    for name, mask in chain(things, stuff):
        free = mask & (numbers == 0)
        if free.any():
            categories.append(classes.numbers[name])
            numbers[free] = len(categories)
    segments = []
    for k, category in enumerate(categories, 1):
        x, y, right, bottom = bounds(numbers == k)
        segments.append(
            {
                "id": k,
                "category_id": category,
                "area": int((numbers == k).sum()),
                "bbox": [x, y, right - x, bottom - y],
                "iscrowd": 0,
            }
        )
    return numbers, segments


def _document(samples: AllSamples, split: str, rows: list[Any], annotations: Iterable[Any]) -> Iterator[bytes]:
    """The file of a split in chunks: its images, the categories in `rows`, and annotations."""
    info = {"description": "made by datasetdm_fast", "version": __version__}
    yield f'{{\n"info":{canonical(info)},\n"licenses":[],\n"categories":{canonical(rows)},\n"images":'.encode()
    yield from json_list(entry["image"] for entry in samples.entries(split))
    yield b',\n"annotations":'
    yield from json_list(annotations)
    yield b"}\n"


def json_list(items: Iterable[Any]) -> Iterator[bytes]:
    """A JSON list in chunks, an item per line."""
    yield b"["
    for place, item in enumerate(items):
        yield f"{',' if place else ''}\n{canonical(item)}".encode()
    yield b"]"


def number_annotations(plan: ExportPlan, samples: AllSamples, kind: str, split: str) -> Iterator[dict[str, Any]]:
    """The annotations of a split with ids from 1 on, which no other split has."""
    number = 0  # pycocotools takes annotation 0 for "no match"
    for name in plan.splits:
        for entry in samples.entries(name):
            for item in entry[kind]:
                number += 1
                if name == split:
                    yield {"id": number, "image_id": entry["image"]["id"], **item}
        if name == split:
            return


def _panoptic(plan: ExportPlan, samples: AllSamples, split: str) -> Iterator[bytes]:
    numbers, things = plan.classes.numbers, plan.classes.things
    rows = [
        row | {"isthing": int(row["name"] in things), "color": list(colour(numbers[row["name"]]))}
        for row in categories(plan, plan.classes.names)
    ]
    annotations = (
        {
            "image_id": entry["image"]["id"],
            "file_name": f"{entry['image']['file_name'].rpartition('.')[0]}.png",
            "segments_info": entry["panoptic"],
        }
        for entry in samples.entries(split)
    )
    return _document(samples, split, rows, annotations)


RARE, COMMON = 10, 100  # images up to which LVIS calls a class rare, and common


class LvisFormat(Format):
    """Every class is searched in every image: a class that an image does not show is known to be absent.

    Its polygons are polygons alone, as detectron2 reads no others.
    """

    needs = (("instance",),)

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, content = sample.picture(self.forms)
        name = f"{sample.split}{YEAR}/{sample.name}.{ending}"
        things = [thing_entry(thing, plan, joins_holes=True) for thing in sample.things]
        shown = {thing["category_id"] for thing in things}
        absent = [plan.classes.numbers[name] for name in plan.classes.things]
        image = image_entry(sample, f"{sample.name}.{ending}") | {
            "coco_url": f"http://images.cocodataset.org/{name}",
            "neg_category_ids": [number for number in absent if number not in shown],
            "not_exhaustive_category_ids": [],
        }
        return {name: content}, {"image": image, "instances": things}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        return {f"lvis_v1_{split}.json": _lvis(plan, samples, split) for split in plan.splits}


def _lvis(plan: ExportPlan, samples: AllSamples, split: str) -> Iterator[bytes]:
    images, things = Counter[int](), Counter[int]()
    for entry in samples.entries(split):
        shown = [thing["category_id"] for thing in entry["instances"]]
        images.update(set(shown))
        things.update(shown)
    rows = [
        category
        | {
            "synset": f"{category['name']}.n.01",
            "synonyms": [category["name"]],
            "def": "",
            "image_count": images[category["id"]],
            "instance_count": things[category["id"]],
            "frequency": "r" if images[category["id"]] <= RARE else "c" if images[category["id"]] <= COMMON else "f",
        }
        for category in categories(plan, plan.classes.things)
    ]
    yield from _document(samples, split, rows, number_annotations(plan, samples, "instances", split))
