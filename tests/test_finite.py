"""NaN and infinite values at each of the four points, in engines whose networks are graphs: found by sample, and by
what the graph itself says of an image.
"""

import fake_tensorrt
import numpy as np
import onnxruntime
import pytest
import torch
from skips import IS_LONG
from small_unets import with_small_unet

from bench.decoders import load_decoders
from datasetdm_fast.data import Batch, ProjectedCapture, Quarantined, Request, Sample
from datasetdm_fast.engine.engines.exported.ort import OrtEngine
from datasetdm_fast.engine.engines.exported.trt import TrtEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop import driver, labelling, recipe
from datasetdm_fast.export.onnx import to_onnx
from datasetdm_fast.export.onnx.graph import DataFile, Extent, Graph
from datasetdm_fast.export.onnx.operators import OPERATORS

BATCH = Batch(
    0,
    (
        Request(0, "a red ball beside a cube", 5, ("ball", "cube")),
        Request(1, "two cones on a table", 6, ("cone",)),
        Request(2, "a star", 7, ("star",)),
    ),
)
TASKS = ("semantic", "depth")
HUGE = 3e38  # a number, but nothing can be computed with it


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    """A cache of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATASETDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        fake_tensorrt.fake_builder(patch)
        yield


def make_engine(name: str, dtype: str, model, decoders):
    if name == "ort":
        return OrtEngine(model, decoders, dtype=dtype, device="cpu", on_message=lambda line: None)
    flavour = fake_tensorrt.FakeFlavour(fake_tensorrt)
    return TrtEngine(
        model,
        decoders,
        dtype=dtype,
        queue=fake_tensorrt.HostQueue(),
        flavour=flavour,
        on_message=lambda line: None,
    )


# Either engine and either precision: the graphs of a precision are the same in both engines.
ENGINES = [("ort", "fp32"), ("trt", "fp16"), *([("ort", "fp16"), ("trt", "fp32")] if IS_LONG else [])]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def made(request) -> tuple[driver.BatchGenerator, labelling.SampledBatch]:
    """A studio, and a batch it has sampled."""
    decoders = load_decoders("demo")
    some = {task: decoders[task] for task in TASKS}
    engine = make_engine(*request.param, load_model("demo"), some)
    studio = driver.BatchGenerator(engine, recipe.make_recipe(engine, TASKS, steps=2), lambda: None)
    return studio, studio.sample(BATCH)


def capture_of(drawn: labelling.SampledBatch) -> ProjectedCapture:
    """The one capture that all decoders read."""
    return next(iter(drawn.captures.values()))


def at_latents(drawn: labelling.SampledBatch, value: float) -> None:
    drawn.latents[1, 2, 3, 4] = value


def at_features(drawn: labelling.SampledBatch, value: float) -> None:
    capture_of(drawn).sums[2][1, 5, 2, 1] = value


def at_image(drawn: labelling.SampledBatch, value: float) -> None:
    drawn.latents[1] = value


def at_depth(drawn: labelling.SampledBatch, value: float) -> None:
    for total, part in zip(capture_of(drawn).sums, capture_of(drawn).slices["depth"]):
        total[1, part] = value


NAN, INFINITE = float("nan"), float("inf")
PLANTS = [
    (at_latents, NAN),
    (at_latents, INFINITE),
    (at_latents, -INFINITE),
    (at_features, NAN),
    (at_features, INFINITE),
    (at_image, HUGE),
    (at_depth, HUGE),
]


@pytest.mark.parametrize(
    ("plant", "value"), PLANTS, ids=lambda one: one.__name__.removeprefix("at_") if callable(one) else str(one)
)
def test_what_is_no_number_sets_its_own_sample_aside(made, plant, value):
    studio, whole = made
    capture = capture_of(whole)
    own = ProjectedCapture(tuple(total.clone() for total in capture.sums), capture.slices)
    drawn = labelling.SampledBatch(whole.latents.clone(), dict.fromkeys(whole.captures, own))
    plant(drawn, value)
    found = studio.label(BATCH, drawn)
    assert [type(result) for result in found] == [Sample, Quarantined, Sample]
    point = plant.__name__.removeprefix("at_")
    named = set(found[1].reason.removeprefix("NaN or infinite values in ").split(", "))
    assert point in named and named <= {"latents": {"latents", "image"}, "features": {"features", *TASKS}}.get(
        point, {point}
    )


def test_an_autoencoder_that_leaves_the_range_of_fp16_is_noticed_and_its_images_made_in_fp32():
    """Weights beyond fp16 in front of a norm, which takes the factor out again: fp32 says the same as before, fp16
    nothing at all.
    """
    model, factor = with_small_unet(load_model("tiny")), 1e6
    dict(model.modules)  # built here once, and not by each export
    for name, weight in model.modules["vae"].named_parameters():
        if name.startswith("decoder.up_blocks.0.resnets.0.conv1."):
            weight.data *= factor
    wide, narrow = (make_engine("ort", dtype, model, {}) for dtype in ("fp32", "fp16"))
    assert not narrow.decode_and_check(torch.zeros(2, 4, 16, 16))[1].any()
    ((_, plain),), ((_, found),) = (
        driver.generate([BATCH], engine, recipe.make_recipe(engine, (), steps=2)) for engine in (wide, narrow)
    )
    for sample, right in zip(found, plain, strict=True):
        assert sample.provenance["retried"] == "fp32 after NaN or infinite values in image"
        assert abs(sample.image.astype(int) - right.image).max() <= 1


def test_rows_of_numbers_are_told_from_others_without_a_false_alarm(tmp_path):
    graph = Graph("finite", DataFile("finite.data"), OPERATORS)
    x = graph.input("x", [Extent(1, ("B",)), 3, 4], torch.float32)
    graph.output("is_finite", x.isfinite().flatten(1).all(1))
    session = onnxruntime.InferenceSession(graph.model({}).SerializeToString(), providers=["CPUExecutionProvider"])
    rows = torch.full((6, 3, 4), 65504.0)  # their sum is beyond fp16
    rows[1] = -3e38  # and here beyond fp32
    for row, value in zip(rows[2:5], (float("nan"), float("inf"), -float("inf"))):
        row[2, 1] = value
    rows[5] = 1e-45
    assert session.run(None, {"x": rows.numpy()})[0].tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("precision", to_onnx.TYPES)
def test_the_flag_of_an_image_is_read_from_its_pixels_before_they_are_clamped(precision, tmp_path):
    import onnx

    to_onnx.export(load_model("tiny"), {}, tmp_path, precision=precision, only=["decode_image"])
    model = onnx.load(tmp_path / "decode_image.onnx", load_external_data=False)
    makers = {name: node for node in model.graph.node for name in node.output}
    chain, node = [], makers["is_finite"]
    while node is not None and node.op_type != "Conv":
        chain.append(node.op_type)
        node = makers.get(node.input[0])
    assert node is not None and chain == [
        "Cast",
        "ReduceMin",
        "Cast",
        "Reshape",
        "Less",
        "Abs",
        *["Cast"] * (precision != "fp32"),
    ]
    assert node.output[0] in {name for one in model.graph.node if one.op_type in ("Div", "Cast") for name in one.input}
    assert np.dtype(bool) == onnx.helper.tensor_dtype_to_np_dtype(model.graph.output[1].type.tensor_type.elem_type)
