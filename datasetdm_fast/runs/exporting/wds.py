"""wds: tar shards for WebDataset, equal bytes for equal samples, and tables of their numbers."""

import json
from collections.abc import Iterable, Iterator, Mapping

from datasetdm_fast.runs.exporting.described import describe_sample, map_files, table_files
from datasetdm_fast.runs.exporting.format import AllSamples, Content, Entry, ExportPlan, Files, Format
from datasetdm_fast.runs.exporting.view import SampleView
from datasetdm_fast.runs.run_folder.shards import end_of, member


class WebDatasetFormat(Format):
    """A sample is NAME.png or .jpg, NAME.json, NAME.semantic.png and NAME.depth.png in the shard SPLIT-NUMBER.tar."""

    has_maps = True

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        return {}, {}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        size = plan.layout.shard
        shards = {
            f"{split}-{k:06d}.tar": _shard(plan, samples, split, k * size)
            for split, count in plan.splits.items()
            for k in range(-(-count // size))
        }
        return {**shards, **table_files(plan)}


def _shard(plan: ExportPlan, samples: AllSamples, split: str, first: int) -> Iterator[bytes]:
    size = 0
    for sample in samples.views(split, first, first + plan.layout.shard):
        ending, image = sample.picture(WebDatasetFormat.forms)
        record = json.dumps(describe_sample(sample, plan), ensure_ascii=False).encode()
        # grey, as its decoders make a palette's colours of the numbers
        labels = {f"{name}.png": content for name, content in map_files(sample, plan, has_colours=False)}
        members = {ending: image, "json": record, **labels}
        for name, content in members.items():
            data = member(f"{sample.name}.{name}", read_content(content))
            size += len(data)
            yield data
    yield end_of(size)


def read_content(content: Content) -> bytes:
    """The bytes of a file."""
    return content if isinstance(content, bytes) else content.read()


WDS = WebDatasetFormat()
