"""Eight-bit floats for the UNet call: what is quantised and how, what it costs in labels, and what it is refused
for.
"""

import json

import fake_tensorrt
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from datasetdm_fast.engine.decoders.checkpoint import load_decoders
from datasetdm_fast.engine.engines.exported.trt import TrtEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.sampling import times
from datasetdm_fast.errors import Missing
from datasetdm_fast.export import __main__ as command
from datasetdm_fast.export import golden
from datasetdm_fast.export.manifest import Manifest
from datasetdm_fast.export.onnx import eight_bits
from datasetdm_fast.export.tensorrt import flavours, sealed, to_tensorrt
from datasetdm_fast.export_cli import calibration
from datasetdm_fast.export_cli.settings import ExportConfig

onnxruntime = pytest.importorskip("onnxruntime")
PROMPTS = ("a red ball beside a cube",)


@pytest.fixture(autouse=True)
def key_file(tmp_path_factory, monkeypatch):
    monkeypatch.setenv(sealed.KEY_VARIABLE, str(tmp_path_factory.getbasetemp() / "fp8.key"))


@pytest.fixture(scope="module")
def demo():
    return load_model("demo"), load_decoders("demo")


@pytest.fixture(scope="module")
def calibrated(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    return folder, *calibration.export(*demo, folder, PROMPTS, 2)


# The graph ------------------------------------------------------------------------------------------------------------


def small_graph() -> onnx.ModelProto:
    """A narrow first convolution, a wide one whose output two linear layers share, and a softmax."""
    rows = np.random.default_rng(0)

    def weight(name, *shape):
        return numpy_helper.from_array((rows.standard_normal(shape) / 8).astype(np.float16), name)

    nodes = [
        helper.make_node("Conv", ["latents", "first"], ["x"], name="unet.conv_in/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "wide"], ["y"], name="unet.wide/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["y", "left"], ["a"], name="unet.left/MatMul"),
        helper.make_node("MatMul", ["y", "right"], ["b"], name="unet.right/MatMul"),
        helper.make_node("MatMul", ["y", "right"], ["c"], name="texts.packed/MatMul"),
        helper.make_node("Softmax", ["a"], ["d"], name="unet/Softmax", axis=-1),
        helper.make_node("Sum", ["b", "c", "d"], ["noise"], name="unet/Sum"),
    ]
    constants = [
        weight("first", 16, 4, 3, 3),
        weight("wide", 32, 16, 3, 3),
        weight("left", 16, 16),
        weight("right", 16, 16),
    ]
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["B", channels, 16, 16])
        for name, channels in (("latents", 4), ("noise", 32))
    ]
    return helper.make_model(
        helper.make_graph(nodes, "small", info[:1], info[1:], constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def test_wide_layers_of_the_unet_are_chosen_and_nothing_else():
    assert [node.name for node in eight_bits.quantisable(small_graph())] == [
        "unet.wide/Conv",
        "unet.left/MatMul",
        "unet.right/MatMul",
    ]


def test_largest_magnitudes_are_watched_and_become_the_largest_of_the_type(tmp_path):
    model = small_graph()
    layers = eight_bits.quantisable(model)
    assert eight_bits.layers_read(layers) == ["x", "y"]
    latents = np.random.default_rng(1).standard_normal((2, 4, 16, 16)).astype(np.float16)
    watched = onnxruntime.InferenceSession(
        eight_bits.watching(model, layers).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    truth, *largest = watched.run(None, {"latents": latents})
    narrow = eight_bits.quantised(model, layers, dict(zip(["x", "y"], map(float, largest))), tmp_path)
    onnx.checker.check_model(narrow)
    constants = {one.name: numpy_helper.to_array(one) for one in narrow.graph.initializer}
    assert (
        constants["x.scale"] == np.float16(largest[0] / 448)
        and np.abs(constants["wide.e4m3"].astype(np.float32)).max() == 448
    )
    assert (
        "first" in constants
        and "wide" not in constants
        and sum(node.op_type == "QuantizeLinear" for node in narrow.graph.node) == 2
    )
    (found,) = onnxruntime.InferenceSession(narrow.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"latents": latents}
    )
    assert (
        0 < golden.distance(found, truth) < 0.1
    )  # 3 bits of mantissa: a step of 1/8, an error of up to 1/16 a product


def test_an_activation_that_is_always_zero_keeps_a_scale():
    narrow = eight_bits.quantised(small_graph(), eight_bits.quantisable(small_graph()), {"x": 0.0, "y": 1.0}, None)
    assert min(numpy_helper.to_array(one) for one in narrow.graph.initializer if one.name.endswith(".scale")) > 0


# Calibrating ----------------------------------------------------------------------------------------------------------


def test_only_the_call_that_is_not_captured_has_eight_bits(calibrated):
    folder, manifest, _ = calibrated
    assert manifest.precision == "fp8" and manifest == Manifest.read(folder)
    manifest.check_files(folder)
    graphs = {
        stage: onnx.load(str(folder / told.file), load_external_data=False).graph
        for stage, told in manifest.stages.items()
    }
    kinds = {stage: {one.data_type for one in graph.initializer} for stage, graph in graphs.items()}
    assert [stage for stage, types in kinds.items() if TensorProto.FLOAT8E4M3FN in types] == ["denoise"]
    assert not (folder / eight_bits.WATCHED).exists()


def test_the_drift_is_measured_in_images_and_labels(calibrated):
    _, _, drift = calibrated
    assert {row["measure"] for row in drift} == {
        "latents",
        "image",
        "semantic",
        "instance",
        "depth",
        "pose",
        "open-vocabulary",
    }
    found = {row["measure"]: row["median"] for row in drift}
    assert 1e-3 < found["latents"] < 0.5 and 0 < found["image"] < 0.2
    lines = calibration.table(drift).splitlines()
    assert len(lines) == 8 and lines[0].startswith("drift of fp8") and lines[1].startswith("latents ")


def test_the_same_prompts_again_are_not_calibrated_again(calibrated, demo, monkeypatch):
    folder, manifest, drift = calibrated
    monkeypatch.setattr(calibration.to_onnx, "export", lambda *arguments, **names: pytest.fail("exported again"))
    assert calibration.export(*demo, folder, PROMPTS, 2) == (manifest, drift)
    with pytest.raises(pytest.fail.Exception, match="exported again"):
        calibration.export(*demo, folder, ("a blue cone",), 2)


def test_tensorrt_rtx_builds_it_for_gpus_with_eight_bit_floats(calibrated, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    folder, manifest, _ = calibrated
    rtx = flavours.find("tensorrt-rtx")
    order = to_tensorrt.make_order("denoise", manifest, to_tensorrt.Target(rtx, (1,), ("sm89",)))
    notes = to_tensorrt.run_builder(
        folder / manifest.stages["denoise"].file, order, tmp_path / "plan", rtx, is_quiet=True
    )
    assert notes["layers"] > 100


# Running --------------------------------------------------------------------------------------------------------------


def make_engine(demo, folder):
    found = fake_tensorrt.FakeFlavour(fake_tensorrt)
    return TrtEngine(
        *demo, dtype="fp8", engines=folder, queue=fake_tensorrt.HostQueue(), found=found, tell=lambda line: None
    )


def test_the_engine_runs_it_and_keeps_the_captured_call_in_fp16(calibrated, demo, monkeypatch):
    built = fake_tensorrt.fake_builder(monkeypatch)
    engine = make_engine(demo, calibrated[0])
    latents, context = times.initial_noise(1, 4, 16, 16)[None], engine.encode_text(["", PROMPTS[0]])
    rough, (exact, _) = engine.denoise(latents, 401, context), engine.denoise_and_capture(latents, 401, context)
    assert 1e-3 < golden.distance(rough.numpy(), exact.numpy()) < 0.25
    assert engine.fingerprint()["dtype"] == "fp8" and {order.precision for order in built} == {"fp8"}


def test_without_a_calibrated_folder_the_engine_says_how_to_make_one(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("DATASETDM_CACHE", str(tmp_path))
    with pytest.raises(
        Missing, match="calibrated on your prompts first, and no folder was given\n.*--precision fp8 --prompts FILE"
    ):
        make_engine(demo, "").encode_text([""])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--precision fp8: is calibrated on your own prompts, and none were given"),
        (
            ("--prompts", "a ball", "--capability", "sm86"),
            "--capability sm86: it has no 8-bit floats, which need at least sm89",
        ),
        (
            ("--prompts", "a ball", "--raw-capture"),
            "--precision fp8: --raw-capture is for parity",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(flags, said, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(ExportConfig, "load", lambda config: pytest.fail("the model was read"))
    assert command.main(["--to", "tensorrt-rtx", "--precision", "fp8", "--out", str(tmp_path), *flags]) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith(said)


def test_as_graphs_alone_it_is_refused(tmp_path, capsys):
    assert command.main(["--to", "onnx", "--precision", "fp8", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("--precision fp8: graphs are written in fp32, fp16 or bf16\n")


def test_the_record_names_the_prompts(calibrated):
    record = json.loads((calibrated[0] / calibration.RECORD).read_bytes())
    assert record["prompts"] == list(PROMPTS) and record["steps"] == 2
