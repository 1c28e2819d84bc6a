"""python -m datasetdm_fast.export: a model and its decoders as files that other runtimes execute."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.config import setting
from datasetdm_fast.errors import Refused

PROG = "python -m datasetdm_fast.export"


@dataclass(frozen=True)
class ExportConfig:
    out: str = setting("", "folder the files go to", metavar="ENGINES")
    to: str = setting("onnx", "what to write", choices=("onnx",))
    model: str = setting("demo", "demo, random-sd14, tiny, a diffusers folder or a .safetensors/.ckpt file", metavar="MODEL")
    decoder: str = setting("demo", "folder of trained decoders, or none", metavar="DIR")
    precision: str = setting("fp32", "storage of UNet and autoencoder", choices=("fp32", "fp16", "bf16"))
    raw_capture: bool = setting(False, "also a stage that hands out every feature and attention map")
    size: int = setting(0, "pixels of a side, a multiple of 64; 0 = what the model was made for", metavar="N")
    allow_download: bool = setting(False, "let --model name a model hub repository")
    json: bool = setting(False, "the manifest on stdout")
    quiet: bool = setting(False, "no progress")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    from datasetdm_fast.flags import run_command

    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    from datasetdm_fast.flags import parse

    config, _ = parse(arguments, ExportConfig, PROG, __doc__)
    if not config.out:
        raise Refused("--out: no folder was given", "Add --out ENGINES.")
    TARGETS[config.to](config)
    return 0


def _to_onnx(config: ExportConfig) -> None:
    model, decoders = load(config)
    from datasetdm_fast.export.to_onnx import export

    def told(stage: str) -> None:
        if not config.quiet:
            print(f"{stage}", file=sys.stderr, flush=True)

    manifest = export(model, decoders, Path(config.out), precision=config.precision, raw_capture=config.raw_capture, told=told)
    print(manifest.to_json() if config.json else config.out, flush=True)


def load(config: ExportConfig) -> tuple[Any, dict[str, Any]]:
    """The model and its decoders."""
    from datasetdm_fast.loading import load_model
    from datasetdm_fast.models.decoders import check_levels, load_decoders

    model = load_model(config.model, size=config.size, allow_download=config.allow_download)
    decoders = {} if config.decoder == "none" else load_decoders(config.decoder)
    for decoder in decoders.values():
        check_levels(decoder, model.levels)
    return model, decoders


TARGETS: dict[str, Callable[[ExportConfig], None]] = {"onnx": _to_onnx}


if __name__ == "__main__":
    sys.exit(main())
