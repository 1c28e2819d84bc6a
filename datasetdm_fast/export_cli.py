"""python -m datasetdm_fast.export: write a model and its decoders as ONNX graphs or TensorRT plans."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.settings import ModelSettings, OutputSettings, setting

EXAMPLES = (
    "--model MODEL --decoder decoder --out graphs",
    "--to tensorrt --precision fp16 --batch 1,8 --model MODEL --out engines",
)


@dataclass(frozen=True)
class ExportConfig(ModelSettings, OutputSettings):
    FLAGS = (
        "out to model decoder precision batch capability raw_capture size dry_run allow_download json quiet"
    ).split()

    out: str = setting("", "output folder", metavar="ENGINES", output="folder", required=True)
    to: str = setting("onnx", "ONNX graphs, or TensorRT plans of them", choices=("onnx", "tensorrt", "tensorrt-rtx"))
    decoder: str = setting("demo", "folder of trained decoders, or none", metavar="DIR")
    precision: str = setting(
        "auto", "of UNet and VAE; auto: fp32 for graphs, fp16 for plans", choices=("auto", "fp32", "fp16", "bf16")
    )
    batch: tuple[str, ...] = setting(("1", "8"), "batch sizes plans are built for", metavar="LIST")
    capability: tuple[str, ...] = setting(
        (), "GPUs to build plans for, such as sm86,sm120; default: this machine's, or portable", metavar="LIST"
    )
    raw_capture: bool = setting(False, "also export a stage that returns every feature and attention map")
    json: bool = setting(False, "the manifest, or the list of plans, as JSON on stdout")


@command_with(ExportConfig, EXAMPLES)
def main(config: ExportConfig, command: CommandLine) -> int:
    if config.to == "onnx" and (unused := sorted({"batch", "capability"} & command.provided)):
        raise Refused(f"--{unused[0]}: graphs fit every GPU and batch", "Drop the flag, or add --to tensorrt-rtx.")
    if find_spec("onnx") is None:
        raise Missing("export: the library onnx is not installed", "Install it with: pip install 'datasetdm-fast[ort]'")
    return export_stages(config)


def export_stages(config: ExportConfig) -> int:
    from datasetdm_fast.engine.loop.checks import check_size
    from datasetdm_fast.export.tensorrt.to_tensorrt import build_plans, check_batches, find_target

    check_size(config.size)
    # What must fail is refused before a model is read.
    batches = check_batches(config.batch)
    target = None if config.to == "onnx" else find_target(config.to, config.capability)

    from datasetdm_fast.engine.decoders.blocks import read_together
    from datasetdm_fast.engine.engines import build_engine, load_decoders
    from datasetdm_fast.engine.loading import load_model
    from datasetdm_fast.export.golden import Reference
    from datasetdm_fast.export.onnx.stage_names import select_stages
    from datasetdm_fast.export.onnx.to_onnx import export, graphed_parts

    model = load_model(config.model, size=config.size, allow_download=config.allow_download)
    if target and not model.backbone.has_plans:
        raise Refused(f"--to {config.to}: no plans are built of {model.backbone.title}", "Use --to onnx.")
    decoders, _ = load_decoders(model, None if config.decoder == "none" else config.decoder)
    model, decoders = read_together(model, decoders)
    if config.dry_run:
        stages = list(select_stages(decoders, config.raw_capture, others=graphed_parts(model)))
        kind = "TensorRT plans" if target else "ONNX graphs"
        return print_plan(config, {"path": config.out, "stages": stages}, config.out, f"{kind} of {', '.join(stages)}")
    precision = ("fp16" if target else "fp32") if config.precision == "auto" else config.precision
    print_progress = partial(print_lines, config)
    options = {"precision": precision, "raw_capture": config.raw_capture, "on_stage": print_progress}
    manifest = export(model, decoders, config.out, **options)
    if target is None:
        print(manifest.to_json() if config.json else config.out, flush=True)
        return 0
    golden = Reference(lambda: build_engine("fast", model, decoders, dtype="fp32", device="cpu"))
    rows = build_plans(Path(config.out), manifest, target, batches, golden, print_progress)
    facts = {"flavour": target.flavour.title, "capabilities": list(target.capabilities), "plans": rows}
    print_result(config, {"path": config.out, **facts}, config.out)
    return 0
