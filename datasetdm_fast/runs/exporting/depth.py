"""nyu and kitti: images, depth as 16-bit PNG in the unit of each, and the lists that name both."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping

from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format, SampleView

SCENE = "synthetic"  # the folder of the pictures, where the originals have one for each place


class DepthFormat(Format):
    """Images and depths in two places, and lists of the pairs."""

    needs = (("depth",),)
    steps: float  # of a metre
    focal: float  # pixels, of the original's camera in the lists; no trainer reads it
    list_name: str  # of a split

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, content = sample.picture(self.forms)
        root, image, depth = self.places(sample.split, sample.name, ending, plan)
        return {f"{root[0]}{image}": content, f"{root[1]}{depth}": sample.depth_file(self.steps)}, {
            "image": image,
            "depth": depth,
        }

    @abstractmethod
    def places(self, split: str, name: str, ending: str, plan: ExportPlan) -> tuple[tuple[str, str], str, str]:
        """The folders of images and depths, and the paths inside of them of one image and its depth."""

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        return {
            self.list_name.format(published_split(split, plan)): self._lines(samples, split) for split in plan.splits
        }

    def _lines(self, samples: AllSamples, split: str) -> Iterable[bytes]:
        for entry in samples.entries(split):
            yield f"{entry['image']} {entry['depth']} {self.focal}\n".encode()


def published_split(split: str, plan: ExportPlan) -> str:
    """What the originals call a split: without one of its own for tests, that is the one to validate on."""
    return "test" if split == "val" and "test" not in plan.splits else split


class NyuFormat(DepthFormat):
    steps, focal, list_name = 1000.0, 518.8579, "{}_list.txt"

    def places(self, split: str, name: str, ending: str, plan: ExportPlan) -> tuple[tuple[str, str], str, str]:
        root = "sync" if split == "train" else f"official_splits/{published_split(split, plan)}"
        return (root, root), f"/{SCENE}/rgb_{name}.{ending}", f"/{SCENE}/sync_depth_{name}.png"

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        return {**super().shared_files(plan, samples), "nyu_class_list.json": [json.dumps([SCENE]).encode()]}


class KittiFormat(DepthFormat):
    steps, focal, list_name = 256.0, 721.5377, "kitti_eigen_{}.txt"

    def places(self, split: str, name: str, ending: str, plan: ExportPlan) -> tuple[tuple[str, str], str, str]:
        return ("input/", "gt_depth/"), f"{SCENE}/{name}.{ending}", f"{SCENE}/{name}.png"
