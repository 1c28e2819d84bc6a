"""python -m datasetdm_fast.export: a model and its decoders as files that other runtimes execute."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasetdm_fast.config import FLAVOURS, setting
from datasetdm_fast.errors import Missing, Refused

PROG = "python -m datasetdm_fast.export"


@dataclass(frozen=True)
class ExportConfig:
    out: str = setting("", "folder the files go to", metavar="ENGINES")
    to: str = setting("onnx", "what to write: graphs, or plans of them", choices=("onnx", "tensorrt", "tensorrt-rtx"))
    model: str = setting("demo", "demo, random-sd14, tiny, a diffusers folder or a .safetensors/.ckpt file", metavar="MODEL")
    decoder: str = setting("demo", "folder of trained decoders, or none", metavar="DIR")
    precision: str = setting(
        "auto", "storage of UNet and autoencoder; auto is fp32 for graphs and fp16 for plans", choices=("auto", "fp32", "fp16", "bf16", "fp8")
    )
    batch: tuple[str, ...] = setting(("1", "8"), "batch sizes plans are built for", metavar="LIST")
    capability: tuple[str, ...] = setting((), "GPUs plans are built for, for example sm86,sm120; default: this machine's, or portable", metavar="LIST")
    trt_flavour: str = setting("auto", "which TensorRT builds; auto is the one --to names", choices=FLAVOURS)
    prompts: str = setting("", "what --precision fp8 is calibrated on: a prompt, or a UTF-8 file with one prompt a line", metavar="FILE|TEXT")
    steps: int = setting(0, "sampling steps of that calibration, 0 = what the model was made for", metavar="N")
    weight_streaming: bool = setting(False, "plans that may leave part of their weights in host memory")
    refit: bool = setting(False, "plans whose weights may be exchanged")
    raw_capture: bool = setting(False, "also a stage that hands out every feature and attention map")
    size: int = setting(0, "pixels of a side, a multiple of 64; 0 = what the model was made for", metavar="N")
    allow_download: bool = setting(False, "let --model name a model hub repository")
    list: bool = setting(False, "show the plans of --out, or of the cache")
    prune: bool = setting(False, "delete plans of --out, or of the cache, that would not be used")
    cap_gb: float = setting(64.0, "gigabytes of plans --prune leaves, the last used ones", metavar="GB")
    json: bool = setting(False, "the manifest, or what plans there are, on stdout")
    quiet: bool = setting(False, "no progress")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    from datasetdm_fast.command_line.ending import run_command

    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse
    from datasetdm_fast.job import check_size

    config, _ = parse(arguments, ExportConfig, PROG, __doc__)
    _check(config)
    for name in ("list", "prune"):
        if getattr(config, name):
            from datasetdm_fast.export import plan_commands

            {"list": plan_commands.list_plans, "prune": plan_commands.prune}[name](config)
            return 0
    if not config.out:
        raise Refused("--out: no folder was given", "Add --out ENGINES.")
    if find_spec("onnx") is None:
        raise Missing("export: the library onnx is not installed", 'pip install "datasetdm-fast[ort]"')
    check_size(config.size)
    TARGETS[config.to](config)
    return 0


OF_PLANS = ("batch", "capability", "trt_flavour", "weight_streaming", "refit")
OF_CALIBRATION = ("prompts", "steps")


def _check(config: ExportConfig) -> None:
    """Refuses flags that would have no effect, or the opposite of what was meant."""
    if config.list and config.prune:
        raise Refused("--prune: --list was given, too", "Drop one of the two flags.")
    if config.cap_gb < 0:
        raise Refused(f"--cap-gb {config.cap_gb:g}: expected 0 or more", "Name the gigabytes of plans that are to stay.")
    if config.steps < 0:
        raise Refused(f"--steps {config.steps}: expected 0 or more", "Leave it out for what the model was made for.")
    idle = {name: ("--to onnx writes graphs, which fit every GPU and batch", "--to tensorrt-rtx") for name in OF_PLANS if config.to == "onnx"}
    idle |= {name: (f"--precision {config.precision} needs no calibration", "--precision fp8") for name in OF_CALIBRATION if config.precision != "fp8"}
    for name, (reason, wanted) in idle.items():
        if getattr(config, name) != getattr(ExportConfig(), name):
            raise Refused(f"--{name.replace('_', '-')}: {reason}", f"Drop the flag, or add {wanted}.")


def _to_onnx(config: ExportConfig) -> None:
    if config.precision == "fp8":
        raise Refused("--precision fp8: graphs are written in fp32, fp16 or bf16", "Choose one of these.")
    model, decoders = load(config)
    from datasetdm_fast.export.to_onnx import export

    precision = "fp32" if config.precision == "auto" else config.precision
    manifest = export(model, decoders, Path(config.out), precision=precision, raw_capture=config.raw_capture, told=teller(config))
    print(manifest.to_json() if config.json else config.out, flush=True)


def _to_tensorrt(config: ExportConfig) -> None:
    from datasetdm_fast.export import plan_commands

    plan_commands.build(config)


def teller(config: ExportConfig) -> Callable[[str], None]:
    """Says which stage is being written, unless all is to be quiet."""

    def told(stage: str) -> None:
        if not config.quiet:
            print(f"{stage}", file=sys.stderr, flush=True)

    return told


def load(config: ExportConfig) -> tuple[Any, dict[str, Any]]:
    """The model and its decoders."""
    from datasetdm_fast.decoders.checkpoint import check_levels, load_decoders
    from datasetdm_fast.loading import load_model

    model = load_model(config.model, size=config.size, allow_download=config.allow_download)
    decoders = {} if config.decoder == "none" else load_decoders(config.decoder)
    for decoder in decoders.values():
        check_levels(decoder, model.levels)
    return model, decoders


TARGETS: dict[str, Callable[[ExportConfig], None]] = {"onnx": _to_onnx, "tensorrt": _to_tensorrt, "tensorrt-rtx": _to_tensorrt}


if __name__ == "__main__":
    sys.exit(main())
