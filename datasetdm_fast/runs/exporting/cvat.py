"""cvat: images and annotations.xml by split, as "CVAT for images 1.1", and labels.json for a task's labels."""

import json
from collections.abc import Iterable, Iterator, Mapping
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from datasetdm_fast.engine.labels.colours import colour
from datasetdm_fast.runs.exporting.classes import one_line
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.rings import editable_parts
from datasetdm_fast.runs.exporting.view import ExportedThing, SampleView


class CvatFormat(Format):
    """An instance of one part is a polygon, others are masks; the higher its score, the higher its z_order."""

    needs = (("instance",),)

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, image = sample.picture(self.forms)
        name = f"{sample.name}.{ending}"
        sides = f'width="{sample.width}" height="{sample.height}"'
        order = np.argsort(np.argsort([thing.score for thing in sample.things], kind="stable"), kind="stable").tolist()
        shapes = "".join(_shape(thing, place) for thing, place in zip(sample.things, order, strict=True) if thing.area)
        entry = f'  <image id="{sample.number}" name="{name}" {sides}>\n{shapes}  </image>\n'
        return {f"{sample.split}/images/{name}": image}, {"image": entry}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        numbers = plan.classes.numbers
        labels = [
            {"name": one_line(name), "color": f"#{bytes(colour(numbers[name])).hex()}", "attributes": []}
            for name in plan.classes.things
        ]
        annotations = {f"{split}/annotations.xml": _annotations(plan, samples, split) for split in plan.splits}
        return {**annotations, "labels.json": [json.dumps(labels, ensure_ascii=False).encode()]}


def _annotations(plan: ExportPlan, samples: AllSamples, split: str) -> Iterator[bytes]:
    yield b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta><task><labels>\n'
    for name in plan.classes.things:
        yield f"    <label><name>{escape(one_line(name))}</name><attributes></attributes></label>\n".encode()
    yield b"  </labels></task></meta>\n"
    for entry in samples.entries(split):
        yield entry["image"].encode()
    yield b"</annotations>\n"


def _shape(thing: ExportedThing, order: int) -> str:
    parts = editable_parts(thing.mask)
    facts = f'label={quoteattr(one_line(thing.name))} source="auto" occluded="0" z_order="{order}"'
    if len(parts) == 1:
        points = ";".join(f"{x:g},{y:g}" for x, y in parts[0].tolist())
        return f'    <polygon {facts} points="{points}"></polygon>\n'
    left, top, width, height = map(int, thing.box)
    runs = _row_runs(thing.mask[top : top + height, left : left + width])
    box = f'left="{left}" top="{top}" width="{width}" height="{height}"'
    return f'    <mask {facts} rle="{", ".join(map(str, runs))}" {box}></mask>\n'


def _row_runs(mask: np.ndarray) -> list[int]:
    """Run lengths row by row, the first of pixels outside of the mask."""
    flat = mask.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes.tolist(), len(flat)]).tolist()
    return [0, *runs] if flat[0] else runs


CVAT = CvatFormat()
