"""python -m datasetdm_fast.export: write a model and its decoders as ONNX graphs or TensorRT plans."""

from collections.abc import Sequence
from importlib.util import find_spec

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export_cli.settings import EXAMPLES, PROG, ExportConfig


def run(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse
    from datasetdm_fast.engine.loop.checks import check_size

    config, _ = parse(arguments, ExportConfig, PROG, __doc__, EXAMPLES)
    _check(config)
    if config.list or config.prune:
        from datasetdm_fast.export_cli import plan_commands

        (plan_commands.list_plans if config.list else plan_commands.prune)(config)
        return 0
    if not config.out:
        raise Refused("--out: no folder was given", "Add --out ENGINES.")
    if find_spec("onnx") is None:
        raise Missing("export: the library onnx is not installed", "Install it with: pip install 'datasetdm-fast[ort]'")
    check_size(config.size)
    if config.to == "onnx":
        write_graphs(config)
    else:
        from datasetdm_fast.export_cli import plan_commands

        plan_commands.build(config)
    return 0


OF_PLANS = ("batch", "capability", "trt_flavour", "weight_streaming", "refit")
OF_CALIBRATION = ("prompts", "steps")


def _check(config: ExportConfig) -> None:
    """Refuses flags that would have no effect, or the opposite of what was meant."""
    if config.list and config.prune:
        raise Refused("--prune: --list was given, too", "Drop one of the two flags.")
    if config.cap_gb < 0:
        raise Refused(f"--cap-gb {config.cap_gb:g}: expected 0 or more", "Give the gigabytes of plans to keep.")
    if config.steps < 0:
        raise Refused(f"--steps {config.steps}: expected 0 or more", "Leave it out for what the model was made for.")
    idle = {}
    if config.to == "onnx":
        fits = "--to onnx writes graphs, which fit every GPU and batch"
        idle |= dict.fromkeys(OF_PLANS, (fits, "--to tensorrt-rtx"))
    if config.precision != "fp8":
        idle |= dict.fromkeys(
            OF_CALIBRATION, (f"--precision {config.precision} needs no calibration", "--precision fp8")
        )
    for name, (reason, wanted) in idle.items():
        if getattr(config, name) != getattr(ExportConfig(), name):
            raise Refused(f"--{name.replace('_', '-')}: {reason}", f"Drop the flag, or add {wanted}.")


def write_graphs(config: ExportConfig) -> None:
    if config.precision == "fp8":
        raise Refused("--precision fp8: graphs are written in fp32, fp16 or bf16", "Choose one of these.")
    model, decoders = config.load()
    if config.dry_run:
        config.show_plan(decoders, "ONNX graphs")
        return
    from datasetdm_fast.export.onnx.to_onnx import export

    options = {"precision": "fp32" if config.precision == "auto" else config.precision}
    manifest = export(model, decoders, config.out, **options, raw_capture=config.raw_capture, told=config.told)
    print(manifest.to_json() if config.json else config.out, flush=True)
