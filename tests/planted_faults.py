"""Faults put into the product's own lines for one rehearsal each: `python tests/planted_faults.py NAME ...` prints the
findings of each as JSON.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """One line of a function, and what it is replaced by."""

    place: str  # module:QUALNAME
    line: str
    wrong: str
    options: dict[str, Any] = {}


FAST, DRIVER, LABELS = (
    f"datasetdm_fast.{name}" for name in ("engines.fast", "generation.driver", "generation.overlap")
)
FAULTS = {
    "images decoded by other threads": Fault(
        f"{FAST}:FastEngine.decode_and_check", 'if self.device.type == "cuda":', 'if self.device.type == "tpu":'
    ),
    "sums given back too early": Fault(
        f"{DRIVER}:BatchGenerator.label",
        "release(value for capture in drawn.captures.values() for value in tensors_of(capture))",
        "pass",
    ),
    "the label stream does not wait": Fault(f"{LABELS}:LabelStream._follow", "self._stream.wait_event(queued)", "pass"),
    "a number is read in the loop": Fault(
        f"{DRIVER}:BatchGenerator.sample", "state.step(call, output)", "state.step(call, output).sum().item()"
    ),
    "fp32 in the fp16 network": Fault(
        "datasetdm_fast.models.fused:MeasuredTransformer.forward",
        "h = self.entry(tokens(self.norm(x)))",
        "h = self.entry(tokens(self.norm(x)).float())",
    ),
    "a tensor of the host": Fault(
        "datasetdm_fast.models.fused:MeasuredResnet.forward", "(h, x.image, self.bias)", "(h, x.image.cpu(), self.bias)"
    ),
    "the host reads before the copy is over": Fault(
        "datasetdm_fast.tasks.to_host:_copied", "torch.cuda.current_stream(group[0].device).synchronize()", "pass"
    ),
    "a pageable copy at the start of a batch": Fault(
        "datasetdm_fast.engines.device:to_device", "value.pin_memory()", "value"
    ),
    "a graph recorded with another GPU's stream": Fault(
        "datasetdm_fast.engines.cuda_graph:StepGraph.__init__",
        "torch.cuda.Stream(device)",
        "torch.cuda.Stream(0)",
        {"device": "cuda:1"},
    ),
    "a kernel launched on another GPU": Fault(
        "datasetdm_fast.kernels.layer_norm:fused",
        "torch.cuda.device_of(x)",
        "torch.cuda.device(0)",
        {"device": "cuda:1"},
    ),
    "the answer of a graph is not copied": Fault(
        "datasetdm_fast.engines.cuda_graph:StepGraph.__call__",
        "tuple(value.clone() for value in self.outputs)",
        "self.outputs",
    ),
    "graphs of two threads in one pool": Fault(
        f"{FAST}:FastEngine._labelled", "self._label_pool or torch.cuda.graph_pool_handle()", "self._pool"
    ),
    "a graph recorded at every call": Fault(
        f"{FAST}:FastEngine._graph", "key = (step.__name__,", "key = (len(self._graphs),"
    ),
    "a recording that other threads can spoil": Fault(
        "datasetdm_fast.engines.cuda_graph:StepGraph.__init__", ', capture_error_mode="thread_local"', ""
    ),
    "an array over memory that is used again": Fault(
        "datasetdm_fast.tasks.to_host:_copied", "place.numpy().copy()", "place.numpy()"
    ),
    "labels on the sampler's stream": Fault(
        f"{LABELS}:LabelStream._follow", "torch.cuda.stream(self._stream)", "torch.cuda.device(self._device)"
    ),
    "numbers of a schedule copied at every batch": Fault(
        "datasetdm_fast.sampling.walk:SamplerState.__init__", "_walk_numbers(", "_walk_numbers.__wrapped__("
    ),
    "a tensor printed in the loop": Fault(
        f"{DRIVER}:BatchGenerator.sample", "state.step(call, output)", "state.step(call, output), f'{output}'"
    ),
    "fp64 in the network": Fault(
        "datasetdm_fast.models.fused:MeasuredTransformer.forward",
        "h = self.entry(tokens(self.norm(x)))",
        "h = self.entry(tokens(self.norm(x)).double().to(x.image.dtype))",
    ),
    "fp32 that is TF32": Fault(
        "datasetdm_fast.engines.device:allow_tf32", "= is_allowed, False", "= True, False", {"dtype": "fp32"}
    ),
}


@contextmanager
def planted(fault: Fault) -> Iterator[int]:
    """The function with its wrong line, as if it stood so in its file; the number of that line."""
    module, _, name = fault.place.partition(":")
    found: Any = __import__(module, fromlist=["_"])
    for part in name.split("."):
        found = getattr(found, part)
    function = inspect.unwrap(found)
    path = Path(inspect.getsourcefile(function))
    lines, first = inspect.getsourcelines(function)
    places = [first + place for place, line in enumerate(lines) if fault.line in line]
    assert len(places) == 1, f"{fault.place} has {len(places)} lines with {fault.line}"
    source = path.read_text(encoding="utf-8").splitlines(keepends=True)
    source[places[0] - 1] = source[places[0] - 1].replace(fault.line, fault.wrong)
    right = function.__code__
    codes = [code for code in nested(compile("".join(source), str(path), "exec")) if code.co_qualname == name]
    function.__code__ = codes[0]
    try:
        yield places[0]
    finally:
        function.__code__ = right


def nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def main(names: list[str]) -> None:
    from bench.rehearsal.run import rehearse

    warnings.simplefilter("ignore")
    for name in names:
        fault = FAULTS[name]
        with planted(fault) as line:
            found = rehearse("tiny", 4, batches=2, steps=2, **fault.options)
        findings = [asdict(one) for one in found.findings]
        print(json.dumps({"name": name, "line": line, "findings": findings}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAULTS))
