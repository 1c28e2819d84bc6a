"""python -m datasetdm_fast.export: write a model and its decoders as ONNX graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_lines, print_plan
from datasetdm_fast.errors import Missing
from datasetdm_fast.settings import ModelSettings, OutputSettings, setting

EXAMPLES = (
    "--model MODEL --decoder decoder --out graphs",
    "--precision fp16 --model MODEL --decoder none --out graphs",
)


@dataclass(frozen=True)
class ExportConfig(ModelSettings, OutputSettings):
    FLAGS = ("out to model decoder precision raw_capture size dry_run allow_download json quiet").split()

    out: str = setting("", "output folder", metavar="GRAPHS", output="folder", required=True)
    to: str = setting("onnx", "format of the graphs", choices=("onnx",))
    decoder: str = setting("demo", "folder of trained decoders, or none", metavar="DIR")
    precision: str = setting("fp32", "of UNet and VAE", choices=("fp32", "fp16", "bf16"))
    raw_capture: bool = setting(False, "also export a stage that returns every feature and attention map")
    json: bool = setting(False, "the manifest as JSON on stdout")


@command_with(ExportConfig, EXAMPLES)
def main(config: ExportConfig, command: CommandLine) -> int:
    from datasetdm_fast.engine.loop.checks import check_size

    if find_spec("onnx") is None:
        raise Missing("export: the library onnx is not installed", "Install it with: pip install 'datasetdm-fast[ort]'")
    check_size(config.size)

    from datasetdm_fast.engine.decoders.blocks import read_together
    from datasetdm_fast.engine.engines import load_decoders
    from datasetdm_fast.engine.loading import load_model
    from datasetdm_fast.export.onnx.stage_names import select_stages
    from datasetdm_fast.export.onnx.to_onnx import export, graphed_parts

    model = load_model(config.model, size=config.size, allow_download=config.allow_download)
    decoders, _ = load_decoders(model, None if config.decoder == "none" else config.decoder)
    model, decoders = read_together(model, decoders)
    if config.dry_run:
        stages = list(select_stages(decoders, config.raw_capture, others=graphed_parts(model)))
        plan = {"path": config.out, "stages": stages}
        return print_plan(config, plan, config.out, f"ONNX graphs of {', '.join(stages)}")
    options = {"precision": config.precision, "raw_capture": config.raw_capture}
    manifest = export(model, decoders, config.out, on_stage=partial(print_lines, config), **options)
    print(manifest.to_json() if config.json else config.out, flush=True)
    return 0
