"""wds: tar shards for WebDataset; and a sample as a JSON object with maps as files, for formats without a layout, with
what the library `datasets` has to know of its columns.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from datasetdm_fast import _C
from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.depth import UNITS, unit_of
from datasetdm_fast.engine.labels.label_files import index_png
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.exporting.format import AllSamples, Content, Entry, ExportPlan, Files, Format, SampleView
from datasetdm_fast.runs.run_folder.shards import write_tar

Column = str | tuple[str, ...] | list["Column"] | dict[str, "Column"]  # a type, names of classes, a list, named parts
README = "README.md"
MAPS = ("semantic", "depth")


def describe_sample(sample: SampleView, plan: ExportPlan) -> dict[str, Any]:
    """Prompt, seed and the labels that are no maps; classes are the numbers of the export."""
    numbers = plan.classes.numbers
    record: dict[str, Any] = {
        "id": sample.name,
        "prompt": sample.prompt,
        "seed": sample.stored.seed,
        "width": sample.width,
        "height": sample.height,
    }
    if "instance" in plan.tasks:
        record["objects"] = {
            "category": [numbers[thing.name] for thing in sample.things],
            "bbox": [list(map(float, thing.box)) for thing in sample.things],
            "area": [thing.area for thing in sample.things],
            "score": [thing.score for thing in sample.things],
            "rle": [thing.rle["counts"] for thing in sample.things],
        }
    if "pose" in plan.tasks:
        record["people"] = {
            "bbox": [list(map(float, person.box)) for person in sample.people],
            "area": [round(float(person.area), 3) for person in sample.people],
            "score": [person.score for person in sample.people],
            "keypoints": [person.joints.ravel().tolist() for person in sample.people],
        }
    return record


def describe_columns(plan: ExportPlan) -> dict[str, Column]:
    """The types of what `describe_sample` returns, by the names that `datasets` has for them."""
    columns: dict[str, Column] = {
        "id": "string",
        "prompt": "string",
        "seed": "int64",
        "width": "int32",
        "height": "int32",
    }
    boxes: dict[str, Column] = {"bbox": [["float64"]]}
    if "instance" in plan.tasks:
        names = ("background", *plan.classes.names)
        columns["objects"] = {"category": [names], **boxes, "area": ["int64"], "score": ["float64"], "rle": ["string"]}
    if "pose" in plan.tasks:
        columns["people"] = {**boxes, "area": ["float64"], "score": ["float64"], "keypoints": [["float64"]]}
    return columns


def name_split(split: str) -> str:
    """A split as `datasets` calls it, where no name has a hyphen."""
    return "validation" if split == "val" else split.replace("-", "_")


def check_splits(name: str, plan: ExportPlan) -> None:
    """Refuses two splits of which `datasets` has one name."""
    splits: dict[str, str] = {}
    for split in plan.splits:
        if (other := splits.setdefault(called := name_split(split), split)) != split:
            raise Refused(
                f"--to {name}: the splits {other} and {split} would both be {called} for the library datasets",
                "Split the run anew with other --names.",
            )


def describe_features(columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Columns as the head of a README.md lists them."""
    return [{"name": name, **_describe_feature(column)} for name, column in columns.items()]


def _describe_feature(column: Column) -> dict[str, Any]:
    if isinstance(column, str):
        return {"dtype": column}
    if isinstance(column, tuple):
        return {"dtype": {"class_label": {"names": {str(number): name for number, name in enumerate(column)}}}}
    if isinstance(column, list):
        return {"list": _describe_feature(column[0])}
    return {"struct": describe_features(column)}


def map_files(sample: SampleView, plan: ExportPlan, *, has_colours: bool) -> Iterator[tuple[str, Content]]:
    """Name and PNG of each map: class numbers of the export, with a palette or grey, and depth in the table's unit."""
    if "semantic" in plan.tasks:
        yield "semantic", index_png(sample.semantic) if has_colours else _C.png_encode(sample.semantic)
    if "depth" in plan.tasks:
        yield "depth", sample.depth_file(UNITS[unit_of(plan.max_depth)])


def table_files(plan: ExportPlan) -> dict[str, list[bytes]]:
    """Files that define the numbers, by name."""
    names = {str(number): name for name, number in plan.classes.numbers.items()}
    id2label = {"0": "background", **names}
    table: dict[str, Any] = {"id2label": id2label}
    if "instance" in plan.tasks:
        table["things"] = list(plan.classes.things)
    if "semantic" in plan.tasks:
        table["ignore"] = IGNORE
    if "depth" in plan.tasks:
        table |= {"depth_steps_of_a_metre": UNITS[unit_of(plan.max_depth)], "max_depth": plan.max_depth}
    if "pose" in plan.tasks:
        table |= {"joints": list(plan.joints), "limbs": [list(limb) for limb in plan.limbs]}
    files = {"classes.json": table, "id2label.json": id2label}
    written = {name: [json.dumps(value, ensure_ascii=False).encode()] for name, value in files.items()}
    if "depth" in plan.tasks:
        written["max_depth.txt"] = [f"{plan.max_depth:g}\n".encode()]
    return written


class WebDatasetFormat(Format):
    """A sample is NAME.png or .jpg, NAME.json, NAME.semantic.png and NAME.depth.png in the shard SPLIT-NUMBER.tar."""

    has_maps = True

    def check(self, name: str, plan: ExportPlan) -> None:
        super().check(name, plan)
        check_splits(name, plan)

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        return {}, {}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        size = plan.layout.shard
        shards = {
            f"{split}-{k:06d}.tar": write_tar(_files(plan, samples, split, k * size))
            for split, count in plan.splits.items()
            for k in range(-(-count // size))
        }
        return {**shards, **table_files(plan), README: self._describe(plan, samples)}

    def _describe(self, plan: ExportPlan, samples: AllSamples) -> Iterator[bytes]:
        """README.md, of which `load_dataset` reads the head. Without the digest it would take what it has cached of
        another export for this one, as it goes by the name of the folder and by the head.
        """
        first = next(samples.views(next(iter(plan.splits)), 0, 1))
        pictures = [first.picture(self.forms)[0], *(f"{name}.png" for name in MAPS if name in plan.tasks)]
        columns: dict[str, Column] = {**dict.fromkeys(pictures, "image"), "json": describe_columns(plan)}
        features = describe_features({**columns, "__key__": "string", "__url__": "string"})
        files = [{"split": name_split(split), "path": f"{split}-{6 * '[0-9]'}.tar"} for split in plan.splits]
        config = {"config_name": "default", "description": f"SHA-256 {plan.digest}", "data_files": files}
        head = {"configs": [config], "dataset_info": {"features": features}}
        text = "`load_dataset` of the library `datasets` reads this folder by the files and types above."
        yield f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{text}\n".encode()


def _files(plan: ExportPlan, samples: AllSamples, split: str, first: int) -> Iterator[tuple[str, bytes]]:
    for sample in samples.views(split, first, first + plan.layout.shard):
        ending, image = sample.picture(WebDatasetFormat.forms)
        record = json.dumps(describe_sample(sample, plan), ensure_ascii=False).encode()
        # grey, as its decoders make a palette's colours of the numbers
        labels = {f"{name}.png": content for name, content in map_files(sample, plan, has_colours=False)}
        for name, content in {ending: image, "json": record, **labels}.items():
            yield f"{sample.name}.{name}", read_content(content)


def read_content(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read()
