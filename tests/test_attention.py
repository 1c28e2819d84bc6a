"""Labels from attention: engines against each other and against the algorithm written plainly, and a run with them."""

import io
import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from stub_engine import StubEngine, Tokenizer

from bench.peers.dataset_diffusion import DatasetDiffusion, Numbers
from bench.rows import attention as bench
from datasetdm_fast import audit as audit_command
from datasetdm_fast import generate, label, split
from datasetdm_fast.command_line.run_settings import label_spec
from datasetdm_fast.config import DEMO_DEFAULTS, AttentionDefaults
from datasetdm_fast.data import AttentionSums, Request, join_texts
from datasetdm_fast.disk.storage import CACHE_VARIABLE
from datasetdm_fast.engine.backbones.flow_models import seg4diff
from datasetdm_fast.engine.backbones.sd import SD
from datasetdm_fast.engine.decoders.config import DEMO, SD1_LEVELS
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.labels.class_tables import ClassTable, ClassWord
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop import calls, class_prompts, driver
from datasetdm_fast.engine.loop.calls import FromOneGenerator
from datasetdm_fast.engine.loop.recipe import Recipe, make_recipe
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.tasks import attention
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.kernels import choice
from datasetdm_fast.runs.jobs import job as job_module
from datasetdm_fast.runs.jobs import labelling
from datasetdm_fast.runs.jobs.labelling import open_pictures
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_settings import LabelConfig
from datasetdm_fast.training.readers import open_data

pytestmark = pytest.mark.usefixtures("one_engine_of_a_kind")

CLASSES = ("ball", "cube", "cone")
REQUESTS = [
    Request(0, "a red ball and a blue cube", 7, ("ball", "cube"), "fog"),
    Request(1, "a yellow cone", 8, ("cone",), "fog"),
    Request(2, "a cube", 9, ("cube",), "fog"),
]


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.fixture(scope="module")
def engines(model, tmp_path_factory):
    names = ["torch", "fast", *(name for name in ("ort", "openvino") if is_installed(name))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield {name: build_engine(name, model, {}) for name in names}


def is_installed(name):
    return find_spec({"ort": "onnxruntime"}.get(name, name)) is not None


def recipe(engine, **attention_settings):
    chosen = {"steps": 2, "classes": CLASSES, "profile": "0.14.0", **attention_settings}
    return make_recipe(engine, ("attention",), **chosen)


def drawn(engine, requests, **settings):
    """The sampled batch and its labels."""
    from datasetdm_fast.data import Batch

    made = driver.BatchGenerator(engine, recipe(engine, **settings), lambda: None)
    batch = Batch(0, tuple(requests))
    sampled = made.sample(batch)
    return sampled, made.label(batch, sampled)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["torch", "fast", "ort"])
def test_parity_is_the_plain_algorithm(model, engines, name):
    settings = {
        "exponent": 4,
        "self_cells": 16,
        "cross_cells": 8,
        "guidance": 7.5,
        "threshold": 0.6,
        "uncertainty": 0.5,
    }
    requests = [Request(k, each.prompt, 7 + k, each.classes, "fog") for k, each in enumerate(REQUESTS[:2])]
    sampled, results = drawn(engines[name], requests, parity="dataset-diffusion", **settings)
    places = [[(1 + k,) for k in range(len(request.classes))] for request in requests]
    maps = attention.class_maps(sampled.averages, places, 4)
    plain = DatasetDiffusion(model, Numbers(**settings), steps=2)
    for b, each in enumerate(plain.draw(requests)):
        assert float((sampled.averages.cells[b] - each.cells).norm() / each.cells.norm()) <= 1e-3
        assert float((sampled.averages.tokens[b] - each.tokens).norm() / each.tokens.norm()) <= 1e-3
        assert float((maps[b] - each.maps).norm() / each.maps.norm()) <= 1e-3
        mask = plain.label(each.maps, requests[b], CLASSES).numpy()
        ordered = F.interpolate(each.maps[None], (128, 128), mode="bicubic")[0].sort(0).values
        is_near = (ordered[-1] - 0.6).abs().minimum((ordered[-1] - 0.5).abs()) < 1e-3
        if len(ordered) > 1:
            is_near |= (ordered[-1] - ordered[-2] < 1e-3) & (ordered[-1] >= 0.6)
        assert ((results[b].annotations["attention"].labels == mask) | is_near.numpy()).all()
        assert is_near.float().mean() < 0.05


def test_the_race_against_dataset_diffusion_begins_with_a_comparison(monkeypatch):
    found = bench.measure(bench.AttentionBench(images=2, steps=2, rounds=1))
    assert found["ratio"] > 0 and found["mib_an_image"] == round((64**2 + 16 * 77) * 4 / 2**20, 2)
    monkeypatch.setattr(bench, "LIMIT", 1e-9)
    with pytest.raises(GateFailed, match="attention of image 0"):
        bench.measure(bench.AttentionBench(images=1, steps=2, rounds=1))


def test_the_bench_runs_both_on_the_cpu(monkeypatch):
    """The other one's networks lie there, also where the engine by itself would take a GPU."""
    devices = []
    monkeypatch.setattr(bench, "build_engine", lambda *_, device: devices.append(device) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.measure(bench.AttentionBench(images=1, steps=2, rounds=1))
    assert devices == ["cpu"]


@torch.inference_mode()
def test_sums_of_all_engines_agree_and_the_output_is_that_of_denoise(engines):
    fast, latents = engines["fast"], torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = join_texts([fast.encode_text([""] * 3), fast.encode_text([each.prompt for each in REQUESTS])])
    class_text = fast.encode_text(["ball cube", "cone", "cube"])
    found = {}
    for name, engine in engines.items():
        sums = AttentionSums(torch.zeros(3, 64, 64), torch.zeros(3, 256, 77))
        for timestep in (900.0, 100.0):
            output, sums = engine.denoise_and_average(latents, timestep, text, class_text, sums)
            apart = output - engine.denoise(latents, timestep, text)
            # OpenVINO compiles the two calls apart.
            assert float(apart.norm() / output.norm()) <= (1e-5 if name == "openvino" else 0)
        assert torch.allclose(sums.cells.sum(-1), torch.tensor(2.0)) and torch.allclose(
            sums.tokens.sum(-1), torch.tensor(2.0)
        )
        found[name] = sums
    for part in ("cells", "tokens"):
        truth = getattr(found["torch"], part)
        for sums in found.values():
            assert float((getattr(sums, part) - truth).norm() / truth.norm()) < 1e-5


@torch.inference_mode()
def test_a_label_does_not_depend_on_its_batch(engines):
    together, _ = drawn(engines["fast"], REQUESTS)
    alone, _ = drawn(engines["fast"], REQUESTS[1:2])
    for part in ("cells", "tokens"):
        one, other = getattr(together.averages, part)[1], getattr(alone.averages, part)[0]
        assert float((one - other).norm() / one.norm()) < 1e-5


def test_one_generator_draws_what_one_call_draws():
    noise = FromOneGenerator()
    whole = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    for place in (0, 1, 4, 2, 2):
        assert torch.equal(noise.draw(3, place, (4, 16, 16)), whole[place])


def test_columns_are_tokens_or_words(model):
    tokenizer = model.tokenizer
    long = len(tokenizer("zebra").input_ids) - 2
    assert long > 1
    find = partial(class_prompts.class_columns, tokenizer=tokenizer)
    assert find("zebra ball", ("ball", "zebra"), by_words=False) == [
        ("ball", (1 + long,)),
        ("zebra", tuple(range(1, 1 + long))),
    ]
    assert find("zebra ball", ("ball", "zebra"), by_words=True) == [("zebra", (1,)), ("ball", (2,))]
    said = find("dining table hot dog dog", ("dog", "diningtable", "hot dog"), by_words=True)
    assert said == [("diningtable", (1, 2)), ("hot dog", (3,)), ("dog", (5,))]  # the dog of "hot dog" is none
    listed = find("person tv monitor person", ("person", "tvmonitor"), by_words=True)
    assert listed == [("person", (1,)), ("tvmonitor", (2, 3)), ("person", (4,))]
    with pytest.raises(Refused, match="does not hold the class word 'cone'"):
        find("ball", ("cone",), by_words=False)
    balls, cubes, mice = (len(tokenizer(text).input_ids) - 2 for text in ("balls", "cubes", "mice"))
    assert find("Balls; cubes, mice", ("cube", "ball", "mouse"), by_words=False) == [  # as find_classes knows them
        ("cube", tuple(range(2 + balls, 2 + balls + cubes))),
        ("ball", tuple(range(1, 1 + balls))),
        ("mouse", tuple(range(3 + balls + cubes, 3 + balls + cubes + mice))),
    ]
    with pytest.raises(Refused, match="does not hold the class word 'ball'"):  # as for Dataset Diffusion
        find("two balls", ("ball",), by_words=True)
    table = ClassTable((ClassWord("fruit", "fruit", ("~orange",)),))
    assert find("an orange", ("fruit",), tokenizer=Tokenizer(), table=table, by_words=False) == [("fruit", (2,))]
    spanning = SimpleNamespace(spans=lambda text: [(0, 2), (2, 6), (6, 8), (8, 10), (10, 12)])
    assert find("a red ball at", ("ball",), tokenizer=spanning, by_words=False) == [("ball", (2, 3))]


def test_a_class_is_read_at_its_first_mention():
    find = partial(class_prompts.class_columns, tokenizer=Tokenizer(), by_words=False)
    assert find("two dogs by a dog", ("dog",)) == [("dog", (2,))]
    assert find("a dog and a dog", ("dog",), is_listed=True) == [("dog", (2,))]
    assert find("a hot dog and a dog", ("dog",)) == [("dog", (6,))]
    assert find("an orange ball", ("ball", "orange")) == [("ball", (3,)), ("orange", (2,))]  # listed by its author


def test_a_concept_that_shares_no_attention_with_the_background_is_absent():
    shares = torch.tensor([[[0.0, 1, 0], [0.2, 0.3, 0.5], [0, 0, 1], [0.6, 0, 0.2]]])  # 4 cells, the background last
    (maps,) = attention.concept_maps(AttentionSums(torch.zeros(1, 0, 0), shares))
    assert torch.allclose(maps, torch.tensor([[[0, 2 / 7], [0, 0.75]], [[1, 0.375], [0, 0]]]))


def test_a_concept_that_no_token_says_is_refused():
    tokenizer = Tokenizer()
    assert class_prompts.concept_places("fire hydrant", tokenizer) == (1, 2)
    tokenizer.unk_token_id = "hydrant"
    for word in ("fire hydrant", ""):
        with pytest.raises(Refused, match=f"no token says '{word}'"):
            class_prompts.concept_places(word, tokenizer)


def test_flat_maps_say_nothing_and_thresholds_part_three_kinds():
    sums = AttentionSums(torch.full((2, 4, 4), 0.25), torch.rand(2, 4, 5))
    flat = attention.class_maps(sums, [[(1,), (2, 3)], []], 2)
    assert flat[0].shape == (2, 2, 2) and float(flat[0].abs().max()) == 0 and flat[1].shape == (0, 2, 2)
    rounded = torch.full((1, 4, 4), 0.02).index_fill(1, torch.tensor([2]), 0.02 * (1 + 1e-7))
    assert rounded.min() < rounded.max() and not attention.scale_maps(rounded).any()
    ramp = torch.linspace(0, 1, 16).view(1, 4, 4)
    some, none = attention.label_maps([ramp, ramp[:0]], [(3,), ()], ("background", "a", "b", "c"), 4, 0.6, 0.5)
    values = ramp[0].numpy()
    assert (some.labels == np.where(values >= 0.6, 3, np.where(values >= 0.5, 255, 0))).all() and not none.labels.any()


def test_numbers_of_a_model_and_those_refused():
    found = class_prompts.attention_recipe(AttentionDefaults(), 64)
    assert (found.self_cells, found.cross_cells, found.exponent, found.appends) == (32, 16, 4, True)
    for cells in (64, 32, 16, 8):
        found = class_prompts.attention_recipe(AttentionDefaults(), 64, self_cells=cells, cross_cells=cells)
        assert (found.self_cells, found.cross_cells) == (cells, cells)
    demo = class_prompts.attention_recipe(DEMO_DEFAULTS.attention, 16)
    assert (demo.self_cells, demo.cross_cells, demo.exponent, demo.appends) == (16, 8, 1, False)
    assert (demo.threshold, demo.uncertainty, demo.start, demo.between) == (0.45, 0.35, "a ", " and a ")
    for threshold, limits in ((0.0, (0.6, 0.5)), (0.7, (0.7, 0.5)), (0.3, (0.3, 0.3))):
        found = class_prompts.attention_recipe(AttentionDefaults(), 64, threshold=threshold)
        assert (found.threshold, found.uncertainty) == limits
    for wrong, said in (
        ({"self_cells": 48}, "--self-cells 48"),
        ({"uncertainty": 0.9}, "--uncertainty 0.9"),
        ({"threshold": 1.5}, "at most 1"),
    ):
        with pytest.raises(Refused, match=said):
            class_prompts.attention_recipe(AttentionDefaults(), 64, **wrong)
    with pytest.raises(Refused, match="would not fit into memory"):
        class_prompts.attention_recipe(AttentionDefaults(), 160)
    assert class_prompts.attention_recipe(seg4diff(9, depth=24), 96).self_cells == 96  # of which nothing is held
    for settings, said in (({"exponent": 2}, "--exponent 2"), ({"parity": "dataset-diffusion"}, "--parity dataset")):
        with pytest.raises(Refused, match=f"{said}.*: of this model the attention to the prompt alone is read"):
            class_prompts.attention_recipe(seg4diff(9, depth=24), 96, **settings)


def test_a_class_prompt_names_the_words_as_the_prompt_does():
    words, request = ("ball", "cube", "cone"), Request(0, "a cube beside a sphere", 1, ("ball", "cube"))
    plain = class_prompts.attention_recipe(AttentionDefaults(), 64)
    assert plain.class_prompt(request, request.classes) == "cube ball" and plain.class_prompt(request, ()) == ""
    assert plain.class_prompt(request, words) == "cube ball cone"
    told = class_prompts.attention_recipe(AttentionDefaults(start="a ", between=" and a "), 64)
    assert told.class_prompt(request, request.classes) == "a cube and a ball"
    exact = class_prompts.attention_recipe(AttentionDefaults(start="a "), 64, parity="dataset-diffusion")
    assert exact.class_prompt(request, request.classes) == "ball cube"
    given = Request(0, "x", 1, ("ball",), class_prompt="a red ball")
    assert plain.class_prompt(given, ("ball",)) == "a red ball"
    appending = replace(plain, appends=True)
    texts = [appending.text(Request(0, text, 1), "ball") for text in ("x; ball", "x", "x; ball ")]
    assert texts == ["x; ball", "x; ball", "x; ball "]
    for recipe, text in ((appending, "x; a red ball"), (exact, "x"), (replace(exact, parity=""), "x; a red ball")):
        assert recipe.text(given, "a red ball") == text


def reading(attention: class_prompts.AttentionRecipe) -> Recipe:
    """A recipe of labels that are read from attention so."""
    return Recipe(None, 1.0, 64, ("attention",), {}, attention=attention)


def test_words_that_are_looked_for_in_every_image_are_not_drawn():
    """With --ask all the text of every image of Stable Diffusion listed all class words, as if it were to show them."""
    attention = class_prompts.attention_recipe(AttentionDefaults(), 64)
    recipe = replace(reading(attention), words=("ball", "cube", "cone"), asks_all=True)
    request = Request(0, "a cube in fog", 1, ("cube",))
    assert attention.appends and recipe.class_prompt(request) == "cube ball cone"
    assert recipe.text(request) == "a cube in fog; cube"
    pictures = replace(recipe, asks_all=False, uncaptioned="a photo")
    shown = Request(0, "a photo", 1)
    assert pictures.class_prompt(shown) == "ball cube cone" and pictures.text(shown) == "a photo; ball cube cone"
    both = replace(pictures, tasks=("semantic", "attention"))
    assert both.class_prompt(shown) == "ball cube cone" and both.text(shown) == "a photo"
    assert replace(both, attention=None).text(request) == "a cube in fog"


def test_only_a_list_of_classes_is_read_word_for_word():
    listing = reading(class_prompts.attention_recipe(AttentionDefaults(), 64))
    for text, classes, places in (
        ("a dog near a house", ("house", "dog"), {"house": (2,), "dog": (1,)}),  # "dog house" is neither of them
        ("a bus and a person", ("bus", "driver", "person"), {"bus": (1,), "person": (2,), "driver": (3,)}),
    ):
        request = Request(0, text, 1, classes)
        assert dict(replace(listing, words=classes).class_columns(request, Tokenizer())) == places
    told = Request(0, "x", 1, ("dog",), class_prompt="two dogs by a dog")
    assert listing.class_columns(told, Tokenizer()) == [("dog", (2,))]


def test_a_class_whose_word_lies_behind_the_last_token_is_refused():
    tokenizer = SimpleNamespace(model_max_length=8)
    recipe = class_prompts.attention_recipe(AttentionDefaults(), 64, parity="dataset-diffusion")
    for before, is_read in (("a b c d e f", True), ("a b c d e f g", False)):  # the word is 7th, at place 7, or 8th
        request = Request(0, "x", 1, ("ball",), class_prompt=f"{before} ball")
        with nullcontext() if is_read else pytest.raises(Refused, match="a class at word 8, at most 7 words are read"):
            reading(recipe).check_request(request, tokenizer, tokenizer_cuts=True)
    recipe = replace(recipe, parity="")
    request = Request(0, "x", 1, ("fire hydrant",), class_prompt="a fire hydrant")
    for most, is_read in ((4, True), (3, False)):  # the second of its tokens is at place 3
        tokenizer = Tokenizer()
        tokenizer.model_max_length = most
        with nullcontext() if is_read else pytest.raises(Refused, match="a class at word 3, at most 2 words are read"):
            reading(recipe).check_request(request, tokenizer, tokenizer_cuts=True)


def test_a_pixel_is_of_a_class_from_the_threshold_on_and_uncertain_from_the_lower_one_on():
    values = torch.tensor([[[0.5, 0.25], [0.75, 0.125]]])
    (found,) = attention.label_maps([values], [[3]], ("background", *"abc"), 2, 0.5, 0.25)
    assert found.labels.tolist() == [[3, 255], [3, 0]] and found.confidence.tolist() == values[0].tolist()


def test_a_confidence_stays_within_zero_and_one_where_maps_are_enlarged():
    edge = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 4, 4)
    (found,) = attention.label_maps([edge], [[1]], ("background", "a"), 32, 0.6, 0.5)
    assert found.confidence.max() == 1 and found.confidence.min() == 0


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "two.jsonl"
    lines = [{"prompt": each.prompt, "classes": each.classes} for each in REQUESTS[:2]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_labeller_reaches_its_kernel_through_the_table_of_forms(prompts, tmp_path, monkeypatch):
    calls, form = count(), choice.FORM["native"].attention_average
    monkeypatch.setattr(
        choice.FORM["native"], "attention_average", lambda *arguments: (next(calls), form(*arguments))[1]
    )
    line = ["--labeller", "attention", "--prompts", str(prompts), "--number", "2", "--steps", "2", "--quiet"]
    assert generate.main([*line, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    assert next(calls) == 2 * 3 * 3 * 2  # self and cross layers of one side, calls, slices of the batch
    assert choice.form_on("attention_average", "sm_90", "NVIDIA H100", "untuned") == "fused"
    run = open_run(tmp_path / "run")
    assert run.tasks == ("attention",) and set(np.unique(run[0].attention.labels)) <= {0, 1, 2, 255}


def test_a_run_of_both_labellers(prompts, tmp_path, capsys):
    run = tmp_path / "run"
    line = ["--labeller", "decoder,attention", "--task", "semantic", "--classes", "ball,cube,cone", "--steps", "3"]
    line += ["--prompts", str(prompts), "--number", "2", "--quiet", "--force-domain", "--out", str(run)]
    assert generate.main([*line, "--limit", "1", "--batch-size", "1"]) == 0
    assert generate.main([*line, "--batch-size", "1"]) == 0
    assert not audit(run).findings
    sample, kept = open_run(run)["00000001"], (run / "attention/00000001.png").read_bytes()
    assert sample.attention.classes == ("background", "ball", "cube", "cone")
    record = json.loads((run / "samples.jsonl").read_text().splitlines()[1])["labels"]["attention"]
    assert (
        0 <= record["agreement"]["semantic"] <= 1
        and "agree with those of the semantic decoder" in (run / "README.md").read_text()
    )
    assert '"attention"' in (run / "gallery/run.js").read_text()
    for name, address in (("semantic", "[all]"), ("attention", "[all,attention]"), ("semantic", "[semantic,all]")):
        read = open_data(f"run:{run}{address}", 128)[1]
        assert np.array_equal(read.semantic, sample.label(name).labels), address
    with pytest.raises(Refused, match="no labels of this name"):
        open_data(f"run:{run}[open-vocabulary]", 128)
    (run / "attention/00000001.png").unlink()
    assert generate.main(["--out", str(run), "--only", "00000001", "--quiet"]) == 0
    assert (run / "attention/00000001.png").read_bytes() == kept


OWN = "number,name,say,words\n2,kubus_(toy),cube,box | block\n1,kugel,ball,sphere | globe\n,,,ball pen\n"


def test_class_words_of_an_own_table(photos, tmp_path, capsys):
    """What they are called in files, said to the text encoder and found by in prompts are three things."""
    table, listed, run = tmp_path / "own.csv", tmp_path / "prompts.txt", tmp_path / "run"
    table.write_text(OWN)
    listed.write_text("a red sphere and a ball pen on a table\na blue box and a green globe on a table\n")
    line = ["--labeller", "attention", "--class-table", str(table), "--prompts", str(listed), "--number", "2"]
    line += ["--steps", "2", "--quiet", "--out", str(run)]
    assert generate.main(line) == 0 and not audit(run).findings
    first, second = open_run(run)
    assert first.attention.classes == ("background", "kugel", "kubus_(toy)")  # in the order of their numbers
    assert first.classes == ("kugel",) and second.classes == ("kugel", "kubus_(toy)")
    kept = (run / "attention/00000001.png").read_bytes()
    (run / "attention/00000001.png").unlink()
    table.rename(tmp_path / "moved.csv")
    assert generate.main(["--out", str(run), "--only", "00000001", "--quiet"]) == 0
    assert (run / "attention/00000001.png").read_bytes() == kept
    (tmp_path / "other.csv").write_text(OWN.replace("globe", "orb"))
    line[line.index("--class-table") + 1] = str(tmp_path / "other.csv")
    assert generate.main(line) == 2 and "class_table" in capsys.readouterr().err
    line[line.index("--class-table") + 1] = str(tmp_path / "moved.csv")
    assert generate.main([*line, "--classes", "kuegel", "--out", str(tmp_path / "no")]) == 2
    assert "did you mean kugel" in capsys.readouterr().err and not (tmp_path / "no").exists()
    (tmp_path / "captions.json").write_text(
        json.dumps({"a.png": "a brown globe", "b": "a block", "more/c": "a sphere"})
    )
    line = [str(photos), "--labeller", "attention", "--class-table", str(tmp_path / "moved.csv"), "--timesteps", "200"]
    line += ["--captions", str(tmp_path / "captions.json"), "--quiet", "--out", str(tmp_path / "labelled")]
    assert label.main(line) == 0
    labelled = tmp_path / "labelled"
    assert [sample.classes for sample in open_run(labelled)] == [("kugel",), ("kubus_(toy)",), ("kugel",)]


def test_the_library_gives_these_labels_too(engines):
    found = Pipeline(engines["fast"])(
        ["a cone", "two cubes"], tasks=("attention",), classes=CLASSES, steps=2, exponent=0, ask="all"
    )
    assert [label.classes for label in found.attention] == [("background", *CLASSES)] * 2
    named = Pipeline(engines["fast"])("a cone", tasks=("attention",), classes=CLASSES, steps=2, exponent=0)
    everything, cone = (set(np.unique(each.attention[0].labels)) - {0, 255} for each in (found, named))
    assert cone == {1 + CLASSES.index("cone")} < everything, "all words are looked for, whatever the prompt names"
    with pytest.raises(Refused, match=r"--threshold 3: expected a number from 0 to 1\s"):
        Pipeline(engines["fast"])("a cone", tasks=("attention",), classes=CLASSES, threshold=3)
    with pytest.raises(Refused, match="no class words"):
        Pipeline(engines["fast"])("a cone", tasks=("attention",))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--labeller", "attention"], "no class words"),
        (["--labeller", "attention", "--classes", "ball", "--task", "semantic"], "needs a decoder"),
        (["--exponent", "2"], "--exponent"),
        (["--labeller", "attention", "--classes", "ball", "--exponent", "1001"], "expected -1 to 1000"),
        (
            ["--labeller", "attention", "--prompts", "a ball", "--classes", "ball", "--self-cells", "5"],
            "--self-cells 5",
        ),
        (["--labeller", "attention", "--prompts", "a ball", "--classes", "x" * 80], "81|tokens|name none"),
        (["--labeller", "guess"], "'guess' is not one of"),
    ],
)
def test_wrong_lines_are_refused_in_a_sentence(line, said, tmp_path, capsys):
    import re

    assert generate.main([*line, "--number", "1", "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three renders of other sizes with captions, in a folder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for name, seed, sides in (("a.png", 11, (128, 128)), ("b.jpg", 12, (200, 150)), ("more/c.png", 13, (130, 170))):
        Image.fromarray(world.view(seed, 128).image).resize(sides).save(folder / name)
    captions = {name: world.sample_scene(seed).caption for name, seed in (("a.png", 11), ("b", 12), ("more/c", 13))}
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def test_pictures_that_exist_are_labelled_as_a_run_folder(photos, tmp_path, capsys):
    run = tmp_path / "run"
    line = [str(photos), "--labeller", "decoder,attention", "--task", "semantic", "--classes", ",".join(world.THINGS)]
    line += ["--captions", str(photos / "captions.json"), "--timesteps", "100,400", "--batch-size", "2", "--quiet"]
    line += ["--out", str(run)]
    assert label.main([*line, "--limit", "2"]) == 0 and label.main(line) == 0
    assert not audit(run).findings
    rows = [json.loads(row) for row in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["picture"] for row in rows] == ["a.png", "b.jpg", "more/c.png"]
    assert rows[2]["classes"] == [word for word in world.THINGS if word in world.sample_scene(13).caption]
    assert np.array_equal(open_run(run)[0].image, world.view(11, 128).image)
    assert (open_run(run)[0].semantic.labels == world.view(11, 128).semantic).mean() > 0.7
    kept = (run / "attention/00000002.png").read_bytes()
    (run / "attention/00000002.png").unlink()
    assert audit_command.main([str(run), "--repair", "--quiet"]) == 4 and label.main(line) == 0
    assert (run / "attention/00000002.png").read_bytes() == kept
    assert label.main([word for word in line if word != "--quiet"]) == 0
    assert f"{run}: complete with 3 pictures, nothing to do" in capsys.readouterr().err
    assert label.main([*line, "--seed", "5"]) == 2


def test_pictures_that_the_decoders_do_not_know_are_told_as_doubtful(tmp_path, capsys):
    (folder := tmp_path / "photos").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)).save(folder / "a.png")
    assert label.main([str(folder), "--task", "semantic", "--out", str(tmp_path / "run")]) == 0
    assert "1 of 1 samples is doubtful (1 out of the domain of the decoders)" in capsys.readouterr().err


def test_captions_of_other_pictures_are_refused(photos, tmp_path, capsys):
    (captions := tmp_path / "captions.json").write_text('{"photos/a.png": "a ball"}')
    line = [str(photos), "--captions", str(captions), "--out", str(tmp_path / "labelled")]
    assert label.main(line) == 2 and not (tmp_path / "labelled").exists()
    assert f"{captions}: names none of the pictures in {photos}" in capsys.readouterr().err
    for text in ("", "{'photos/a.png': 'a ball'}", '["a ball"]', '{"a.png": 7}'):
        captions.write_text(text)
        assert label.main(line) == 2 and (told := capsys.readouterr().err).endswith(
            'Write {"a.jpg": "a dog on a sofa"}.\n'
        )
    assert "the caption of a.png is not a text" in told


def test_pictures_in_tiles_have_a_largest_size_and_noise_levels_are_named(photos, monkeypatch):
    assert open_pictures(str(photos), "").sides() == [(128, 128), (200, 150), (130, 170)]
    monkeypatch.setattr(labelling.images, "MOST_PIXELS", 200 * 150)
    assert len(open_pictures(str(photos), "").sides()) == 3
    monkeypatch.setattr(labelling.images, "MOST_PIXELS", 200 * 150 - 1)
    with pytest.raises(Refused, match="b.jpg: 200 x 150 pixels, with --tiles at most 29,999"):
        open_pictures(str(photos), "").sides()
    assert labelling.parse_timesteps(["0", "999"]) == (0, 999)
    for wrong in ([], ["1000"], ["-1"], ["1.5"]):
        with pytest.raises(Refused, match="--timesteps: "):
            labelling.parse_timesteps(wrong)


def test_a_job_of_pictures_in_tiles_counts_the_calls_and_pixels_of_one_on_average(tmp_path, monkeypatch, capsys):
    """Pictures of 1, 4 and 9 tiles of 64 pixels, of which a batch has 8: 1 + 1 + 2 calls."""
    monkeypatch.setattr(labelling, "open_engine", lambda *_: (StubEngine(tasks=("semantic",)), {}))
    monkeypatch.setattr(job_module.storage, "free_bytes", lambda path: job_module.SPARE + 10**6)
    (folder := tmp_path / "photos").mkdir()
    for name, width, height in (("a", 64, 64), ("b", 200, 64), ("c", 150, 120)):
        Image.new("RGB", (width, height), (width, height, 0)).save(folder / f"{name}.png")
    (captions := tmp_path / "captions.json").write_text('{"a.png": "a ball", "a": "a cone", "b": "a dog"}')
    settings = LabelConfig(images=str(folder), tiles=True, task=("semantic",), size=1024, out=str(tmp_path / "run"))
    spec, pictures = label_spec(settings), open_pictures(str(folder), str(captions))  # labels are not of 1024 pixels
    assert pictures.captions == {"a.png": "a ball", "b.png": "a dog", "c.png": ""}
    assert replace(pictures, captions={}).digest() != pictures.digest()
    job = labelling.prepare_labelling(spec, None, pictures, (100,), has_tiles=True)
    assert (job.plan.batch_size, job.document["composition"]["together"], job.calls) == (1, 8, 2)
    assert job.pixels == (64 * 64 + 200 * 64 + 150 * 120) // 3 and job.unnamed == (1, 3)
    stored = job.document | {"composition": job.document["composition"] | {"together": 3}}
    again = labelling.prepare_labelling(spec, stored, pictures, (100,), has_tiles=True)
    assert (again.document["composition"]["together"], again.calls) == (3, 2)  # 1 + 2 + 3 calls
    with monkeypatch.context() as patch, pytest.raises(Missing, match="are free"):
        patch.setattr(labelling, "open_engine", None)  # before networks are loaded
        labelling.prepare_labelling(spec, None, pictures, (100,), has_tiles=False)
    spec = replace(spec, model=replace(spec.model, size=0))
    whole = labelling.prepare_labelling(replace(spec, identity={}), None, pictures, (100,), has_tiles=False)
    assert (whole.plan.batch_size, whole.calls, whole.pixels) == (3, 0, 0)
    line = [str(folder), "--task", "semantic", "--timesteps", "100", "--out", str(tmp_path / "run"), "--dry-run"]
    for more, each in (["--tiles"], "2 UNet calls"), ([], "1 UNet call"):
        assert label.main([*line, *more]) == 0
        assert capsys.readouterr().err.startswith(f"3 of 3 pictures, {each} each; labels: semantic")


def test_captions_that_name_no_class_are_told_before_pictures_are_labelled(photos, tmp_path, capsys):
    (captions := tmp_path / "captions.json").write_text('{"a.png": "a ball", "b": "some things", "more/c": "a scene"}')
    line = [str(photos), "--task", "semantic", "--classes", "ball,cube", "--out", str(tmp_path / "run"), "--dry-run"]
    assert label.main([*line, "--captions", str(captions)]) == 0
    said = "captions: 2 of 3 name none of the classes of the labels: ball, cube"
    told = capsys.readouterr().err
    assert said in told.splitlines() and "without one" not in told
    assert label.main(line) == 0 and "captions:" not in capsys.readouterr().err
    captions.write_text('{"a.png": "a ball", "b": "a cube", "more\\\\c.png": "a ball"}')
    assert label.main([*line, "--captions", str(captions)]) == 0
    assert "captions: 1 of 3 pictures without one, such as more/c.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("z.png", lambda whole: b"no picture", "neither a PNG nor a JPEG file"),
        ("z.jpg", lambda whole: whole[: len(whole) // 2], "not a complete image"),
        (
            "z.png",
            lambda whole: png_of(np.zeros((64, 64), np.uint16)),
            "expected an 8-bit picture: scale its values to 0 to 255",
        ),
        ("z.png", lambda whole: png_of(np.zeros((8, 64), np.uint8)), "64 x 8 pixels, expected sides of 16"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_picture_that_cannot_be_read_is_refused_before_any_is_labelled(name, spoil, said, photos, tmp_path, capsys):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / name).write_bytes(spoil((photos / "b.jpg").read_bytes()))
    line = [str(folder), "--task", "semantic", "--out", str(tmp_path / "run"), "--limit", "1", "--quiet"]
    assert label.main(line) == 2
    told = capsys.readouterr().err.splitlines()
    assert name in told[0] and said in told[0] and told[1] == "Repair it, or take it out of the folder."
    assert not (tmp_path / "run").exists()
    for k in range(7):
        (folder / f"z{k}.png").write_bytes(b"no picture")
    assert label.main(line) == 2
    told = capsys.readouterr().err.splitlines()[0]
    assert said in told and told.endswith("; nor can be read: z0.png, z1.png, z2.png, z3.png, z4.png and 2 more")


def test_pictures_of_other_formats_are_told_before_the_others_are_labelled(photos, tmp_path, capsys):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    line = [str(folder), "--task", "semantic", "--out", str(tmp_path / "run"), "--dry-run"]
    assert label.main(line) == 0 and "left out" not in capsys.readouterr().err
    for name in ("y.HEIC", "x.webp", ".hidden.webp", "notes.txt"):
        (folder / name).touch()
    said = f"left out: 2 not PNG or JPEG, such as {folder}/x.webp"
    assert label.main(line) == 0 and said in capsys.readouterr().err.splitlines()


def test_a_picture_that_is_too_small_for_tiles_has_a_remedy_of_this_command(photos, tmp_path, capsys):
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    for name in ("y.png", "z.png"):
        (folder / name).write_bytes(png_of(np.zeros((8, 64), np.uint8)))
    line = [str(folder), "--tiles", "--task", "semantic", "--out", str(tmp_path / "run"), "--quiet"]
    assert label.main(line) == 2
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause.endswith("; nor can be read: z.png") and remedy == "Repair it, or take it out of the folder."


def test_a_run_folder_among_the_pictures_is_refused(photos, tmp_path, capsys):
    """The same command could not resume it: its own files would be pictures."""
    folder, run = Path(shutil.copytree(photos, tmp_path / "photos")), tmp_path / "run"
    line = [str(folder), "--task", "semantic", "--quiet", "--limit", "1", "--out"]
    for out in (folder, folder / "labelled"):
        assert label.main([*line, str(out)]) == 2 and "so its files would count as pictures" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {path.name for path in photos.iterdir()}
    assert label.main([*line, str(run), "--dry-run", "--no-quiet"]) == 0
    assert capsys.readouterr().err.startswith("1 of 3 pictures")
    assert label.main([*line, str(run)]) == 0 and "1 of 3 pictures is there; resume with" in capsys.readouterr().err
    (folder / "b.jpg").unlink()
    assert label.main([*line, str(run)]) == 2
    assert "it holds labels of other pictures or captions than" in capsys.readouterr().err
    assert label.main([str(run), "--out", str(tmp_path / "other")]) == 2
    assert f"Name the folder of its pictures, {run / 'images'}." in capsys.readouterr().err


def test_captions_are_found_by_name_before_stem_and_are_what_a_run_resumes_with(photos, tmp_path):
    (captions := tmp_path / "captions.json").write_text('{"a": "a cube", "a.png": "a ball", "more/c": "a star"}')
    pictures = open_pictures(str(photos), str(captions))
    assert pictures.captions == {"a.png": "a ball", "b.jpg": "", "more/c.png": "a star"}
    captions.write_text('{"a.png": "a ball", "more/c": "a cone"}')
    assert open_pictures(str(photos), str(captions)).digest() != pictures.digest()


def png_of(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_larger_than_the_model_are_labelled_in_tiles(tmp_path):
    """At their own sizes, things of several tiles as one; interrupted after a picture, the same bytes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    large, wide = world.view(11, 256), world.view(12, 160).image[16:144]
    Image.fromarray(large.image).save(folder / "large.png")
    Image.fromarray(wide).save(folder / "wide.png")
    captions = {"large": world.sample_scene(11).caption, "wide": world.sample_scene(12).caption}
    (folder / "captions.json").write_text(json.dumps(captions))
    line = [str(folder), "--tiles", "--labeller", "decoder,attention", "--classes", ",".join(world.THINGS), "--quiet"]
    line += ["--captions", str(folder / "captions.json"), "--timesteps", "200", "--batch-size", "5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert label.main([*line, "--out", str(whole)]) == 0 and not audit(whole).findings
    assert label.main([*line, "--out", str(cut), "--limit", "1"]) == 0
    moved = ["--decoder", str(DEMO), "--task", "semantic,instance"]
    assert label.main([*line, *moved, "--out", str(cut)]) == 0
    for path in sorted((whole / "attention").iterdir()) + [whole / "instances.json", whole / "samples.jsonl"]:
        assert (cut / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert "\n2 of 2 images of their own sizes with their labels" in (whole / "README.md").read_text()
    run = open_run(whole)
    assert run.tasks == ("semantic", "instance", "attention")  # depth and pose need the whole picture
    first, second = run
    assert np.array_equal(first.image, large.image) and second.attention.labels.shape == (128, 160)
    star = large.semantic == world.CLASSES.index("star")
    found = first.attention.labels == first.attention.classes.index("star")
    assert (star & found).sum() > 0.6 * (star | found).sum()
    surest = first.instances.masks[first.instances.scores.argmax()]
    assert (surest & star).sum() > 0.7 * star.sum()  # four tiles show a part of it
    assert split.main([str(whole), "--shares", "50,50", "--quiet"]) == 0
    assert len(open_data(f"run:{whole}[all]", 64)) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "IMAGES is missing"),
        (["nowhere"], "'nowhere' is not a folder"),
        (["EMPTY"], "Name a folder of PNG or JPEG files."),
        (["PHOTOS", "--labeller", "attention"], "no class words"),
        (["PHOTOS", "--labeller", "attention", "--classes", "ball", "--timesteps", "5000"], "--timesteps"),
        (["PHOTOS", "--tiles", "--task", "semantic,depth"], "a tile shows only a part"),
        (["PHOTOS", "--task", "semantic", "--threads", str(10**20)], "--threads 1"),
    ],
)
def test_wrong_lines_of_label_are_refused(line, said, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    given = [{"PHOTOS": str(photos), "EMPTY": str(tmp_path / "empty")}.get(word, word) for word in line]
    assert label.main([*given, "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_label_without_a_folder_of_decoders_is_refused(photos, tmp_path, capsys):
    line = [str(photos), "--task", "semantic", "--decoder", "", "--out", str(tmp_path / "run"), "--quiet"]
    assert label.main(line) == 2 and "--decoder: no value was given" in capsys.readouterr().err
    line[line.index("")] = str(tmp_path)
    assert label.main(line) == 3 and "no sub-folder holds a config.json" in capsys.readouterr().err
    (tmp_path / "semantic" / "training" / "folds-5" / "1" / "training").mkdir(parents=True)
    (tmp_path / "semantic" / "training" / "folds-5" / "1" / "training" / "log.jsonl").touch()
    assert label.main(line) == 3 and "has not ended\nRun the command that trains it again" in capsys.readouterr().err


def test_a_picture_whose_name_is_no_text_is_refused_by_it(photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    shutil.copy(photos / "b.jpg", os.fsencode(folder) + b"/caf\xe9.jpg")
    assert label.main([str(folder), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert "the path of 'caf\\udce9.jpg' is not valid UTF-8" in capsys.readouterr().err


def test_attention_is_read_of_families_that_have_it_and_drawn_as_upstream_without_noise_at_every_call():
    engine, attention = StubEngine(64), {"classes": ("ball",), "parity": "dataset-diffusion"}
    engine.model.levels = SD1_LEVELS
    with pytest.raises(Refused, match="sampler: euler-ancestral adds noise at every call, and with --parity"):
        make_recipe(engine, ("attention",), sampler="euler-ancestral", **attention)
    engine.model.backbone = replace(SD, has_averages=False, has_text_maps=False)
    with pytest.raises(Refused, match="labels are not read from the attention of Stable Diffusion 1.x and 2.x yet"):
        make_recipe(engine, ("attention",), classes=("ball",))


def test_calls_may_be_saved_where_attention_is_read_at_one_of_them_alone():
    engine, settings = StubEngine(64), {"classes": ("ball",), "steps": 20, "sampler": "ddim", "speed": "cache3"}
    engine.speeds, engine.model.levels = (calls.CACHED,), SD1_LEVELS
    with pytest.raises(Refused, match="--speed cache3: labels from attention are read from every call"):
        make_recipe(engine, ("attention",), **settings)
    engine.model.backbone = replace(SD, has_averages=False, has_text_maps=True)
    engine.model.defaults = replace(engine.model.defaults, attention=seg4diff(9, depth=24))
    assert len(make_recipe(engine, ("attention",), **settings).cached) > 10


def test_class_words_that_do_not_fit_beside_their_prompt_are_refused():
    recipe = class_prompts.attention_recipe(AttentionDefaults(), 64)
    request = Request(3, "a photo of a scene", 1, ("ball",))
    for most, fits in ((60, True), (2, False)):
        tokenizer = Tokenizer()
        tokenizer.model_max_length = most
        with nullcontext() if fits else pytest.raises(Refused, match="prompt 3: with its class words . tokens, at mo"):
            reading(recipe).check_request(request, tokenizer)
