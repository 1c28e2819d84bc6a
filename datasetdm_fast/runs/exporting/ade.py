"""ade: images and annotations of SceneParsing by split, with objectInfo150.txt."""

from collections.abc import Iterable, Iterator, Mapping

from datasetdm_fast import _C
from datasetdm_fast.engine.labels.semantic import count_pixels
from datasetdm_fast.runs.exporting.classes import IGNORED, one_line
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.view import SampleView

FOLDERS = {"train": "training", "val": "validation", "test": "testing"}


class AdeFormat(Format):
    """Classes are counted from 1; 0 stands for other and unknown pixels, which trainers ignore."""

    needs = (("semantic",),)
    forms = ("jpg",)
    has_maps = True

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        _, image = sample.picture(self.forms)
        labels = sample.semantic.copy()
        labels[labels == IGNORED] = 0
        name = f"{FOLDERS.get(sample.split, sample.split)}/ADE_{sample.split}_{sample.name}"
        files: Files = {f"images/{name}.jpg": image, f"annotations/{name}.png": _C.png_encode(labels)}
        return files, {"counts": count_pixels(labels)}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        return {"objectInfo150.txt": _classes(plan, samples)}


def _classes(plan: ExportPlan, samples: AllSamples) -> Iterator[bytes]:
    """Number, share of the pixels, images for training and validation, and name of each class."""
    pixels: dict[int, int] = {}
    images: dict[tuple[int, bool], int] = {}
    for split in plan.splits:
        for entry in samples.entries(split):
            for number, count in entry["counts"].items():
                pixels[int(number)] = pixels.get(int(number), 0) + count
                key = int(number), split == "train"
                images[key] = images.get(key, 0) + 1
    total = sum(pixels.values())
    yield b"Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    for name, number in plan.classes.numbers.items():
        counts = (images.get((number, is_train), 0) for is_train in (True, False))
        stuff = int(name in plan.classes.stuff)
        cells = [number, f"{pixels.get(number, 0) / total:.4f}", *counts, stuff, one_line(name)]
        yield ("\t".join(map(str, cells)) + "\n").encode()
