"""Edits: a region of a sample is drawn anew, and its labels are read anew; everything else stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.data import Annotation, Instances, Request, Sample
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.labels import kind_of, mask_rle
from datasetdm_fast.engine.labels.instance import SHOWN_SCORE
from datasetdm_fast.engine.labels.words import replaced_text
from datasetdm_fast.engine.loop.checks import check_seed
from datasetdm_fast.engine.loop.origin import Beginning
from datasetdm_fast.engine.loop.prompts import PromptLine, check_line
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions import regions
from datasetdm_fast.runs.compositions.redraw import Redrawing
from datasetdm_fast.runs.compositions.settings import EditSettings
from datasetdm_fast.runs.compositions.source import Source, Tile
from datasetdm_fast.runs.run_folder.document import table_of

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.sampling.schedule import Schedule

MOST_NEW = 1000  # ids of instances that one image may add
LEAST_SHOWN = 1 / 500  # of the pixels: a class that fills less of a label is not shown
FEATHER = 128  # of a side of the picture, the part over which an edit is feathered


class Edits(Redrawing):
    """One image of every sample that is taken; where a class is drawn anew, of those that show it."""

    command = "edit"
    settings: EditSettings

    def __init__(self, source: Source, settings: EditSettings, mask: Mapping[str, Any] | None = None):
        if not settings.prompt.strip():
            raise Refused("--prompt is missing", "Describe the edited image: --prompt TEXT.")
        check_line(settings.prompt, "--prompt")
        for name, least in (("grow", 0), ("feather", -1)):
            if not least <= getattr(settings, name) <= source.side:
                raise Refused(
                    f"--{name} {getattr(settings, name)}: expected a number from {least} to {source.side}, the side of "
                    "the samples",
                    "Choose another number.",
                )
        numbered = regions.labels_of(source, "instance")
        self.way, self.task, self.region = regions.way_of(settings), next(iter(numbered), ""), None
        if self.way == "class_":
            self.task = regions.class_task(source, settings.class_)
        elif self.way == "instance" and not numbered:
            raise Refused(
                f"--instance {settings.instance}: {source.path} has no instances, it has {', '.join(source.run.tasks)}",
                "Use --class, --mask or --box, or generate with --task instance.",
            )
        elif self.way == "mask":
            self.mask = mask or regions.read_mask(settings.mask, source.side)
            self.region = mask_rle.decode(self.mask)
        elif self.way == "box":
            self.region = regions.read_box(settings.box, source.side)
        self.ids = {label: regions.annotation_ids(source, label) for label in numbered}
        self.largest = max((id for ids in self.ids.values() for own in ids.values() for id in own), default=0)
        self.feather = source.side // FEATHER if settings.feather < 0 else settings.feather
        super().__init__(source, settings)
        if settings.seed != -1:
            check_seed(settings.seed, self.number)

    def _places(self) -> list[int]:
        places = super()._places()
        if self.way == "instance":
            return [self._place_of_instance(places)]
        if self.way != "class_":
            return places
        kind, table, word = kind_of(self.task), self.source.document["labels"][self.task], self.settings.class_
        rows = self.source.run.rows(parts=("labels",))
        shown = {place: list(kind.words(_sure(row.labels[self.task]), table, 1)) for place, row in enumerate(rows)}
        found = [place for place in places if word in shown[place]]
        if self.settings.only and len(found) < len(places):
            other = min(set(places) - set(found))
            told = ", ".join(dict.fromkeys(shown[other])) or "none"
            raise Refused(
                f"--class {word}: sample {self.requests[other].id} does not show it, its labels show {told}",
                "Choose one of these, or another sample.",
            )
        if not found:
            raise Refused(f"--class {word}: no sample of {self.source.path} shows it", "Choose another class.")
        return found

    def _place_of_instance(self, places: Sequence[int]) -> int:
        wanted = self.settings.instance
        for place in places:
            if wanted in self.ids[self.task][self.requests[place].index]:
                return place
        raise Refused(
            f"--instance {wanted}: no annotation of the selected samples has this id",
            f"Use an id from {self.source.path / kind_of(self.task).coco_file}.",
        )

    @property
    def number(self) -> int:
        return len(self.places)

    @property
    def told(self) -> str:
        name = self.way.strip("_")
        value = "" if self.way == "mask" else f" {getattr(self.settings, self.way)}"
        return f"Edited from the run {self.source.path.resolve().name}, {name}{value}: {self.settings.prompt}"

    @property
    def image_format(self) -> str:
        return "png"  # which alone keeps every pixel

    def own_settings(self) -> dict[str, Any]:
        return super().own_settings() | ({"mask": self.mask} if self.way == "mask" else {})

    @classmethod
    def restored(cls, source: Source, settings: EditSettings, config: Mapping[str, Any]) -> Edits:
        mask = config["mask"]
        return cls(source, replace(settings, mask="run.json"), mask) if mask else cls(source, settings)

    def place(self, index: int) -> int:
        return self.places[index]

    def prompt(self, index: int) -> PromptLine:
        request, settings = self.requests[self.place(index)], self.settings
        text, word = settings.prompt, self._word(request.index)
        if word and not settings.alone:
            words = dict.fromkeys((*self.source.document["plan"].get("words", ()), word))
            text = replaced_text(request.prompt, word, text, tuple(words), table_of(self.source.document)) or text
        seed = request.seed if settings.seed < 0 else settings.seed + index
        return PromptLine(0, text, None, seed, negative=request.negative)

    def _word(self, source: int) -> str:
        """The class of what is drawn anew of a sample of the source, if it has one."""
        if self.way != "instance":
            return self.settings.class_
        record = self.source.run[f"{source:08d}"].row.labels[self.task]
        item = record[self.ids[self.task][source].index(self.settings.instance)]
        return kind_of(self.task).names(self.source.document["labels"][self.task])[item["category_id"]]

    def region_of(self, tile: Tile) -> np.ndarray:  # [H, W] bool
        """What is drawn anew of a sample."""
        region = self.region
        if self.way == "class_":
            region, _ = kind_of(self.task).mask_of(self.source.label(tile, self.task), self.settings.class_)
        elif self.way == "instance":
            number = self.ids[self.task][tile.row.request.index].index(self.settings.instance)
            region = mask_rle.decode(tile.row.labels[self.task][number]["segmentation"])
        return regions.grown(region, self.settings.grow)

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        """Latents blended by the region: outside they are the source's at every call."""
        import torch

        from datasetdm_fast.kernels.to_device import to_device

        source, last = self.latents(engine, requests), len(schedule) - 1
        cells = np.stack([regions.cells(self.region_of(self.tile(request.index))) for request in requests])
        is_new = to_device(torch.from_numpy(cells)[:, None], source.clean.device)
        outside = source.noised(schedule.noise_step(0))
        inside = source.noise if self.settings.strength == 1 else outside

        def blended(call: int, latents: Tensor) -> Tensor:
            known = source.clean if call == last else source.noised(schedule.noise_step(call + 1))
            return torch.where(is_new, latents, known)

        return Beginning(torch.where(is_new, inside, outside), blended)

    def finish(self, sample: Sample) -> Sample:
        """The source with the region's pixels and labels of the sample that was made."""
        index = sample.request.index
        tile = self.tile(index)
        region = self.region_of(tile)
        share = regions.weights(region, self.feather)[..., None]
        old = tile.pixels["image"]
        image = np.rint(old + share * (sample.image.astype(np.float32) - old)).astype(np.uint8)
        labels = {}
        for task, found in sample.annotations.items():
            kept = self.source.label(tile, task)
            if task in self.ids:
                kept = replace(kept, ids=np.array(self.ids[task][tile.row.request.index], np.int64))
            labels[task] = kind_of(task).merged(kept, found, region)
            if task in self.ids:
                labels[task] = numbered(labels[task], self.first_new(task, index))
        facts = {"mask": regions.described(region), "feather": self.feather}
        request = replace(sample.request, classes=self._classes(sample.request, tile, labels))
        provenance = {**sample.provenance, **self.provenance(index), **facts}
        return Sample(request, image, labels, provenance)

    def first_new(self, label: str, index: int) -> int:
        """The first of the ids for instances that an image adds to a label, which no other label of the run has."""
        return self.largest + 1 + (index * len(self.ids) + list(self.ids).index(label)) * MOST_NEW

    def _classes(self, request: Request, tile: Tile, labels: Mapping[str, Annotation]) -> tuple[str, ...]:
        """The class words of the prompt, and those of the source that the labels still show."""
        tables = {task: self.source.document["labels"][task].get("classes", ()) for task in labels}

        def is_left(word: str) -> bool:
            told = [task for task, classes in tables.items() if word in classes and kind_of(task).can_mask]
            return not told or any(kind_of(task).mask_of(labels[task], word)[0].mean() >= LEAST_SHOWN for task in told)

        left = {word for word in tile.row.request.classes if is_left(word)} | set(request.classes)
        return tuple(word for word in self.source.document["plan"].get("words", ()) if word in left)


def _sure(record: Any) -> Any:
    """The record of a label without the things whose score is too low for a region, as it is for pictures."""
    return [item for item in record if item["score"] >= SHOWN_SCORE] if isinstance(record, list) else record


def numbered(label: Instances, first: int) -> Instances:
    """The instances with an id each: those that have none take the numbers from `first` on."""
    return replace(label, ids=np.where(label.ids > 0, label.ids, first + np.cumsum(label.ids == 0) - 1))
