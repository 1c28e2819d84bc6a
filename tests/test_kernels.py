"""Every op on each of its cases: the reference in fp32 against itself in fp64, and every other form against the
reference.

Kernels run on a GPU where there is one, else in Triton's interpreter.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from skips import IS_LONG, long_test
from torch import Tensor

from bench.kernels.files import FILES
from bench.kernels.inputs import cases_of, sizes_of
from bench.rehearsal.kernels import LARGEST_GRID
from datasetdm_fast.config import SAMPLERS, FlowRule
from datasetdm_fast.engine.loop.recipe import LARGEST_BATCH
from datasetdm_fast.engine.sampling import schedule as walk
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.kernels import (
    OPS,
    attention,
    attention_shares,
    depth_head,
    fused,
    guided_step,
    launch,
    native,
    plain,
    pyramid,
    query_attention,
    reference,
    upsample_concat,
)
from datasetdm_fast.kernels.described_product import SUFFIX, find_described_sizes
from datasetdm_fast.kernels.noise import noise

ROOT = Path(__file__).parents[1]
FLOOR = 1e-6
FLOORS = {
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}  # half a unit of the last place of the answer, a few in fp32
# The interpreter truncates bf16 where hardware rounds, and its products of bf16 tiles are wrong.
# With a GPU every dtype is a test of it, so that `pytest -m gpu` runs the usual fp16, too; the interpreter has no bf16.
ON_GPU = [pytest.mark.gpu] if torch.cuda.is_available() else []
DTYPES = [pytest.param(dtype, marks=ON_GPU) for dtype in (torch.float32, torch.float16)]
DTYPES.append(pytest.param(torch.bfloat16, marks=pytest.mark.gpu))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [pytest.param(op, case, id=f"{name}-{case.reason}") for name, op in OPS.items() for case in cases_of(name)]
KERNELS = [one for one in CASES if hasattr(one.values[0], "fused")]
# Cases that descriptors do not fit: rows of no whole vectors, and images of no whole chunks.
UNFIT = ("smallest", "ragged in every size", "two inputs, ragged in every size", "no bias")
UNFIT += ("SD 1.x first level, the skip beside what comes from below",)

needs_triton = pytest.mark.skipif(
    launch.triton is None, reason="triton is not installed; pip install 'datasetdm-fast[triton]'"
)


def changed(value, change, change_other=lambda x: x):
    """`value` with `change` made to every floating-point tensor in it, and `change_other` to every other."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else change_other(value)
    if isinstance(value, (list, tuple)):
        return type(value)(changed(one, change, change_other) for one in value)
    return value


def tensors_of(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in tensors_of(part)] if isinstance(value, (list, tuple)) else []


def doubled(value):
    return changed(value, Tensor.double)


def fenced(x: Tensor) -> Tensor:
    """`x` with its strides, between numbers that spoil whatever reads them."""
    room, size = 4096, 1 + sum((length - 1) * stride for length, stride in zip(x.shape, x.stride())) if x.numel() else 0
    field = torch.full((size + 2 * room,), float("nan"), dtype=x.dtype, device=x.device)
    return field.as_strided(x.shape, x.stride(), room).copy_(x)


def listed(answer) -> list[Tensor]:
    return list(answer) if isinstance(answer, tuple) else [answer]


def shapes(case) -> list[tuple[int, ...]]:
    return list(case.shape) if isinstance(case.shape[0], tuple) else [case.shape]


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12))


@pytest.fixture
def poisoned():
    """Fresh memory filled with NaN, so that an element nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op,case", CASES)
def test_reference_against_double(op, case):
    answers = listed(op.reference(*case.inputs))
    exacts = listed(op.reference(*doubled(case.inputs)))
    assert [tuple(answer.shape) for answer in answers] == [tuple(exact.shape) for exact in exacts] == shapes(case)
    for answer, exact in zip(answers, exacts):
        assert (answer.dtype, exact.dtype) in ((torch.float32, torch.float64), (torch.bool, torch.bool))
        assert torch.isfinite(answer).all()
        # Normalising planes a hundred deviations from zero costs two digits, scores in the hundreds a bit or two.
        assert distance(answer, exact) <= (
            1e-4 if "far from zero" in case.reason else 4 * FLOOR if "overflow" in case.reason else FLOOR
        )


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("op,case", KERNELS)
def test_fused_stays_within_the_error_budget(op, case, dtype, poisoned):
    """At most twice as far from the exact answer as the reference in the same dtype, plus a floor."""
    assert_within_the_budget(op, case, dtype)


def assert_within_the_budget(op, case, dtype):
    inputs = changed(case.inputs, lambda x: x.to(DEVICE, dtype), lambda mask: mask.to(DEVICE))
    exacts = listed(op.reference(*doubled(inputs)))
    plain = listed(op.reference(*inputs))
    answers = listed(op.fused(*changed(inputs, fenced)))
    assert [tuple(answer.shape) for answer in answers] == shapes(case)
    for answer, other, exact in zip(answers, plain, exacts):
        assert answer.dtype == other.dtype
        assert torch.isfinite(answer).all()
        assert distance(answer, exact) <= 2 * distance(other, exact) + FLOORS[dtype]


@pytest.mark.parametrize("start, fits", [(0, True), (8, True), (4, False)])
def test_descriptors_are_for_tensors_that_begin_at_whole_vectors(start, fits):
    """A GPU refuses others where the kernel is launched."""
    sizes = {"BLOCK_S": 64}
    table = {launch.UNTUNED: {(f"product {SUFFIX}", 16): sizes}}
    tensors = [torch.zeros(64).half().view(8, 8), torch.zeros(72).half()[start:][:64].view(8, 8)]
    assert (find_described_sizes(table, "product", *tensors) is sizes) == fits


@needs_triton
@pytest.mark.parametrize("programs", [0, 1])
@pytest.mark.parametrize("op,case", [(op, case) for op in ("linear_geglu", "linear_add") for case in cases_of(op)])
def test_products_by_descriptors_stay_within_the_error_budget(op, case, programs, poisoned, monkeypatch):
    """In fp16 with the rows of an H200; inputs that no descriptor fits are left to the kernel by pointers."""
    name, launched, op = launch.names_of(torch.device(DEVICE))[0], [], OPS[op]
    rows = op.BLOCKS.get("sm_90" if name == "cpu" else name, {})
    rows = {key: sizes | {"PROGRAMS": programs} for key, sizes in rows.items() if key[0].endswith(SUFFIX)}
    monkeypatch.setitem(op.BLOCKS, name, rows)
    multiply = op.multiply
    monkeypatch.setattr(op, "multiply", lambda *given, **named: launched.append(multiply(*given, **named)))
    assert_within_the_budget(op, case, torch.float16)
    assert bool(launched) == (bool(rows) and case.reason not in UNFIT)


@pytest.mark.parametrize("op", [op for op in OPS if op != "guided_step"])
@pytest.mark.parametrize("form", (plain, native), ids=("plain", "native"))
@torch.inference_mode()
def test_every_form_is_exact(op, form):
    """Of guided_step the native form is fp32, see test_guided_step.py."""
    for case in cases_of(op):
        inputs = doubled(case.inputs)
        for answer, exact in zip(listed(getattr(form, op)(*inputs)), listed(OPS[op].reference(*inputs)), strict=True):
            assert answer.dtype == exact.dtype and distance(answer.float(), exact.float()) <= 1e-7, case.reason
            assert answer.dtype == torch.bool or distance(answer, exact) <= 1e-12, case.reason


@pytest.mark.parametrize("name", [name for name in OPS if hasattr(OPS[name], "native")])
@torch.inference_mode()
def test_native_forms_are_near_in_fp32(name):
    for case in cases_of(name):
        inputs = changed(case.inputs, Tensor.clone)
        answers, exacts = OPS[name].native(*inputs), OPS[name].reference(*doubled(case.inputs))
        for answer, exact in zip(listed(answers), listed(exacts), strict=True):
            assert answer.dtype == torch.float32 and distance(answer, exact) <= 1e-4, case.reason
        for after, before in zip(tensors_of(inputs), tensors_of(case.inputs), strict=True):
            assert torch.equal(after.nan_to_num(), before.nan_to_num()), case.reason


def with_another_epsilon(value):
    """`value` with 0.5 for the small number that a norm adds to a variance."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(with_another_epsilon, value))
    return 0.5 if isinstance(value, float) and 0 < value <= 1e-4 else value


@needs_triton
@pytest.mark.parametrize("name", [op for op in OPS if "eps" in signature(OPS[op].reference).parameters])
def test_norms_add_the_epsilon_they_are_given(name):
    """All but one of the published models have the same one."""
    for case in cases_of(name)[1:4]:
        inputs = with_another_epsilon(case.inputs)
        exacts = listed(OPS[name].reference(*doubled(inputs)))
        if torch.equal(exacts[-1], listed(OPS[name].reference(*doubled(case.inputs)))[-1]):
            continue  # without a norm
        for form in {getattr(namespace, name) for namespace in (fused, plain, native) if hasattr(namespace, name)}:
            with torch.inference_mode():
                answers = listed(form(*inputs))
            for answer, exact in zip(answers, exacts, strict=True):
                assert distance(answer, exact) <= 1e-4, (form, case.reason)


def spread(x: Tensor) -> Tensor:
    """`x` as a part of wider rows, as packed products and slices are."""
    return torch.nn.functional.pad(x, (2, 3), value=torch.nan)[..., 2:-3]


def interleaved(x: Tensor) -> Tensor:
    """`x` with its second axis beside its last one in memory, as heads and channels are."""
    return spread(x.transpose(1, -2)).transpose(1, -2) if x.ndim > 2 else x


@needs_triton
@pytest.mark.parametrize("layout", [spread, interleaved])
@pytest.mark.parametrize("name", vars(fused))
def test_inputs_are_read_where_they_lie(name, layout):
    case = cases_of(name)[1]
    answers = listed(OPS[name].fused(*changed(case.inputs, layout)))
    for answer, expected in zip(answers, listed(OPS[name].reference(*case.inputs)), strict=True):
        assert answer.shape == expected.shape and distance(answer, expected) <= 1e-4


def gapped(x: Tensor) -> Tensor:
    """`x` with a number that spoils whatever reads it after each of its own."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@needs_triton
@pytest.mark.parametrize("are_vectors", [False, True], ids=["matrices", "vectors"])
@pytest.mark.parametrize("name", vars(fused))
def test_inputs_with_gaps_are_read_where_they_lie_or_refused(name, are_vectors):
    case = cases_of(name)[1]
    inputs = changed(case.inputs, lambda x: gapped(x) if (x.ndim < 2) == are_vectors else x)
    for form in (form for form in ("fused", "native") if hasattr(OPS[name], form)):
        try:
            with torch.inference_mode():
                answers = listed(getattr(OPS[name], form)(*inputs))
        except ValueError as refusal:
            assert "call contiguous()" in str(refusal) and are_vectors
            continue
        for answer, expected in zip(answers, listed(OPS[name].reference(*case.inputs)), strict=True):
            assert answer.shape == expected.shape and distance(answer, expected) <= 1e-4, form


@needs_triton
def test_a_shift_of_each_image_is_read_where_it_lies():
    parts, statistics, shift, *rest = cases_of("group_norm_parts")[1].inputs
    shift = torch.stack([shift, 2 * shift])
    expected = OPS["group_norm_parts"].reference(parts, statistics, shift, *rest)
    assert distance(OPS["group_norm_parts"].fused(parts, statistics, gapped(shift), *rest), expected) <= 1e-4


def test_the_numbers_of_a_step_may_be_of_another_precision():
    output, latents, history, numbers = cases_of("guided_step")[1].inputs
    expected = guided_step.reference(output, latents, history, numbers)
    assert distance(guided_step.native(output, latents, history, numbers.double()), expected) <= 1e-4


def cut_once(value):
    """`value` with one of its tensors one shorter along one of its axes, for each of them."""
    if isinstance(value, Tensor):
        yield from (value.narrow(axis, 0, size - 1) for axis, size in enumerate(value.shape) if size > 1)
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield from (type(value)([*value[:place], other, *value[place + 1 :]]) for other in cut_once(part))


@needs_triton
@pytest.mark.parametrize("name", vars(fused))
def test_what_does_not_fit_is_never_read_beyond_its_end(name):
    """An input that is too short is refused, unless the reference makes sense of it, too."""
    forms = [getattr(OPS[name], form) for form in ("fused", "native") if hasattr(OPS[name], form)]
    for form, inputs in ((form, inputs) for form in forms for inputs in cut_once(cases_of(name)[1].inputs)):
        try:
            with torch.inference_mode():
                answers = listed(form(*inputs))
        except (ValueError, RuntimeError):
            continue
        for answer, expected in zip(answers, listed(OPS[name].reference(*inputs)), strict=True):
            assert answer.shape == expected.shape and distance(answer, expected) <= 1e-4, form


def test_namespaces_offer_every_op():
    assert set(vars(reference)) == set(vars(plain)) == set(vars(native)) == set(OPS)
    assert set(vars(fused)) == {name for name, op in OPS.items() if hasattr(op, "fused")}


def test_narrow_levels_are_summed_in_fp32():
    features, maps = [torch.randn(1, 64, 8, 8) for _ in range(12)], [torch.softmax(torch.randn(1, 8, 64, 77), -1)]
    weight = torch.randn(32, 12 * 64 + 8 * 77, 1, 1) * 0.03
    exact = pyramid.reference(*doubled((features, maps, weight)), 8)
    narrow = [[x.bfloat16() for x in tensors] for tensors in (features, maps)]
    budget = distance(pyramid.reference(*narrow, weight.bfloat16(), 8), exact)
    assert distance(pyramid.plain(*narrow, weight.bfloat16(), 8), exact) <= 2 * budget


def coefficients(update, guidance: float, slots: int) -> list[float]:
    """One call's numbers: guidance, sample, both of the entry, this entry's weight, then `slots` earlier ones'."""
    earlier = update.weights[1:]
    return [guidance, update.sample, *update.entry, update.weights[0], *earlier, *[0.0] * (slots - len(earlier))]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guided_step_is_the_sampler(sampler):
    """Call by call the state that ReferenceSampler reaches; the slots beyond what a call reads may hold anything."""
    if walk.open_sampler(sampler).calls:
        scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        schedule = walk.make_schedule(scheduler, sampler, 7)
    else:
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
        schedule = walk.make_schedule(scheduler, sampler, 7, flow=FlowRule())
    state = walk.ReferenceSampler(schedule, 7.5, torch.randn(2, 4, 3, 3, dtype=torch.float64))
    slots = schedule.memory
    for k, update in enumerate(schedule.updates):
        output = torch.randn(4, 4, 3, 3, dtype=torch.float64)
        history = torch.full((slots, 2, 4, 3, 3), float("nan"), dtype=torch.float64)
        for slot, entry in enumerate(state.history):
            history[slot] = entry
        latents = state.origin if update.restarts else state.latents
        numbers = torch.tensor(coefficients(update, 7.5, slots), dtype=torch.float64)
        answer, entry = guided_step.reference(output, latents, history, numbers)
        state.step(k, output)
        torch.testing.assert_close(answer, state.latents)
        if update.is_kept and slots:
            torch.testing.assert_close(entry, state.history[0])


def audit(*flags, program=("-m", "bench")):
    """The audit as a user runs it; the interpreter's switch would leave nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *program, "kernels", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )


# The short form compiles the first launch of every kernel, the long one all.
FIRST = """
import os, sys
from bench.__main__ import dispatch, run_command
from bench.kernels import audit
every, done = audit.launches, set()
def first(*given):
    for case, launch in every(*given):
        if launch.kernel not in done:
            done.add(launch.kernel)
            yield case, launch
audit.launches = first
code = run_command(dispatch)
sys.stdout.flush()
os._exit(code)  # to take apart what torch and Triton imported takes a second
"""
DESCRIBED = "described_product"
PAIRS = [(dtype, "80,90,100,120") for dtype in ("fp16", "bf16", "fp32")] if IS_LONG else [("fp16", "90")]


@needs_triton
@pytest.mark.parametrize("dtype,targets", PAIRS)
def test_every_kernel_compiles_without_spills(dtype, targets):
    """For GPUs that need not be there: every storage type with every target in the long form, one pair else."""
    program = ("-m", "bench") if IS_LONG else ("-c", FIRST)
    ran = audit("--audit", "--json", "--dtypes", dtype, "--targets", targets, program=program)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    launched = {
        (name.strip("_").removesuffix("_kernel"), gpu)
        for op in FILES
        for name in vars(op)
        for gpu in (f"sm_{target}" for target in targets.split(","))
        if name.endswith("_kernel") and gpu not in getattr(op, "LIBRARY", ())
    }
    if dtype == "fp32":  # by descriptors 16 bits alone, and on a GPU with a row of it
        launched = {(kernel, gpu) for kernel, gpu in launched if kernel != DESCRIBED}
    launched -= {(DESCRIBED, gpu) for gpu in ("sm_80", "sm_100", "sm_120")}
    assert {(row["kernel"], row["target"]) for row in said["kernels"]} == launched
    for row in said["kernels"]:
        assert (
            row["spills"] == 0
            and 0 < row["registers"] <= 255
            and row["shared"] <= said["shared_limit"][row["target"].removeprefix("sm_")]
        )


@pytest.mark.parametrize("largest, parts", [(2 * 3 * 8 * 8, [2, 2, 1]), (1, [1] * 5), (5 * 3 * 8 * 8, [5])])
def test_images_too_large_for_one_resize_on_a_gpu_are_resized_in_parts(monkeypatch, largest, parts):
    """PyTorch's kernel for channels-last images takes fewer than 2^31 - 1 numbers."""
    x, sizes = noise(5, 3, 4, 6).contiguous(memory_format=torch.channels_last), []
    whole, interpolate = upsample_concat.resize(x, 8), torch.nn.functional.interpolate
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(upsample_concat, "LARGEST_RESIZED", largest)
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda x, **options: sizes.append(len(x)) or interpolate(x, **options)
    )
    resized = upsample_concat.resize(x, 8)
    assert sizes == parts and torch.equal(resized, whole) and resized.stride() == whole.stride()


def test_wide_heads_whose_tiles_not_every_gpu_holds_are_left_to_pytorch(monkeypatch):
    """Theirs take 108 KiB of shared memory and more in fp16, where GPUs like sm_86 and sm_120 have 99."""
    monkeypatch.setattr(attention, "_attention_kernel", None)
    q, k, v = noise(1, 1030, 3, 1, 136).permute(2, 0, 3, 1, 4)
    assert distance(fused.attention(q[:, :, :3], k, v), attention.reference(q[:, :, :3], k, v)) <= 1e-6
    monkeypatch.setattr(query_attention, "_query_attention_kernel", None)
    inputs = *noise(3, 1, 5, 130), 1, *noise(2, 5, 130)
    assert torch.equal(fused.query_attention(*inputs), reference.query_attention(*inputs))


@needs_triton
@pytest.mark.parametrize("name", [name for name in vars(fused) if hasattr(OPS[name], "BLOCKS")])
def test_the_largest_batch_needs_no_more_blocks_than_a_gpu_takes(name, monkeypatch):
    """With the rows of a GPU that was not measured, of both halves of a guided call."""
    grids: list[tuple[int, ...]] = []

    class Launched:
        def __getitem__(self, grid):
            return lambda *given, **named: grids.append(grid)

    for module in FILES:
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Launched())
    empty = partial(torch.empty, dtype=torch.float16, device="meta")
    sizes = sizes_of(name)
    assert sizes is not None
    for _, inputs in sizes(lambda *shape: empty(shape), batch=2 * LARGEST_BATCH):
        OPS[name].fused(*inputs)
    assert grids and all(count <= most for grid in grids for count, most in zip(grid, LARGEST_GRID))


COMPILED = """
import re
from bench.kernels import audit
read = audit.taken
def taken(made):
    code = audit.asked("nvdisasm", made, "-c")
    print(*(sorted(set(re.findall(name, code))) for name in (r"HGMMA[.]64x\\d+", r"UTMALDG[.]\\dD", r"UTMASTG[.]\\dD")))
    return read(made)
audit.taken = taken
for case, launch in audit.launches("linear_geglu", "fp16", "90"):
    print(launch.kernel.__name__, audit.resources(launch, "90"))
"""


@long_test
@needs_triton
def test_products_by_descriptors_load_multiply_and_store_as_they_should():
    """One product of hidden values and gates beside each other, whose blocks the copy engine loads and stores."""
    ran = audit(program=("-c", COMPILED))
    assert "['HGMMA.64x256'] ['UTMALDG.2D', 'UTMALDG.3D'] ['UTMASTG.2D']" in ran.stdout, ran.stdout + ran.stderr


@long_test
@needs_triton
@pytest.mark.parametrize(
    "op,target,sizes,said",
    [
        ("layer_norm", "120", "1, BLOCK_S=4", "[1-9][0-9]* bytes of stack"),  # one warp holds what four should
        (
            "attention_capture",
            "120",
            "8, bits=(16,), BLOCK_S=128, BLOCK_D=128, BLOCK_F=512",
            "of 101376 bytes of shared",
        ),
        # ptxas of CUDA 12.8 puts addresses of tiles of 16 channels together from the wrong register, for sm_90
        ("attention_capture", "90", "8, bits=(16,), BLOCK_S=64, BLOCK_D=16, BLOCK_F=64", "[1-9] spoilt addresses"),
    ],
)
def test_the_audit_finds_what_does_not_fit(op, target, sizes, said):
    """In the rows of a kind of GPU, which no other takes."""
    plant = (
        f"from datasetdm_fast.kernels import OPS, launch; OPS['{op}'].BLOCKS['sm_{target}'] = "
        f"launch.block_sizes('{op}', {sizes})"
    )
    run = "import sys; from bench.__main__ import dispatch, run_command; sys.exit(run_command(dispatch))"
    flags, targets = ("--audit", "--json", "--ops", op, "--dtypes", "fp16"), f"80,{target}"
    ran = audit(*flags, "--targets", targets, program=("-c", f"{plant}; {run}"))
    assert ran.returncode == 4, ran.stderr
    cause, remedy = ran.stderr.splitlines()
    assert re.search(said, cause) and f"worst {op} (" in cause and "smaller blocks" in remedy
    rows = json.loads(ran.stdout)["kernels"]
    assert {row["target"] for row in rows} == {"sm_80", f"sm_{target}"}
    other = [row for row in rows if row["target"] == "sm_80"]
    assert all(row["spills"] == row["spoilt"] == 0 and row["shared"] <= 163 * 1024 for row in other)


def test_an_address_is_spoilt_where_one_register_stands_for_both_halves():
    """The descriptor of an address: `UR10` is added to for the lower half, and stands for zero in the upper one."""
    from bench.kernels import sass

    lower, zero, upper = (
        "/*04f0*/ UIADD3 UR25, UP0, UR10, 0x20, URZ ;",
        "/*0560*/ UMOV UR10, URZ ;",
        "/*0570*/ UIADD3.X UR27, UR10, -0x3ffffff0, URZ, UP0, !UPT ;",
    )
    other = "/*0500*/ USHF.R.U32.HI UR37, URZ, 0x4, UR5 ;"
    assert sass.spoilt("\n".join((lower, other, upper))) == ["UIADD3.X UR27, UR10, -0x3ffffff0, URZ, UP0"]
    assert sass.spoilt("\n".join((lower, zero, other, upper))) == []
    assert sass.spoilt("\n".join((lower, upper.replace("UP0", "UP1")))) == []


@long_test
@needs_triton
def test_the_audit_refuses_in_two_lines():
    for flags in ((), ("--audit", "--ops", "softmax"), ("--audit", "--ops", "mask_head")):
        ran = audit(*flags)
        assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 2
    assert "mask_head has no kernel with block sizes" in ran.stderr


@needs_triton
def test_an_audit_of_nothing_is_refused(monkeypatch):
    """An op whose kernel is launched at no model size would end with 0, as if it had been compiled."""
    from bench.kernels import audit as program

    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    monkeypatch.setitem(OPS, "idle", SimpleNamespace(BLOCKS={"untuned": {}}, fused=None))
    monkeypatch.setitem(sys.modules, "bench.kernels.inputs.idle", SimpleNamespace(sizes=lambda empty: ()))
    with pytest.raises(Refused, match="nothing was audited") as refusal:
        program.main(["--audit", "--ops", "idle"])
    assert refusal.value.exit_code == 2


def test_fused_falls_back_only_where_no_kernel_runs(monkeypatch):
    """On a CPU without the interpreter the answer is the reference's, whatever the dtype; a GPU tensor is never handed
    to it.
    """
    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    x, y = torch.randn(2, 1, 3, 2, 4, dtype=torch.float64)
    assert torch.equal(fused.upsample_concat([x, y], 4), reference.upsample_concat([x, y], 4))
    if launch.triton is not None:
        with pytest.raises(ValueError, match="upsample_concat: torch.float64 has no kernel"):
            fused.upsample_concat([x.to("meta"), y.to("meta")], 4)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if hasattr(op, "fused")])
def test_every_op_is_the_reference_on_a_cpu_without_the_interpreter(name, monkeypatch):
    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    few = [case.inputs for case in cases_of(name) if sum(x.numel() for x in tensors_of(case.inputs)) < 50_000]
    assert few
    for inputs in few:  # the smallest has one of each size, which hides a changed order
        answers = listed(OPS[name].fused(*changed(inputs, Tensor.clone)))
        for answer, wanted in zip(answers, listed(OPS[name].reference(*inputs)), strict=True):
            assert distance(answer, wanted) <= 1e-4  # a chain of ops may round otherwise


def test_heads_and_numbers_that_a_form_leaves_to_another_are_answered(monkeypatch):
    q, k = torch.randn(1, 1, 2, 257), torch.randn(1, 1, 3, 257)
    shares = fused.attention_shares(q, k, torch.ones(1, 1, 2), None, None)
    assert distance(shares, reference.attention_shares(q, k, torch.ones(1, 1, 2), None, None)) <= FLOOR
    monkeypatch.setattr(attention_shares, "plain", lambda q, *others: q.shape[3])
    for width, dtype in ((129, torch.float32), (257, torch.bfloat16)):  # more than 512 bytes
        q, k = noise(1, 1, 2, width).to(dtype), noise(1, 1, 3, width).to(dtype)
        assert fused.attention_shares(q, k, torch.ones(1, 1, 2), None, None) == width
    given = list(cases_of("guided_step")[-1].inputs)
    for place in (1, 2):  # latents, history
        inputs = [*given[:place], given[place].double(), *given[place + 1 :]]
        assert torch.equal(native.guided_step(*inputs), reference.guided_step(*inputs))


def test_channels_that_do_not_lie_side_by_side_are_captured_like_others():
    inputs = noise(1, 2, 5, 16), noise(1, 2, 7, 16), noise(1, 2, 7, 16), noise(2, 7, 4)
    apart = [x.mT.contiguous().mT for x in inputs]
    for ours, theirs in zip(fused.attention_capture(*apart), reference.attention_capture(*inputs), strict=True):
        assert distance(ours, theirs) <= 1e-5


def test_a_wide_depth_head_adds_up_all_its_parts(monkeypatch):
    """Of the published width each form holds some hidden channels at once."""
    weights = noise(40, 3, 3, 3), noise(40), noise(1, 40, 3, 3), noise(1)
    x, exact = noise(2, 3, 4, 4), depth_head.reference(*doubled((noise(2, 3, 4, 4), *weights)), (7, 9))
    for name in ("CHUNK", "WIDE_CHUNK", "SLICE"):
        monkeypatch.setattr(depth_head, name, 16)
    with torch.no_grad():
        for form in (depth_head.plain, depth_head.fused, depth_head.native):
            assert distance(form(x, *weights, (7, 9)), exact) <= 1e-6
    with pytest.raises(ValueError, match="depth_head"):
        depth_head.fused(x, *weights[:3], noise(2), (7, 9))


def test_heads_that_do_not_lie_side_by_side_are_left_to_pytorch():
    q, k, v = noise(1, 2, 1030, 120).split(40, 3)
    assert distance(fused.attention(q[:, :, :3], k, v), attention.reference(q[:, :, :3], k, v)) <= 1e-6


def test_tensors_of_two_devices_a_missing_triton_and_wide_rows_are_told(monkeypatch):
    x, far = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2, device="meta")
    with pytest.raises(ValueError, match="upsample_concat: the tensors lie on cpu and meta, move them"):
        fused.upsample_concat([x, far], 4)
    for name, rest in (("layer_norm", (1e-5,)), ("ada_norm", (None,) * 6 + (1e-5,))):
        wide = torch.ones(1, 1, OPS[name].WIDEST + 1, device="meta")
        row = [wide[0, 0]] * 2 if name == "layer_norm" else []
        with pytest.raises(Missing if launch.triton is None else ValueError, match=f"{name}: .*(registers|Triton)"):
            OPS[name].fused(wide, *row, *rest)
    monkeypatch.setattr(launch, "triton", None)
    with pytest.raises(Missing, match="upsample_concat: Triton is not installed, the kernels for meta need it"):
        fused.upsample_concat([far, far], 4)
    assert launch.names_of.__wrapped__(torch.device("cuda")) == ("without triton",)


REFUSED = {
    "layer_norm: weight": lambda: fused.layer_norm(torch.ones(2, 8), torch.ones(7), torch.ones(8), 1e-5),
    "layer_norm: shift": lambda: fused.layer_norm(torch.ones(2, 8), *torch.ones(2, 8), 1e-5, torch.ones(7)),
    "linear_geglu: weight": lambda: fused.linear_geglu(torch.ones(2, 3), torch.ones(5, 3), torch.ones(5)),
    "linear_add: width": lambda: fused.linear_add([torch.ones(1, 2, 3)], torch.ones(4, 5), None, torch.ones(1, 2, 4)),
    "linear_add: residual": lambda: fused.linear_add(
        [torch.ones(1, 2, 3)], torch.ones(4, 3), None, torch.ones(1, 3, 4)
    ),
    "linear_add: bias": lambda: fused.linear_add(
        [torch.ones(1, 2, 3)], torch.ones(4, 3), torch.ones(3), torch.ones(1, 2, 4)
    ),
    "add_statistics: residual": lambda: fused.add_statistics(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 1), None),
    "add_statistics: bias": lambda: fused.add_statistics(torch.ones(1, 4, 2, 2), None, torch.ones(3)),
    "place_statistics: 9 channels": lambda: fused.place_statistics(torch.ones(1, 9, 2, 2), torch.ones(2)),
    "group_norm_parts: 4 channels in 3 groups": lambda: fused.group_norm_parts(
        [torch.ones(1, 4, 2, 2)], [], None, torch.ones(4), torch.ones(4), 3, 1e-5
    ),
    "group_norm_parts: weight": lambda: fused.group_norm_parts(
        [torch.ones(1, 4, 2, 2)], [], None, torch.ones(3), torch.ones(4), 2, 1e-5
    ),
    "group_norm_parts: shift": lambda: fused.group_norm_parts(
        [torch.ones(3, 4, 2, 2)], [], torch.ones(2, 4), *torch.ones(2, 4), 2, 1e-5
    ),
    "guided_step: output": lambda: fused.guided_step(
        torch.ones(3, 4, 2, 2), torch.ones(1, 4, 2, 2), torch.ones(0, 1, 4, 2, 2), torch.ones(5)
    ),
    "guided_step: history": lambda: native.guided_step(
        torch.ones(2, 4, 2, 2), torch.ones(1, 4, 2, 2), torch.ones(1, 1, 4, 2, 1), torch.ones(6)
    ),
    "attention_capture: 2 queries over 0 tokens": lambda: fused.attention_capture(
        torch.ones(1, 1, 2, 8), *[torch.ones(1, 1, 0, 8)] * 2, torch.ones(1, 0, 4)
    ),
    "attention_capture: 0 features": lambda: fused.attention_capture(
        *[torch.ones(1, 2, 4, 8)] * 3, torch.ones(2, 4, 0)
    ),
    "attention_capture: weight": lambda: fused.attention_capture(*[torch.ones(1, 2, 4, 8)] * 3, torch.ones(5, 2, 4)),
    "joint_qkv: turns": lambda: fused.joint_qkv(
        [torch.ones(2, 3, 48), torch.ones(2, 5, 48)],
        [(torch.ones(8), torch.ones(8))] * 2,
        torch.ones(2, 7, 4, 2),
        2,
        8,
        1e-6,
    ),
    "upsample_concat: two batches": lambda: fused.upsample_concat([torch.ones(1, 4, 2, 2), torch.ones(2, 4, 2, 2)], 2),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_inputs_are_refused_in_a_sentence(case):
    with pytest.raises(ValueError, match=rf"^{case.split(':')[0]}: .*\[.* do not fit ") as refusal:
        REFUSED[case]()
    assert "\n" not in str(refusal.value)


def test_queries_share_no_blocked_cell():
    """A query that blocked all but one cell returns that cell's value."""
    q, k, v, _ = (noise.double() for noise in torch.randn(4, 1, 2, 3, 4))
    blocked = torch.ones(1, 3, 3, dtype=torch.bool)
    blocked[0, :, 1] = False
    answer = reference.masked_attention(q, k, v, blocked)
    assert torch.allclose(answer, v[:, :, 1:2].expand_as(answer))


def test_a_cell_just_below_zero_is_seen_where_its_sigmoid_rounds_to_one_half():
    k, v = noise(2, 1, 2, 16, 1).half()[..., 0]
    places, logits = torch.zeros(2, 2, 16, dtype=torch.float16), torch.tensor([[[-1e-4, -3.0]]], dtype=torch.float16)
    answer = fused.query_attention(k[:, :1], k, v, 1, places[0, :1], places[1], logits)
    assert torch.equal(answer, v[:, :1])


def test_bare_import_is_refused():
    ran = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "import datasetdm_fast.kernels" in ran.stderr.splitlines()[-1]


def test_transformers_may_look_for_a_package_of_that_name():
    """Beside a checkout it finds this folder."""
    code = "exec('import kernels; print(vars(kernels).get(\"OPS\"))', {'__name__': 'transformers.integrations'})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "None\n"), ran.stderr
