"""Every operation of kernels/ in the forms that this machine's engine uses, each against its reference."""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.kernels.inputs import cases_of, sizes_of
from bench.machine.limits import device_rate, nearest_limit
from bench.machine.measure import distance, interleaved
from bench.machine.work import HALVES, flops
from bench.peers import OURS, PEERS
from bench.peers.upstream import arithmetic
from bench.report.tables import Row, Table, figure, share, text
from bench.rows.measurement import BenchRun, Measurement, Rows
from datasetdm_fast.engine.engines.fast import DTYPES
from datasetdm_fast.kernels import OPS
from datasetdm_fast.kernels.choice import FORM, form_of

FLOOR = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}  # relative L2 that rounding alone explains
OWN_DRIFT = 2.0  # times what the reference itself loses in the same type
SMALL = 2**24  # bytes of inputs
HEAVIEST = 10**11  # operations of a reference that a CPU is given
LEAST_ROUNDS = 5
ATTENTIONS = ("attention", "masked_attention", "attention_capture")


def rows(run: BenchRun) -> Rows:
    device, dtype = run.setting.device, PEERS[OURS].build(run.setting, 1).engine.fingerprint()["dtype"]
    is_quick = run.setting.quick
    timing = OpTiming(device, dtype, run.limits, 0.02 if is_quick else 0.1, device.type == "cuda" or not is_quick)
    return [row for op in OPS for row in timing.rows(op)]


@dataclass(frozen=True)
class OpTiming:
    """Where and how operations are timed."""

    device: torch.device
    dtype: str
    limits: dict[str, Any]
    seconds: float  # for each form and case
    has_sizes: bool = True  # those of Stable Diffusion 1.x, too

    def rows(self, op: str) -> Iterator[dict[str, Any]]:
        """A row for each case and size of Stable Diffusion 1.x, and on a GPU for each kernel of an operation; one that
        differs too much from the reference is failed and not timed.
        """
        forms = self.forms(op)
        sizes = self.sizes(op) if forms and self.has_sizes else []
        small = cases_of(op)
        cases = [(case.reason, case.inputs) for case in small] + sizes
        cases = [(reason, placed(inputs, self.device, DTYPES[self.dtype])) for reason, inputs in cases]
        largest = max(moved(inputs) for _, inputs in cases)
        for name, form in forms.items():
            for place, (reason, inputs) in enumerate(cases):
                try:
                    row = judged(op, form, inputs, self.dtype)
                except torch.OutOfMemoryError:
                    row = {"status": "absent", "why": "not enough memory for the reference"}
                row |= {"op": op, "case": reason, "form": name, "dtype": self.dtype}
                is_timed = place >= len(small) if sizes else moved(inputs) == largest
                if row["status"] == "ok" and (self.device.type == "cuda" or is_timed):
                    row |= self.times(op, form, inputs)
                yield row

    def sizes(self, op: str) -> list[tuple[str, tuple]]:
        """The sizes of Stable Diffusion 1.x: on a CPU for the two prompts of an image, and without those whose
        reference takes a CPU long.
        """
        found = sizes_of(op) or (lambda empty, batch=0: ())
        if self.device.type == "cuda":
            return list(found(RandomInputs(self.device)))
        meta = found(RandomInputs(torch.device("meta")), HALVES)
        is_light = [flops(functools.partial(OPS[op].reference, *inputs)) <= HEAVIEST for _, inputs in meta]
        drawn = found(RandomInputs(self.device), HALVES) if any(is_light) else ()
        return [(f"SD 1.x: {reason}", inputs) for (reason, inputs), kept in zip(drawn, is_light) if kept]

    def forms(self, op: str) -> dict[str, Callable]:
        """What the engine runs on the device, under the name `engine`, and on a GPU the kernel it does not run."""
        usual, reference = form_of(op, self.device), OPS[op].reference
        fused = getattr(FORM["fused"], op, reference) if self.device.type == "cuda" else reference
        found = {"engine": usual} if usual is not reference else {}
        return found | ({"fused": fused} if fused not in (usual, reference) else {})

    def times(self, op: str, form: Callable, inputs: tuple) -> dict[str, Any]:
        reference = OPS[op].reference
        with torch.inference_mode():
            made = outputs(form, inputs)
            work, traffic = flops(lambda: reference(*inputs)), moved(inputs) + moved(tuple(made))
            calls = {name: functools.partial(one, *inputs) for name, one in (("plain", reference), ("form", form))}
            plain_s, form_s = self.seconds_of(calls)
        exps = inputs[0].shape[:3].numel() * inputs[1].shape[2] if op in ATTENTIONS else 0
        bound = nearest_limit(work, traffic, exps, form_s, self.limits, self.dtype)
        return {"plain_s": plain_s, "form_s": form_s, "ratio": round(plain_s / form_s, 3), **bound}

    def seconds_of(self, calls: dict[str, Callable[[], object]]) -> list[float]:
        """Of each call: on a GPU without its launches; on a CPU, which others share, as the median over rounds in which
        the calls take turns.
        """
        if self.device.type == "cuda":
            return [1 / device_rate(call, self.device, self.seconds) for call in calls.values()]
        for call in calls.values():
            call()
        rounds = interleaved(calls, 2 * self.seconds, least=LEAST_ROUNDS, lasting=self.seconds / LEAST_ROUNDS)
        return [statistics.median(taken.seconds) for taken in rounds.values()]


class RandomInputs:
    """Tensors of a shape, filled on the device."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device) * shape[-1] ** -0.5


def judged(op: str, form: Callable, inputs: tuple, dtype: str) -> dict[str, Any]:
    """The distance to the reference in fp64, and what it may be, of the form as an engine calls it: where nobody wants
    gradients.
    """
    with arithmetic(has_tf32=False), torch.inference_mode():
        wide, limit = limit_of(OPS[op].reference, inputs, dtype)
        try:
            found = outputs(form, inputs)
        except Exception as error:  # of whatever kind: the row is what says it
            return {"status": "failed", "why": f"{op}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        error = max((distance(a, b) for a, b in zip(found, wide, strict=True)), default=0.0)
    is_right = error <= limit and all(a.shape == b.shape for a, b in zip(found, wide))
    why = {} if is_right else {"why": f"{op}: differs from its reference by {error:.1e}, expected at most {limit:.1e}"}
    return {"status": "ok" if is_right else "failed", "error": error, "limit": limit, **why}


def limit_of(reference: Callable, inputs: tuple, dtype: str) -> tuple[list[Tensor], float]:
    """The reference's answer in a wider type, and how far from it a form in `dtype` may lie."""
    # At model sizes fp64 would take minutes and all of the memory.
    exact = torch.float64 if moved(inputs) < SMALL else torch.float32
    wide, own = outputs(reference, placed(inputs, None, exact)), outputs(reference, inputs)
    return wide, OWN_DRIFT * max(distance(a, b) for a, b in zip(own, wide, strict=True)) + FLOOR[dtype]


def placed(value: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """Inputs of an op on a device, floating tensors in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(device or value.device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(placed(one, device, dtype) for one in value)
    return value


def outputs(form: Callable, inputs: tuple) -> list[Tensor]:
    answer = form(*inputs)
    return [answer] if isinstance(answer, Tensor) else list(answer)


def moved(value: Any) -> int:
    """Bytes of all tensors of a nested tuple or list."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(moved(one) for one in value) if isinstance(value, (list, tuple)) else 0


def shown(found: Sequence[Row]) -> list[Row]:
    """The rows that were timed, and the failed ones."""
    return [row for row in found if row["status"] == "failed" or "form_s" in row]


COLUMNS = {"operation": text("op"), "form": text("form"), "case": text("case")}
COLUMNS |= {"reference, ms": figure("plain_s", 1e3), "this form, ms": figure("form_s", 1e3)}
COLUMNS |= {"speed-up": figure("ratio", unit="×"), "GB/s": figure("gbps"), "TFLOP/s": figure("tflops")}
COLUMNS |= {"bound by": text("bound"), "share of limit": share("share"), "error": lambda row: f"{row['error']:.0e}"}
MEASUREMENT = Measurement(
    "ops", "Operations against their reference", rows, (Table(COLUMNS, shown, reason_at=3),), least_seconds=60
)
