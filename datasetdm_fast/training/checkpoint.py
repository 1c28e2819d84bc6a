"""The state of a training in one file, written whole or not at all, and checked before a training goes on from it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted.tensors import check_safetensors

NAME = "checkpoint.safetensors"


def write(folder: Path, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Replaces the folder's checkpoint."""
    storage.publish({folder / NAME: save(tensors, {"state": json.dumps(numbers)})})


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The folder's checkpoint, or None where there is none."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        check_safetensors(path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads((file.metadata() or {})["state"])
    except OSError as error:
        raise storage.refusal(error, path) from error
    except (SafetensorError, KeyError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise Refused(
            f"{path}: not a checkpoint ({first})", "Delete it to train from the start, or restore it from a copy."
        ) from error


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Refuses a checkpoint that does not fit what takes it up within this block, as of another version of a library."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise Refused(
            f"{folder / NAME}: not the state of this training ({first})", "Delete it to train from the start."
        ) from error


def remove(folder: Path) -> None:
    """Deletes the folder's checkpoint, where there is one, which nothing needs any more."""
    path = folder / NAME
    if storage.is_there(path):  # a folder that may not be written has none
        with storage.refusing(path):
            storage.syscall("unlink", path.unlink, True)
