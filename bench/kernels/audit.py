"""python -m bench kernels --audit: compiles every kernel at model sizes for GPUs that need not be there, and reads back
what each takes. python -m bench kernels --tune: the fastest block sizes and forms on the GPU that is there, see
bench/kernels/tune.py.

The kernels' own entry points are called with tensors that have a shape and no memory, and each launch is compiled
instead of run, so what is audited is what an engine would launch on a GPU of each target: block sizes measured there,
strides and alignment included.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

from bench.kernels.sass import asked, spoilt_of
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.settings import setting

SHARED_LIMIT = {
    "80": 163 * 1024,
    "90": 227 * 1024,
    "100": 227 * 1024,
    "120": 99 * 1024,
}  # bytes a block may have, by compute capability
DESCRIPTION = (
    "python -m bench kernels: registers, spills and shared memory of every Triton kernel (--audit), or its fastest "
    "block sizes on this GPU (--tune)."
)
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
TYPE_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "uint8": "u8", "int32": "i32"}


@dataclass(frozen=True)
class KernelConfig:
    audit: bool = setting(False, "compile the kernels and report registers, spills and shared memory")
    tune: bool = setting(
        False, "find the fastest block sizes of every kernel on this GPU, and the fastest form of every operation"
    )
    minutes: float = setting(8.0, "with --tune: start nothing that would end later; the same command resumes")
    out: str = setting("", "with --tune: result file (default: bench/results/DATE-tuned-DEVICE-COMMIT.json)")
    json: bool = setting(False, "one JSON object on standard output instead of a table")
    ops: tuple[str, ...] = setting((), "only these ops (default: all; with --tune those that a run launches)")
    dtypes: tuple[str, ...] = setting(
        (), "storage types (default: all; with --tune those that a run launches)", choices=tuple(DTYPES)
    )
    targets: tuple[str, ...] = setting(
        tuple(SHARED_LIMIT), "compute capabilities, times ten", choices=tuple(SHARED_LIMIT)
    )


class CompiledLaunch(NamedTuple):
    """One kernel as an engine would launch it, ready to compile; equal launches are the same machine code."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]  # argument -> type
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # places of arguments that 16 divides
    options: tuple[tuple[str, Any], ...]


class KernelRow(NamedTuple):
    kernel: str
    case: str
    dtype: str
    target: str
    registers: int
    spills: int  # bytes of stack of a thread
    shared: int  # bytes of a block
    spoilt: int  # addresses that ptxas got wrong, see sass.py


def type_name(value: Any) -> str:
    """Triton's name of the type of a tensor's values."""
    return TYPE_NAMES[str(value.dtype).removeprefix("torch.")]


class Recorder:
    """Stands where a kernel stood and notes each launch."""

    def __init__(self, kernel, launches: list[CompiledLaunch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return self.note

    def note(self, *positional, **named) -> None:
        """Types, constants and alignment as Triton itself specialises them."""
        from torch import Tensor

        from datasetdm_fast.kernels.launch import TensorDescriptor

        parameters = self.kernel.params
        given = dict(zip((parameter.name for parameter in parameters), positional)) | named
        signature, constants, aligned = {}, {}, []
        for place, parameter in enumerate(parameters):
            value = given.pop(parameter.name)
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = "*" + type_name(value)
                if value.storage_offset() * value.element_size() % 16 == 0:
                    aligned.append(place)
            elif isinstance(value, TensorDescriptor):
                block = ", ".join(map(str, value.block_shape))
                signature[parameter.name] = f"tensordesc<{type_name(value.base)}[{block}]>"
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(place)
            else:
                signature[parameter.name] = "fp32"
        types, values, options = (tuple(facts.items()) for facts in (signature, constants, dict(sorted(given.items()))))
        self.launches.append(CompiledLaunch(self.kernel, types, values, tuple(aligned), options))


def launches(op: str, dtype: str, target: str) -> Iterator[tuple[str, CompiledLaunch]]:
    """Every distinct launch that `op` makes at model sizes on a GPU of `target`, with the first case that makes it: by
    its rows, then without those of kernels by descriptors, as for sizes that these do not fit.
    """
    import torch

    from bench.kernels.files import FILES
    from bench.kernels.inputs import sizes_of
    from datasetdm_fast.kernels import OPS, launch
    from datasetdm_fast.kernels.described_product import SUFFIX

    noted, seen, places, module = [], set(), [vars(module) for module in (launch, *FILES)], OPS[op]
    card = f"sm_{target}"
    rows = module.BLOCKS.get(card, {})
    by_pointers = {key: sizes for key, sizes in rows.items() if not key[0].endswith(SUFFIX)}
    kernels = [(place, name, kernel) for place in places for name, kernel in place.items() if name.endswith("_kernel")]
    named = [(place, "names_of", place["names_of"]) for place in places if "names_of" in place]
    empty = functools.partial(torch.empty, dtype=getattr(torch, DTYPES[dtype]), device="meta")
    for names, name, kernel in kernels:
        names[name] = Recorder(kernel, noted)
    for names, name, _ in named:
        names[name] = lambda device: (card, launch.UNTUNED)
    try:
        for table in (rows, by_pointers):
            with mock.patch.dict(module.BLOCKS, {card: table}):
                for case, inputs in sizes_of(op)(lambda *shape: empty(shape)):
                    noted.clear()
                    module.fused(*inputs)
                    for one in noted:
                        if one not in seen:
                            seen.add(one)
                            yield case, one
    finally:
        for names, name, own in (*kernels, *named):
            names[name] = own


def resources(launch: CompiledLaunch, target: str) -> tuple[int, int, int, int]:
    """Registers and bytes of stack of a thread, bytes of shared memory of a block, and addresses that are spoilt."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    made = triton.compile(source, target=GPUTarget("cuda", int(target), 32), options=dict(launch.options))
    return taken(made)


def taken(made: Any) -> tuple[int, int, int, int]:
    """The same of what Triton compiled, and how many addresses of it ptxas spoilt."""
    taken = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", asked("cuobjdump", made, "--dump-resource-usage")))
    return int(taken["REG"]), int(taken["STACK"]) + int(taken["LOCAL"]), made.metadata.shared, spoilt_of(made)


def name_of(kernel: Any) -> str:
    return kernel.__name__.strip("_").removesuffix("_kernel")


def rows(ops: Sequence[str], dtypes: Sequence[str], targets: Sequence[str]) -> Iterator[KernelRow]:
    for op in ops:
        for dtype in dtypes:
            for target in targets:
                for case, launch in launches(op, dtype, target):
                    yield KernelRow(name_of(launch.kernel), case, dtype, f"sm_{target}", *resources(launch, target))


def is_sound(row: KernelRow) -> bool:
    return row.spills == row.spoilt == 0 and row.shared <= SHARED_LIMIT[row.target.removeprefix("sm_")]


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, KernelConfig, "python -m bench kernels", DESCRIPTION)
    if config.audit == config.tune:
        raise Refused("python -m bench kernels: expected one of --audit and --tune", "add one of them")
    from datasetdm_fast.kernels import launch

    if launch.triton is None:
        raise Missing("python -m bench kernels: Triton is not installed", "pip install 'datasetdm-fast[triton]'")
    if launch.IS_INTERPRETED:
        raise Refused("python -m bench kernels: TRITON_INTERPRET is set, so nothing would be compiled", "unset it")
    ops = kernels_of(config.ops)
    if config.tune:
        return tune_here(config, arguments)
    found = []
    for row in rows(ops, config.dtypes or tuple(DTYPES), config.targets):
        found.append(row)
        if not config.json:
            print(
                f"{row.kernel:24} {row.case:44} {row.dtype:5} {row.target:7} {row.registers:4} registers "
                f"{row.spills:5} B stack {row.shared:7} B shared",
                flush=True,
            )
    if not found:
        raise Refused(
            f"python -m bench kernels: nothing was audited, {', '.join(ops)} launch no kernel at their model sizes "
            f"on {', '.join(f'sm_{target}' for target in config.targets)}",
            "their `sizes` have to yield inputs, and LIBRARY must not name every target",
        )
    wrong = [row for row in found if not is_sound(row)]
    if config.json:
        facts = {"triton": launch.triton.__version__, "shared_limit": SHARED_LIMIT}
        print(json.dumps(facts | {"kernels": [row._asdict() for row in found]}, indent=1))
    if wrong:
        worst = max(wrong, key=lambda row: (row.spoilt, row.spills, row.shared))
        place = f"{worst.kernel} ({worst.case}, {worst.dtype}, {worst.target})"
        limit = SHARED_LIMIT[worst.target.removeprefix("sm_")]
        raise GateFailed(
            f"bench kernels: {len(wrong)} of {len(found)} compiled kernels are wrong or do not fit, worst {place}: "
            f"{worst.spoilt} spoilt addresses and {worst.spills} bytes of stack, expected none, and {worst.shared} of "
            f"{limit} bytes of shared memory",
            "choose smaller blocks or more warps in BLOCKS of the kernel's file; wider ones against spoilt addresses",
        )
    return 0


def kernels_of(asked: Sequence[str]) -> tuple[str, ...]:
    """The ops that were asked for, else all that have block sizes: one without has no kernel to compile or tune."""
    from datasetdm_fast.kernels import OPS

    able = tuple(op for op, module in OPS.items() if getattr(module, "BLOCKS", None))
    wrong = [op for op in asked if op not in able]
    if wrong:
        without = [op for op in wrong if op in OPS]
        why = f", and {', '.join(without)} has no kernel with block sizes" if without else ""
        raise Refused(f"python -m bench kernels: --ops names {', '.join(wrong)}{why}", f"there are: {', '.join(able)}")
    return tuple(asked) or able


def tune_here(config: KernelConfig, arguments: Sequence[str]) -> int:
    import torch

    from bench.kernels import tune
    from bench.options import check_numbers

    check_numbers(minutes=config.minutes)
    if not torch.cuda.is_available():
        raise Missing(
            "python -m bench kernels --tune: this machine shows no CUDA device",
            "`--audit` compiles for GPUs that are not there",
        )
    command = " ".join(["python", "-m", "bench", "kernels", *arguments])
    usual = tune.running()
    ops = {op: config.dtypes or usual.get(op, tuple(DTYPES)) for op in config.ops or usual}
    document = tune.run(torch.device("cuda"), ops, config.minutes, config.out, command)
    print(json.dumps(document, indent=1) if config.json else "\n".join(tune.table_lines(document)))
    return 0
