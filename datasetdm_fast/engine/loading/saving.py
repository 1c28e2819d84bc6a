"""A model written as a diffusers folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.backbones.sd import SD
from datasetdm_fast.engine.loading.checks import quiet_libraries
from datasetdm_fast.engine.loading.folder import SCHEDULER
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Refused

PARTS = (*SD.parts, SCHEDULER)
INDEX = "model_index.json"  # is written last: a folder that has one is whole
CLASSES = {
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}


def check_new(folder: Path) -> None:
    """Refuses a folder with files of another origin than a conversion that was interrupted."""
    if not folder.is_dir():
        return
    others = sorted(
        path.name for path in folder.iterdir() if path.name not in PARTS and path not in set(_desks(folder))
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
            index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__, **CLASSES}
            index |= {"scheduler": ["diffusers", scheduler["_class_name"]], "requires_safety_checker": False}
            for part in PARTS:
                for path in sorted((desk / part).glob("*")):
                    storage.make_folder(folder / part)
                    storage.move(path, folder / part / path.name)
        files = {folder / "scheduler" / "scheduler_config.json": scheduler, folder / INDEX: index}
        storage.publish({path: (json.dumps(values, indent=2) + "\n").encode() for path, values in files.items()})
    finally:
        shutil.rmtree(desk, ignore_errors=True)
    return folder


def _desks(folder: Path) -> Iterator[Path]:
    """What conversions that were killed left in the folder."""
    return folder.glob(".*.part")
