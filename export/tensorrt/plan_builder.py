"""The process that builds one plan, so that a crash takes only itself: JSON job on stdin, JSON lines out."""

import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LOUD = 0.5  # seconds between two reports of progress
FUSED_ATTENTION = "_mha"  # part of the tactic name of an attention that runs as one kernel
FLAGS = {"weight-streaming": "WEIGHT_STREAMING", "refit": "REFIT"}


class Refusal(Exception):
    """The builder's own words of why there is no plan."""


class Pipe:
    """Events to the process that asked."""

    def __init__(self, handle: int):
        self.file = os.fdopen(handle, "w", encoding="utf-8")

    def send(self, **event: Any) -> bool:
        """Whether anybody still listens."""
        try:
            self.file.write(json.dumps(event) + "\n")
            self.file.flush()
        except BrokenPipeError:
            return False
        return True


def _logger(trt):
    class Logger(trt.ILogger):
        """Keeps what went wrong and the list of layers, which without a GPU is to be had nowhere else."""

        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity, message):
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif message.startswith("Layers:"):
                self.layers = [line for line in message.splitlines() if line.startswith("Name:")]

    return Logger()


def _monitor(trt, pipe: Pipe):
    class Monitor(trt.IProgressMonitor):
        """The share of the build that is done, from the nested phases TensorRT reports."""

        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list] = {}  # name -> [parent, steps, steps done]
            self.told = 0.0

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.phases[phase_name] = [parent_phase, max(num_steps, 1), 0]

        def step_complete(self, phase_name, step):
            if phase_name in self.phases:
                self.phases[phase_name][2] = step + 1
            now = time.monotonic()
            if now - self.told < LOUD:
                return True
            self.told = now
            return pipe.send(at=self.share(phase_name), phase=phase_name)

        def phase_finish(self, phase_name):
            self.phases.pop(phase_name, None)

        def share(self, name):
            """A phase is one step of the phase around it."""
            done = 0.0
            while name in self.phases:
                name, steps, finished = self.phases[name]
                done = min((finished + done) / steps, 1.0)
            return round(done, 4)

    return Monitor()


def build(job: dict[str, Any], pipe: Pipe) -> dict[str, Any]:
    """Writes the plan of `job` and says what it is; raises Refusal where the graph is refused."""
    trt = importlib.import_module(job["module"])
    logger = _logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always on where the flag is gone
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["graph"]):
        raise Refusal("; ".join(_parser_errors(parser)) or _last(logger))
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, pipe)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32: labels hang on the stages that keep it
    if hasattr(trt.BuilderFlag, "STRICT_NANS"):  # else 0 * x is 0 even where x is NaN, which sets samples aside
        config.set_flag(trt.BuilderFlag.STRICT_NANS)
    for flag in job["flags"]:
        if not hasattr(trt.BuilderFlag, FLAGS[flag]):
            raise Refusal(f"the flag {flag} is not offered")
        config.set_flag(getattr(trt.BuilderFlag, FLAGS[flag]))
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, tuple(least), tuple(usual), tuple(most))
        if config.add_optimization_profile(profile) < 0:
            raise Refusal(f"the shapes {json.dumps(shapes)} do not fit the graph's inputs: {_last(logger)}")
    if job["capabilities"]:
        config.num_compute_capabilities = len(job["capabilities"])
        for place, capability in enumerate(job["capabilities"]):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), place):
                raise Refusal(f"the capability {capability} is not accepted: {_last(logger)}")
    timings = _timing_cache(config, job["timings"]) if job["timings"] else None
    begin = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refusal(_last(logger))
    seconds = time.perf_counter() - begin
    with Path(job["plan"]).open("wb") as file:
        file.write(plan)
    if timings is not None:
        Path(job["timings"]).write_bytes(config.get_timing_cache().serialize())
    fused = sum(FUSED_ATTENTION in line for line in logger.layers)
    counts = {"layers": len(logger.layers), "fused_attentions": fused, "nodes": network.num_layers}
    return counts | {"seconds": round(seconds, 2)}


def _timing_cache(config, path: str):
    """The timings of earlier builds, attached to this one; an empty or unfit file starts anew."""
    stored = Path(path).read_bytes() if Path(path).exists() else b""
    cache = config.create_timing_cache(stored) or config.create_timing_cache(b"")
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _parser_errors(parser) -> list[str]:
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    return [
        f"node {error.node_name() or error.node()!r} ({error.node_operator() or 'no operator'}): "
        f"{' '.join(error.desc().split())}"
        for error in errors
    ]


def _last(logger) -> str:
    return " ".join(logger.errors[-1].split()) if logger.errors else "no reason was given"


def main() -> int:
    pipe = Pipe(int(sys.argv[1]))
    job = json.load(sys.stdin)
    try:
        pipe.send(result=build(job, pipe))
    except Refusal as refusal:
        pipe.send(refused=str(refusal))
    except MemoryError:
        pipe.send(refused="there is not enough memory")
    with contextlib.suppress(BrokenPipeError):
        pipe.file.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
