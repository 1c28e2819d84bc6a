"""The library surface on the tiny model with seeded decoders: the real path from prompt to label, without trained
weights.
"""

import copy
import io
import json
import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import save_file
from small_unets import with_small_unet
from stub_engine import StubEngine
from test_loading import pipeline as in_diffusers

from datasetdm_fast import Pipeline, generate, label, open_run
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Request, Sample, SemanticMap
from datasetdm_fast.engine import engines
from datasetdm_fast.engine.decoders.checkpoint import build_decoder, save_decoder
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.fast.on_cpu import CpuEngine
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.engine.labels.class_tables import ClassWord
from datasetdm_fast.engine.loading import in_memory, load_model, lora
from datasetdm_fast.engine.loop import diffusing
from datasetdm_fast.engine.loop.calls import call_text
from datasetdm_fast.engine.loop.driver import LabelStream, sample_and_label
from datasetdm_fast.engine.models import blocks
from datasetdm_fast.engine.pictures.framing import crop_square, pictures_in_memory
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.settings import EngineSettings
from datasetdm_fast.stages import LEVELS

pytestmark = pytest.mark.usefixtures("tiny_has_one_layer")


@pytest.fixture(scope="module")
def tiny():
    """For tests that change none of its weights or settings."""
    return load_model("tiny")


@pytest.fixture(scope="module")
def tiny64():
    return with_small_unet(load_model("tiny", size=64))


@pytest.fixture(scope="module")
def decoders(tiny, tmp_path_factory):
    folder, levels = tmp_path_factory.mktemp("decoders"), tiny.levels
    small = {
        "levels": levels,
        "width": 32,
        "heads": 4,
        "layers": 2,
        "feed_forward": 64,
        "mask_dim": 32,
        "queries": 10,
        "score_threshold": 0.0,
    }
    configs = [
        DecoderConfig("segmentation", "semantic", classes=world.CLASSES, **small),
        DecoderConfig("segmentation", "instance", classes=world.THINGS, **small),
        DecoderConfig("depth", "depth", levels=levels, width=16, depth_width=16, max_depth=4.0),
        DecoderConfig(
            "heatmap", "pose", levels=levels, width=16, joints=world.JOINTS, limbs=world.LIMBS, score_threshold=0.01
        ),
        DecoderConfig("open-vocabulary", "open-vocabulary", classes=world.THINGS, text_width=32, **small),
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for config in configs:
            save_decoder(build_decoder(config), folder / config.task)
    return folder


@pytest.fixture(scope="module")
def pipe(decoders):
    return Pipeline.from_pretrained("tiny", engine="torch", decoder=str(decoders))


def test_the_library_takes_what_generate_takes_of_an_engine(monkeypatch):
    chosen = {
        **{"engine": "trt", "dtype": "fp16", "device": "cuda:1", "threads": 3, "compile": True, "provider": "cpu"},
        "streams": 2,
        **{"size": 128, "allow_download": True},
        "lora": ("weights.safetensors:0.5",),
    }
    assert set(chosen) == {setting.name for setting in fields(EngineSettings)} | {"size", "allow_download", "lora"}
    opened = []
    monkeypatch.setattr(engines, "open_engine", lambda *given, **options: opened.append((given, options)) or (0, {}))
    Pipeline.from_pretrained("tiny", **chosen)
    assert opened == [(("tiny", None), chosen)]


def test_a_call_gives_images_and_the_labels_asked_for(pipe):
    out = pipe(["a red ball beside a cube"], seeds=[7], tasks=("semantic", "depth"), steps=2)
    assert out.images[0].shape == (128, 128, 3) and out.images[0].dtype == np.uint8
    assert (
        isinstance(out.semantic[0], SemanticMap)
        and isinstance(out.depth[0], DepthMap)
        and out.instances == out.keypoints == []
    )
    with pytest.raises(Refused, match=r"'semantc' is no label \(did you mean semantic\?\)"):
        out.labels("semantc")
    assert (
        out.meta[0]["prompt"] == "a red ball beside a cube" and out.meta[0]["seed"] == 7 and out.meta[0]["steps"] == 2
    )


def test_all_tasks_by_default(pipe):
    out = pipe("two cubes", steps=2)
    assert (
        isinstance(out.instances[0], Instances)
        and isinstance(out.keypoints[0], Keypoints)
        and out.open_vocabulary[0].classes == ("background", *world.THINGS)
    )
    assert set(pipe.tasks) == {"semantic", "instance", "depth", "pose", "open-vocabulary"}


def test_command_and_library_give_the_same_samples(pipe, decoders, tmp_path):
    arguments = [
        "--model",
        "tiny",
        "--decoder",
        str(decoders),
        "--engine",
        "torch",
        "--prompts",
        "a red ball\ntwo cubes",
        "--number",
        "3",
        "--seed",
        "5",
    ]
    arguments += [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--task",
        "semantic,instance,depth,pose,open-vocabulary",
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    ]
    assert generate.main(arguments) == 0
    stream = pipe.stream(["a red ball", "two cubes", "a red ball"], seed=5, batch_size=2, steps=2)
    for stored, made in zip(open_run(tmp_path / "run"), stream, strict=True):
        for name in ("id", "prompt", "seed", "classes", "is_doubtful"):
            assert getattr(stored, name) == getattr(made, name)
        assert (stored.image == made.image).all()
        assert (stored.semantic.labels == made.semantic.labels).all()
        assert (stored.instances.masks == made.instances.masks).all()
        assert np.allclose(stored.depth.metres, made.depth.metres, atol=5.1e-4)
        assert (stored.keypoints.visibility == made.keypoints.visibility).all()
        assert (stored.open_vocabulary.labels == made.open_vocabulary.labels).all()
        assert stored.attention is made.attention is None
    assert generate.main(["--only", "00000002", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    (tmp_path / "run" / "images" / "00000002.png").unlink()
    assert generate.main(["--only", "00000002", "--out", str(tmp_path / "run"), "--quiet"]) == 0


def test_pictures_that_exist_get_the_labels_of_the_command(pipe, decoders, tmp_path):
    (tmp_path / "in").mkdir()
    pictures = [world.view(k, 160).image[:140] for k in range(2)]
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "in" / f"{k}.png")
    line = ["--model", "tiny", "--decoder", str(decoders), "--engine", "torch", "--seed", "3", "--quiet"]
    line += ["--task", "semantic,depth", "--batch-size", "2", "--out", str(tmp_path / "run")]
    assert label.main([str(tmp_path / "in"), *line]) == 0
    out = pipe.label([Image.fromarray(pictures[0]), pictures[1]], tasks=("semantic", "depth"), seed=3)
    for stored, made in zip(open_run(tmp_path / "run"), out.samples, strict=True):
        assert (stored.image == made.image).all() and stored.seed == made.request.seed
        assert (stored.semantic.labels == made.annotations["semantic"].labels).all()
        assert np.allclose(stored.depth.metres, made.annotations["depth"].metres, atol=5.1e-4)
    for wrong, message in (
        ((np.zeros((64, 64), np.uint8),), "image: uint8|image 0"),
        ((pictures, ["one"]), "1 given for 2 images"),
        ((np.zeros((8, 64, 3), np.uint8),), "image 0: uint8 of shape"),
        ((Image.fromarray(np.full((64, 64), 300, np.uint16)),), "image 0: its pixels are I;16, expected an 8-bit"),
        ((pictures, [None, "a ball"]), "prompt 0: None is not a text"),
        ((pictures, None), "prompts: None was given, expected a text or several texts"),
        ((None,), "images: None was given, expected an image or several images"),
        (("photo.png",), r"image 0: 'photo.png' is not an image\n.*as Image.open\(FILE\) returns it"),
        ((["photo.png"],), "image 0: 'photo.png' is not an image"),
    ):
        with pytest.raises(Refused, match=message):
            pipe.label(*wrong, tasks=("depth",))


def test_words_that_are_looked_for_change_no_other_label_of_a_picture():
    """As a caption they drew things to them: a ball became a tree in the label map, and every sample was doubtful."""
    pipe, picture = Pipeline.from_pretrained("demo"), world.view(4, 128).image
    alone, both = (pipe.label(picture, tasks=tasks) for tasks in (("semantic",), ("semantic", "open-vocabulary")))
    assert (alone.semantic[0].labels == both.semantic[0].labels).all()
    found = both.samples[0]
    assert found.request.classes == () == found.trust.missing
    assert len(np.unique(found.annotations["open-vocabulary"].labels)) > 1


def test_a_picture_of_pillow_is_labelled_as_viewers_show_it(pipe):
    """A camera held upright stores a picture that lies on its side, and says so."""
    upright, file, orientation = Image.fromarray(world.view(0, 128).image), io.BytesIO(), Image.Exif()
    orientation[0x0112] = 6
    upright.rotate(90).save(file, "PNG", exif=orientation)
    found = pipe.label(Image.open(file), tasks=("depth",))
    assert np.array_equal(found.images[0], np.asarray(upright))
    with pytest.raises(Refused, match="image 0: it cannot be decoded"):
        pipe.label(Image.open(io.BytesIO(file.getvalue()[:2000])), tasks=("depth",))


def made(decoders, engine, look=lambda: None):
    """What a pipeline of its own makes for a program, and what `look` sees where the program goes on."""
    pipe = Pipeline.from_pretrained("tiny", engine=engine, decoder=str(decoders), size=64)
    generator = torch.Generator("cpu").manual_seed(3)
    stream = pipe.stream(["a red ball"], steps=2, batch_size=1)
    sample, seen = next(stream), look()
    label = pipe.label(sample.image, tasks=("depth",)).depth[0].metres
    drawn = pipe.diffuse("a ball", num_inference_steps=2, generator=generator, tasks=(), output_type="np").images
    features = pipe.features(sample.image)["low"].cpu()
    assert not list(stream)
    return (sample.image, sample.annotations["depth"].metres, label, drawn, features), seen


@pytest.fixture(scope="module")
def alone(decoders):
    """What pipelines make in a program that changes nothing, by their engine."""
    return cache(lambda engine: made(decoders, engine)[0])


@pytest.mark.parametrize("engine", ["torch", "fast"])
def test_a_program_with_autocast_gets_the_same_images_and_labels(decoders, alone, engine):
    expected = alone(engine)
    with torch.autocast("cpu", torch.bfloat16):
        found, is_switched = made(decoders, engine, lambda: torch.is_autocast_enabled("cpu"))
    assert is_switched
    assert all(map(np.array_equal, expected, found))


@pytest.mark.parametrize(
    ("engine", "default"),
    [("torch", torch.bfloat16), ("fast", torch.float64), ("fast", torch.bfloat16), ("fast", "meta")],
)
def test_a_program_with_another_default_dtype_or_device_gets_the_same_images_and_labels(
    decoders, alone, engine, default
):
    """The compiled operations write fp32 into memory that was of a smaller dtype otherwise."""
    expected, before = alone(engine), torch.get_default_dtype()
    change = torch.set_default_device if default == "meta" else torch.set_default_dtype
    try:
        change(default)
        found, seen = made(decoders, engine, lambda: (torch.get_default_dtype(), torch.get_default_device()))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert default in (seen[0], seen[1].type)
    assert all(map(np.array_equal, expected, found))


@pytest.mark.parametrize("engine", ["torch", "fast"])
def test_a_program_that_lets_a_cpu_round_fp32_gets_the_same_images_and_labels(decoders, alone, engine):
    expected, before = alone(engine), torch.get_float32_matmul_precision()
    seen = set()
    try:
        torch.set_float32_matmul_precision("medium")  # bf16 where a CPU multiplies that, as trainers ask for
        found, after = made(decoders, engine, torch.get_float32_matmul_precision)
        pipe = Pipeline.from_pretrained("tiny", engine=engine, decoder=str(decoders), size=64)
        pipe("a ball", steps=2, callback=lambda *_: seen.add(torch.backends.mkldnn.matmul.fp32_precision))
    finally:
        torch.set_float32_matmul_precision(before)
    assert (seen, after) == ({"ieee"}, "medium")
    assert all(map(np.array_equal, expected, found))


def test_pictures_that_exist_are_not_sampled(pipe):
    with pytest.raises(TypeError, match="'steps' is no choice here, as no image is sampled"):
        pipe.label(world.view(0, 128).image, steps=20)


@pytest.mark.parametrize("timesteps", [(), (1000,), (-1,), (0.5,)])
def test_timesteps_that_the_model_does_not_have_are_refused(pipe, timesteps):
    with pytest.raises(Refused, match="^timesteps: .* from 0 to 999"):
        pipe.label(world.view(0, 128).image, tasks=("attention",), classes=("ball",), timesteps=timesteps)


@pytest.mark.parametrize(("prompts", "images"), [("a ball", 1), (["a ball", "a cube"], 2), (iter(["a ball"]), 4)])
def test_a_stream_makes_no_batch_larger_than_what_it_is_of(pipe, monkeypatch, prompts, images):
    seen, denoise = [], pipe.engine.denoise
    monkeypatch.setattr(pipe.engine, "suggested_batch", lambda: 4)
    monkeypatch.setattr(
        pipe.engine, "denoise", lambda latents, *more: seen.append(len(latents)) or denoise(latents, *more)
    )
    next(pipe.stream(prompts, steps=2, tasks=()))
    assert {*seen} == {images}


def test_a_callback_sees_the_latents_of_every_step(pipe):
    seen = []
    choices = {"sampler": "ddim", "steps": 3, "tasks": (), "batch_size": 2}
    pipe(["a ball", "a cube", "a tree"], callback=lambda *step: seen.append(step), **choices)
    assert [(step, len(latents)) for step, latents in seen] == [(0, 2), (1, 2), (2, 2), (0, 1), (1, 1), (2, 1)]
    assert not torch.equal(seen[0][1], seen[-1][1][:1])


def test_each_sample_may_have_a_negative_prompt_of_its_own(pipe):
    prompts = ["a red ball"] * 2
    choices = {"seeds": [1, 1], "steps": 2, "tasks": (), "batch_size": 1}
    same, other = pipe(prompts, negative_prompt="fog", **choices), pipe(prompts, negative_prompt=["fog", ""], **choices)
    assert (same.images[0] == other.images[0]).all() and (same.images[1] != other.images[1]).any()
    assert [entry["negative_prompt"] for entry in other.meta] == ["fog", ""]
    none = pipe(prompts[:1], negative_prompt=None, **choices | {"seeds": [1]})
    assert (none.images[0] == other.images[1]).all() and none.meta[0]["negative_prompt"] == ""
    with pytest.raises(Refused, match="1 given for 2 prompts"):
        pipe(prompts, negative_prompt=["fog"], **choices)
    with pytest.raises(Refused, match="^negative_prompt of prompt 1: .* tokens"):
        pipe(prompts, negative_prompt=["fog", "fog " * 90], **choices)


def test_what_is_printed_of_an_output_is_a_line_a_sample(pipe):
    out = pipe(["a red ball <b>", "two cubes"], steps=2)
    lines = repr(out).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) < 200 and "'two cubes', seed 1" in lines[2]
    assert all(len(repr(label)) < 600 for label in out.samples[0].annotations.values())
    assert out.__class__(out.samples[:1])._repr_html_().startswith("<div>1 sample<")
    with pytest.raises(AttributeError, match=r"no label is called 'instanced' \(did you mean instances\?\)"):
        out.instanced  # noqa: B018
    with pytest.raises(AttributeError, match="labels of pose are called 'keypoints'"):
        out.pose  # noqa: B018
    assert len(out) == 2 and list(out) == out.samples == [out[0], out[-1]]
    page = out._repr_html_()
    assert page.count("<img") == 12 and "a red ball &lt;b&gt;" in page and "<b>" not in page
    assert [row.count("<img") for row in page.split("<div>")[2:]] == [6, 6]  # a sample begins a row


def test_features_are_the_levels_of_the_model(pipe):
    image = world.view(1).image
    levels = pipe.features(image, prompt="a ball")
    assert tuple(levels) == LEVELS
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, level.channels, level.side, level.side) for level in pipe.engine.model.levels
    ]
    assert torch.equal(levels["mid"], pipe.features(image, prompt="a ball")["mid"])
    assert not torch.equal(levels["mid"], pipe.features(image, prompt="a ball", seed=1)["mid"])
    assert not torch.equal(levels["mid"], pipe.features(image, prompt="a ball", timestep=500)["mid"])


def test_maps_follow_the_features_by_layer_head_and_token(pipe):
    level = pipe.features(world.view(1).image)["low"][0]
    heads, tokens = pipe.engine.model.levels[0].heads[0], pipe.engine.model.levels[0].tokens
    maps = level[-heads * tokens :].unflatten(0, (heads, tokens))
    assert torch.allclose(maps.sum(1), torch.ones_like(maps[:, 0]), atol=1e-5)


@pytest.mark.parametrize("timestep", ["3", 3.5, 1000])
def test_features_refuse_what_is_no_timestep(pipe, timestep):
    with pytest.raises(Refused, match=f"timestep: {timestep} is no whole number within 0 .. 999"):
        pipe.features(world.view(1).image, timestep=timestep)


def test_features_refuse_what_is_no_prompt(pipe):
    assert pipe.features(prompt="a red\nball", steps=2)["low"].equal(pipe.features(prompt="a red ball", steps=2)["low"])
    with pytest.raises(Refused, match="prompt: .* invalid UTF-8"):
        pipe.features(prompt="a \ud800 ball")


def test_a_stream_has_a_seed_for_each_prompt_or_says_which_has_none():
    stub = Pipeline(StubEngine(tasks=("depth",)))
    found = stub.stream(["a", "b", "c"], seeds=iter(np.array([5, 3])), batch_size=1)
    assert [type(sample.request.seed) for sample in islice(found, 2)] == [int, int]
    with pytest.raises(Refused, match="seeds: there is none for prompt 2"):
        next(found)
    found = stub.stream(["a", "b"], negative_prompt=iter(["fog"]), batch_size=1)
    assert next(found).request.prompt == "a"
    with pytest.raises(Refused, match="negative_prompt: there is none for prompt 1"):
        next(found)
    with pytest.raises(Refused, match="5 is one number"):
        stub.stream(["a"], seeds=5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 64, 3), np.uint8), "8, 64, 3"),
        (np.zeros((128, 128, 3), np.float32), "float32"),
        (np.zeros((128, 128), np.uint8), "128, 128"),
    ],
)
def test_wrong_images_are_refused(pipe, image, message):
    with pytest.raises(Refused, match=message):
        pipe.features(image)


def test_features_of_an_image_of_any_size_are_those_of_its_square(pipe):
    image = world.view(1, 192).image
    wide = np.concatenate([image[:, :40], image, image[:, :40]], 1)
    expected = pipe.features(crop_square(pictures_in_memory([image]).whole(0), 128))["low"]
    assert all(pipe.features(given)["low"].equal(expected) for given in (image, wide, Image.fromarray(wide)))


def test_names_of_diffusers_are_told_the_names_of_here():
    stub = Pipeline(StubEngine(tasks=("depth",)))
    with pytest.raises(TypeError, match="'num_inference_steps' is no choice here; write steps=, or call diffuse"):
        stub("a ball", num_inference_steps=3)
    with pytest.raises(TypeError, match="write guidance="):
        stub.stream(["a ball"], guidance_scale=3)
    for name, theirs in (("steps", "num_inference_steps="), ("seeds", "generator="), ("guidance", "guidance_scale=")):
        with pytest.raises(TypeError, match=f"'{name}' is no choice here; write {theirs}"):
            stub.diffuse("a ball", **{name: 3})
    with pytest.raises(TypeError, match="'latents' is no choice here$"):  # not "attention", which is none either
        stub.stream(["a ball"], latents=3)


@pytest.mark.parametrize("name, value", [("strength", 0.4), ("speed", "cache3")])
def test_what_needs_an_image_or_a_test_is_no_choice_of_a_call(name, value):
    """With a strength the last calls would begin with nothing but noise; a speed is tested before it is taken."""
    stub = Pipeline(StubEngine(tasks=("depth",)))
    for call in (stub, stub.diffuse, stub.stream):
        with pytest.raises(TypeError, match=f"'{name}' is no choice here, but of "):
            call(["a ball"], **{name: value})


def test_a_pipeline_without_decoders_says_that_there_are_no_labels(recwarn):
    stub = Pipeline(StubEngine(tasks=()))
    with pytest.warns(UserWarning, match="has no decoder, so its outputs have no labels; give decoder=DIR"):
        stub("a ball")
    recwarn.clear()
    stub("a ball", tasks=())
    with pytest.raises(Refused, match="projected: this pipeline has no decoders"):
        stub.features(prompt="a ball", projected=True)
    assert repr(stub) == "<Pipeline of stub: 64 x 64, engine stub, labels none>"
    assert repr(Pipeline(StubEngine(tasks=("depth", "pose")))).endswith("engine stub, labels depth, pose>")
    assert not recwarn.list


def test_saving_an_output_names_what_does():
    out = Pipeline(StubEngine(tasks=("depth",)))("a ball")
    with pytest.raises(AttributeError, match="PIL.Image.fromarray.* and the command generate a run folder"):
        out.save("folder")
    with pytest.raises(AttributeError, match="no label is called 'dept'"):
        out.dept  # noqa: B018


def test_samples_offer_every_kind_of_label_by_its_name():
    sample = Sample(Request(0, "a ball", 0), np.zeros((8, 8, 3), np.uint8), {task: object() for task in LABEL_KINDS})
    assert {kind.attribute: getattr(sample, kind.attribute) for kind in LABEL_KINDS.values()} == {
        LABEL_KINDS[task].attribute: label for task, label in sample.annotations.items()
    }


def test_samples_and_labels_are_compared_by_identity():
    """Arrays of them have no one truth."""
    pipe = Pipeline(StubEngine(tasks=("depth",)))
    first, second = pipe("a ball"), pipe("a ball")
    for one, other in zip(first.samples + first.depth, second.samples + second.depth):
        assert one != other and one in [other, one] and len({one, other}) == 2


def test_streams_are_lazy_and_hold_one_batch():
    stub, asked = Pipeline(StubEngine()), []
    endless = (asked.append(k) or f"a ball {k}" for k in count())
    found = list(islice(stub.stream(endless, batch_size=4, tasks=("depth",)), 5))
    assert [sample.request.index for sample in found] == [0, 1, 2, 3, 4] and len(asked) == 8


def test_threads_that_share_a_pipeline_get_what_each_would_get_alone(pipe):
    def made(seed):
        features = pipe.features(world.view(seed).image, "a red ball")
        choices = {"tasks": ("semantic", "depth"), "steps": 2, "batch_size": 1}
        sample = next(iter(pipe.stream(["a red ball"], seed=seed, **choices)))
        labels = sample.annotations
        return [sample.image, labels["semantic"].labels, labels["depth"].metres, *map(np.asarray, features.values())]

    alone = [made(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as threads:
        for found, truth in zip(threads.map(made, range(2)), alone, strict=True):
            assert all(map(np.array_equal, found, truth))


def test_a_prompt_that_is_long_in_coming_keeps_no_thread_waiting(pipe):
    beginning, others = Event(), Event()

    def late():
        beginning.set()
        assert others.wait(60)
        yield "a red ball"

    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(lambda: list(pipe.stream(late(), steps=2, tasks=(), batch_size=1)))
        assert beginning.wait(60)
        assert len(pipe(["a cube"], steps=2, tasks=()).images) == 1
        others.set()
        assert len(slow.result(60)) == 1


def test_samples_before_a_refused_prompt_come_first():
    stub = Pipeline(StubEngine(tasks=("depth",)))
    for given, message in (
        (["a ball", "a cube", "a cone", "x " * 90, "a star"], "prompt 3: 92 tokens"),
        (["a ball", "a cube", "a cone", " "], "prompt 3: holds no prompt"),
    ):
        found = stub.stream(given, seed=4, batch_size=2)
        assert [(one.request.prompt, one.request.seed) for one in islice(found, 3)] == list(zip(given[:3], (4, 5, 6)))
        with pytest.raises(Refused, match=message):
            next(found)
    made = []
    engine = StubEngine(tasks=("depth",))
    engine.denoise_and_capture = lambda *given: made.append(given)
    with pytest.raises(Refused, match="prompt 1: 92 tokens"):  # a call gives all samples or none
        Pipeline(engine)(["a ball", "x " * 90], batch_size=1)
    assert not made


def test_samples_whose_labels_are_under_way_come_before_a_refusal():
    class Waiting(LabelStream):
        def __init__(self):
            self._waiting = deque()

        def put(self, name, call, *arguments):
            done = Future()
            done.set_result(call(*arguments))
            self._waiting.append((name, done))

        def ready(self, most=9):
            return iter(()) if most else super().ready(most)

    class Padded(str):
        padded = ()

    def batches():
        yield from map(Padded, "ab")
        raise Refused("prompt 2: too long", "Shorten it.")

    generator = SimpleNamespace(engine=None, sample=str, label=lambda batch, drawn: [drawn])
    found = sample_and_label(generator, batches(), Waiting())
    assert list(islice(found, 2)) == [("a", ["a"]), ("b", ["b"])]
    with pytest.raises(Refused, match="prompt 2: too long"):
        next(found)


def test_stream_refuses_before_it_is_read():
    stub = Pipeline(StubEngine(tasks=("depth",)))
    for choices, message in (
        ({"tasks": ("semantic",)}, "no decoder for 'semantic'"),
        ({"tasks": ("colour",)}, "not one of"),
        ({"tasks": ("depht",)}, r"not one of .*did you mean depth\?"),
        ({"sampler": "dim"}, r"sampler: 'dim' is none of .*did you mean ddim\?"),
        ({"sampler": ["ddim"]}, r"sampler: \['ddim'\] is none of"),
        ({"profile": "0.14"}, r"profile: '0.14' is none of .*did you mean 0.14.0\?"),
        ({"steps": -1}, "--steps -1"),
        ({"guidance": float("nan")}, "--guidance nan"),
        ({"batch_size": -1}, "--batch-size -1"),
        ({"batch_size": 1.5}, "--batch-size 1.5: expected a whole number"),
        ({"batch_size": 5000}, "--batch-size 5000: expected at most 4096"),
        ({"steps": "20"}, "--steps '20': expected a whole number"),
        ({"steps": 2.5}, "--steps 2.5: expected a whole number"),
        ({"guidance": None}, "--guidance None: expected a number"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": "3"}, "--seed '3': expected a whole number"),
        ({"classes": "ball"}, "one string"),
        ({"classes": ("",)}, "empty"),
        ({"classes": (3,)}, "classes: 3 is not a text"),
        ({"tasks": "depth"}, "'depth' is one string"),
        ({"tasks": (3,)}, "tasks: 3 is not a text"),
        ({"tasks": 3}, "tasks: 3 was given, expected a sequence of labels"),
        ({"classes": None}, "classes: None was given, expected a sequence of words"),
        ({"negative_prompt": 3}, "negative_prompt: 3 was given, expected a text or several texts"),
        ({"combine": "a within b:c"}, "combine: 'a within b:c' is one string"),
        ({"ask": "every"}, "--ask: 'every' is none of named, all"),
        ({"tasks": ("attention",), "classes": ("ball",), "exponent": -2}, "--exponent -2"),
        ({"tasks": ("attention",), "classes": ("ball",), "threshold": -0.5}, "--threshold -0.5"),
        ({"tasks": ("attention",), "classes": ("ball",), "parity": "other"}, "--parity: 'other' is none of"),
    ):
        with pytest.raises(Refused, match=message):
            stub.stream(["a ball"], **choices)
    with pytest.raises(TypeError, match=r"'stepz' is no choice here \(did you mean steps\?\)"):
        stub.stream(["a ball"], stepz=3)
    with pytest.raises(TypeError, match=r"'torch_dtype' is no option here \(did you mean dtype\?\), expected engine"):
        Pipeline.from_pretrained("demo", torch_dtype="fp16")
    with pytest.raises(TypeError, match="'exponent' is no choice here; it needs the task attention"):
        stub.stream(["a ball"], exponent=3)
    for prompt, message in (("x " * 90, "prompt 0: 92 tokens"), ("a\0", "NUL"), (" ", "holds no prompt")):
        with pytest.raises(Refused, match=message):
            stub([prompt])
    for seeds, message in (
        ([1], "1 given for 2 prompts"),
        (5, "5 is one number"),
        (5.5, "5.5 is one number"),
        ([1, "2"], "--seed '2': expected a whole number"),
        ([1, 2.5], "--seed 2.5: expected a whole number"),
    ):
        with pytest.raises(Refused, match=message):
            stub(["a", "b"], seeds=seeds)
    assert [sample.request.seed for sample in stub(["a", "b"], seeds=count(3)).samples] == [3, 4]
    for prompts in (None, 3, b"a ball"):
        for make in (stub, stub.stream, stub.diffuse):
            with pytest.raises(Refused, match="prompts?: .* was given, expected a text or several texts"):
                make(prompts)
    with pytest.raises(Refused, match="prompt 1: None is not a text"):
        stub(["a", None])
    with pytest.raises(Refused, match="--batch-size -1"):
        stub(["a", "b"], batch_size=-1)
    with pytest.raises(Refused, match="negative_prompt: 3 given for 2 prompts"):
        stub(["a", "b"], negative_prompt=["fog"] * 3)
    assert [one.request.seed for one in stub(["a", "b"], seeds=torch.tensor([5, 3])).samples] == [5, 3]
    assert [sample.request.prompt for sample in stub.stream("a ball")] == ["a ball"]
    with pytest.raises(GateFailed, match="prompt 1: NaN"):
        stub(["a ball", "broken"], seed=5)
    for wrong, message in (("x " * 90, "negative_prompt"), (["fog", "x " * 90], "negative_prompt of prompt 1")):
        with pytest.raises(Refused, match=f"{message}: 92 tokens"):
            stub(["a", "b"], negative_prompt=wrong)
    with pytest.raises(Refused, match="seeds: 3 given for 2 prompts"):
        stub(["a", "b"], seeds=[1, 2, 3])


def test_pictures_that_cannot_be_made_are_refused(decoders):
    with pytest.raises(Refused, match="--size 100"):
        Pipeline.from_pretrained("tiny", decoder=str(decoders), size=100)
    for choices, message in (
        ({"size": "128"}, "--size '128': expected a multiple of 64"),
        ({"threads": -1}, "--threads -1: expected a whole number of 0 or more"),
        ({"outlines": "sharp"}, "--outlines: 'sharp' is none of auto, decoder, image"),
        ({"lora": "style.safetensors"}, "lora: 'style.safetensors' is one string"),
        ({"lora": Path("style.safetensors")}, "lora: 'style.safetensors' is one string"),
        ({"lora": [3]}, "lora: 3 is not a text"),
        ({"streams": "2"}, "--streams '2': expected a whole number of 0 or more"),
        ({"device": None}, "device: None is none of auto, cpu, cuda, cuda:N"),
        ({"device": "cdua"}, r"did you mean cuda\?"),
        ({"engine": "fats"}, r"engine: 'fats' is none of .*did you mean fast\?"),
        ({"dtype": "bfloat16"}, r"dtype: 'bfloat16' is none of .*did you mean bf16\?"),
    ):
        with pytest.raises(Refused, match=message):
            Pipeline.from_pretrained("tiny", decoder=str(decoders), **choices)
    with pytest.raises(Missing, match="--lora none.safetensors: no such file"):
        Pipeline.from_pretrained("tiny", lora=[Path("none.safetensors")])
    with pytest.raises(Missing):
        Pipeline.from_pretrained("tiny", decoder=str(decoders / "none"))
    with pytest.raises(Refused):
        Pipeline.from_pretrained("no-such-model")


def test_every_adapter_and_option_reaches_the_engine(monkeypatch):
    asked = []
    monkeypatch.setattr(engines, "open_engine", lambda *names, **how: asked.append((names, how)) or (StubEngine(), {}))
    Pipeline.from_pretrained("sdxl", lora=[Path("a.safetensors"), "b.safetensors:0.5"], size=512, dtype="bf16")
    Pipeline.from_pretrained("demo", decoder="own")
    (first, how), (second, _) = asked
    assert first == ("sdxl", None) and second == ("demo", "own")
    assert how["lora"] == ("a.safetensors", "b.safetensors:0.5") and (how["size"], how["dtype"]) == (512, "bf16")


def test_without_decoders_there_are_images_alone():
    bare = Pipeline.from_pretrained("tiny", engine="torch")
    out = bare("a ball", steps=2)
    assert bare.tasks == () and len(out.images) == 1 and out.samples[0].annotations == {}


def test_a_pipeline_in_memory_gives_what_its_folder_gives(tmp_path):
    """Its weights are copied; an adapter that was not fused is refused, one that was is part of them."""
    tiny = with_small_unet(load_model("tiny"))
    theirs = in_diffusers(tiny)
    found = Pipeline.from_diffusers(theirs, engine="fast", device="cpu", size=tiny.size)
    theirs.save_pretrained(tmp_path / "model")
    expected = Pipeline.from_pretrained(str(tmp_path / "model"), engine="fast", device="cpu", size=tiny.size)
    images = [pipe("a ball", seed=3, steps=2, tasks=()).images[0] for pipe in (found, expected)]
    assert np.array_equal(*images)
    digests = found.engine.model.digests
    assert set(digests) == {"tokenizer", "scheduler", "unet", "vae", "text_encoder"}
    layer = theirs.unet.conv_in
    assert found.engine.model.modules["unet"].conv_in.weight.data_ptr() != layer.weight.data_ptr()
    layer.lora_A, layer.merged = {"one": torch.nn.Linear(1, 1)}, False
    with pytest.raises(Refused, match="not fused, the first is conv_in"):
        Pipeline.from_diffusers(theirs)
    layer.merged = True
    with torch.no_grad():
        layer.weight += 0.1
    theirs.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config, beta_end=0.013)
    again = Pipeline.from_diffusers(theirs, engine="fast", device="cpu", size=tiny.size)
    changed = again.engine.model.digests
    assert {name for name in digests if digests[name] != changed[name]} == {"unet", "scheduler"}
    assert not np.array_equal(again("a ball", seed=3, steps=2, tasks=()).images[0], images[0])


def test_a_digest_of_weights_is_that_of_their_names_and_values_in_any_order():
    first, second = torch.ones(2), torch.zeros(2)
    digest = in_memory.digest_of({"a": first, "b": second})
    assert digest == in_memory.digest_of({"b": second, "a": first}) != in_memory.digest_of({"a": second, "b": first})
    assert digest != in_memory.digest_of({"a": first, "c": second})


def test_settings_and_tensors_are_read_off_a_pipeline_as_a_folder_has_them():
    notes = {"_diffusers_version": "1", "_use_default_values": [], "_name_or_path": "y"}
    part = SimpleNamespace(config={"a": (1, 2), "b": "x", **notes})
    assert in_memory._config_of(part) == {"a": [1, 2], "b": "x"} and in_memory._config_of(object()) == {}
    pipe = SimpleNamespace(config={"_own": 1, "is_distilled": True, "length": 3, "share": 0.5, "unet": ("a", "B")})
    assert in_memory._index_of(pipe) == {"model_index": {"is_distilled": True, "length": 3, "share": 0.5}}
    network, layer = torch.nn.Module(), torch.nn.Module()
    layer.base_layer, layer.merged = torch.nn.Linear(2, 3).half(), True
    layer.lora_A = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 1)})
    network.layer = layer
    network.register_buffer("count", torch.tensor(2**30 + 1))
    state = in_memory.state_of(network, "unet")
    assert set(state) == {"layer.weight", "layer.bias", "count"} and int(state["count"]) == 2**30 + 1
    assert state["count"].dtype == torch.int64 and state["layer.weight"].dtype == torch.float32
    network.more = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(Refused, match="the weights of the unet are offloaded"):
        in_memory.state_of(network, "unet")


def test_every_draw_of_a_caller_s_generator_is_of_its_next_numbers():
    one = torch.Generator().manual_seed(7)
    drawn, _ = diffusing.draw_noise(torch.Generator().manual_seed(7), 2, (1, 2, 3), 2)
    assert torch.equal(drawn, torch.stack([torch.randn((2, 1, 2, 3), generator=one) for _ in range(2)]))
    each = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    drawn, _ = diffusing.draw_noise([torch.Generator().manual_seed(seed) for seed in (7, 8)], 2, (1, 2, 3), 2)
    for k, source in enumerate(each):
        right = [torch.randn((1, 1, 2, 3), generator=source)[0] for _ in range(2)]
        assert torch.equal(drawn[:, k], torch.stack(right))


def test_the_seed_of_a_caller_s_generator_is_told_whole():
    assert diffusing.draw_noise(torch.Generator().manual_seed(2**40 + 7), 2, (1, 2, 2))[1] == [2**40 + 7] * 2
    assert diffusing.draw_noise(torch.Generator().manual_seed(2**63 + 7), 2, (1, 2, 2))[1] == [7] * 2  # of 63 bits


def test_a_pipeline_in_memory_that_no_weights_describe_is_refused():
    """What it would do beside its weights could only be left out, and its images would be others."""
    tiny = with_small_unet(load_model("tiny"))
    theirs = in_diffusers(tiny)
    theirs.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(Refused, match="FreeU is enabled"):
        Pipeline.from_diffusers(theirs)
    theirs.disable_freeu()
    theirs.register_to_config(_name_or_path="somebody/model")
    assert in_memory.model_of(theirs).name == "somebody/model"
    assert len(Pipeline.from_diffusers(theirs, device="cpu", size=tiny.size)("a ball", steps=2, tasks=()).images) == 1
    theirs.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(Refused, match="encoder_hid_dim_type is 'ip_image_proj'"):
        Pipeline.from_diffusers(theirs)


def test_a_compiled_pipeline_in_memory_gives_the_same_images(tiny64):
    theirs = in_diffusers(tiny64)
    plain, compiled = (
        Pipeline.from_diffusers(theirs, engine="torch", device="cpu", size=tiny64.size)("a ball", steps=2, tasks=())
        for theirs.unet in (theirs.unet, torch.compile(theirs.unet))
    )
    assert np.array_equal(plain.images[0], compiled.images[0])


def test_a_pipeline_whose_weights_are_offloaded_or_of_no_square_is_refused():
    theirs = in_diffusers(load_model("tiny"))
    with pytest.raises(Refused, match="sample_size is .*16, 32.*, expected a number"):
        theirs.unet = copy.deepcopy(theirs.unet)
        theirs.unet.register_to_config(sample_size=(16, 32))
        Pipeline.from_diffusers(theirs)
    theirs.unet.register_to_config(sample_size=16)
    theirs.unet.to("meta")
    with pytest.raises(Refused, match="weights of the unet are offloaded"):
        Pipeline.from_diffusers(theirs)


def test_textual_inversion_of_one_vector_is_followed_and_of_several_refused():
    tiny = with_small_unet(load_model("tiny"))
    theirs = in_diffusers(tiny, text_encoder=copy.deepcopy(tiny.modules["text_encoder"]))
    theirs.set_progress_bar_config(disable=True)
    width = theirs.text_encoder.config.hidden_size
    theirs.load_textual_inversion(torch.full((1, width), 2.0), token="<one>")
    mine = Pipeline.from_diffusers(theirs, engine="torch", device="cpu", size=tiny.size)
    given = {"prompt": "a <one> ball", "num_inference_steps": 2, "output_type": "latent"}
    images = [each(**given, generator=torch.Generator().manual_seed(1)).images for each in (theirs, mine.diffuse)]
    torch.testing.assert_close(*images, atol=1e-3, rtol=1e-3)
    theirs.load_textual_inversion(torch.ones(2, width), token="<two>")
    with pytest.raises(Refused, match="'<two>' several vectors"):
        Pipeline.from_diffusers(theirs)


def test_a_family_may_have_a_sampler_of_its_own(tiny):
    model = replace(tiny, defaults=replace(tiny.defaults, sampler="ddim"))
    own = Pipeline(build_engine("torch", model, device="cpu"))

    def steps_of(**choices):
        generator = torch.Generator().manual_seed(1)
        return own.diffuse("a ball", num_inference_steps=3, generator=generator, output_type="latent", **choices).images

    assert torch.equal(steps_of(), steps_of(sampler="ddim")) and not torch.equal(steps_of(), steps_of(sampler="euler"))


def test_the_arguments_of_diffusers_give_its_images(pipe):
    """Of several generators and of one, in batches of two, with a callback that changes latents in the middle."""
    model, prompts = pipe.engine.model, ["a red ball", "two cubes", "a tree"]
    theirs = in_diffusers(model)
    theirs.set_progress_bar_config(disable=True)

    def pulled(_, step, timestep, given):
        return {"latents": given["latents"] * 0.5} if step == 1 else given

    def same(labels=(), **choices):
        generators = [[torch.Generator().manual_seed(seed) for seed in (7, 2, 7)] for _ in range(2)]
        if choices.pop("is_one", False):
            generators = [torch.Generator().manual_seed(9) for _ in range(2)]
        given = {"num_inference_steps": 3, "callback_on_step_end": pulled, **choices}
        expected = theirs(prompts, generator=generators[0], **given).images
        found = pipe.diffuse(prompts, generator=generators[1], batch_size=2, tasks=labels, **given)
        return found, found.images, expected

    found, images, expected = same(output_type="latent", guidance_scale=0.5, negative_prompt=["fog", "", "rain"])
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=1e-3)
    _, images, expected = same(output_type="pt", is_one=True, guidance_scale=4.0, negative_prompt=["fog"] * 3)
    torch.testing.assert_close(images, expected, atol=1.1 / 255, rtol=0)
    several = [torch.Generator().manual_seed(9)] * 6
    sides = {"height": 128, "width": 128, "num_images_per_prompt": 2}
    given = {"num_inference_steps": 2, "output_type": "latent", "negative_prompt": ["fog", "", "rain"], **sides}
    expected, images = (
        make(prompts, generator=torch.Generator().manual_seed(9), **given).images for make in (theirs, pipe.diffuse)
    )
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=1e-3)
    assert len(pipe.diffuse(prompts, generator=several, tasks=(), num_inference_steps=2, **sides).samples) == 6
    found, images, expected = same(labels=("depth",))
    for mine, other in zip(images, expected, strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(other, int)).max() <= 1
    assert len(found.depth) == 3 and [entry["seed"] for entry in found.meta] == [7, 2, 7]
    assert pipe.diffuse("a ball", num_inference_steps=2, output_type="np", tasks=()).images.shape == (1, 128, 128, 3)


@pytest.mark.parametrize(
    "kind, settings, refused",
    [
        (PNDMScheduler, {}, ""),
        (PNDMScheduler, {"skip_prk_steps": False}, "skip_prk_steps=False"),
        (DDIMScheduler, {"clip_sample": False}, ""),
        (DDIMScheduler, {"clip_sample": True}, "clip_sample=True"),
        (DPMSolverMultistepScheduler, {}, ""),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, ""),
        (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}, "use_lu_lambdas=True"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver"),
        (DPMSolverMultistepScheduler, {"solver_order": 3}, "solver_order=3"),
        (DPMSolverMultistepScheduler, {"lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
        (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, ""),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}, ""),
        (EulerDiscreteScheduler, {"use_beta_sigmas": True}, "use_beta_sigmas"),
        (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, ""),
        (LCMScheduler, {}, ""),
        (LCMScheduler, {"clip_sample": True}, "clip_sample=True"),
        (UniPCMultistepScheduler, {}, "unipc samples flows alone"),
    ],
)
def test_a_scheduler_gives_the_images_of_diffusers_or_is_refused(tiny64, kind, settings, refused):
    theirs = in_diffusers(tiny64)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = kind.from_config(theirs.scheduler.config, **settings)
    mine = Pipeline.from_diffusers(theirs, engine="torch", device="cpu", size=tiny64.size)
    given = {"prompt": "a ball", "num_inference_steps": 4, "output_type": "latent", "height": 64, "width": 64}
    if refused:
        with pytest.raises(Refused, match=refused):
            mine.diffuse(**given)
        return
    given["prompt"] = ["a ball", "a cube", "a tree"]
    for seeds in ([1], [7, 2, 7]):
        images = []
        for each, choices in ((theirs, {}), (mine.diffuse, {"batch_size": 2})):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            one_or_several = generators[0] if len(seeds) == 1 else generators
            images.append(each(**given, **choices, generator=one_or_several).images)
        torch.testing.assert_close(*images, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"output_type": "jpg"}, "output_type: 'jpg' is none of pil, np, pt, latent"),
        ({"negative_prompt": ["fog"]}, "negative_prompt: 1 given for 2 prompts"),
        ({"generator": [torch.Generator()] * 3}, "generator: 3 given for 2 images"),
        ({"height": 128, "width": 64}, "width: 64 was given, and the model was loaded for images of 128 x 128 pixels"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: 0 is no whole number from 1 on"),
        ({"prompt": []}, "prompt: none was given"),
        ({"generator": 7}, "generator: 7 is no generator of torch"),
        ({"negative_prompt": 3}, "negative_prompt: 3 was given, expected a text or several texts"),
        ({"callback_on_step_end": lambda *given: {"latents": torch.zeros(1)}}, r"latents of shape \[1\], expected"),
    ],
)
def test_wrong_arguments_of_diffusers_are_refused(pipe, choices, message):
    with pytest.raises(Refused, match=message):
        pipe.diffuse(**{"prompt": ["a ball", "a cube"], "num_inference_steps": 2, "tasks": (), **choices})


def test_an_adapter_is_fused_at_its_scale(tiny, tmp_path):
    model, layer = tiny, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    before = model.modules["unet"].get_submodule(layer).weight
    down, up = torch.randn(2, before.shape[1]), torch.randn(before.shape[0], 2)
    kohya = f"lora_unet_{layer.replace('.', '_')}"
    named = {
        "kohya": (
            {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.alpha": torch.ones(())},
            0.5,
        ),
        "peft": ({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, 1.0),
    }
    thin = {f"unet.{layer}.lora_A.weight": down[:1].clone(), f"unet.{layer}.lora_B.weight": up[:, :1].clone()}
    save_file(thin, tmp_path / "thin.safetensors")
    weight = lora.fuse_adapters(model, [f"{tmp_path}/thin.safetensors"]).modules["unet"].get_submodule(layer).weight
    torch.testing.assert_close(weight, before + up[:, :1] @ down[:1])
    for name, (state, share) in named.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        changed = lora.fuse_adapters(model, [f"{tmp_path / name}.safetensors:0.25"])
        torch.testing.assert_close(
            changed.modules["unet"].get_submodule(layer).weight, before + 0.25 * share * up @ down
        )
        assert (
            changed.digests[f"lora {name}.safetensors"].endswith(" x 0.25")
            and model.modules["unet"].get_submodule(layer).weight is before
        )
    for state, message in (
        ({"nothing.weight": down}, "is not a tensor of a low-rank adapter"),
        ({"unet.nowhere.lora_A.weight": down, "unet.nowhere.lora_B.weight": up}, "has no layer 'nowhere'"),
        ({f"unet.{layer}.lora_A.weight": down}, "only down of its adapter"),
        ({f"unet.{layer}.lora_A.weight": down[:, 1:].clone(), f"unet.{layer}.lora_B.weight": up}, "for a weight of"),
        (
            {f"unet.{layer}.lora_A.weight": down[:0], f"unet.{layer}.lora_B.weight": up[:, :0].clone()},
            "for a weight of",
        ),
        ({f"unet.{layer}.lora_A.weight": down[0], f"unet.{layer}.lora_B.weight": up[:, 0].clone()}, "for a weight of"),
        ({**named["kohya"][0], f"{kohya}.alpha": torch.ones(2)}, "for a weight of"),
    ):
        save_file(state, tmp_path / "bad.safetensors")
        with pytest.raises(Refused, match=message):
            lora.fuse_adapters(model, [str(tmp_path / "bad.safetensors")])
    with pytest.raises(Missing, match=r"no such file \(did you mean bad.safetensors\?\)"):
        lora.fuse_adapters(model, [f"{tmp_path}/bat.safetensors:2"])


def test_adapters_of_one_name_are_each_written_down(tiny, tmp_path):
    model, layer = tiny, "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    wide, high = model.modules["unet"].get_submodule(layer.removeprefix("unet.")).weight.shape[::-1]
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        state = {f"{layer}.lora_A.weight": torch.randn(2, wide), f"{layer}.lora_B.weight": torch.randn(high, 2)}
        save_file(state, tmp_path / folder / "pytorch_lora_weights.safetensors")
    given = [f"{tmp_path / folder}/pytorch_lora_weights.safetensors" for folder in ("a", "b", "c")]
    digests = lora.fuse_adapters(model, given).digests
    own = {digests[f"lora pytorch_lora_weights.safetensors{number}"] for number in ("", " 2", " 3")}
    assert len(own) == 3 and set(digests) > set(model.digests) and len(digests) == len(model.digests) + 3


def test_a_callback_is_told_the_timestep_and_may_change_the_images_of_the_batch():
    schedule, latents, told = SimpleNamespace(timesteps=(900, 500, 100)), torch.tensor([1.0, 2, 2]).view(3, 1, 1, 1), []

    def change(step, timestep, given):
        told.append((step, int(timestep), given["latents"].flatten().tolist()))
        return {"latents": 10 * given["latents"]} if step else None

    after = [diffusing._after(change, schedule, 2, call, latents).flatten().tolist() for call in (0, 1)]
    assert told == [(0, 900, [1, 2]), (1, 500, [1, 2])]
    assert after == [[1, 2, 2], [10, 20, 2]] and latents.flatten().tolist() == [1, 2, 2]  # the third fills the batch


def test_an_adapter_of_diffusers_is_scaled_as_its_file_notes(tiny, tmp_path):
    model, layer = tiny, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    before = model.modules["unet"].get_submodule(layer).weight
    down, up = torch.randn(4, before.shape[1]), torch.randn(before.shape[0], 4)
    state = {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    alone, path = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {}}, tmp_path / "style.safetensors"
    cases = [
        (alone, 2.0),
        (alone | {"unet.use_rslora": True}, 4.0),
        (alone | {"unet.alpha_pattern": {"2.to_k": 9, "attn2.to_k": 1, "to_q": 9}}, 0.25),  # by whole names
        ({"text_encoder.lora_alpha": 8}, 1.0),
        (alone | {"unet.alpha_pattern": {"tn2.to_k": 9}}, 2.0),
        (alone | {"unet.alpha_pattern": {f"^{layer}": 2}}, 0.5),  # as diffusers writes mixed ranks that it has read
        (alone | {"unet.alpha_pattern": {"^attn2.to_k": 2}}, 2.0),
    ]
    for notes, share in cases:
        save_file(state, path, {"lora_adapter_metadata": json.dumps(notes)})
        changed = lora.fuse_adapters(model, [str(path)]).modules["unet"].get_submodule(layer).weight
        torch.testing.assert_close(changed, before + share * up @ down)
    save_file(state | {f"unet.{layer}.alpha": torch.tensor(2.0)}, path, {"lora_adapter_metadata": json.dumps(alone)})
    changed = lora.fuse_adapters(model, [str(path)]).modules["unet"].get_submodule(layer).weight
    torch.testing.assert_close(changed, before + 0.5 * up @ down)  # 2 of the tensor over a rank of 4
    unread = [{"to_k": None}, {"to_k|to_q": 2}, {".*to_k": 2}]  # as regular expressions they may never end
    for notes in ({"unet.lora_alpha": "8"}, [], *(alone | {"unet.alpha_pattern": pattern} for pattern in unread)):
        save_file(state, path, {"lora_adapter_metadata": json.dumps(notes)})
        with pytest.raises(Refused, match="its lora_adapter_metadata are inconsistent"):
            lora.fuse_adapters(model, [str(path)])


def test_features_of_a_prompt_are_those_of_its_own_sampling(pipe):
    raw = pipe.features(prompt="a ball", steps=2, seed=4)
    projected = pipe.features(prompt="a ball", steps=2, seed=4, projected=True)
    assert set(projected) == set(pipe.tasks) and torch.equal(
        raw["low"], pipe.features(prompt="a ball", steps=2, seed=4)["low"]
    )
    for name, levels in projected.items():
        weights = pipe.engine.decoders[name].projections()
        highest = torch.nn.functional.conv2d(raw["highest"], weights["highest"])
        torch.testing.assert_close(levels["highest"], highest, atol=1e-3, rtol=1e-3)
    with pytest.raises(Refused, match="neither an image nor a prompt"):
        pipe.features()


def test_features_can_be_trained_on(decoders):
    pipe = Pipeline.from_pretrained("tiny", engine="fast", decoder=str(decoders))
    for levels in (pipe.features(prompt="a ball", steps=2), *pipe.features(prompt="a ball", projected=True).values()):
        assert not any(level.is_inference() for level in levels.values())


def test_features_of_a_prompt_are_of_latents_as_its_scheduler_begins_them_and_adds_noise(tiny64):
    """The capture is that of the latents which diffusers' scheduler, built in code, gives to the second call."""
    theirs = in_diffusers(tiny64)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs.scheduler = EulerAncestralDiscreteScheduler(**betas, timestep_spacing="trailing")
    mine = Pipeline.from_diffusers(theirs, engine="torch", device="cpu", size=64)
    mine.engine.model = replace(mine.engine.model, defaults=replace(mine.engine.model.defaults, sampler="auto"))
    engine, scheduler, random = mine.engine, theirs.scheduler, torch.Generator().manual_seed(4)
    scheduler.set_timesteps(2)
    first, second = scheduler.timesteps.tolist()
    latents = torch.randn(1, 4, 8, 8, generator=random) * scheduler.init_noise_sigma
    text = call_text(engine, ["a ball"], 3.0)
    without, with_text = engine.denoise(scheduler.scale_model_input(latents, first), first, text).chunk(2)
    latents = scheduler.step(without + 3 * (with_text - without), first, latents, generator=random).prev_sample
    capture = engine.denoise_and_capture_raw(scheduler.scale_model_input(latents, second), second, text)[1]
    found = mine.features(prompt="a ball", steps=2, guidance=3.0, seed=4, timestep=int(second))
    expected = torch.cat(capture.features[3], 1)
    torch.testing.assert_close(found["highest"][:, : expected.shape[1]], expected, atol=1e-4, rtol=1e-4)


def test_the_example_teaches_a_head_of_ones_own(capsys):
    page = (Path(__file__).parents[1] / "docs" / "library.md").read_text(encoding="utf-8")
    _, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(example.splitlines()) <= 40
    names: dict = {}
    exec(example, names)
    truth = (names["truth"] > 0).float().mean().item()
    assert names["share"] > 0.8 > max(truth, 1 - truth)


def test_what_diffuse_leaves_to_its_caller_is_followed():
    stub, random = Pipeline(StubEngine(tasks=("depth",))), torch.Generator().manual_seed(3)
    given = {"num_inference_steps": 2, "sampler": "ddim", "output_type": "np"}
    scales = [stub.diffuse("a", guidance_scale=scale, **given).meta[0]["guidance"] for scale in (0.0, 1.0, 7.5)]
    assert scales[0] <= 1 and scales[1:] == [1.0, 7.5]
    profiles = [stub.diffuse("a", **given, **choices).meta[0]["profile"] for choices in ({}, {"profile": "0.3.0"})]
    assert profiles == ["0.14.0", "0.3.0"]
    stub.diffuse(["a", "b"], generator=random, **given)  # draws as many numbers as its images need
    again = torch.Generator().manual_seed(3)
    torch.randn(2, 4, 8, 8, generator=again)
    assert torch.equal(torch.randn(3, generator=random), torch.randn(3, generator=again))


def test_images_are_repeated_in_turn_and_converted_by_their_axes():
    prompts, negatives = diffusing.repeat_prompts(["a", "b"], ["fog", "rain"], 2)
    assert (prompts, negatives) == (["a", "a", "b", "b"], ["fog", "fog", "rain", "rain"])
    assert diffusing.repeat_prompts("a", None) == (["a"], [""])
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    samples, latents = [SimpleNamespace(image=image), SimpleNamespace(image=image + 1)], {1: torch.ones(1), 0: None}
    pixels = diffusing.convert_images(samples, "np", {})
    assert pixels.dtype == np.float32 and (pixels == np.stack([image, image + 1]) / np.float32(255)).all()
    planes = diffusing.convert_images(samples, "pt", {})
    assert planes.shape == (2, 3, 2, 4) and float(planes[1, 2, 1, 3]) == np.float32(24 / 255)
    latents[0] = torch.zeros(1)
    assert diffusing.convert_images(samples, "latent", latents).tolist() == [[0], [1]]
    assert [each.size for each in diffusing.convert_images(samples, "pil", {})] == [(4, 2)] * 2


def test_a_callback_gets_the_images_of_a_batch_without_its_padding():
    shapes, stub = [], Pipeline(StubEngine(tasks=("depth",)))

    def tell(pipeline, step, timestep, given):
        shapes.append((pipeline is stub, step, len(given["latents"])))

    given = {"num_inference_steps": 1, "sampler": "ddim", "callback_on_step_end": tell}
    stub.diffuse(["a", "b", "c"], batch_size=2, **given)
    assert shapes == [(True, 0, 2), (True, 0, 1)]


def test_features_of_a_prompt_are_of_the_guidance_that_a_call_is_told():
    class Telling(StubEngine):
        def denoise(self, latents, timestep, text):
            told.append(text.guidance)
            return super().denoise(latents, timestep, text)

        def denoise_and_capture_raw(self, latents, timestep, text):
            return super().denoise_and_capture(latents, timestep, text)

    engine = Telling(tasks=("depth",))
    engine.model.guidance, engine.model.has_negative = "embedded", lambda guidance: False
    for guidance, expected in ((3.5, 3.5), (0.0, 2.0)):
        told = []
        Pipeline(engine).features(prompt="a ball", steps=3, guidance=guidance)
        assert told and set(told) == {expected}


def test_calls_that_name_no_guidance_take_that_of_their_pipeline():
    pipe = Pipeline.from_pretrained("tiny", guidance=9.0)
    for asked, expected in (({}, 9.0), ({"guidance": 0.0}, 9.0), ({"guidance": 2.0}, 2.0)):
        recipe, _ = pipe.prepare([], [], tasks=(), **asked)
        assert recipe.facts["guidance"] == expected
    first, same, other = (pipe.features(prompt="a", steps=3, guidance=value)["high"] for value in (0.0, 9.0, 2.0))
    assert (first == same).all() and (first != other).any()


def test_prompts_are_cut_where_no_word_of_a_class_that_its_decoder_keeps_is_lost():
    engine = StubEngine(tasks=("semantic",))
    decoder = engine.decoders["semantic"]
    decoder.config = replace(decoder.config, class_words=(ClassWord("ball", "globe", ("orb",)),))
    long, stub = "word " * 80, Pipeline(engine)
    (sample,) = stub([long + "street"], truncate=True).samples
    assert sample.request.prompt == ("word " * 75).strip() and sample.request.classes == ()
    with pytest.raises(Refused, match="would lose the class word 'ball'"):
        stub([long + "orb"], truncate=True)
    assert stub(["two orbs"]).meta[0]["classes"] == ("ball",)


def test_pictures_of_a_call_have_seeds_one_after_another():
    stub = Pipeline(StubEngine(tasks=("depth",)))
    found = stub.label([np.zeros((64, 80, 3), np.uint8)] * 3, "a ball", seed=7, batch_size=2)
    assert [entry["seed"] for entry in found.meta] == [7, 8, 9]
    assert [entry["picture"] for entry in found.meta] == ["0", "1", "2"]
    assert stub([]).samples == [] and stub.label([]).samples == []


def test_what_is_told_of_samples_made_with_numbers_of_numpy_is_plain_json(recwarn):
    numbers = {"steps": np.int64(3), "guidance": np.float32(2.5), "seeds": np.array([7])}
    (entry,) = Pipeline(StubEngine(tasks=("depth",)))(["a ball"], **numbers).meta
    stored = json.loads(json.dumps(entry))
    assert (stored["steps"], stored["guidance"], stored["seed"]) == (3, 2.5, 7) and not recwarn.list


def test_the_noise_of_each_picture_of_a_batch_is_that_of_its_own_seed(monkeypatch):
    engine, seen = StubEngine(tasks=("depth",)), []
    engine.decoders["depth"].config = replace(engine.decoders["depth"].config, capture_timestep=500)
    capture = engine.denoise_and_capture
    monkeypatch.setattr(engine, "denoise_and_capture", lambda *call: seen.append(call[:2]) or capture(*call))
    Pipeline(engine).label([np.zeros((64, 64, 3), np.uint8)] * 3, "a ball", seed=7)  # black: the latents are zeros
    ((latents, timestep),) = seen
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000)[:501] ** 2
    noise = [torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in (7, 8, 9)]
    assert timestep == 500 and torch.allclose(latents, torch.stack(noise) * (1 - np.prod(1 - betas)) ** 0.5, atol=1e-5)


@pytest.mark.parametrize("place", [(CpuEngine, "_ready"), (blocks._C, "Upsample"), (blocks.UpsampleBlock, "pack")])
@pytest.mark.parametrize("is_done", [False, True])
def test_after_an_interrupt_amid_the_reading_of_weights_a_call_gives_the_same(decoders, place, is_done):
    call = getattr(*place)

    def depth(pipe):
        return pipe("a ball", steps=2, tasks=("depth",)).depth[0].metres

    def interrupted(*given):
        undo.undo()
        if is_done:
            call(*given)
        raise KeyboardInterrupt

    pipes = [Pipeline.from_pretrained("tiny", engine="fast", decoder=str(decoders), size=64) for _ in range(2)]
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            depth(pipes[0])
    assert np.array_equal(depth(pipes[0]), depth(pipes[1]))


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("has_turn", [True, False])
def test_an_interrupt_that_comes_while_a_turn_is_waited_for_reaches_the_caller(decoders, call, has_turn):
    class Turn:
        calls = held = 0

        def __enter__(self):
            self.calls += 1
            self.held += self.calls != call or has_turn
            if self.calls == call:
                raise KeyboardInterrupt

        acquire = __enter__

        def release(self):
            if not self.held:
                raise RuntimeError("cannot release un-acquired lock")
            self.held -= 1

    pipe = Pipeline.from_pretrained("tiny", engine="fast", decoder=str(decoders), size=64)
    pipe._turn = Turn()
    with pytest.raises(KeyboardInterrupt):
        pipe("a ball", steps=2, tasks=("depth",))
    assert pipe._turn.held == 0
