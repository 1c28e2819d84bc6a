"""deepfashion-mm: images, segm and captions.json of DeepFashion-MultiModal, with its 24 classes."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from datasetdm_fast import _C
from datasetdm_fast.engine.labels.class_tables import builtin_table
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.view import SampleView
from datasetdm_fast.runs.run_folder.ledger import canonical

NUMBERS = {name: number for number, name in enumerate(builtin_table("deepfashion").names)}
BACKGROUND, IGNORED = 0, 255


class DeepFashionFormat(Format):
    """It has no splits: all samples are in one folder. Captions are the prompts."""

    needs = (("semantic",),)
    forms = ("jpg",)
    known = tuple(NUMBERS)
    has_maps = True

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        _, image = sample.picture(self.forms)
        translated = np.full(256, BACKGROUND, np.uint8)
        translated[IGNORED] = IGNORED
        for name, number in plan.classes.numbers.items():
            translated[number] = NUMBERS.get(name, BACKGROUND)
        files: Files = {
            f"images/{sample.name}.jpg": image,
            f"segm/{sample.name}_segm.png": _C.png_encode(translated[sample.semantic]),
        }
        return files, {"name": f"{sample.name}.jpg", "prompt": sample.prompt}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        return {"captions.json": self._captions(plan, samples)}

    def _captions(self, plan: ExportPlan, samples: AllSamples) -> Iterator[bytes]:
        start = "{"
        for split in plan.splits:
            for entry in samples.entries(split):
                yield f"{start}\n{canonical(entry['name'])}: {canonical(entry['prompt'])}".encode()
                start = ","
        yield b"\n}\n"
