"""label-studio: images by split, tasks.json with polygons as predictions, and config.xml for the interface."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from datasetdm_fast.engine.labels.colours import colour
from datasetdm_fast.runs.exporting.classes import one_line
from datasetdm_fast.runs.exporting.coco import json_list
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.rings import editable_parts, join_rings
from datasetdm_fast.runs.exporting.view import ExportedThing, SampleView

LOCAL = "/data/local-files/?d="  # before a path below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT
NAMES = {"from_name": "label", "to_name": "image"}  # of the interface's parts, in config.xml


class LabelStudioFormat(Format):
    """A polygon for each instance, its parts joined by lines of no width; places are per cent of the sides."""

    needs = (("instance",),)

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, image = sample.picture(self.forms)
        path = f"images/{sample.split}/{sample.name}.{ending}"
        polygons = [_polygon(number, thing, sample) for number, thing in enumerate(sample.things, 1) if thing.area]
        scores = [thing.score for thing in sample.things]
        prediction = {"model_version": "datasetdm_fast", "score": min(scores, default=0.0), "result": polygons}
        data = {"image": f"{LOCAL}{path}", "id": sample.name, "prompt": sample.prompt, "split": sample.split}
        return {path: image}, {"task": {"data": data, "predictions": [prediction]}}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        tasks = (entry["task"] for split in plan.splits for entry in samples.entries(split))
        return {"tasks.json": json_list(tasks), "config.xml": _interface(plan)}


def _polygon(number: int, thing: ExportedThing, sample: SampleView) -> dict[str, Any]:
    line = join_rings(editable_parts(thing.mask)) * (100 / sample.width, 100 / sample.height)
    value = {"points": np.round(line, 6).tolist(), "closed": True, "polygonlabels": [one_line(thing.name)]}
    sides = {"original_width": sample.width, "original_height": sample.height, "image_rotation": 0}
    return {"id": f"thing{number}", "type": "polygonlabels", **NAMES, **sides, "score": thing.score, "value": value}


def _interface(plan: ExportPlan) -> Iterator[bytes]:
    yield f'<View>\n  <Image name="{NAMES["to_name"]}" value="$image"/>\n'.encode()
    yield f'  <PolygonLabels name="{NAMES["from_name"]}" toName="{NAMES["to_name"]}">\n'.encode()
    for name in plan.classes.things:
        shown = bytes(colour(plan.classes.numbers[name])).hex()
        yield f'    <Label value={quoteattr(one_line(name))} background="#{shown}"/>\n'.encode()
    yield b"  </PolygonLabels>\n</View>\n"


LABEL_STUDIO = LabelStudioFormat()
