"""A sample's image and labels as files and records, and back; the bytes depend on the sample alone."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.data import Annotation, Sample
from datasetdm_fast.engine.labels import LABEL_KINDS, kind_of
from datasetdm_fast.engine.labels.image_files import image_bytes
from datasetdm_fast.engine.labels.kind import Table
from datasetdm_fast.engine.labels.names import task_of_label
from datasetdm_fast.untrusted import images

Files = dict[str, tuple[str, bytes]]  # role -> path inside the run folder, content


def encode(
    sample: Sample, image_format: str, tables: Mapping[str, Table], folder: str = ""
) -> tuple[Files, dict[str, Any]]:
    """The files of a sample, below a `folder/` of the run folder, and its records by task; `tables` are those of
    run.json.
    """
    id = sample.request.id
    files: Files = {"image": (f"{folder}images/{id}.{image_format}", image_bytes(sample.image, image_format))}
    records = {}
    for task, annotation in sorted(sample.annotations.items()):
        contents, records[task] = LABEL_KINDS.guard(
            task_of_label(task),
            partial(kind_of(task).encode, annotation, sample.annotations, tables[task]),
            "cannot store a label",
        )
        files |= {role: (f"{folder}{role}/{id}.png", content) for role, content in contents.items()}
    return files, records


def decode(task: str, folder: Path, files: Mapping[str, str], record: Any, table: Mapping[str, Any]) -> Annotation:
    """The label of one task; `files` maps roles to paths inside `folder`, `table` names classes, joints and ranges."""
    kind = kind_of(task)
    label: Annotation = kind.decode(
        {role: np.array(images.read_image(folder / files[role])) for role in kind.files(table)}, record, table
    )
    return label
