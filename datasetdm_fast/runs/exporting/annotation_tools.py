"""label-studio, cvat and labelme: images by split, and instances as polygons that a person can correct."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from datasetdm_fast.engine.labels import mask_rle
from datasetdm_fast.engine.labels.class_tables import colour
from datasetdm_fast.runs.exporting.classes import one_line
from datasetdm_fast.runs.exporting.coco import json_list
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportedThing, ExportPlan, Files, Format, SampleView
from datasetdm_fast.runs.exporting.rings import editable_parts, join_rings

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


class CvatFormat(Format):
    """An instance of one part is a polygon, others are masks; the higher its score, the higher its z_order."""

    needs = (("instance",),)

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, image = sample.picture(self.forms)
        name = f"{sample.name}.{ending}"
        sides = f'width="{sample.width}" height="{sample.height}"'
        order = np.argsort(np.argsort([thing.score for thing in sample.things], kind="stable"), kind="stable").tolist()
        shapes = "".join(
            _cvat_shape(thing, place) for thing, place in zip(sample.things, order, strict=True) if thing.area
        )
        entry = f'  <image id="{sample.number}" name="{name}" {sides}>\n{shapes}  </image>\n'
        return {f"{sample.split}/images/{name}": image}, {"image": entry}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        numbers = plan.classes.numbers
        labels = [
            {"name": one_line(name), "color": f"#{bytes(colour(numbers[name])).hex()}", "attributes": []}
            for name in plan.classes.things
        ]
        annotations = {f"{split}/annotations.xml": _cvat_annotations(plan, samples, split) for split in plan.splits}
        return {**annotations, "labels.json": [json.dumps(labels, ensure_ascii=False).encode()]}


def _cvat_annotations(plan: ExportPlan, samples: AllSamples, split: str) -> Iterator[bytes]:
    yield b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta><task><labels>\n'
    for name in plan.classes.things:
        yield f"    <label><name>{escape(one_line(name))}</name><attributes></attributes></label>\n".encode()
    yield b"  </labels></task></meta>\n"
    for entry in samples.entries(split):
        yield entry["image"].encode()
    yield b"</annotations>\n"


def _cvat_shape(thing: ExportedThing, order: int) -> str:
    parts = editable_parts(thing.mask)
    facts = f'label={quoteattr(one_line(thing.name))} source="auto" occluded="0" z_order="{order}"'
    if len(parts) == 1:
        points = ";".join(f"{x:g},{y:g}" for x, y in parts[0].tolist())
        return f'    <polygon {facts} points="{points}"></polygon>\n'
    left, top, width, height = map(int, thing.box)
    rows = thing.mask[top : top + height, left : left + width]
    runs = mask_rle.run_lengths(mask_rle.encode(rows.T[None]).rles[0]).tolist()  # row by row
    box = f'left="{left}" top="{top}" width="{width}" height="{height}"'
    return f'    <mask {facts} rle="{", ".join(map(str, runs))}" {box}></mask>\n'


VERSION = "5.5.0"  # of labelme, whose files have had this form since


class LabelMeFormat(Format):
    """A polygon for each part of an instance; parts of one instance have its number as group_id."""

    needs = (("instance",),)

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, image = sample.picture(self.forms)
        document = {
            "version": VERSION,
            "flags": {},
            "shapes": list(_labelme_shapes(sample)),
            "imagePath": f"{sample.name}.{ending}",
            "imageData": None,
            "imageHeight": sample.height,
            "imageWidth": sample.width,
        }
        content = json.dumps(document, ensure_ascii=False, indent=1).encode()
        return {f"{sample.split}/{sample.name}.{ending}": image, f"{sample.split}/{sample.name}.json": content}, {}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        return {"labels.txt": [f"{one_line(name)}\n".encode() for name in plan.classes.things]}


def _labelme_shapes(sample: SampleView) -> Iterator[dict[str, Any]]:
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
