"""A model written as a diffusers folder."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.backbones import every_backbone, pipeline_of
from datasetdm_fast.engine.backbones.fitting import quiet_libraries
from datasetdm_fast.engine.loading.folder import INDEX, SCHEDULER
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Refused


def check_new(folder: Path) -> None:
    """Refuses a folder with files of another origin than a conversion that was interrupted."""
    if not folder.is_dir():
        return
    parts = {SCHEDULER, *(part for backbone in every_backbone() for part in backbone.parts)}
    others = sorted(
        path.name for path in folder.iterdir() if path.name not in parts and path not in set(_desks(folder))
    )
    if others:
        raise Refused(
            f"--out {folder}: it holds {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}",
            "Name a folder that is not there yet.",
        )


def save_model(model: Model, folder: Path) -> Path:
    """The folder, which diffusers and this package read; written beside and moved in, so that a part is never cut."""
    import diffusers

    check_new(folder)
    desk = folder / f".{os.getpid()}.part"
    for left in _desks(folder):
        shutil.rmtree(left, ignore_errors=True)
    storage.make_folder(desk)
    try:
        with storage.refusing(folder), quiet_libraries():
            for part, module in (*model.modules.items(), *model.tokenizers.items()):
                module.save_pretrained(desk / part)
            scheduler = {**model.scheduler, "_diffusers_version": diffusers.__version__}
            parts = (*model.modules, *model.tokenizers)
            index: dict[str, Any] = {
                "_class_name": pipeline_of(model.backbone),
                "_diffusers_version": diffusers.__version__,
            }
            index |= {**dict.fromkeys(model.backbone.parts, [None, None]), **model.backbone.index, **model.index}
            index |= {part: model.backbone.parts[part].classes[0].split(":") for part in parts}
            index |= {SCHEDULER: ["diffusers", scheduler["_class_name"]]}
            for part in parts:
                for path in sorted((desk / part).glob("*")):
                    storage.make_folder(folder / part)
                    storage.move(path, folder / part / path.name)
        files = {folder / SCHEDULER / "scheduler_config.json": scheduler, folder / INDEX: index}
        storage.publish({path: (json.dumps(values, indent=2) + "\n").encode() for path, values in files.items()})
    finally:
        shutil.rmtree(desk, ignore_errors=True)
    return folder


def _desks(folder: Path) -> Iterator[Path]:
    """What conversions that were killed left in the folder."""
    return folder.glob(".*.part")
