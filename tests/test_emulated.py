"""What a GPU's precisions do to images and labels, emulated on a CPU: fp16 and bf16 as storage, sums in fp32, and TF32
in the convolutions of fp32, through the gates of verify.
"""

import functools
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bench.decoders import load_decoders
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.fast import FastEngine, on_cpu
from datasetdm_fast.engine.engines.fast import engine as base
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.prompts import make_plan
from datasetdm_fast.engine.loop.recipe import make_recipe, prompt_words
from datasetdm_fast.kernels import plain
from datasetdm_fast.runs.agreement import observe, verify
from datasetdm_fast.runs.agreement.verify import EXACT
from datasetdm_fast.runs.jobs.prompt_files import read_source
from datasetdm_fast.runs.run_settings import PromptSettings

LONG = os.environ.get("DATASETDM_LONG_TESTS") == "1"
HALVES = (torch.float16, torch.bfloat16)
CALLS = ("encode_text", "encode_classes", "denoise", "denoise_and_capture", "annotate", "decode_image")
# Operations that a GPU computes in fp32, whatever they are stored as.
WIDE = (
    "convolution mm addmm bmm baddbmm native_group_norm native_layer_norm gelu silu sigmoid _softmax "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math"
).split()
TASKS = ("semantic", "instance", "depth", "pose")


def to_tf32(x: Tensor) -> Tensor:
    """fp32 to 10 bits of mantissa, to nearest."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).reshape(x.shape)


class Emulated(TorchDispatchMode):
    """Operations on 16-bit tensors as a GPU has them, and where `has_tf32` convolutions of fp32 in TF32."""

    def __init__(self, has_tf32: bool):
        super().__init__()
        self.has_tf32 = has_tf32

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        # In inference mode operations arrive whole; their parts are what a GPU runs.
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite):
            with self:
                if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return parts
        stored = next((x.dtype for x in args if isinstance(x, Tensor) and x.dtype in HALVES), None)
        if name in WIDE and stored:
            widened = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in HALVES else x, args)
            return tree_map(lambda x: x.to(stored) if isinstance(x, Tensor) else x, func(*widened, **kwargs))
        if name == "convolution" and self.has_tf32 and args[0].dtype == torch.float32:
            args = (to_tf32(args[0]), to_tf32(args[1]), *args[2:])
        return func(*args, **kwargs)


def emulated(engine, has_tf32: bool):
    """The engine with its calls as a GPU computes them."""

    def as_on_gpu(method):
        def call(*arguments, **named):
            with Emulated(has_tf32):
                return method(*arguments, **named)

        return call

    for name in CALLS:
        setattr(engine, name, as_on_gpu(getattr(engine, name)))
    return engine


@pytest.fixture(scope="module")
def reference():
    model, decoders = load_model("demo"), load_decoders("demo")
    return build_engine("torch", model, {task: decoders[task] for task in TASKS}, device="cpu")


def judged(reference, dtype: str, number: int, steps: int) -> verify.Verdict:
    """The verdict on the fast engine as it is on a GPU."""
    in_turn = SimpleNamespace(map=lambda call, given: [call(*one) for one in given])  # a mode is of one thread
    rounded = functools.partial(emulated, has_tf32=False)
    with (
        mock.patch.object(base, "resolve_precision", lambda name, device: name),
        mock.patch.object(base, "operations", lambda device, dtype: plain),
        mock.patch.object(on_cpu, "pack_layers", lambda module: module),
        mock.patch.object(on_cpu, "Lanes", lambda: in_turn),
        mock.patch.object(verify, "Rounded", lambda *given: rounded(observe.Rounded(*given))),
    ):
        own = FastEngine(reference.model, reference.decoders, dtype=dtype, device="cpu", ops=plain)
        engine = emulated(own, has_tf32=True)
        recipe = make_recipe(reference, TASKS, steps=steps, profile="0.14.0")
        words, source = prompt_words(reference, TASKS, ()), read_source(PromptSettings(), has_captions=True)
        tokenizer = reference.model.tokenizer
        plan = make_plan(source, tokenizer, number=number, seed=0, batch_size=number, words=words)
        return verify.verify(engine, reference, [plan.request(k) for k in range(number)], recipe, number)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "tf32"])
@pytest.mark.skipif(not LONG, reason="the long form only")
def test_the_precisions_of_a_gpu_pass_the_gates(reference, dtype, record_property):
    verdict = judged(reference, dtype, number=2, steps=4)
    rows = {row.measure: row for row in verdict.rows}
    shares = {
        name: max(row.median / row.limit[0], row.p99 / row.limit[1]) for name, row in rows.items() if row.limit[0]
    }
    nearest = max(shares, key=shares.get)
    held = sum(row.is_passed for row in verdict.rows)
    record_property(
        "told", f"{dtype} emulated: {held} of {len(rows)} gates hold, {nearest} has {shares[nearest]:.0%} of its limit"
    )
    assert verdict.agrees, [row for row in verdict.rows if not row.is_passed]
    # What is emulated is no fp32: its own gates would see it.
    assert rows["call"].median > EXACT["call"][0] and rows["level low"].p99 > EXACT["level"][1]


def test_tf32_keeps_ten_bits_and_half_precision_sums_in_fp32():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11 + 2**-20, 1 + 2**-12, -3.0])
    assert to_tf32(x).tolist() == [1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -3.0]
    ones, small = torch.ones(1, 4097, dtype=torch.float16), torch.full((1, 4097), 1 + 2**-12)
    weight = small[:, :, None, None]
    with Emulated(has_tf32=True), torch.inference_mode():
        total = ones @ ones.T
        image = torch.nn.functional.conv2d(small[:, :, None, None], weight)
    assert total.dtype == torch.float16 and float(total) == 4096.0  # the nearest fp16; sums in fp16 end at 2048
    assert float(image) == 4097.0 and float(small @ small.T) > 4098
