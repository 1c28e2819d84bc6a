"""yolo-detect, yolo-seg and yolo-pose: images and labels by split, and data.yaml; places are shares of the sides."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from datasetdm_fast.engine.labels.class_tables import mirrored_names
from datasetdm_fast.engine.labels.pose import TO_EDGE
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format, SampleView
from datasetdm_fast.runs.exporting.rings import group_parts, join_rings, rings

DIGITS = 10  # of a share


class YoloFormat(Format):
    """A class is its place among those that have instances, from 0 on; an image without labels has an empty file."""

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        ending, image = sample.picture(self.forms)
        lines = "".join(f"{line}\n" for line in self.lines(sample, plan))
        files: Files = {
            f"images/{sample.split}/{sample.name}.{ending}": image,
            f"labels/{sample.split}/{sample.name}.txt": lines.encode(),
        }
        return files, {}

    @abstractmethod
    def lines(self, sample: SampleView, plan: ExportPlan) -> Iterator[str]:
        """The lines of a sample's labels."""

    def names(self, plan: ExportPlan) -> Sequence[str]:
        """The classes by their place."""
        return plan.classes.things

    def fields(self, plan: ExportPlan) -> dict[str, object]:
        """Fields of data.yaml beside paths and names."""
        return {}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        import yaml

        places = {split: f"images/{split}" for split in plan.splits}
        first = next(iter(places.values()))  # also to validate on where no split is for it, as trainers want one
        names = dict(enumerate(self.names(plan)))
        document = {"train": first, "val": first} | places | {"nc": len(names)} | self.fields(plan) | {"names": names}
        return {"data.yaml": [yaml.safe_dump(document, allow_unicode=True, sort_keys=False).encode()]}


class YoloDetect(YoloFormat):
    needs = (("instance",),)

    def lines(self, sample: SampleView, plan: ExportPlan) -> Iterator[str]:
        for thing in sample.things:
            kind = plan.classes.things.index(thing.name)
            yield f"{kind} {' '.join(_box(thing.box, sample))}"


class YoloSegment(YoloFormat):
    needs = (("instance",),)

    def lines(self, sample: SampleView, plan: ExportPlan) -> Iterator[str]:
        """A closed line for an instance, holes and parts joined by lines of no width, or one for each part."""
        sides = np.array([sample.width, sample.height])
        for thing in sample.things:
            kind, outline = plan.classes.things.index(thing.name), rings(thing.mask)
            if outline:
                groups = [outline] if plan.layout.parts == "joined" else group_parts(outline)
                yield from (f"{kind} {' '.join(map(_share, (join_rings(group) / sides).ravel()))}" for group in groups)


class YoloPose(YoloFormat):
    needs = (("pose",),)

    def lines(self, sample: SampleView, plan: ExportPlan) -> Iterator[str]:
        for person in sample.people:
            joints = []
            for x, y, visibility in person.joints.tolist():
                x, y = ((x + TO_EDGE) / sample.width, (y + TO_EDGE) / sample.height) if visibility else (0.0, 0.0)
                joints += [_share(min(max(x, 0.0), 1.0)), _share(min(max(y, 0.0), 1.0)), f"{visibility:.0f}"]
            yield f"0 {' '.join([*_box(person.box, sample), *joints])}"

    def names(self, plan: ExportPlan) -> Sequence[str]:
        return plan.people

    def fields(self, plan: ExportPlan) -> dict[str, object]:
        return {"kpt_shape": [len(plan.joints), 3], "flip_idx": mirrored_names(plan.joints)}


def _box(box: Sequence[float], sample: SampleView) -> list[str]:
    """Middle and sides of a box, cut to the picture."""
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    left, right = (min(max(x, 0), sample.width) / sample.width for x in (left, right))
    top, bottom = (min(max(y, 0), sample.height) / sample.height for y in (top, bottom))
    return list(map(_share, ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)))


def _share(value: float) -> str:
    return f"{value:.{DIGITS}f}".rstrip("0").rstrip(".") or "0"
