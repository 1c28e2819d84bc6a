"""What an engine is opened with: threads, precision, guidance, decoders and the settings of the process around it."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from datasetdm_fast.config import HALF
from datasetdm_fast.engine import engines, loading
from datasetdm_fast.engine.decoders.trunk import SpectralConv2d
from datasetdm_fast.engine.engines import device
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.errors import Missing, Refused


@pytest.fixture
def built(monkeypatch):
    """The engines that would be built: name, model, decoders and choices."""
    calls = []
    monkeypatch.setattr(engines, "build_engine", lambda *given, **choices: calls.append((*given, choices)))
    return calls


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.mark.parametrize("choice", [{"decoder": "nowhere"}, {"lora": ["nowhere.safetensors"]}, {"model": "demoo"}])
def test_what_is_not_there_is_refused_before_a_model_is_loaded(choice, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    with pytest.raises((Missing, Refused), match="no such|neither one of"):
        engines.open_engine(**choice)


def test_an_engine_has_the_threads_and_the_guidance_that_were_asked_for(built, tiny):
    before = torch.get_num_threads()
    try:
        for threads, guidance in ((3, 0.5), (0, 0.0)):
            engines.open_engine("another", None, loaded=tiny, threads=threads, guidance=guidance, device="cpu")
            (name, model, decoders, choices) = built[-1]
            assert (name, model.name, model.scale, decoders) == ("auto", "tiny", guidance, {})
            assert choices == {"dtype": "auto", "device": "cpu"} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("half", "engine", "halves", "dtype"),
    [
        ("bf16", "auto", ("fp16", "bf16"), "bf16"),
        ("bf16", "fast", ("bf16",), "bf16"),
        ("fp16", "fast", ("bf16",), "auto"),
        ("bf16", "torch", ("fp16", "bf16"), "auto"),
        ("", "fast", ("fp16", "bf16"), "auto"),
    ],
)
def test_half_precision_is_one_that_device_engine_and_family_have(
    built, tiny, monkeypatch, half, engine, halves, dtype
):
    monkeypatch.setattr(device, "half_of", lambda place: half)
    model = replace(tiny, backbone=replace(tiny.backbone, halves=halves))
    engines.open_engine("tiny", None, loaded=model, engine=engine, dtype=HALF, device="cpu")
    assert built[-1][-1]["dtype"] == dtype


def test_decoders_are_loaded_in_the_order_of_their_tasks_with_the_outlines_asked_for(tiny):
    demo = load_model("demo")
    for outlines, expected in (("auto", ["decoder", "image"]), ("image", ["image"] * 2), ("decoder", ["decoder"] * 2)):
        decoders, told = engines.load_decoders(demo, "demo", ["pose", "depth"], outlines=outlines)
        assert list(decoders) == list(told) == ["pose", "depth"]
        assert [decoder.config.outlines for decoder in decoders.values()] == expected
    seeded, told = engines.load_decoders(tiny, "demo", ["depth"])
    assert told["depth"]["digest"] == "seeded: depth" and list(seeded) == ["depth"]
    assert not any(isinstance(module, SpectralConv2d) for module in seeded["depth"].modules())
    assert engines.load_decoders(tiny, None) == ({}, {})


def test_a_task_without_a_decoder_of_its_name_tells_what_there_is():
    known = {"depth:near": 1, "pose": 2}

    def check(*tasks):
        return engines.check_known(tasks or None, known, ["pose"], "some/folder")

    assert check() == ["pose"] and list(check("pose", "depth:near")) == ["pose", "depth:near"]
    with pytest.raises(Refused, match="--task depth: some/folder holds several .*none is called depth\n.*depth:near"):
        check("depth")
    with pytest.raises(Refused, match="--task depth:far: some/folder holds no decoder of this name.*\n.*depth:near"):
        check("depth:far")
    with pytest.raises(Refused, match="--task pose:a: some/folder holds no decoder of this name.*\n.*from pose"):
        check("pose:a")
    with pytest.raises(Missing, match="--task semantic: .*no decoder for it, only for pose\n.*write --task pose"):
        check("semantic")


def test_the_digest_of_a_decoder_is_that_of_both_of_its_files(tmp_path):
    place = tmp_path / "depth"
    place.mkdir()
    found = []
    for config, weights in ((b"{}", b"1"), (b"{ }", b"1"), (b"{}", b"2"), (b"{}", b"1")):
        (place / "config.json").write_bytes(config)
        (place / "model.safetensors").write_bytes(weights)
        found.append(engines.describe_decoders({"depth": place}, ["depth"])["depth"]["digest"])
    assert len(set(found)) == 3 and found[0] == found[3]


def test_options_of_another_engine_are_refused_with_their_value():
    for options in ({"provider": "cpu"}, {"streams": 2}):
        with pytest.raises(Refused, match="the engine is fast"):
            engines.check_engine("fast", **options)
    engines.check_engine("fast", provider="auto", streams=0)


def test_within_an_engine_precision_and_device_are_pytorchs_own():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), engines.in_own_precision():
            with engines.in_own_precision():
                assert torch.ones(1).dtype == torch.float32 and torch.ones(1).device.type == "cpu"
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert torch.ones(1).dtype == torch.float32  # the inner block ends, the outer one goes on
        assert torch.ones(1).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_an_interrupt_while_an_engine_changes_the_precision_leaves_that_of_a_program(monkeypatch):
    before, conv = torch.get_default_dtype(), torch.backends.mkldnn.conv.fp32_precision
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "set_default_dtype", Mock(side_effect=[KeyboardInterrupt, None]))
        with engines.in_own_precision():
            pytest.fail("the block ran")
    assert not engines._REPLACED
    assert (torch.get_default_dtype(), torch.backends.mkldnn.conv.fp32_precision) == (before, conv)


def test_after_an_engine_operations_still_follow_the_precision_of_a_program():
    backend = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    try:
        for precision in ("bf16", "ieee", "tf32"):
            torch.backends.fp32_precision = precision
            backend.matmul.fp32_precision = "bf16"  # of its own
            with engines.in_own_precision(), engines.in_own_precision():
                assert backend.conv.fp32_precision == backend.matmul.fp32_precision == "ieee"
            assert (backend.conv.fp32_precision, backend.matmul.fp32_precision) == (precision, "bf16")
    finally:
        torch.backends.fp32_precision = "none"
        backend.matmul.fp32_precision = before


def test_an_engine_of_a_gpu_leaves_a_program_its_choice_of_algorithms():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        for chosen in ((True, False), (False, True)):
            cudnn.benchmark, cudnn.deterministic = chosen
            with engines.in_own_precision():
                with engines.in_own_precision():
                    device.choose_by_shape(torch.device("cuda"))
                assert (cudnn.benchmark, cudnn.deterministic) == (False, True)  # another thread may be amid a call
            assert (cudnn.benchmark, cudnn.deterministic) == chosen
    finally:
        cudnn.benchmark, cudnn.deterministic = before


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_an_engine_of_a_gpu_leaves_a_program_its_precision(chosen):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(chosen)
        for is_of_gpu in (False, True):
            with engines.in_own_precision():
                if is_of_gpu:
                    torch.backends.cuda.matmul.allow_tf32 = False
            assert torch.get_float32_matmul_precision() == chosen  # and torch.compile can ask for it
            assert torch.backends.cuda.matmul.allow_tf32 == (chosen != "highest")
    finally:
        torch.set_float32_matmul_precision(before)
