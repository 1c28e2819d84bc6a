"""Checkpoints of other projects become what this package reads, and decoders become checkpoints of DatasetDM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused, quote


def to_decoder(source: Path, out: Path, *, kind: str = "", model: str = "", is_dry: bool = False) -> dict[str, Any]:
    """Writes the folder of a decoder from a checkpoint; its facts, and a message."""
    from datasetdm_fast.engine.decoders.config import SD1_LEVELS
    from datasetdm_fast.engine.decoders.upstream import open_checkpoint
    from datasetdm_fast.engine.loading import load_model

    checkpoint = open_checkpoint(source, kind, load_model(model).levels if model else SD1_LEVELS)
    _publish({out / name: content for name, content in checkpoint.files().items()}, out, is_dry)
    use = f"use it with --decoder {quote(out.parent)} --task {checkpoint.config.task}"
    facts = {"kind": checkpoint.kind, "task": checkpoint.config.task}
    return {"path": str(out), "told": f"{checkpoint.description}\n{use}", **facts}


def to_checkpoint(source: Path, out: Path, *, is_dry: bool = False) -> dict[str, Any]:
    """Writes a decoder as a checkpoint of DatasetDM."""
    from datasetdm_fast.engine.decoders.upstream import as_checkpoint

    if not out.suffix:
        raise Refused(f"--out {out}: expected a file such as latest_checkpoint.pth", "Name a file.")
    _publish({out: as_checkpoint(source)}, out, is_dry)
    return {"path": str(out), "told": f"{out}: a state dict as DatasetDM saves and loads its decoders"}


def to_diffusers(
    source: Path, out: Path, *, ema: bool = False, allow_download: bool = False, is_dry: bool = False
) -> dict[str, Any]:
    """Writes a whole model in one file as a diffusers folder."""
    if source.suffix not in (".ckpt", ".safetensors"):
        raise Refused(f"{source}: expected one file of a whole model, .ckpt or .safetensors", "Name such a file.")
    if not source.is_file():
        raise Missing(f"{source}: no such file{storage.named_alike(source)}", "Check the path.")
    from datasetdm_fast.engine.loading.saving import check_new, save_model
    from datasetdm_fast.engine.loading.single_file import load_file  # which needs diffusers

    check_new(out)
    model = load_file(source, allow_download=allow_download, ema=ema)
    if not is_dry:
        save_model(model, out)
    weights = "the averaged weights" if ema else "the weights"
    return {"path": str(out), "told": f"{out}: {weights} of {source} as a diffusers folder, for --model {out}"}


def _publish(files: Mapping[Path, bytes], place: Path, is_dry: bool) -> None:
    """Writes files, or finds equal ones; where one has another content, nothing is written."""
    for path, content in files.items():
        if storage.is_there(path) and storage.read(path, 2**40) != content:
            raise Refused(f"--out {place}: {path} is there, with another content", "Choose another --out.")
    if not is_dry:
        storage.remove_parts_of(files)
        storage.publish(files)
