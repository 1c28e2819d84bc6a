"""python -m datasetdm_fast.export: write a model and its decoders as ONNX graphs, or as TensorRT plans of these."""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_end, print_lines
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.settings import ModelSettings, OutputSettings, setting

EXAMPLES = ("--model MODEL --decoder decoder --out graphs", "--to tensorrt --precision fp16 --model MODEL --out plans")


@dataclass(frozen=True)
class ExportConfig(ModelSettings, OutputSettings):
    FLAGS = "out to model decoder precision batch capability raw_capture size dry_run allow_download json quiet".split()

    out: str = setting("", "output folder", metavar="GRAPHS", output="folder", required=True)
    to: str = setting("onnx", "graphs alone, or also plans of them", choices=("onnx", "tensorrt"))
    decoder: str = setting("demo", "folder of trained decoders, or none", metavar="DIR")
    precision: str = setting("fp32", "of UNet and VAE", choices=("fp32", "fp16", "bf16"))
    batch: int = setting(8, "images of a call of a plan", least=1, metavar="N")
    capability: str = setting("", "GPU that plans are for, such as sm89; default: this machine's", metavar="NAME")
    raw_capture: bool = setting(False, "also export a stage that returns every feature and attention map")
    json: bool = setting(False, "the manifest as JSON on stdout")


@command_with(ExportConfig, EXAMPLES)
def main(config: ExportConfig, command: CommandLine) -> int:
    from datasetdm_fast.engine.engines import check_sources, load_decoders
    from datasetdm_fast.engine.loop.recipe import check_size

    if find_spec("onnx") is None:
        raise Missing("export: the library onnx is not installed", "Install it with: pip install 'datasetdm-fast[ort]'")
    check_size(config.size)
    if config.to == "onnx" and (config.batch, config.capability) != (ExportConfig.batch, ExportConfig.capability):
        raise Refused(
            "--batch, --capability: graphs are for every batch and GPU", "Add --to tensorrt, or leave it out."
        )
    decoder = None if config.decoder == "none" else config.decoder
    check_sources(config.model, decoder, config.allow_download)
    flavour, capability = None, ""
    if config.to == "tensorrt":
        from datasetdm_fast.export.tensorrt.flavours import choose_target

        flavour, capability = choose_target(config.capability)

    from datasetdm_fast.engine.decoders.trunk import read_together
    from datasetdm_fast.engine.loading import load_model
    from datasetdm_fast.export.onnx.stage_names import select_stages
    from datasetdm_fast.export.onnx.to_onnx import export, graphed_parts

    model = load_model(config.model, size=config.size, allow_download=config.allow_download)
    decoders, _ = load_decoders(model, decoder)
    model, decoders = read_together(model, decoders)
    if config.dry_run:
        stages = list(select_stages(decoders, config.raw_capture, others=graphed_parts(model)))
        plan = {"path": config.out, "stages": stages}
        plans = f", and {flavour.title} plans of them for {capability}" if flavour else ""
        return print_end(config, plan, config.out, f"ONNX graphs of {', '.join(stages)}{plans}")
    options = {"precision": config.precision, "raw_capture": config.raw_capture}
    manifest = export(model, decoders, config.out, on_stage=partial(print_lines, config), **options)
    if flavour:
        from datasetdm_fast.engine.engines.exported.trt import build_stage

        for stage in manifest.stages:
            path = Path(config.out) / f"{stage}.plan"
            build_stage(path, manifest, stage, config.batch, flavour, capability, partial(print_lines, config))
    print(manifest.to_json() if config.json else config.out, flush=True)
    return 0
