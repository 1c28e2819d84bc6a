"""python -m datasetdm_fast.doctor: report what is installed, which engines can run and why others cannot."""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.probes import MODEL_PROBE, PROBES, make_printable, run_probes
from datasetdm_fast.config import ENGINES
from datasetdm_fast.cores import count_cores
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import setting
from datasetdm_fast.version import __version__

EXAMPLES = ("--json",)
LIBRARIES = (
    "torch diffusers transformers accelerate safetensors tokenizers numpy scipy pillow pycocotools pyyaml tqdm triton "
    "onnx onnxruntime onnxruntime-gpu openvino tensorrt tensorrt-rtx xformers ray fsspec pyarrow httpx2 starlette "
    "uvicorn shtab"
).split()


@dataclass(frozen=True)
class DoctorConfig:
    model: str = setting("", "a model's folder, whose family is told", metavar="DIR")
    json: bool = setting(False, "everything as one JSON object on stdout")


def examine(model: str = "") -> dict[str, Any]:
    """Everything the command reports."""
    probes = {"model": MODEL_PROBE.format(folder=str(Path(model).resolve()))} if model else {}
    reports = run_probes({**PROBES, **probes})
    engines = {name: reports[f"engine {name}"] for name in ENGINES.names}
    for report in engines.values():
        if problem := report.pop("problem"):
            report |= {"runs": False, "cause": f"it does not load ({problem})", "remedy": "Reinstall that library."}
    failure, reference = reports["self-test"]["problem"], engines["torch"]
    if not failure and not reference["runs"]:
        failure = f"engine torch, with which the others are compared: {reference['cause']}"
    return {
        "package": {"version": __version__, "path": str(Path(__file__).parent), "extension": reports["extension"]},
        "system": {"python": platform.python_version(), "platform": platform.platform(), "cores": count_cores()},
        "libraries": {name: _find_version(name) for name in LIBRARIES},
        "gpu": reports["gpu"],
        "torch": reports["torch"],
        "engines": engines,
        "sandbox": reports["sandbox"],
        **({"model": reports["model"]} if model else {}),
        "self_test": {"passed": not failure, "problem": failure},
    }


def _find_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
    except Exception as error:  # the description of a half-removed package
        return f"unknown ({type(error).__name__})"


def describe(facts: dict[str, Any]) -> list[str]:
    """The report for a person, one subject a line."""
    package, system, torch, test = (facts[name] for name in ("package", "system", "torch", "self_test"))
    versions, extension, gpu = facts["libraries"], package["extension"], facts["gpu"]
    cards = [
        f"{card['name']} ({card['capability']}, {card['memory'] / 1e9:,.0f} GB)" for card in torch.get("devices", ())
    ]
    missing = "; ".join(facts["sandbox"].get("missing", ())) or "network, programs and files"
    rows = [
        ("package", f"datasetdm_fast {package['version']} in {package['path']}"),
        ("extension", extension["problem"] or f"built {'with CUDA' if extension['cuda'] else 'for the CPU'}"),
        ("system", f"Python {system['python']}, {system['platform']}, {count_noun(system['cores'], 'core')}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("missing", ", ".join(name for name, version in versions.items() if not version)),
        ("driver", gpu["problem"] or gpu["driver"]),
        ("torch", torch["problem"] or f"{torch['version']}, CUDA {torch['cuda'] or 'none'}"),
        ("GPUs", ", ".join(cards) or "none"),
        ("pickles", facts["sandbox"]["problem"] or f"read by a process without {missing}"),
    ]
    for name, engine in facts["engines"].items():
        cause = f"does not run here: {engine['cause']}. {engine['remedy']}"
        rows.append((f"--engine {name}", "runs here" if engine["runs"] else cause))
    if model := facts.get("model"):
        rows.append(("model", model["problem"] or f"{model['family']}, for the engines {', '.join(model['engines'])}"))
    rows.append(("self-test", "passed" if test["passed"] else f"FAILED: {test['problem']}"))
    return [f"{name:<19}{text}" for name, text in rows if text]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0 where the self-test passed, 3 where something it needs is missing."""
    try:
        from datasetdm_fast.command_line.ending import run_command
    except Exception as error:  # even what every command begins with may be broken
        facts = examine()
        print(json.dumps(facts) if "--json" in (arguments or sys.argv[1:]) else "\n".join(describe(facts)))
        cause = f"datasetdm_fast.command_line does not load: {type(error).__name__}: {make_printable(str(error))}"
        print(cause, "Reinstall the package.", sep="\n", file=sys.stderr)
        return 3
    return run_command(_run_command, arguments)


def _run_command(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse
    from datasetdm_fast.errors import Missing, Refused

    config, _ = parse(arguments, DoctorConfig, "python -m datasetdm_fast.doctor", __doc__, EXAMPLES)
    if config.model and not Path(config.model).is_dir():
        raise Refused(f"--model {config.model}: no such folder", "Give the folder of a model.")
    if not config.json:
        print("testing every engine, then generating a first image: about ten seconds", file=sys.stderr, flush=True)
    facts = examine(config.model)
    print(json.dumps(facts) if config.json else "\n".join(describe(facts)))
    if problem := facts["self_test"]["problem"]:
        raise Missing(f"the self-test failed: {problem}", "Fix what the lines above report, then run doctor again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
