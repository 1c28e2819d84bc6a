"""The process that builds one plan, so that a crash takes only itself: JSON job on stdin, JSON lines out."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SECONDS_PER_REPORT = 0.5  # of progress
FUSED_ATTENTION = "_mha"  # part of the tactic name of an attention that runs as one kernel


class RefusedByTensorRT(Exception):
    """The builder's own words of why there is no plan."""


class Pipe:
    """Events to the process that started this one."""

    def __init__(self, handle: int):
        self.file = os.fdopen(handle, "w", encoding="utf-8")

    def send(self, **event: Any) -> bool:
        """Whether that process still listens."""
        try:
            self.file.write(json.dumps(event) + "\n")
            self.file.flush()
        except BrokenPipeError:
            return False
        return True


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps what went wrong and the list of layers, which without a GPU TensorRT reports nowhere else."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif message.startswith("Layers:"):
                self.layers = [line for line in message.splitlines() if line.startswith("Name:")]

    return Logger()


def _make_monitor(trt: Any, pipe: Pipe) -> Any:
    class Monitor(trt.IProgressMonitor):
        """The share of the build that is done, from the nested phases TensorRT reports."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[Any]] = {}  # name -> [parent, steps, steps done]
            self.last_report = 0.0

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self.phases[phase_name] = [parent_phase, max(num_steps, 1), 0]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][2] = step + 1
            now = time.monotonic()
            if now - self.last_report < SECONDS_PER_REPORT:
                return True
            self.last_report = now
            return pipe.send(share=self.share(phase_name))

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def share(self, name: str) -> float:
            """A phase is one step of the phase around it."""
            done = 0.0
            while name in self.phases:
                name, steps, finished = self.phases[name]
                done = min((finished + done) / steps, 1.0)
            return round(done, 4)

    return Monitor()


def build(job: dict[str, Any], pipe: Pipe) -> dict[str, Any]:
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
        raise RefusedByTensorRT("; ".join(_read_parser_errors(parser)) or _last_error(logger))
    config = builder.create_builder_config()
    config.progress_monitor = _make_monitor(trt, pipe)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32: labels hang on the stages that keep it
    if hasattr(trt.BuilderFlag, "STRICT_NANS"):  # else 0 * x is 0 even where x is NaN, which quarantines samples
        config.set_flag(trt.BuilderFlag.STRICT_NANS)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, *[tuple(shape)] * 3)
        if config.add_optimization_profile(profile) < 0:
            raise RefusedByTensorRT(f"the shapes {json.dumps(shapes)} do not fit its inputs: {_last_error(logger)}")
    if job["capabilities"]:
        config.num_compute_capabilities = len(job["capabilities"])
        for place, capability in enumerate(job["capabilities"]):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), place):
                raise RefusedByTensorRT(f"the capability {capability} is not accepted: {_last_error(logger)}")
    begin = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusedByTensorRT(_last_error(logger))
    seconds = time.perf_counter() - begin
    with Path(job["plan"]).open("wb") as file:
        file.write(plan)
    attentions = sum(FUSED_ATTENTION in line for line in logger.layers)
    return {"layers": len(logger.layers), "fused_attentions": attentions, "seconds": round(seconds, 2)}


def _read_parser_errors(parser: Any) -> list[str]:
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    return [
        f"node {error.node_name() or error.node()!r} ({error.node_operator() or 'no operator'}): "
        f"{' '.join(error.desc().split())}"
        for error in errors
    ]


def _last_error(logger: Any) -> str:
    return " ".join(logger.errors[-1].split()) if logger.errors else "no reason was given"


def main() -> int:
    pipe = Pipe(int(sys.argv[1]))
    job = json.load(sys.stdin)
    try:
        pipe.send(result=build(job, pipe))
    except RefusedByTensorRT as refusal:
        pipe.send(refusal=str(refusal))
    except MemoryError:
        pipe.send(refusal="there is not enough memory")
    with contextlib.suppress(BrokenPipeError):
        pipe.file.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
