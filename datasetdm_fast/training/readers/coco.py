"""coco:PATH[SPLIT]: instances and keypoints in COCO's form; annotations are read from their file image by image.
lvis:PATH[SPLIT]: LVIS v1 annotations over COCO's images.
"""

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datasetdm_fast.engine.decoders.config import COCO_JOINTS, COCO_LIMBS
from datasetdm_fast.engine.labels import mask_rle
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.readers.coco_layout import find_layout, find_pictures
from datasetdm_fast.training.truth import shapes, windows
from datasetdm_fast.training.truth.picture_source import largest
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.json_stream import JsonStream

IMAGE_FORM = {"id": int, "height": int, "width": int}
SEARCHED = ("neg_category_ids", "not_exhaustive_category_ids")  # of LVIS: which classes an image was searched for
IMAGE_FIELDS = ("file_name", "coco_url", "height", "width")
SUPERVISION = "common-objects"  # of a category, as the library supervision writes it
DATUMARO = {"flickr_url": "", "coco_url": "", "date_captured": 0}  # of an image as CVAT, which uses it, writes it
ANNOTATION_FORM = {"id": int, "image_id": int, "category_id": int}


class Annotations:
    """One annotation file: its images, its categories, and where in it each annotation stands. An image without any
    shows nothing, also where all do.
    """

    def __init__(self, path: Path):
        self.path, self.stream = path, JsonStream(path)
        self.images: dict[int, dict[str, Any]] = {}
        self.categories: dict[int, str] = {}
        self.parents: dict[int, Any] = {}  # category -> its supercategory
        self.joints: tuple[str, ...] = ()
        self.limbs: tuple[tuple[int, int], ...] = ()
        self.bad: dict[int, str] = {}  # image id -> the fault of one of its annotations
        self.has_outlines = False
        # whether it is of CVAT or supervision, which turn photos, and whose iscrowd says that an outline is a mask
        self.marks_masks = False
        rows = {name: array("q") for name in ("id", "image", "category", "start", "end", "count")}
        areas, crowds = array("d"), array("b")
        for key, value, start, end in self.stream:
            try:
                if key == "images":
                    documents.check_form(value, IMAGE_FORM)
                    documents.check_form(
                        {name: value.get(name, []) for name in SEARCHED}, dict.fromkeys(SEARCHED, [int])
                    )
                    if value["id"] in self.images:
                        raise ValueError(f"the id {value['id']} occurs twice")
                    self.marks_masks = self.marks_masks or DATUMARO.items() <= value.items()
                    self.images[value["id"]] = {name: value[name] for name in IMAGE_FIELDS if name in value}
                    for name in SEARCHED:  # which may be long lists
                        if name in value:
                            self.images[value["id"]][name] = array("i", value[name])
                elif key == "categories":
                    self._add_category(value)
                elif key == "annotations":
                    documents.check_form(value, ANNOTATION_FORM)
                    documents.check_form(value.get("area", 0), float, "area")
                    if not all(-(2**63) <= value[name] < 2**63 for name in ANNOTATION_FORM):
                        raise ValueError("an id of more than 64 bits")
                    ids = value["id"], value["image_id"], value["category_id"]
                    for column, number in zip(rows.values(), (*ids, start, end, _count_joints(value)), strict=True):
                        column.append(number)
                    self.has_outlines = self.has_outlines or bool(value.get("segmentation"))
                    areas.append(value.get("area", 0))
                    crowds.append(_is_crowd(value))
            except (ValueError, TypeError, OverflowError) as error:
                raise reading.bad(path, f"{key}, byte {start}: {error}") from error
        is_annotated = "annotations" in self.stream.keys  # an empty list means that the images show nothing
        for what, part in (("images", self.images), ("categories", self.categories), ("annotations", is_annotated)):
            if not part:
                raise reading.bad(path, f"no {what} in it")
        self.rows = {name: np.array(column, np.int64) for name, column in rows.items()}
        self.areas, self.crowds = np.array(areas), np.array(crowds, bool) & (not self.marks_masks)
        self.order = np.argsort(self.rows["image"], kind="stable")
        self.sorted_images = self.rows["image"][self.order]
        self._check_ids()

    def _add_category(self, value: Any) -> None:
        documents.check_form(value, {"id": int, "name": str})
        if value["id"] in self.categories:
            raise ValueError(f"the category id {value['id']} occurs twice")
        self.categories[value["id"]] = value["name"]
        self.parents[value["id"]] = value.get("supercategory")
        self.marks_masks = self.marks_masks or self.parents[value["id"]] == SUPERVISION
        if "keypoints" in value:
            documents.check_form(value["keypoints"], [str], "keypoints")
            self.joints = tuple(value["keypoints"])
            self.limbs = _limbs(value.get("skeleton"), len(self.joints))

    def _check_ids(self) -> None:
        """Annotations of unknown categories make their image bad; an unknown image or what occurs twice is refused."""
        names = [self.categories[category] for category in self.shown_categories]
        if repeated := next((name for name, number in Counter(names).items() if number > 1), ""):
            raise reading.bad(self.path, f"the category {documents.quote(repeated)} occurs twice")
        ids = np.sort(self.rows["id"])
        if len(twice := ids[1:][ids[1:] == ids[:-1]]):
            raise reading.bad(self.path, f"the annotation id {twice[0]} occurs twice")
        known = np.isin(self.rows["category"], list(self.categories))
        for row in np.flatnonzero(~known):
            self.bad[int(self.rows["image"][row])] = (
                f"annotation {self.rows['id'][row]} has the unknown category {self.rows['category'][row]}"
            )
        stray = np.flatnonzero(~np.isin(self.rows["image"], list(self.images)))
        if len(stray):
            raise reading.bad(
                self.path,
                f"annotation {self.rows['id'][stray[0]]} is of the unknown image {self.rows['image'][stray[0]]}",
            )

    @property
    def shown_categories(self) -> list[int]:
        """The categories but the background, and but a root of all others that Roboflow adds and nothing is of."""
        roots = {id for id, name in self.categories.items() if self.parents[id] == "none" and self._is_root(id, name)}
        return sorted(id for id, name in self.categories.items() if id not in roots and not reading.is_background(name))

    def _is_root(self, number: int, name: str) -> bool:
        others = [parent for id, parent in self.parents.items() if id != number]
        return name in others and number not in self.rows["category"]

    def of(self, image: int) -> np.ndarray:
        """The rows of an image's annotations, in the file's order."""
        return self.order[
            np.searchsorted(self.sorted_images, image) : np.searchsorted(self.sorted_images, image, "right")
        ]

    def bad_annotation(self, row: int, reason: str) -> Refused:
        return reading.bad(self.path, f"annotation {self.rows['id'][row]}: {reason}")

    def read(self, row: int) -> dict[str, Any]:
        return self.stream.at(int(self.rows["start"][row]), int(self.rows["end"][row]))


class Coco(shapes.OutlineSource):
    """Annotation files and pictures as coco_layout finds them.

    Asked for pose alone, each item is one person in the middle of a square; otherwise it is an image.
    """

    joints = COCO_JOINTS
    limbs = COCO_LIMBS

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path, layout = path, find_layout(path, split)
        is_pose_alone = tasks == ("pose",)
        things = Annotations(layout.things) if layout.things and not (is_pose_alone and layout.persons) else None
        persons = Annotations(layout.persons) if layout.persons and (not tasks or "pose" in tasks) else None
        if persons is None and things and things.joints and (not tasks or "pose" in tasks):
            persons = things  # one file has both
        if is_pose_alone:
            if persons is None:
                raise Refused(f"{layout.things}: no category in it has keypoints", reading.AS_PUBLISHED)
            things = None
        elif things is None and persons is None:
            things = Annotations(layout.persons)
        first = things or persons
        names = [image.get("file_name") for image in first.images.values()]
        self.pictures = find_pictures(layout.folders, names, first.path)
        self._open(things, persons, size, is_pose_alone)
        self.layout = f"annotations of {_below(path, first.path)}, pictures in {_below(path, self.pictures.folder)}"

    def _open(self, things: Annotations | None, persons: Annotations | None, size: int, is_pose_alone: bool) -> None:
        self.things, self.persons, self.shows_persons = things, persons, is_pose_alone
        if things:
            ids = things.shown_categories
            self.numbers = {category: k for k, category in enumerate(ids)}
            self.set_things(things.categories[category] for category in ids)
        if persons:
            self.tasks += ("pose",)
            self.joints = persons.joints or COCO_JOINTS
            self.limbs = COCO_LIMBS if self.joints == COCO_JOINTS else persons.limbs
        first = things or persons
        self.images = sorted(first.images)
        # a person is a row of the keypoint file
        self.people = np.flatnonzero((persons.rows["count"] > 0) & ~persons.crowds) if is_pose_alone else None
        if is_pose_alone:
            self.people = self.people[np.argsort(persons.rows["image"][self.people], kind="stable")]
        super().__init__(size, len(self.images) if self.people is None else len(self.people))

    def name(self, record: int) -> str:
        try:
            return str(self.image_path(self._image_of(record)))
        except Refused:  # its file name is the fault
            return f"image {self._image_of(record)}"

    def _image_of(self, record: int) -> int:
        return self.images[record] if self.people is None else int(self.persons.rows["image"][self.people[record]])

    def origins(self, record: int) -> tuple[str, ...]:
        """The image, where each item is one of its persons."""
        return () if self.people is None else (str(self._image_of(record)),)

    def image_path(self, image: int) -> Path:
        first = self.things or self.persons
        name = first.images[image].get("file_name")
        if not isinstance(name, str):
            raise reading.bad(first.path, f"image {image} has no file_name")
        return self.pictures.path_of(name, first.path)

    def picture(self, record: int) -> Picture:
        image, first = self._image_of(record), self.things or self.persons
        path, facts = self.image_path(image), first.images[image]
        for source in (self.things, self.persons):
            if source and image in source.bad:
                raise reading.bad(source.path, source.bad[image])
        entry, (width, height) = f"its entry in {first.path.name}", (facts["width"], facts["height"])
        sides = (width, height)
        turned = reading.as_drawn(sides) if first.marks_masks else reading.as_sized(entry, lambda: sides)
        pixels = reading.colour_image(path, turned)
        shapes.check_sides(path, pixels, (height, width), first.path)
        fields: dict[str, Any] = {}
        if self.persons:
            rows = self.persons.of(image) if self.people is None else [self.people[record]]
            kinds = {self.persons.categories[int(self.persons.rows["category"][row])]: None for row in rows}
            fields = {"caption": self.photo_of([*kinds] or ["person"]), **self._joints(rows)}
        if self.things:
            fields |= self._things(image, pixels.shape[:2])
        suffix = "" if self.people is None else f"_{self.persons.rows['id'][self.people[record]]}"
        return Picture(f"{path.stem}{suffix}", pixels, **fields)

    def _things(self, image: int, shape: tuple[int, int]) -> dict[str, Any]:
        things = shapes.Things()
        for row in self.things.of(image):
            if (class_id := self.numbers.get(int(self.things.rows["category"][row]))) is None:  # the background
                continue
            annotation = self.things.read(row)
            is_box = self.things.has_outlines and not annotation.get("segmentation")  # of a thing without an outline
            try:
                mask = _box(annotation, shape) if is_box else _mask(annotation.get("segmentation"), shape)
            except ValueError as error:
                raise self.things.bad_annotation(row, documents.reason_of(error)) from error
            things.add(mask, class_id, is_crowd=is_box or bool(self.things.crowds[row]))
        return things.fields | {"caption": self.names_of(things)}

    def _joints(self, rows: Sequence[int]) -> dict[str, Any]:
        points, boxes, areas = [], [], []
        for row in rows:
            if not self.persons.rows["count"][row] or self.persons.crowds[row]:
                continue
            value = self.persons.read(row)
            try:
                documents.check_form(value, {"keypoints": [float], "bbox": [float]})
                if len(value["keypoints"]) != 3 * len(self.joints) or len(value["bbox"]) != 4:
                    raise ValueError(
                        f"{len(value['keypoints'])} numbers for {len(self.joints)} joints, {len(value['bbox'])} for "
                        "a box"
                    )
                joints = np.array(value["keypoints"], np.float64).reshape(-1, 3)
                if (
                    not np.isin(joints[:, 2], (0, 1, 2)).all()
                    or np.abs(joints).max() > 1e6
                    or np.abs(value["bbox"]).max() > 1e6
                ):
                    raise ValueError("a joint or box out of range")
            except ValueError as error:
                raise self.persons.bad_annotation(row, str(error)) from error
            joints[:, :2] += 0.5  # COCO counts from the middle of the first pixel
            points.append(joints)
            boxes.append(value["bbox"])
            areas.append(self.persons.areas[row] or value["bbox"][2] * value["bbox"][3])
        count = len(self.joints)
        return {
            "keypoints": np.array(points, np.float32).reshape(-1, count, 3),
            "keypoint_boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "keypoint_areas": np.array(areas, np.float32),
            "person": tuple(boxes[0]) if self.people is not None and boxes else None,
        }

    def areas(self, record: int) -> dict[str, int]:
        if self.things is None:
            return {"person": 1}
        if not self.things.areas.any():  # the file has none
            return super().areas(record)
        rows = [row for row in self.things.of(self.images[record]) if not self.things.crowds[row]]
        kinds = {row: self.numbers.get(int(self.things.rows["category"][row])) for row in rows}
        named = ((row, self.thing_classes[kind]) for row, kind in kinds.items() if kind is not None)
        return largest((name, int(self.things.areas[row])) for row, name in named)

    def is_centred(self, record: int) -> bool:
        """Whether the mean visible joint lies near the middle of the box (the rule of COCO pose training)."""
        if self.people is None:
            return True
        person = self._joints([self.people[record]])
        seen = person["keypoints"][0][:, 2] > 0
        x, y, width, height = person["keypoint_boxes"][0]
        side = max(width, height) * windows.PERSON_MARGIN
        away = person["keypoints"][0][seen, :2].mean(0) - (x + width / 2, y + height / 2)
        nearness = math.exp(-float(away @ away) / (2 * 0.2**2 * max(side * side, 1.0)))
        return nearness > 0.2 / 16 * int(seen.sum()) + 0.45 - 0.2 / 16


class Lvis(Coco):
    """lvis_v1_SPLIT.json; an image lies where its coco_url ends, below PATH or the folder beside it. It was searched
    for the classes that it shows and those of neg_category_ids alone; one without either is left out.
    """

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path = path
        annotations = reading.first_there(
            path / f"lvis_v1_{split}.json", path / "annotations" / f"lvis_v1_{split}.json"
        )
        self._open(Annotations(annotations), None, size, False)
        shown = {*self.things.rows["image"].tolist()}
        self.images = [image for image in self.images if image in shown or self._was_searched(image)]
        self.order = range(len(self.images))

    def _was_searched(self, image: int) -> bool:
        """Whether an image without annotations lists classes that it does not show; of others nothing is known."""
        facts = self.things.images[image]
        return (
            image in self.things.bad or SEARCHED[0] not in facts or not {*facts[SEARCHED[0]]}.isdisjoint(self.numbers)
        )

    def picture(self, record: int) -> Picture:
        picture, facts = super().picture(record), self.things.images[self.images[record]]
        absent, more = (tuple(self.numbers[k] for k in facts.get(name, ()) if k in self.numbers) for name in SEARCHED)
        searched = tuple(sorted({*absent, *picture.mask_classes})) if SEARCHED[0] in facts else None
        return replace(picture, searched=searched, not_exhausted=more)

    def image_path(self, image: int) -> Path:
        url = self.things.images[image].get("coco_url")
        parts = PurePosixPath(url).parts[-2:] if isinstance(url, str) else ()
        if len(parts) < 2:
            raise reading.bad(self.things.path, f"image {image} has no coco_url")
        below = reading.inside(self.path, "/".join(parts), self.things.path)
        return below if below.exists() else reading.inside(self.path.parent, "/".join(parts), self.things.path)


def _below(root: Path, path: Path) -> Path:
    """A path inside of a folder by its place there."""
    return path.relative_to(root) if root.is_dir() and path != root and path.is_relative_to(root) else path


def _limbs(skeleton: Any, joints: int) -> tuple[tuple[int, int], ...]:
    """The limbs of a category, whose joints COCO counts from 1; none where they join no joints, as only drawings need
    them.
    """
    try:
        documents.check_form(skeleton, [[int]])
        pairs = tuple((a - 1, b - 1) for a, b in skeleton)
    except ValueError:
        return ()
    return pairs if all(0 <= end < joints for pair in pairs for end in pair) else ()


def _is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether an annotation is of many things; without the field, it is of one."""
    is_crowd = annotation.get("iscrowd") or 0
    if is_crowd not in (0, 1):
        raise ValueError(f"iscrowd is {documents.quote(is_crowd)}, expected 0 or 1")
    return bool(is_crowd)


def _count_joints(annotation: dict[str, Any]) -> int:
    """The visible joints as the file counts them, else as it lists them: many programs leave the count out."""
    count, points = annotation.get("num_keypoints"), annotation.get("keypoints")
    documents.check_form(count or 0, int, "num_keypoints")
    if count is None and isinstance(points, list):
        return sum(isinstance(value, (int, float)) and value > 0 for value in points[2::3])
    return count or 0


def _box(annotation: dict[str, Any], shape: tuple[int, int]) -> shapes.Mask:
    """The mask of a box, in which every prediction is ignored, as nobody told what of it is the thing."""
    documents.check_form(annotation, {"bbox": [float]})
    left, top, width, height = annotation["bbox"]
    return shapes.box((left, top, left + width, top + height), shape)


def _mask(segmentation: Any, shape: tuple[int, int]) -> shapes.Mask:
    """The mask of a polygon list or a run-length string that fits the image."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != list(shape):
            size = documents.quote(segmentation.get("size"))
            raise ValueError(f"an RLE of size {size}, but its image has {list(shape)}")
        mask_rle.run_lengths(segmentation)
        return partial(mask_rle.decode, segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("no segmentation")
    documents.check_form(segmentation, [[float]], "segmentation")
    if sum(map(len, segmentation)) > 2 * shapes.MOST_CORNERS:
        raise ValueError(f"polygons of more than {shapes.MOST_CORNERS} corners")
    for corners in segmentation:
        shapes.polygon(corners, shape)
    return partial(shapes.rasterise, segmentation, shape)
