"""Edits: a region of a sample is drawn anew, and its labels are read anew; everything else stays as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from datasetdm_fast.data import Annotation, Request, Sample
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.engines import Engine
from datasetdm_fast.engine.labels import SHOWN_SCORE, by_kind, kind_of, mask_rle, task_of_label
from datasetdm_fast.engine.labels.class_tables import replaced_text
from datasetdm_fast.engine.labels.trust import LEAST_SHARE
from datasetdm_fast.engine.loop.calls import Beginning
from datasetdm_fast.engine.loop.prompts import PromptLine, check_line
from datasetdm_fast.engine.loop.recipe import check_seed
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.runs.compositions.composition import SourceSample, SquareSource
from datasetdm_fast.runs.compositions.redraw import Redrawing
from datasetdm_fast.runs.compositions.settings import EditSettings
from datasetdm_fast.runs.run_folder.document import LEDGER, table_of
from datasetdm_fast.runs.run_folder.indexes.coco import rows_with_ids
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.untrusted import images

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.sampling.schedule import Schedule


WHITE = 128  # grey values from it on belong to the region of a mask file
LONGEST_MASK = 2**18  # letters of the run lengths of a mask file, which run.json holds
SQUARE = np.ones((3, 3), bool)  # a pixel and its neighbours
KINDS = ("class_", "instance", "mask", "box")


def find_kind(choice: EditSettings) -> str:
    """Which of the four flags names the region."""
    used = [name for name in KINDS if getattr(choice, name)]
    if len(used) != 1:
        flags = " and ".join(f"--{name.strip('_')}" for name in used)
        cause = f"{flags}: {len(used)} ways to name the region, expected one"
        raise Refused(
            cause if used else "the region to redraw is missing",
            "Use one of --class CLASS, --instance ID, --mask FILE and --box X0,Y0,X1,Y1.",
        )
    return used[0]


def read_mask(path: str, side: int) -> dict[str, Any]:
    """The run lengths of a mask file for pictures of side x side pixels."""
    storage.check_given(Path(path), "--mask", "Name a picture whose white pixels mark the area to redraw.")
    grey = np.asarray(images.read_image(Path(path)).convert("L"))
    if grey.shape != (side, side):
        raise Refused(
            f"--mask {path}: {grey.shape[1]} x {grey.shape[0]} pixels, the samples have {side} x {side}",
            "Give a mask of the size of the samples.",
        )
    if not (grey >= WHITE).any():
        raise Refused(
            f"--mask {path}: the mask is empty, no pixel has a value of {WHITE} or more",
            "Paint the area to redraw white.",
        )
    rle = mask_rle.encode((grey >= WHITE)[None]).rles[0]
    if len(rle["counts"]) > LONGEST_MASK:
        raise Refused(f"--mask {path}: has too many parts to be stored", "Give a mask of larger areas.")
    return dict(rle)


def read_box(text: str, side: int) -> np.ndarray:  # [side, side] bool
    """A box of pixels as a region."""
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise Refused(f"--box {text}: expected four whole numbers", "Write --box X0,Y0,X1,Y1, in pixels.") from None
    if not (0 <= left < right <= side and 0 <= top < bottom <= side):
        raise Refused(
            f"--box {text}: is empty or leaves the samples, which have {side} x {side} pixels",
            "Write --box X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1.",
        )
    region = np.zeros((side, side), bool)
    region[top:bottom, left:right] = True
    return region


def labels_of(source: SquareSource, task: str) -> list[str]:
    """The labels of a run that decoders of this task made."""
    return [label for label in source.run.tasks if task_of_label(label) == task]


def class_task(source: SquareSource, word: str) -> str:
    """The task whose labels locate a class, label maps before instances."""
    tables = {
        task: table["classes"]
        for task in sorted(by_kind(source.run.tasks), key=lambda task: not kind_of(task).is_map)
        if kind_of(task).can_mask and "classes" in (table := source.document["labels"][task])
    }
    if not tables:
        raise Refused(
            f"--class {word}: {source.path} has no labels that name classes, it has {', '.join(source.run.tasks)}",
            "Use --mask or --box, or generate with --task semantic.",
        )
    for task, classes in tables.items():
        if word in classes:
            return task
    known = list(dict.fromkeys(name for classes in tables.values() for name in classes))
    raise Refused(
        f"--class {word}: no label of {source.path} has this class{nearest(word, known)}",
        f"Choose from {', '.join(known)}.",
    )


def annotation_ids(source: SquareSource, label: str) -> dict[int, list[int]]:
    """The ids in its file of COCO's form of every sample's instances, by the index of the sample."""
    with Ledger(source.path / LEDGER, read_only=True) as ledger:
        return {row.request.index: ids for row, ids in rows_with_ids(label, source.document, ledger)}


def grow(region: np.ndarray, pixels: int) -> np.ndarray:
    """The region with all pixels that are at most so many rows and columns away."""
    return ndimage.binary_dilation(region, SQUARE, pixels) if pixels else region


def weights(region: np.ndarray, feather: int) -> np.ndarray:  # [H, W] fp32
    """Share of the new image: 0 outside of the region, rising inside to 1 after `feather` pixels."""
    inner, total = region, region.astype(np.float32)
    for _ in range(feather):
        inner = ndimage.binary_erosion(inner, SQUARE, border_value=1)
        total += inner
    return total / (feather + 1)


def to_cells(region: np.ndarray, pixels: int) -> np.ndarray:  # [h, w] bool
    """The latent cells, of `pixels` a side, of which any pixel is in the region."""
    height, width = (side // pixels for side in region.shape)
    return region.reshape(height, pixels, width, pixels).any((1, 3))


def describe(region: np.ndarray) -> dict[str, Any]:
    """The region in the row of a sample: its run lengths, and the SHA-256 of its pixels as bytes 0 and 1."""
    encoded = mask_rle.encode(np.ascontiguousarray(region)[None])
    digest = hashlib.sha256(np.ascontiguousarray(region, np.uint8).tobytes()).hexdigest()
    return {"segmentation": dict(encoded.rles[0]), "pixels": int(encoded.areas[0]), "sha256": digest}


MOST_NEW = 1000  # ids of instances that one image may add
FEATHER = 128  # of a side of the picture, the part over which an edit is feathered


class Edits(Redrawing):
    """One image of every requested sample; where a class is drawn anew, of those that show it."""

    command = "edit"
    choice: EditSettings

    def __init__(self, source: SquareSource, choice: EditSettings):
        check_line(choice.prompt, "--prompt")
        for name, value, least in (("grow", choice.grow, 0), ("feather", choice.feather, -1)):
            if not least <= value <= source.side:
                raise Refused(
                    f"--{name} {value}: expected a number from {least} to {source.side}, the side of the samples",
                    "Choose another number.",
                )
        labels = labels_of(source, "instance")
        self.kind, self.task, self.region = find_kind(choice), next(iter(labels), ""), None
        if self.kind == "class_":
            self.task = class_task(source, choice.class_)
        elif self.kind == "instance" and not labels:
            raise Refused(
                f"--instance {choice.instance}: {source.path} has no instances, it has {', '.join(source.run.tasks)}",
                "Use --class, --mask or --box, or generate with --task instance.",
            )
        elif self.kind == "mask":
            self.mask = read_mask(choice.mask, source.side)
            self.region = mask_rle.decode(self.mask)
        elif self.kind == "box":
            self.region = read_box(choice.box, source.side)
        self.ids = {label: annotation_ids(source, label) for label in labels}
        rows = [row for rows in self.ids.values() for row in rows.values()]
        self.largest_id = max((id for row in rows for id in row), default=0)
        self.feather = source.side // FEATHER if choice.feather < 0 else choice.feather
        super().__init__(source, choice)
        if choice.seed != -1:
            check_seed(choice.seed, self.number)

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "mask": self.mask} if self.kind == "mask" else super().config

    def _find_positions(self) -> list[int]:
        positions = super()._find_positions()
        if self.kind == "instance":
            return [self._position_of_instance(positions)]
        if self.kind != "class_":
            return positions
        kind, table, word = kind_of(self.task), self.source.document["labels"][self.task], self.choice.class_
        rows = self.source.run.rows(parts=("labels",))
        shown = []
        for row in rows:
            record = row.labels[self.task]
            if isinstance(record, list):  # things whose score is too low for pictures are so for a region, too
                record = [item for item in record if item["score"] >= SHOWN_SCORE]
            shown.append(list(kind.words(record, table, 1)))
        matches = [position for position in positions if word in shown[position]]
        if self.choice.only and len(matches) < len(positions):
            other = min(set(positions) - set(matches))
            words = ", ".join(dict.fromkeys(shown[other])) or "none"
            raise Refused(
                f"--class {word}: sample {self.requests[other].id} does not show it, its labels show {words}",
                "Choose one of these, or another sample.",
            )
        if not matches:
            raise Refused(f"--class {word}: no sample of {self.source.path} shows it", "Choose another class.")
        return matches

    def _position_of_instance(self, positions: Sequence[int]) -> int:
        for position in positions:
            if self.choice.instance in self.ids[self.task][self.requests[position].index]:
                return position
        raise Refused(
            f"--instance {self.choice.instance}: no annotation of the selected samples has this id",
            f"Use an id from {self.source.path / kind_of(self.task).coco_file}.",
        )

    @property
    def summary(self) -> str:
        value = "" if self.kind == "mask" else f" {getattr(self.choice, self.kind)}"
        name = f"{self.kind.strip('_')}{value}"
        return f"Edited from the run {self.source.path.resolve().name}, {name}: {self.choice.prompt}"

    @property
    def image_format(self) -> str:
        return "png"  # which alone keeps every pixel

    def prompt(self, index: int) -> PromptLine:
        request, choice = self.requests[self.position(index)], self.choice
        text, word = choice.prompt, self._class_word(request.index)
        if word and not choice.alone:
            words = dict.fromkeys((*self.source.document["plan"].get("words", ()), word))
            table, place = table_of(self.source.document), self._find_mention(request.index)
            text = replaced_text(request.prompt, word, text, tuple(words), table, place) or text
        seed = request.seed if choice.seed < 0 else choice.seed + index
        return PromptLine(0, text, None, seed, negative=request.negative)

    def _class_word(self, source: int) -> str:
        """The class of the region of a sample of the source, empty where it has none."""
        if self.kind != "instance":
            return self.choice.class_
        item, _ = self._read_instance(source)
        return kind_of(self.task).names(self.source.document["labels"][self.task])[item["category_id"]]

    def _find_mention(self, source: int) -> int | None:
        """Which mention of its class stands for an instance beside others of this class: captions tell things from left
        to right, or in no order. None: all mentions.
        """
        if self.kind != "instance":
            return None
        chosen, record = self._read_instance(source)
        alike = [
            item
            for item in record
            if item["category_id"] == chosen["category_id"] and (item is chosen or item["score"] >= SHOWN_SCORE)
        ]
        alike.sort(key=lambda item: item["bbox"][0] + item["bbox"][2] / 2)
        return alike.index(chosen) if len(alike) > 1 else None

    def _read_instance(self, source: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The instance of the region, and all of its label."""
        record = self.source.run[f"{source:08d}"].row.labels[self.task]
        return record[self.ids[self.task][source].index(self.choice.instance)], record

    def region_of(self, tile: SourceSample) -> np.ndarray:  # [H, W] bool
        """The region of a sample that is drawn anew."""
        region = self.region
        if self.kind == "class_":
            region, _ = kind_of(self.task).mask_of(self.source.label(tile, self.task), self.choice.class_)
        elif self.kind == "instance":
            number = self.ids[self.task][tile.row.request.index].index(self.choice.instance)
            region = mask_rle.decode(tile.row.labels[self.task][number]["segmentation"])
        return grow(region, self.choice.grow)

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        """Latents blended by the region: outside they are the source's at every call."""
        import torch

        from datasetdm_fast.kernels.transfer import to_device

        source, last = self.latents(engine, requests), len(schedule) - 1
        pixels = engine.model.latents.pixels
        cells = np.stack([to_cells(self.region_of(self.tile(request.index)), pixels) for request in requests])
        is_new = to_device(torch.from_numpy(cells)[:, None], source.clean.device)
        outside = source.add_noise(schedule.noise_steps[0])
        inside = source.noise * schedule.noise_scale if self.choice.strength == 1 else outside

        def blend(call: int, latents: Tensor) -> Tensor:
            known = source.clean if call == last else source.add_noise(schedule.noise_steps[call + 1])
            return torch.where(is_new, latents, known)

        return Beginning(torch.where(is_new, inside, outside), blend, source.draw)

    def finish(self, sample: Sample) -> Sample:
        """The source with the region's pixels and labels of the new sample."""
        index = sample.request.index
        tile = self.tile(index)
        region = self.region_of(tile)
        share = weights(region, self.feather)[..., None]
        old = tile.pixels["image"]
        image = np.rint(old + share * (sample.image.astype(np.float32) - old)).astype(np.uint8)
        labels = {}
        for task, predicted in sample.annotations.items():
            source = self.source.label(tile, task)
            if task in self.ids:
                source = replace(source, ids=np.array(self.ids[task][tile.row.request.index], np.int64))
            labels[task] = kind_of(task).merge(source, predicted, region)
            if task in self.ids:
                ids, first = labels[task].ids, self.first_new_id(task, index)
                labels[task] = replace(labels[task], ids=np.where(ids > 0, ids, first + np.cumsum(ids == 0) - 1))
        facts = {"mask": describe(region), "feather": self.feather}
        request = replace(sample.request, classes=self._classes(sample.request, tile, labels))
        provenance = {**sample.provenance, **self.provenance(index), **facts}
        return Sample(request, image, labels, provenance)

    def first_new_id(self, label: str, index: int) -> int:
        """The first of the ids for instances that an image adds to a label, which no other label of the run has."""
        return self.largest_id + 1 + (index * len(self.ids) + list(self.ids).index(label)) * MOST_NEW

    def _classes(self, request: Request, tile: SourceSample, labels: Mapping[str, Annotation]) -> tuple[str, ...]:
        """The class words of the prompt, and those of the source that every label that could still shows."""
        tables = {task: self.source.document["labels"][task].get("classes", ()) for task in labels}

        def is_shown(word: str) -> bool:
            tasks = [task for task, classes in tables.items() if word in classes and kind_of(task).can_mask]
            shares = (kind_of(task).mask_of(labels[task], word)[0].mean() for task in tasks)
            return all(share >= LEAST_SHARE for share in shares)

        left = {word for word in tile.row.request.classes if is_shown(word)} | set(request.classes)
        return tuple(word for word in self.source.document["plan"].get("words", ()) if word in left)
