"""Edits: a region of a sample is drawn anew, and its labels are read anew; everything else stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.data import Annotation, Instances, Request, Sample
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.labels import kind_of, mask_rle
from datasetdm_fast.engine.labels.kind import SHOWN_SCORE
from datasetdm_fast.engine.labels.words import replaced_text
from datasetdm_fast.engine.loop.checks import check_seed
from datasetdm_fast.engine.loop.origin import Beginning
from datasetdm_fast.engine.loop.prompts import PromptLine, check_line
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions import regions
from datasetdm_fast.runs.compositions.redraw import Redrawing
from datasetdm_fast.runs.compositions.settings import EditChoice
from datasetdm_fast.runs.compositions.source import Tile, TileSource
from datasetdm_fast.runs.run_folder.document import table_of

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.sampling.schedule import Schedule

MOST_NEW = 1000  # ids of instances that one image may add
LEAST_SHOWN = 1 / 500  # of the pixels: a class that fills less of a label is not shown
FEATHER = 128  # of a side of the picture, the part over which an edit is feathered


class Edits(Redrawing):
    """One image of every requested sample; where a class is drawn anew, of those that show it."""

    command = "edit"
    choice: EditChoice

    def __init__(self, source: TileSource, choice: EditChoice):
        check_line(choice.prompt, "--prompt")
        for name, value, least in (("grow", choice.grow, 0), ("feather", choice.feather, -1)):
            if not least <= value <= source.side:
                raise Refused(
                    f"--{name} {value}: expected a number from {least} to {source.side}, the side of the samples",
                    "Choose another number.",
                )
        labels = regions.labels_of(source, "instance")
        self.kind, self.task, self.region = regions.find_kind(choice), next(iter(labels), ""), None
        if self.kind == "class_":
            self.task = regions.class_task(source, choice.class_)
        elif self.kind == "instance" and not labels:
            raise Refused(
                f"--instance {choice.instance}: {source.path} has no instances, it has {', '.join(source.run.tasks)}",
                "Use --class, --mask or --box, or generate with --task instance.",
            )
        elif self.kind == "mask":
            self.mask = regions.read_mask(choice.mask, source.side)
            self.region = mask_rle.decode(self.mask)
        elif self.kind == "box":
            self.region = regions.read_box(choice.box, source.side)
        self.ids = {label: regions.annotation_ids(source, label) for label in labels}
        rows = [row for rows in self.ids.values() for row in rows.values()]
        self.largest_id = max((id for row in rows for id in row), default=0)
        self.feather = source.side // FEATHER if choice.feather < 0 else choice.feather
        super().__init__(source, choice)
        if choice.seed != -1:
            check_seed(choice.seed, self.number)

    @property
    def config(self) -> dict[str, Any]:
        return super().config | ({"mask": self.mask} if self.kind == "mask" else {})

    def _find_positions(self) -> list[int]:
        positions = super()._find_positions()
        if self.kind == "instance":
            return [self._position_of_instance(positions)]
        if self.kind != "class_":
            return positions
        kind, table, word = kind_of(self.task), self.source.document["labels"][self.task], self.choice.class_
        rows = self.source.run.rows(parts=("labels",))
        shown = [list(kind.words(_shown_items(row.labels[self.task]), table, 1)) for row in rows]
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
            text = replaced_text(request.prompt, word, text, tuple(words), table_of(self.source.document)) or text
        seed = request.seed if choice.seed < 0 else choice.seed + index
        return PromptLine(0, text, None, seed, negative=request.negative)

    def _class_word(self, source: int) -> str:
        """The class of the region of a sample of the source, empty where it has none."""
        if self.kind != "instance":
            return self.choice.class_
        record = self.source.run[f"{source:08d}"].row.labels[self.task]
        item = record[self.ids[self.task][source].index(self.choice.instance)]
        return kind_of(self.task).names(self.source.document["labels"][self.task])[item["category_id"]]

    def region_of(self, tile: Tile) -> np.ndarray:  # [H, W] bool
        """The region of a sample that is drawn anew."""
        region = self.region
        if self.kind == "class_":
            region, _ = kind_of(self.task).mask_of(self.source.label(tile, self.task), self.choice.class_)
        elif self.kind == "instance":
            number = self.ids[self.task][tile.row.request.index].index(self.choice.instance)
            region = mask_rle.decode(tile.row.labels[self.task][number]["segmentation"])
        return regions.grow(region, self.choice.grow)

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        """Latents blended by the region: outside they are the source's at every call."""
        import torch

        from datasetdm_fast.kernels.transfer import to_device

        source, last = self.latents(engine, requests), len(schedule) - 1
        pixels = engine.model.latents.pixels
        cells = np.stack([regions.to_cells(self.region_of(self.tile(request.index)), pixels) for request in requests])
        is_new = to_device(torch.from_numpy(cells)[:, None], source.clean.device)
        outside = source.add_noise(schedule.noise_step(0))
        inside = source.noise * schedule.noise_scale if self.choice.strength == 1 else outside

        def blend(call: int, latents: Tensor) -> Tensor:
            known = source.clean if call == last else source.add_noise(schedule.noise_step(call + 1))
            return torch.where(is_new, latents, known)

        return Beginning(torch.where(is_new, inside, outside), blend)

    def finish(self, sample: Sample) -> Sample:
        """The source with the region's pixels and labels of the new sample."""
        index = sample.request.index
        tile = self.tile(index)
        region = self.region_of(tile)
        share = regions.weights(region, self.feather)[..., None]
        old = tile.pixels["image"]
        image = np.rint(old + share * (sample.image.astype(np.float32) - old)).astype(np.uint8)
        labels = {}
        for task, predicted in sample.annotations.items():
            source = self.source.label(tile, task)
            if task in self.ids:
                source = replace(source, ids=np.array(self.ids[task][tile.row.request.index], np.int64))
            labels[task] = kind_of(task).merge(source, predicted, region)
            if task in self.ids:
                labels[task] = number_instances(labels[task], self.first_new_id(task, index))
        facts = {"mask": regions.describe(region), "feather": self.feather}
        request = replace(sample.request, classes=self._classes(sample.request, tile, labels))
        provenance = {**sample.provenance, **self.provenance(index), **facts}
        return Sample(request, image, labels, provenance)

    def first_new_id(self, label: str, index: int) -> int:
        """The first of the ids for instances that an image adds to a label, which no other label of the run has."""
        return self.largest_id + 1 + (index * len(self.ids) + list(self.ids).index(label)) * MOST_NEW

    def _classes(self, request: Request, tile: Tile, labels: Mapping[str, Annotation]) -> tuple[str, ...]:
        """The class words of the prompt, and those of the source that the labels still show."""
        tables = {task: self.source.document["labels"][task].get("classes", ()) for task in labels}

        def is_shown(word: str) -> bool:
            tasks = [task for task, classes in tables.items() if word in classes and kind_of(task).can_mask]
            shares = (kind_of(task).mask_of(labels[task], word)[0].mean() for task in tasks)
            return not tasks or any(share >= LEAST_SHOWN for share in shares)

        left = {word for word in tile.row.request.classes if is_shown(word)} | set(request.classes)
        return tuple(word for word in self.source.document["plan"].get("words", ()) if word in left)


def _shown_items(record: Any) -> Any:
    """The record of a label without the things whose score is too low for a region, as it is for pictures."""
    return [item for item in record if item["score"] >= SHOWN_SCORE] if isinstance(record, list) else record


def number_instances(label: Instances, first: int) -> Instances:
    """The instances with an id each: those that have none take the numbers from `first` on."""
    return replace(label, ids=np.where(label.ids > 0, label.ids, first + np.cumsum(label.ids == 0) - 1))
