"""Builds a plan of one graph in a process of its own, so that a crash takes only that: a JSON job on its stdin, a JSON
line on its stdout.
"""

import ctypes
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.export.tensorrt.flavours import Flavour

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
LONGEST_REASON = 1000  # bytes of what a builder that failed wrote last
LONGEST_BUILD = 3600  # seconds for one plan; the largest known, a UNet of Stable Diffusion, takes minutes


def build_plan(
    graph: Path, plan: Path, shapes: Mapping[str, tuple[int, ...]], flavour: Flavour, capability: str
) -> None:
    """Writes the plan of a graph for one GPU and these shapes of inputs; refuses what TensorRT refuses."""
    job = {"module": flavour.module.__name__, "graph": str(graph), "plan": str(plan), "shapes": shapes}
    job["capability"] = capability if flavour.capabilities else ""  # the full TensorRT knows its GPU by itself
    command = [sys.executable, "-m", "datasetdm_fast.export.tensorrt.plan_builder"]
    try:
        process = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, timeout=LONGEST_BUILD)
    except subprocess.TimeoutExpired:
        raise Refused(
            f"{graph.stem}: {flavour.title} gave no plan within {LONGEST_BUILD / 60:g} minutes",
            "Build on a machine with nothing else running, or use --engine fast.",
        ) from None
    if code := process.returncode:
        ending = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
        words = " ".join(process.stderr[-LONGEST_REASON:].decode(errors="replace").split())
        refusal = f"its builder ended {ending}" + (f", saying: {words}" if words else "")
    else:
        refusal, number = json.loads(process.stdout.splitlines()[-1])
        if number:
            raise storage.refusal(OSError(number, refusal), plan)
    if refusal:
        raise Refused(
            f"{graph.stem}: {flavour.title} gives no plan: {refusal}",
            "The graph stays usable with --engine ort; another --dtype may build.",
        )


class RefusedByTensorRT(Exception):
    """The builder's own words of why there is no plan."""


def make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps the last error for our own sentence about it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no reason was given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = " ".join(message.split())

    return Logger()


def _build(job: dict[str, Any]) -> None:
    trt = importlib.import_module(job["module"])
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always on where the flag is gone
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["graph"]):
        errors = [parser.get_error(place) for place in range(parser.num_errors)]
        raise RefusedByTensorRT("; ".join(map(_describe_parser_error, errors)) or logger.last)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32: labels hang on the stages that keep it
    if hasattr(trt.BuilderFlag, "STRICT_NANS"):  # else 0 * x is 0 even where x is NaN, which quarantines samples
        config.set_flag(trt.BuilderFlag.STRICT_NANS)
    profile = builder.create_optimization_profile()
    for name, shape in job["shapes"].items():
        profile.set_shape(name, *[tuple(shape)] * 3)
    if config.add_optimization_profile(profile) < 0:
        raise RefusedByTensorRT(f"the shapes {json.dumps(job['shapes'])} do not fit its inputs: {logger.last}")
    if job["capability"]:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, job["capability"].upper()), 0):
            raise RefusedByTensorRT(f"the capability {job['capability']} is not accepted: {logger.last}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusedByTensorRT(logger.last)
    with Path(job["plan"]).open("wb") as file:
        file.write(plan)


def _describe_parser_error(error: Any) -> str:
    node = f"node {error.node_name() or error.node()!r} ({error.node_operator() or 'no operator'})"
    return f"{node}: {' '.join(error.desc().split())}"


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # it ends with the process that waits for it
    refusal, number = "", 0
    try:
        _build(json.load(sys.stdin))
    except RefusedByTensorRT as error:
        refusal = str(error)
    except MemoryError:
        refusal = "there is not enough memory"
    except Exception as error:  # whatever TensorRT throws, and a full disk, which has a number
        refusal, number = f"{type(error).__name__}: {' '.join(str(error).split())}", getattr(error, "errno", 0) or 0
    print(f"\n{json.dumps([refusal, number])}", flush=True)


if __name__ == "__main__":
    main()
