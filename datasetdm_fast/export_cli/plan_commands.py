"""What `export` does with TensorRT plans: builds them, lists them, clears them away."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.export.manifest import NAME, Manifest
from datasetdm_fast.export.tensorrt import flavours, plans
from datasetdm_fast.export.tensorrt.plans import SUFFIX, Entry, PlanFolder, cached_plans, say
from datasetdm_fast.export_cli.settings import ExportConfig
from datasetdm_fast.messages import count_noun


def build(config: ExportConfig) -> None:
    """The plans of every stage in --out, built or found; what must fail is refused before any model is read."""
    from datasetdm_fast.export.tensorrt import to_tensorrt

    named = config.to if config.trt_flavour == "auto" else config.trt_flavour
    if config.to == "tensorrt-rtx" and named != "tensorrt-rtx":
        raise Refused(f"--trt-flavour {named}: --to tensorrt-rtx names another one", "Drop one of the two flags.")
    flavour, gpus = flavours.find(named, f"--to {named}"), flavours.gpu_capabilities()
    batches = to_tensorrt.check_batches(config.batch)
    capabilities = flavours.check_capabilities(flavour, config.capability, gpus)
    if config.precision == "fp8":
        capabilities = _check_fp8(config, flavour, capabilities)
    flags = to_tensorrt.check_flags(
        flavour, [flag for flag in ("weight-streaming", "refit") if getattr(config, flag.replace("-", "_"))], gpus
    )

    import torch

    from datasetdm_fast.engine.engines.fast import FastEngine
    from datasetdm_fast.export.golden import Reference
    from datasetdm_fast.export.onnx.to_onnx import export
    from datasetdm_fast.export_cli import calibration

    model, decoders = config.load()
    if config.dry_run:
        served = ", ".join(capabilities) or "every GPU"
        config.show_plan(decoders, f"TensorRT plans for {served}, batches {', '.join(map(str, batches))}")
        return
    folder, precision, drift = Path(config.out), "fp16" if config.precision == "auto" else config.precision, {}
    if precision == "fp8":
        prompts = calibration.read_prompts(config.prompts, model)
        manifest, rows = calibration.export(model, decoders, folder, prompts, config.steps, told=config.told)
        say(calibration.table(rows))
        drift = {"drift": rows}
    else:
        options = {"precision": precision, "raw_capture": config.raw_capture}
        manifest = export(model, decoders, folder, **options, told=config.told)
    gpu = "" if flavour.is_portable else torch.cuda.get_device_name()
    target = to_tensorrt.Target(flavour, batches, capabilities, flags, gpu)
    golden = Reference(lambda: FastEngine(model, decoders, dtype="fp32", device="cpu"))
    opened, rows = PlanFolder(folder, say), []
    for stage in manifest.stages:
        plan = to_tensorrt.open_plan(opened, stage, manifest, target, golden, is_quiet=config.quiet)
        row = {"stage": stage, "file": plan.path.name, "bytes": len(plan.content), "built": plan.is_new}
        rows.append(row | {name: plan.notes[name] for name in NOTES})
        config.told(row_line(rows[-1]))
    facts = {"path": str(folder), "flavour": flavour.title, "capabilities": list(capabilities), "plans": rows, **drift}
    print(json.dumps(facts) if config.json else folder, flush=True)


def _check_fp8(config: ExportConfig, flavour: flavours.Flavour, capabilities: tuple[str, ...]) -> tuple[str, ...]:
    """The GPUs with eight-bit floats among those asked for; refused without prompts to calibrate on."""
    if not config.prompts:
        raise Refused(
            "--precision fp8: is calibrated on your own prompts, and none were given",
            "Add --prompts FILE with one prompt per line.",
        )
    if config.raw_capture:
        raise Refused(
            "--precision fp8: --raw-capture is for parity, which 8-bit precision does not have",
            "Drop --raw-capture.",
        )
    for capability in capabilities:
        if _number(capability) < FP8_FROM:
            able = ", ".join(one for one in flavour.capabilities if _number(one) >= FP8_FROM)
            raise Refused(
                f"--capability {capability}: it has no 8-bit floats, which need at least sm{FP8_FROM}",
                f"Name GPUs that have them: {able or 'sm89 and later'}.",
            )
    return capabilities or tuple(one for one in flavour.capabilities if _number(one) >= FP8_FROM)


def _number(capability: str) -> int:
    return int(capability.removeprefix("sm"))


FP8_FROM = 89
NOTES = ("layers", "fused_attentions", "seconds")


def row_line(row: Mapping[str, Any]) -> str:
    size = f"{row['bytes'] / 1e6:9.1f} MB"
    layers = f"{row['layers']} layers, {row['fused_attentions']} fused attentions"
    built = "built in" if row["built"] else "was there, built in"
    return f"{row['stage']:<26}{size}   {layers}, {built} {row['seconds']:.1f} s"


def list_plans(config: ExportConfig) -> None:
    """Every plan of --out or of the cache and what it is for; raises GateFailed where one would not be used."""
    rows, faulty = [], 0
    for opened in _folders(config.out):
        for entry in opened.entries():
            reason = entry.fault or _staleness(opened.folder)(entry.facts)
            faulty += bool(reason)
            rows.append(_described(entry) | {"fault": reason})
            if not config.json:
                print(_line(rows[-1]))
    if config.json:
        print(json.dumps(rows))
    elif not rows:
        say("no plans")
    if faulty:
        raise GateFailed(
            f"--list: {faulty} of {len(rows)} plans would not be used",
            "Delete them with --prune; they are rebuilt when they are needed.",
        )


def prune(config: ExportConfig) -> None:
    """Deletes plans of --out or of the cache that would not be used, and the least used beyond --cap-gb."""
    folders = [(opened, _staleness(opened.folder)) for opened in _folders(config.out)]
    removed = plans.prune(folders, int(config.cap_gb * 1e9), is_dry=config.dry_run)
    if config.json:
        print(json.dumps([{"path": str(path), "reason": reason} for path, reason in removed]))
        return
    for path, reason in removed:
        print(f"{path}: {reason.removeprefix(f'{path} ')}")
    done = "would be" if config.dry_run else "is" if len(removed) == 1 else "are"
    say(f"{count_noun(len(removed), 'file')} {done} deleted")


def _folders(out: str) -> list[PlanFolder]:
    if out and not Path(out).is_dir():
        raise Missing(
            f"--out: {out} is not a folder", "Name the folder of the plans, or leave the flag out for the cache."
        )
    found = []
    for root in [Path(out)] if out else sorted(path for path in cached_plans().glob("*") if path.is_dir()):
        inner = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        found += [root, *sorted(inner)]
    return [PlanFolder(folder) for folder in found if any(folder.glob(f"*{SUFFIX}"))]


def _staleness(folder: Path):
    """Why a plan will not be asked for again: another TensorRT is installed, or its graph was exported anew."""
    try:
        graphs = Manifest.read(folder) if (folder / NAME).is_file() else None
    except Refused:
        graphs = None

    def reason(facts: Mapping[str, Any]) -> str:
        try:
            installed = flavours.find(facts["flavour"], "--list")
        except Missing:
            installed = None  # built here for another machine
        if installed and (installed.version, installed.cuda) != (facts["version"], facts["cuda"]):
            return f"is stale: built by version {facts['version']}, installed is {installed.version}"
        if graphs and (facts["source"] != graphs.source or facts["stage"] not in graphs.stages):
            return f"is stale: {folder / NAME} tells of other graphs"
        return ""

    return reason


def _described(entry: Entry) -> dict[str, Any]:
    facts, head = entry.facts, {"path": str(entry.path), "bytes": entry.size}
    if not facts:
        return head
    about = {"stage": facts["stage"], "precision": facts["precision"], "batches": _batches(facts["profiles"])}
    about |= {"flavour": f"{flavours.TITLES[facts['flavour']]} {facts['version']}", "cuda": facts["cuda"]}
    about |= {"capabilities": facts["capabilities"] or ["portable"], "gpu": facts["gpu"], "flags": facts["flags"]}
    return head | about | {name: entry.notes[name] for name in NOTES}


def _batches(profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]]) -> list[int]:
    """The images each optimisation profile takes; a CFG batch is twice as long and never the shortest input."""
    return [min(shapes[1][0] for shapes in profile.values()) for profile in profiles]


def _line(row: Mapping[str, Any]) -> str:
    head, fault = f"{row['path']}  {row['bytes'] / 1e6:.1f} MB", row["fault"].removeprefix(f"{row['path']} ")
    if "stage" not in row:
        return f"{head}  not usable: {fault}"
    batches, capabilities = ",".join(map(str, row["batches"])), ",".join(row["capabilities"])
    facts = f"{row['stage']} {row['precision']}, batch {batches}, {row['flavour']} for {capabilities}"
    return f"{head}  {facts}" + (f"  not usable: {fault}" if fault else f", {row['layers']} layers")
