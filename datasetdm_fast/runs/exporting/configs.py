"""mmseg, mask2former, simcc, depthformer: a layout that these trainers read, and the part of a config that names it."""

from collections.abc import Iterable, Mapping
from pprint import pformat
from typing import Any

from datasetdm_fast import _C
from datasetdm_fast.engine.labels.class_tables import colour, palette
from datasetdm_fast.engine.labels.words import mirrored_names
from datasetdm_fast.runs.exporting.coco import YEAR, CocoFormat
from datasetdm_fast.runs.exporting.depth import NyuFormat, lines, published_split
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.view import SampleView

SIGMA = 0.05  # of a joint, default for joints whose annotation error is unknown
WIDTH = 120


def python(note: str, **values: Any) -> list[bytes]:
    """A Python file of constants, names included as literals."""
    lines = [f"{name} = {pformat(value, width=WIDTH, sort_dicts=False)}\n" for name, value in values.items()]
    return [f"# {note}\n{''.join(lines)}".encode()]


class MmsegFormat(Format):
    """Class numbers of the export, 0 = background, 255 = to be ignored."""

    needs = (("semantic",),)
    has_maps = True

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, image = sample.picture(self.forms)
        labels = _C.png_encode(sample.semantic, palette())
        files: Files = {
            f"images/{sample.split}/{sample.name}.{ending}": image,
            f"annotations/{sample.split}/{sample.name}.png": labels,
        }
        return files, {"ending": ending}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        return {"dataset.py": self._config(plan, samples)}

    def _config(self, plan: ExportPlan, samples: AllSamples) -> Iterable[bytes]:
        names = ("background", *plan.classes.names)
        loaders = {
            split: {
                "type": "BaseSegDataset",
                "data_prefix": {"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"},
                "img_suffix": f".{next(iter(samples.entries(split)))['ending']}",
                "seg_map_suffix": ".png",
                "reduce_zero_label": False,
            }
            for split in plan.splits
        }
        yield from python(
            "For an mmsegmentation config: add metainfo, data_root and a pipeline to the dataset of each dataloader.",
            metainfo={"classes": names, "palette": [list(colour(k)) for k in range(len(names))]},
            num_classes=len(names),
            datasets=loaders,
        )


class Mask2FormerFormat(CocoFormat):
    """COCO's panoptic, instance and stuff files."""

    needs = (("instance", "semantic"),)

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        numbers = plan.classes.numbers
        things = [numbers[name] for name in plan.classes.things]
        files = {
            split: {
                "images": f"images/{split}{YEAR}",
                "instances": f"annotations/instances_{split}{YEAR}.json",
                "panoptic": f"annotations/panoptic_{split}{YEAR}.json",
                "panoptic_images": f"annotations/panoptic_{split}{YEAR}",
            }
            for split in plan.splits
        }
        config = python(
            "For Mask2Former: ids are those of the files; segment 0 is none: transformers' ignore_index=0.",
            id2label={number: name for name, number in numbers.items()},
            thing_ids=things,
            stuff_ids=[numbers[name] for name in plan.classes.stuff],
            contiguous_ids={number: k for k, number in enumerate(numbers.values())},
            files=files,
        )
        return {**super().shared_files(plan, samples), "dataset.py": config}


class SimccFormat(CocoFormat):
    """COCO's keypoints."""

    needs = (("pose",),)

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        swapped = mirrored_names(plan.joints)
        joints = {
            k: {
                "name": name,
                "id": k,
                "color": list(colour(k)),
                "type": "",
                "swap": plan.joints[swapped[k]] if swapped[k] != k else "",
            }
            for k, name in enumerate(plan.joints)
        }
        limbs = {
            k: {"link": (plan.joints[a], plan.joints[b]), "id": k, "color": list(colour(k))}
            for k, (a, b) in enumerate(plan.limbs)
        }
        loaders = {
            split: {
                "type": "CocoDataset",
                "data_mode": "topdown",
                "ann_file": f"annotations/person_keypoints_{split}{YEAR}.json",
                "data_prefix": {"img": f"images/{split}{YEAR}/"},
            }
            for split in plan.splits
        }
        config = python(
            "For an mmpose config (SimCC): add metainfo, data_root and a pipeline to the dataset of each dataloader.",
            metainfo={
                "dataset_name": "datasetdm_fast",
                "keypoint_info": joints,
                "skeleton_info": limbs,
                "joint_weights": [1.0] * len(joints),
                "sigmas": [SIGMA] * len(joints),
            },
            datasets=loaders,
        )
        return {**super().shared_files(plan, samples), "dataset.py": config}


class DepthFormerFormat(NyuFormat):
    """NYU Depth v2's layout, with the lists of this toolbox, which has one folder for all splits, beside its own."""

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        loaders = {
            split: {
                "type": "NYUDataset",
                "depth_scale": int(self.steps),
                "split": f"nyu_{published_split(split, plan)}.txt",
                "eigen_crop": False,
                "min_depth": 1e-3,
                "max_depth": plan.max_depth,
            }
            for split in plan.splits
        }
        config = python(
            "For a config of the Monocular-Depth-Estimation-Toolbox: add data_root and a pipeline to each.",
            datasets=loaders,
        )
        lists = {loaders[split]["split"]: lines(samples, split, "nyu", self.root(split, plan)) for split in plan.splits}
        return {**super().shared_files(plan, samples), **lists, "dataset.py": config}
