"""labelme: a JSON file beside each picture by split, as the program labelme writes and opens them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasetdm_fast.runs.exporting.classes import one_line
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.rings import editable_parts
from datasetdm_fast.runs.exporting.view import SampleView

VERSION = "5.5.0"  # of labelme, whose files have had this form since


class LabelMeFormat(Format):
    """A polygon for each part of an instance; parts of one instance have its number as group_id."""

    needs = (("instance",),)

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, image = sample.picture(self.forms)
        document = {
            "version": VERSION,
            "flags": {},
            "shapes": list(_shapes(sample)),
            "imagePath": f"{sample.name}.{ending}",
            "imageData": None,
            "imageHeight": sample.height,
            "imageWidth": sample.width,
        }
        content = json.dumps(document, ensure_ascii=False, indent=1).encode()
        return {f"{sample.split}/{sample.name}.{ending}": image, f"{sample.split}/{sample.name}.json": content}, {}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        return {"labels.txt": [f"{one_line(name)}\n".encode() for name in plan.classes.things]}


def _shapes(sample: SampleView) -> Iterator[dict[str, Any]]:
    for number, thing in enumerate(sample.things, 1):
        parts = editable_parts(thing.mask)
        for part in parts:
            yield {
                "label": one_line(thing.name),
                "points": part.tolist(),
                "group_id": number if len(parts) > 1 else None,
                "description": f"score {thing.score:g}",
                "shape_type": "polygon",
                "flags": {},
            }


LABELME = LabelMeFormat()
