"""mmseg: images and label maps by split, and dataset.py, the part of a config that names them."""

from collections.abc import Iterable, Mapping
from pprint import pformat

from datasetdm_fast import _C
from datasetdm_fast.engine.labels.class_tables import PALETTE, colour
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format, SampleView

WIDTH = 120
NOTE = "For an mmsegmentation config: add metainfo, data_root and a pipeline to the dataset of each dataloader."


class MmsegFormat(Format):
    """Class numbers of the export, 0 = background, 255 = to be ignored."""

    needs = (("semantic",),)
    has_maps = True

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, image = sample.picture(self.forms)
        labels = _C.png_encode(sample.semantic, PALETTE)
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
        colours = [list(colour(k)) for k in range(len(names))]
        values = {"metainfo": {"classes": names, "palette": colours}, "num_classes": len(names), "datasets": loaders}
        lines = [f"{name} = {pformat(value, width=WIDTH, sort_dicts=False)}\n" for name, value in values.items()]
        yield f"# {NOTE}\n{''.join(lines)}".encode()
