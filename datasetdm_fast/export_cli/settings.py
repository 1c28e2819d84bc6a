"""The settings of the command export."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasetdm_fast.command_line.output import print_plan
from datasetdm_fast.config import FLAVOURS
from datasetdm_fast.export.staging import say
from datasetdm_fast.settings import ModelSettings, OutputSettings, setting

PROG = "python -m datasetdm_fast.export"
EXAMPLES = (
    "--model MODEL --decoder decoder --out graphs",
    "--to tensorrt --precision fp16 --batch 1,8 --model MODEL --out engines",
    "--list",
)


@dataclass(frozen=True)
class ExportConfig(ModelSettings, OutputSettings):
    FLAGS = (
        "out to model decoder precision batch capability trt_flavour prompts steps weight_streaming refit raw_capture "
        "size dry_run allow_download list prune cap_gb json quiet"
    ).split()

    out: str = setting("", "output folder", metavar="ENGINES", output="folder")
    to: str = setting(
        "onnx", "what to write: ONNX graphs, or TensorRT plans of them", choices=("onnx", "tensorrt", "tensorrt-rtx")
    )
    decoder: str = setting("demo", "folder of trained decoders, or none", metavar="DIR")
    precision: str = setting(
        "auto",
        "storage of UNet and autoencoder; auto is fp32 for graphs and fp16 for plans",
        choices=("auto", "fp32", "fp16", "bf16", "fp8"),
    )
    batch: tuple[str, ...] = setting(("1", "8"), "batch sizes plans are built for", metavar="LIST")
    capability: tuple[str, ...] = setting(
        (),
        "GPU architectures to build plans for, such as sm86,sm120; default: this machine's, or portable",
        metavar="LIST",
    )
    trt_flavour: str = setting("auto", "which TensorRT builds; auto is the one --to names", choices=FLAVOURS)
    prompts: str = setting(
        "",
        "calibration prompts for --precision fp8: a prompt, or a UTF-8 file with one prompt per line",
        metavar="FILE|TEXT",
    )
    steps: int = setting(0, "sampling steps of that calibration, 0 = what the model was made for", metavar="N")
    weight_streaming: bool = setting(False, "build plans that can keep part of their weights in host memory")
    refit: bool = setting(False, "build plans whose weights can be replaced")
    raw_capture: bool = setting(False, "also export a stage that returns every feature and attention map")
    list: bool = setting(False, "show the plans of --out, or of the cache")
    prune: bool = setting(False, "delete plans of --out, or of the cache, that are out of date or unusable")
    cap_gb: float = setting(64.0, "gigabytes of plans that --prune keeps, most recently used first", metavar="GB")
    json: bool = setting(False, "the manifest, or the list of plans, as JSON on stdout")

    def told(self, line: str) -> None:
        """Prints a line of progress, unless all is to be quiet."""
        if not self.quiet:
            say(line)

    def load(self) -> tuple[Any, dict[str, Any]]:
        """The model and its decoders."""
        from datasetdm_fast.engine.decoders.checkpoint import check_fits, load_decoders
        from datasetdm_fast.engine.decoders.upstream import unpacked
        from datasetdm_fast.engine.loading import load_model

        model = load_model(self.model, size=self.size, allow_download=self.allow_download)
        decoders = {} if self.decoder == "none" else load_decoders(unpacked(self.decoder, model.levels))
        for label, decoder in decoders.items():
            check_fits(decoder, model.levels, label, model.text_width)
        return model, decoders

    def show_plan(self, decoders: Mapping[str, Any], kind: str) -> None:
        """Tells what stages would be written."""
        from datasetdm_fast.export.onnx.to_onnx import chosen_stages

        names = chosen_stages(decoders, self.raw_capture, None, None)
        print_plan(self, {"path": self.out, "stages": list(names)}, self.out, f"{kind} of {', '.join(names)}")
