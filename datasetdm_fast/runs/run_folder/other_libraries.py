"""A run folder as the data set of another library, where that is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from datasetdm_fast.data import Instances, Keypoints
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.kind import Table
from datasetdm_fast.engine.labels.names import task_of_label
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.ledger import Row

Tables = Mapping[str, Table]  # of each label of a run, as run.json has them


class ReadSample(Protocol):
    """A sample of a run folder, as far as other libraries are told of it."""

    @property
    def row(self) -> Row: ...
    @property
    def folder(self) -> Path: ...
    @property
    def image(self) -> np.ndarray: ...
    def label(self, task: str, /) -> Any: ...


def supervision_dataset(samples: Iterable[ReadSample], tables: Tables) -> Any:
    """supervision's DetectionDataset of the first label of instances; class ids are places in its `classes`."""
    try:
        import supervision
    except ImportError as error:
        raise Missing(
            "to_supervision: supervision is not installed", "Install it with: pip install supervision"
        ) from error
    label = next((one for one in tables if task_of_label(one) == "instance"), None)
    if label is None:
        raise Refused(f"to_supervision: no instances, the run has {', '.join(tables)}", "Make a run with instances.")
    found = {}
    for sample in samples:
        things = sample.label(label)
        found[image_path(sample)] = (
            supervision.Detections(
                xyxy=boxes(label, things, tables),
                mask=np.asarray(things.masks, bool),
                confidence=np.asarray(things.scores, np.float32),
                class_id=np.asarray(things.class_ids, np.int64),
            )
            if len(things.masks)
            else supervision.Detections.empty()
        )
    classes = list(tables[label]["classes"])
    return supervision.DetectionDataset(classes=classes, images=list(found), annotations=found)


def fiftyone_dataset(samples: Iterable[ReadSample], tables: Tables, name: str | None = None) -> Any:
    """FiftyOne's Dataset, which names the files of the run and copies none: instances as detections with masks, maps of
    classes as segmentations, depth as a heat map, joints as keypoints.
    """
    try:
        import fiftyone
    except ImportError as error:
        raise Missing("to_fiftyone: fiftyone is not installed", "Install it with: pip install fiftyone") from error
    data = fiftyone.Dataset(name)
    data.add_samples([fiftyone_sample(fiftyone, sample, tables) for sample in samples])
    return data


def fiftyone_sample(fiftyone: Any, sample: ReadSample, tables: Tables) -> Any:
    """A sample with its prompt, seed and labels; each label is a field that bears its name."""
    request = sample.row.request
    made = fiftyone.Sample(filepath=image_path(sample), prompt=request.prompt, seed=request.seed, sample_id=request.id)
    files = {role: str((sample.folder / name).absolute()) for role, (name, _) in sample.row.files.items()}
    for task in tables:
        label, field, kind = sample.label(task), task.replace(":", "_").replace("-", "_"), task_of_label(task)
        if kind == "instance":
            made[field] = fiftyone.Detections(detections=list(detections(fiftyone, label, boxes(task, label, tables))))
        elif kind == "depth":
            made[field] = fiftyone.Heatmap(map=label.metres, range=[0.0, label.max_depth])
        elif kind == "pose":
            made[field] = fiftyone.Keypoints(keypoints=list(people(fiftyone, label, sample.image.shape)))
        else:
            made[field] = fiftyone.Segmentation(mask_path=files[kind_of(task).roles[0]])
    return made


def detections(fiftyone: Any, things: Instances, places: np.ndarray) -> Iterator[Any]:
    """Each instance with its box in shares of the sides and its mask inside the box."""
    for mask, kind, score, (left, top, right, bottom) in zip(
        things.masks, things.class_ids, things.scores, places.astype(int), strict=True
    ):
        height, width = mask.shape
        share = [left / width, top / height, (right - left) / width, (bottom - top) / height]
        inside = np.asarray(mask[top:bottom, left:right], bool)
        yield fiftyone.Detection(label=things.classes[kind], bounding_box=share, mask=inside, confidence=float(score))


def people(fiftyone: Any, joints: Keypoints, shape: tuple[int, ...]) -> Iterator[Any]:
    """The joints of each person in shares of the sides; those that are not in the picture are no numbers."""
    height, width = shape[:2]
    for points, seen, score in zip(joints.points, joints.visibility, joints.scores, strict=True):
        places = np.where(seen[:, None] > 0, points[:, :2] / [width, height], np.nan)
        yield fiftyone.Keypoint(
            label="person", points=[tuple(map(float, place)) for place in places], confidence=[float(score)] * len(seen)
        )


def boxes(label: str, things: Instances, tables: Tables) -> np.ndarray:
    """The boxes [N, 4] float32 of instances: left, top, right and bottom, the latter two behind the last pixel."""
    return kind_of(label).arrays(things, tables[label])["boxes"]


def image_path(sample: ReadSample) -> str:
    return str(Path(sample.folder / sample.row.files["image"][0]).absolute())
