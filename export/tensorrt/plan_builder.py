"""The process that builds one plan, so that a crash takes only itself: a JSON job on stdin, a JSON line on stdout."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

FUSED_ATTENTION = "_mha"  # part of the tactic name of an attention that runs as one kernel


class RefusedByTensorRT(Exception):
    """The builder's own words of why there is no plan."""


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps what went wrong and the list of layers, which without a GPU TensorRT reports nowhere else."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.error = "no reason was given"
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.error = " ".join(message.split())
            elif message.startswith("Layers:"):
                self.layers = [line for line in message.splitlines() if line.startswith("Name:")]

    return Logger()


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the plan of `job`; its layers, fused attentions and seconds. Raises RefusedByTensorRT where the graph is
    refused.
    """
    trt = importlib.import_module(job["module"])
    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always on where the flag is gone
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["graph"]):
        errors = [parser.get_error(place) for place in range(parser.num_errors)]
        raise RefusedByTensorRT("; ".join(map(_describe_parser_error, errors)) or logger.error)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32: labels hang on the stages that keep it
    if hasattr(trt.BuilderFlag, "STRICT_NANS"):  # else 0 * x is 0 even where x is NaN, which quarantines samples
        config.set_flag(trt.BuilderFlag.STRICT_NANS)
    profile = builder.create_optimization_profile()
    for name, shape in job["shapes"].items():
        profile.set_shape(name, *[tuple(shape)] * 3)
    if config.add_optimization_profile(profile) < 0:
        raise RefusedByTensorRT(f"the shapes {json.dumps(job['shapes'])} do not fit its inputs: {logger.error}")
    if job["capabilities"]:
        config.num_compute_capabilities = len(job["capabilities"])
        for place, capability in enumerate(job["capabilities"]):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), place):
                raise RefusedByTensorRT(f"the capability {capability} is not accepted: {logger.error}")
    begin = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusedByTensorRT(logger.error)
    seconds = time.perf_counter() - begin
    with Path(job["plan"]).open("wb") as file:
        file.write(plan)
    attentions = sum(FUSED_ATTENTION in line for line in logger.layers)
    return {"layers": len(logger.layers), "fused_attentions": attentions, "seconds": round(seconds, 2)}


def _describe_parser_error(error: Any) -> str:
    node = f"node {error.node_name() or error.node()!r} ({error.node_operator() or 'no operator'})"
    return f"{node}: {' '.join(error.desc().split())}"


def main() -> int:
    try:
        result = build(json.load(sys.stdin))
    except RefusedByTensorRT as refusal:
        result = {"refusal": str(refusal)}
    except MemoryError:
        result = {"refusal": "there is not enough memory"}
    except Exception as error:  # whatever TensorRT throws, and a full disk
        result = {"refusal": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(f"\n{json.dumps(result)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
