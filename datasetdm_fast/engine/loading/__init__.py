"""Loads and checks a diffusion model from any source: a preset, a diffusers folder, a single file or a model hub."""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.backbones import RANDOM_MODELS, list_supported
from datasetdm_fast.engine.loading import presets
from datasetdm_fast.engine.loading.folder import INDEX, download_model, load_demo, load_demo_dit, load_folder
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.errors import Refused, nearest

PRESETS: dict[str, Callable[[int], Model]] = {
    "demo": load_demo,
    "demo-dit": load_demo_dit,
    "tiny": presets.load_tiny,
    **{name: partial(presets.load_random, name) for name in RANDOM_MODELS},
}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


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
    alike = nearest(name, PRESETS) or storage.named_alike(path)
    if not HUB_NAME.fullmatch(name):
        raise Refused(
            f"model: {name!r} is neither one of {', '.join(PRESETS)} nor an existing folder or file{alike}",
            list_supported(),
        )
    if not allow_download:
        raise Refused(
            f"model: {name!r} is not a folder here{alike}, and as a name on the hub it would have to be downloaded",
            "Add --allow-download, or give a local folder.",
        )
    return load_folder(download_model(name), size=size, name=name)
