"""What is told of an installed TensorRT, the driver and the GPUs, and what a builder of plans is asked for."""

import ctypes
import json
from enum import IntEnum
from types import SimpleNamespace

import fake_tensorrt
import pytest

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.tensorrt import flavours, plan_builder


class Driver:
    """libcuda.so.1 of CUDA 12.8 and of GPUs of these capabilities, the second of which does not answer."""

    def __init__(self, gpus, code=0):
        self.gpus, self.code = gpus, code

    def cuDriverGetVersion(self, version):
        version._obj.value = 12080

    def cuInit(self, flags):
        return self.code

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.gpus)

    def cuDeviceGet(self, device, place):
        device._obj.value = place
        return self.gpus[place] is None

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.gpus[device.value][{75: 0, 76: 1}[attribute]]


def test_gpus_are_read_from_the_driver(monkeypatch, tmp_path):
    libraries = {"libcuda.so.1": Driver([(9, 0), None, (8, 6)])}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libraries[name])
    assert flavours.gpu_capabilities() == ["sm90", "sm86"]
    monkeypatch.setattr(flavours, "Path", lambda _: tmp_path / "version")
    assert flavours.describe_driver() == "driver for CUDA 12, with 3 GPUs"
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\n")
    assert flavours.describe_driver() == "driver 570.86.15, CUDA 12.8, with 3 GPUs"
    libraries["libcuda.so.1"] = Driver([(8, 6)], code=100)
    assert flavours.gpu_capabilities() == [] and flavours.describe_driver().endswith("which reports error 100")

    def missing(name):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert flavours.gpu_capabilities() == []
    assert flavours.describe_driver() == "no NVIDIA driver was found (libcuda.so.1)"


def test_one_gpu_that_is_served_is_enough(monkeypatch):
    flavour = fake_tensorrt.FakeFlavour(fake_tensorrt)
    monkeypatch.setattr(flavours, "find_flavour", lambda: flavour)
    monkeypatch.setattr(flavours, "gpu_capabilities", lambda: ["sm90", "sm89", "sm86"])
    assert flavours.require_gpu() is flavour
    assert flavours.choose_target("") == (flavour, "sm89") and flavours.choose_target("sm75") == (flavour, "sm75")
    with pytest.raises(Refused, match="--capability 'sm70': TensorRT-RTX .* builds plans for sm75, sm86, sm89"):
        flavours.choose_target("sm70")
    monkeypatch.setattr(flavours, "find_flavour", lambda: fake_tensorrt.FakeFlavour(fake_tensorrt, "TensorRT 10", ()))
    assert flavours.choose_target("")[1] == "sm90"
    with pytest.raises(Refused, match="builds plans for those of the GPU at hand"):
        flavours.choose_target("sm86")


def test_a_module_that_does_not_load_leaves_the_other(monkeypatch):
    rtx = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.2", ComputeCapability=fake_tensorrt.ComputeCapability)
    modules = {"tensorrt": OSError("libnvinfer.so.10:\n no such file"), "tensorrt_rtx": rtx}

    def load(name):
        if isinstance(modules[name], Exception):
            raise modules[name]
        return modules[name]

    monkeypatch.setattr(flavours.importlib.util, "find_spec", lambda name: modules.get(name))
    monkeypatch.setattr(flavours.importlib, "import_module", load)
    found = flavours.find_flavour()
    assert (found.title, found.capabilities) == ("TensorRT-RTX 1.2", ("sm75", "sm86", "sm89"))
    modules["tensorrt_rtx"] = RuntimeError("not for this driver")
    with pytest.raises(Missing) as told:
        flavours.find_flavour()
    assert "tensorrt is installed but does not load (libnvinfer.so.10: no such file); tensorrt_rtx is" in str(
        told.value
    )
    assert "Reinstall it" in told.value.remedy
    modules["tensorrt"] = SimpleNamespace(__name__="tensorrt", __version__="10.9")
    assert (flavours.find_flavour().title, flavours.find_flavour().capabilities) == ("TensorRT 10.9", ())
    modules.clear()
    for gpus, package in ((["sm86", "sm103"], "trt-full"), (["sm86"], "'datasetdm-fast[trt]'")):
        monkeypatch.setattr(flavours, "gpu_capabilities", lambda gpus=gpus: gpus)
        with pytest.raises(Missing) as told:
            flavours.find_flavour()
        assert package in told.value.remedy


def test_a_builder_is_told_its_job_and_believed_by_its_last_line(monkeypatch, tmp_path):
    jobs, ended = [], SimpleNamespace(returncode=0, stdout=b'loading libraries\n["", 0]\n', stderr=b"")
    monkeypatch.setattr(
        plan_builder.subprocess, "run", lambda command, input, **_: jobs.append(json.loads(input)) or ended
    )

    def build(*kind):
        flavour = fake_tensorrt.FakeFlavour(fake_tensorrt, *kind)
        plan_builder.build_plan(tmp_path / "small.onnx", tmp_path / "plan", {"x": (2, 3)}, flavour, "sm86")

    build()
    build("TensorRT 10", ())
    assert [job["capability"] for job in jobs] == ["sm86", ""]
    assert jobs[0]["shapes"] == {"x": [2, 3]} and jobs[0]["module"] == "fake_tensorrt"
    assert (jobs[0]["graph"], jobs[0]["plan"]) == (str(tmp_path / "small.onnx"), str(tmp_path / "plan"))
    ended.stdout = b'loading\n["no kernel", 0]\n'
    with pytest.raises(Refused, match="small: TensorRT-RTX .* gives no plan: no kernel"):
        build()
    ended.stdout = b'loading\n["OSError: No space", 28]\n'
    with pytest.raises(Missing, match="plan: the disk is full"):
        build()
    ended.returncode, ended.stderr = 7, b"early words " * 200 + b"the last words"
    with pytest.raises(Refused, match="its builder ended with 7, saying: .*the last words"):
        build()
    ended.stderr = b""
    with pytest.raises(Refused, match="its builder ended with 7$|its builder ended with 7\n"):
        build()


class Flag(IntEnum):
    TF32, STRICT_NANS = 0, 1


class Creation(IntEnum):
    STRONGLY_TYPED = 3


class Builder:
    """Of TensorRT: what it was asked for."""

    plan: bytes | None = b"a plan"
    flags, profiles, network = {Flag.TF32}, [], None

    def __init__(self, logger):
        self.set_shape = lambda name, *shapes: Builder.profiles.append((name, shapes))
        self.set_flag, self.clear_flag = self.flags.add, self.flags.discard
        self.logger = logger

    def create_network(self, flags):
        Builder.network = flags

    def create_builder_config(self):
        return self

    create_optimization_profile = create_builder_config

    def add_optimization_profile(self, profile):
        return 0

    def set_compute_capability(self, capability, place):
        Builder.capability = capability, place
        return True

    def build_serialized_network(self, network, config):
        self.logger.log(1, "no\n kernel fits")
        self.logger.log(2, "a warning after it")
        return self.plan


def test_a_plan_is_built_in_full_precision_and_keeps_its_nans(monkeypatch, tmp_path):
    names = {"ILogger": fake_tensorrt.ILogger, "ComputeCapability": fake_tensorrt.ComputeCapability}
    names |= {"Builder": Builder, "BuilderFlag": Flag, "NetworkDefinitionCreationFlag": Creation}
    parser = SimpleNamespace(parse_from_file=lambda name: name == "small.onnx", num_errors=0)
    module = SimpleNamespace(**names, OnnxParser=lambda network, logger: parser)
    monkeypatch.setattr(plan_builder.importlib, "import_module", lambda name: module)
    job = {"module": "", "graph": "small.onnx", "plan": str(tmp_path / "plan"), "shapes": {"x": [2, 3]}}
    plan_builder._build(job | {"capability": "sm86"})
    assert (tmp_path / "plan").read_bytes() == b"a plan"
    assert Builder.flags == {Flag.STRICT_NANS} and Builder.network == 1 << 3
    assert Builder.profiles == [("x", ((2, 3),) * 3)]
    assert Builder.capability == (fake_tensorrt.ComputeCapability.SM86, 0)
    monkeypatch.setattr(Builder, "plan", None)
    with pytest.raises(plan_builder.RefusedByTensorRT, match="^no kernel fits$"):
        plan_builder._build(job | {"capability": ""})
    with pytest.raises(plan_builder.RefusedByTensorRT, match="^no reason was given$"):
        plan_builder._build(job | {"graph": "other.onnx", "capability": ""})
