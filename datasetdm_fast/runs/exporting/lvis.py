"""lvis: lvis_v1_SPLIT.json over the images of SPLIT2017, which their coco_url names."""

from collections.abc import Iterable, Iterator, Mapping

from datasetdm_fast.runs.exporting.coco import (
    YEAR,
    categories,
    image_entry,
    info,
    json_document,
    number_annotations,
    thing_entry,
)
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.view import SampleView

RARE, COMMON = 10, 100  # images up to which LVIS calls a class rare, and common


class LvisFormat(Format):
    """Every class is searched in every image: a class that an image does not show is known to be absent.

    Its polygons are polygons alone, as detectron2 reads no others.
    """

    needs = (("instance",),)

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, content = sample.picture(self.forms)
        name = f"{sample.split}{YEAR}/{sample.name}.{ending}"
        things = [thing_entry(thing, plan, joins_holes=True) for thing in sample.things]
        shown = {thing["category_id"] for thing in things}
        absent = [plan.classes.numbers[name] for name in plan.classes.things]
        image = image_entry(sample, f"{sample.name}.{ending}") | {
            "coco_url": f"http://images.cocodataset.org/{name}",
            "neg_category_ids": [number for number in absent if number not in shown],
            "not_exhaustive_category_ids": [],
        }
        return {name: content}, {"image": image, "instances": things}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        return {f"lvis_v1_{split}.json": _annotations(plan, samples, split) for split in plan.splits}


def _annotations(plan: ExportPlan, samples: AllSamples, split: str) -> Iterator[bytes]:
    images = dict.fromkeys((plan.classes.numbers[name] for name in plan.classes.things), 0)
    things = dict(images)
    for entry in samples.entries(split):
        kinds = [thing["category_id"] for thing in entry["instances"]]
        for kind in set(kinds):
            images[kind] += 1
        for kind in kinds:
            things[kind] += 1
    known = [
        category
        | {
            "synset": f"{category['name']}.n.01",
            "synonyms": [category["name"]],
            "def": "",
            "image_count": images[category["id"]],
            "instance_count": things[category["id"]],
            "frequency": "r" if images[category["id"]] <= RARE else "c" if images[category["id"]] <= COMMON else "f",
        }
        for category in categories(plan, plan.classes.things)
    ]
    fields = {"info": info(), "licenses": [], "categories": known}
    all_images = (entry["image"] for entry in samples.entries(split))
    yield from json_document(
        fields, images=all_images, annotations=number_annotations(plan, samples, "instances", split)
    )


LVIS = LvisFormat()
