"""Loads and checks a diffusion model from any source: a preset, a diffusers folder, a single file or a model hub."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasetdm_fast.engine.backbones import RANDOM_MODELS, check_source
from datasetdm_fast.engine.loading import presets
from datasetdm_fast.engine.loading.folder import INDEX, download_model, load_demo, load_demo_dit, load_folder
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Refused

PRESETS: dict[str, Callable[[int], Model]] = {
    "demo": load_demo,
    "demo-dit": load_demo_dit,
    "tiny": presets.load_tiny,
    **{name: partial(presets.load_random, name) for name in RANDOM_MODELS},
}


def load_model(name: str, *, size: int = 0, allow_download: bool = False) -> Model:
    """The model `name`: a preset, a diffusers folder, a file, or a hub repository where allowed."""
    path = Path(name)
    if name in PRESETS:
        if (path / INDEX).is_file():
            print(f"model: {name} is this package's own; that of the folder here is --model ./{name}", file=sys.stderr)
        return PRESETS[name](size)
    if path.is_dir():
        return load_folder(path, size=size, name=name if str(path) in PRESETS else "")
    if path.is_file():
        from datasetdm_fast.engine.loading.single_file import load_file  # which needs diffusers

        return load_file(path, size=size, allow_download=allow_download)
    check_source(name, allow_download)
    try:
        return load_folder(download_model(name, allow_download), size=size, name=name)
    except Refused as stop:
        if allow_download:
            raise
        raise Refused(stop.cause, f"{stop.remedy} If its download was interrupted, add --allow-download.") from stop
