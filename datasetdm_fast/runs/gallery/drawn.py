"""Pictures and outlines of labels that the gallery shows, made with their samples or, where they are missing, later."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import LABEL_KINDS, kind_of
from datasetdm_fast.engine.labels.image_files import picture_bytes
from datasetdm_fast.engine.labels.kind import GalleryLayer
from datasetdm_fast.engine.labels.label_files import Files
from datasetdm_fast.engine.labels.names import own_stem
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.document import ASIDE
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, Ledger, Row
from datasetdm_fast.untrusted import images

BLOCK = 64  # pictures published at once


def pictures(files: Files) -> Iterator[tuple[str, bytes]]:
    """The pictures the gallery shows of a sample's files, each with its path inside the run folder."""
    for role, (name, content) in files.items():
        if drawn_layer(role):
            yield f"gallery/{name.removeprefix(ASIDE)}", picture_of(role, content)


def tracings(records: Mapping[str, Any]) -> dict[str, Any]:
    """What the page draws of a sample's labels and would take long to find for all samples at once, by layer."""
    return {
        layer.name: layer.trace(records[task])
        for task in records
        for layer in kind_of(task).layers
        if layer.trace and records[task]
    }


def traced(layer: GalleryLayer, row: Row, task: str) -> Any:
    """What was traced when the sample was written; by earlier versions nothing was."""
    if layer.trace is None or not row.labels[task]:
        return []
    return row.tracings[layer.name] if layer.name in row.tracings else layer.trace(row.labels[task])


def draw_missing(folder: Path, ledger: Ledger, role: str) -> None:
    """Draws the pictures of a role that are missing, as in the folder of an earlier version they are. A file that is
    not there, or is no whole image, gets none, and `audit` names it.
    """
    there = {path.name for path in (folder / "gallery" / role).glob("*.png")}
    indices = sorted([*ledger.indices(), *ledger.indices(DOUBTFUL)])
    wanted = (index for index in indices if f"{index:08d}.png" not in there)
    while block := list(islice(wanted, BLOCK)):
        rows = [row for index in block if (row := ledger.row(index)) and row.status in (DONE, DOUBTFUL)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            drawn = pool.map(partial(_picture_in, folder, role), rows)
            found = {folder / picture_name(role, row): picture for row, picture in zip(rows, drawn, strict=True)}
        storage.publish({path: picture for path, picture in found.items() if picture})


def _picture_in(folder: Path, role: str, row: Row) -> bytes:
    """The picture of a sample's file in a run folder, empty where that is not there or is no whole image."""
    try:
        return picture_of(role, storage.read(folder / row.files[role][0], images.LARGEST_IMAGE_FILE))
    except (Refused, Missing) as error:
        if isinstance(error, Missing) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        return b""


def picture_of(role: str, content: bytes) -> bytes:
    """The picture the gallery shows of a file."""
    return picture_bytes(drawn_layer(role).picture(np.array(images.decode_image(content, role))))


def drawn_layer(role: str) -> GalleryLayer | None:
    """The layer whose picture of the files of a role the gallery makes, None where it shows the files themselves."""
    wanted = own_stem(role)
    layers = (layer for kind in LABEL_KINDS.values() for layer in kind.layers)
    return next((layer for layer in layers if layer.picture and layer.role == wanted), None)


def picture_name(role: str, row: Row) -> str:
    """Where the picture lies that the gallery shows of a sample's file."""
    return f"gallery/{role}/{row.request.id}.png"
