import copy
import json
import threading
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rendered import write_run
from run_steps import find_result, prepare, prepare_remake
from stub_engine import CONFIGS, SCHEDULER, StubEngine, Tokenizer

from datasetdm_fast import generate
from datasetdm_fast.command_line import run_report, run_settings
from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.config import HALF, TASKS
from datasetdm_fast.data import (
    Batch,
    Capture,
    DomainDistance,
    Instances,
    ProjectedCapture,
    Quarantined,
    Request,
    Sample,
    SemanticMap,
    Text,
    join_texts,
)
from datasetdm_fast.engine.decoders.config import SD1_LEVELS
from datasetdm_fast.engine.labels.class_tables import ClassTable, ClassWord, find_classes
from datasetdm_fast.engine.labels.trust import trust_of
from datasetdm_fast.engine.loop import calls, driver, inversion, inverting, labelling
from datasetdm_fast.engine.loop.driver import FinishedCalls
from datasetdm_fast.engine.loop.recipe import capture_calls, check_size, class_words_of, make_recipe, prompt_words
from datasetdm_fast.engine.sampling import schedule as walk
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.tasks import labeller
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.runs.jobs import job
from datasetdm_fast.runs.jobs.remake import find_remake_row
from datasetdm_fast.runs.jobs.run import merge_with_stored
from datasetdm_fast.runs.jobs.writing import BackgroundWriter, write_missing
from datasetdm_fast.runs.run_folder.document import read_document
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.runs.workers import worker
from datasetdm_fast.settings import EngineSettings, ModelSettings

pytestmark = pytest.mark.core


@pytest.fixture
def engines(monkeypatch):
    """Every engine the job opens, newest last."""
    opened = []

    def open_engine(model="demo", decoder="demo", tasks=TASKS, **choices):
        opened.append(StubEngine(choices.get("size") or 64, tasks=tuple(tasks or TASKS)))
        return opened[-1], {task: {"digest": "stub", "licence": "none"} for task in tasks or TASKS}

    monkeypatch.setattr("datasetdm_fast.engine.engines.open_engine", open_engine)
    return opened


def config(path, **changes):
    return RunConfig(**{"out": str(path), "number": 7, "batch_size": 3, "task": TASKS, "sampler": "ddim", **changes})


def tree(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and "state" not in file.parts
    }


def samples(engine, requests, size=None, tasks=("semantic", "depth"), **choices):
    recipe = make_recipe(engine, tasks, **choices)
    size = size or len(requests)
    groups = [requests[k : k + size] for k in range(0, len(requests), size)]
    batches = [Batch(k, tuple(group), size - len(group)) for k, group in enumerate(groups)]
    return [result for _, results in driver.generate(batches, engine, recipe) for result in results]


def requests(*prompts, classes=()):
    return [Request(k, prompt, 10 + k, classes) for k, prompt in enumerate(prompts)]


def test_the_loop_captures_once_at_the_last_call():
    engine = StubEngine()
    samples(engine, requests("a", "b", "c"), sampler="ddim", steps=5)
    assert [entry[0] for entry in engine.log] == ["denoise"] * 5 + ["capture"]
    assert engine.log[-1] == ("capture", engine.log[-2][1]) and all(entry[2] == 3 for entry in engine.log[:5])


def test_a_gpu_reads_as_many_images_at_once_whatever_a_batch_holds(monkeypatch):
    """The last batch, and a sample that is made again, are read in the shapes of all others."""
    engine, lengths, collect, postprocess = StubEngine(), [], driver.collect_results, labelling.postprocess

    def on_gpu(*given):
        engine.device = torch.device("cuda")
        found = collect(*given)
        engine.device = torch.device("cpu")
        return found

    def read(requests, raw, *others):
        lengths.append((len(requests), *map(len, raw.values())))
        return postprocess(requests, raw, *others)

    monkeypatch.setattr(labelling, "CHUNK_PIXELS", {"cuda": 2 * 64**2})
    monkeypatch.setattr(driver.BatchGenerator, "collect", staticmethod(on_gpu))
    monkeypatch.setattr(labelling, "postprocess", read)
    found = samples(engine, requests(*"abcde"), size=4, tasks=("depth",), sampler="ddim", steps=2)
    assert lengths == [(2, 2)] * 4 and [one.request.prompt for one in found] == list("abcde")
    assert all("depth" in one.annotations for one in found)


def test_the_capture_follows_the_decoders_timestep():
    engine = StubEngine(configs={task: replace(config, capture_timestep=390) for task, config in CONFIGS.items()})
    recipe = make_recipe(engine, ("semantic", "depth"), sampler="ddim", steps=5)
    assert recipe.schedule.timesteps[recipe.captured[-1]] == 400 and recipe.facts["capture_timestep"] == 400


def test_decoders_of_different_timesteps_read_a_capture_each_and_change_no_image():
    """The output of an earlier captured call is not taken on: it may differ from that of a plain call by rounding."""

    class RoundingEngine(StubEngine):
        def denoise_and_capture(self, latents, timestep, context):
            noise, capture = super().denoise_and_capture(latents, timestep, context)
            return noise * 1.01, capture

    engine = RoundingEngine(configs=CONFIGS | {"depth": replace(CONFIGS["depth"], capture_timestep=600)})
    recipe = make_recipe(engine, ("semantic", "depth"), sampler="ddim", steps=5)
    assert recipe.facts["capture_timestep"] == {"semantic": 0, "depth": 600}
    both = samples(engine, requests("a", "b"), tasks=("semantic", "depth"), sampler="ddim", steps=5)
    assert [entry[0] for entry in engine.log].count("capture") == 2
    for task in ("semantic", "depth"):
        alone = samples(engine, requests("a", "b"), tasks=(task,), sampler="ddim", steps=5)
        for one, other in zip(alone, both, strict=True):
            assert (one.image == other.image).all() or task == "depth"  # whose own run takes on its captured call
            assert all(np.array_equal(*pair) for pair in zip(_arrays(one, task), _arrays(other, task), strict=True))


def _arrays(sample, task):
    return [value for value in vars(sample.annotations[task]).values() if isinstance(value, np.ndarray)]


def test_a_repeated_timestep_is_captured_at_its_last_call():
    schedule = make_recipe(StubEngine(), ("depth",), steps=4).schedule
    repeated = schedule.timesteps.index(schedule.timesteps[1])
    assert schedule.timesteps[1] == schedule.timesteps[2]
    assert capture_calls(schedule, {"depth": (schedule.timesteps[1],)}) == {"depth": (repeated + 1,)}


def test_words_that_a_decoder_keeps_are_those_of_a_run():
    engine = StubEngine()
    assert make_recipe(engine, ("semantic",), steps=2).table is None
    decoder = engine.decoders["semantic"]
    decoder.config = replace(decoder.config, class_words=(ClassWord("ball", "globe", ("orb",)),))
    assert find_classes("two orbs", ("ball",), make_recipe(engine, ("semantic",), steps=2).table) == ("ball",)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_do_not_mix_images(size):
    asked = requests("a ball", "two cubes", "a tree", "a star")
    whole, parts = samples(StubEngine(), asked), samples(StubEngine(), asked, size)
    for one, other in zip(whole, parts, strict=True):
        assert one.request == other.request and (one.image == other.image).all()
        assert (one.annotations["semantic"].labels == other.annotations["semantic"].labels).all()
        assert np.allclose(one.annotations["depth"].metres, other.annotations["depth"].metres)


def test_samples_that_are_not_finite_are_set_aside_alone():
    found = samples(StubEngine(), requests("a ball", "broken", "a tree"))
    assert [type(result) for result in found] == [Sample, Quarantined, Sample]
    assert "latents" in found[1].reason and "semantic" in found[1].reason
    assert (found[2].image == samples(StubEngine(), requests("a ball", "a cube", "a tree"))[2].image).all()


@pytest.mark.parametrize("place", range(3))
def test_the_padding_of_a_batch_shifts_no_flag(place):
    """A batch of four, the last request of which is repeated."""
    prompts = ["a ball", "a cube", "a tree"]
    prompts[place] = "broken"
    results = samples(StubEngine(), requests(*prompts), size=8)
    assert [isinstance(result, Quarantined) for result in results] == [k == place for k in range(3)]


def test_large_seeds_are_those_of_the_images_and_of_their_rows(engines, tmp_path):
    first = 2**31 + 5
    write_missing(prepare(config(tmp_path, number=2, seed=first, task=("depth",))))
    rows = list(open_run(tmp_path))
    assert [sample.seed for sample in rows] == [first, first + 1]
    alone = [samples(StubEngine(), [Request(0, row.prompt, row.seed)], sampler="ddim")[0].image for row in rows]
    assert all((row.image == image).all() for row, image in zip(rows, alone, strict=True))
    assert (alone[0] != alone[1]).any()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        Missing("memory: the GPU does not have enough memory for 2 images", "Take fewer."),
    ],
)
def test_what_there_is_no_memory_to_make_again_is_set_aside_and_the_run_goes_on(error):
    engine = Narrow("features")
    engine.fp32_fallback = lambda: raised(error)
    found = samples(engine, requests("a heavy ball", "a cube"), sampler="ddim", steps=2)
    assert isinstance(found[0], Quarantined) and isinstance(found[1], Sample)
    assert found[0].reason.endswith("; there is not enough memory for another attempt in fp32")
    engine.fp32_fallback = lambda: raised(Missing("a library is not there", "Install it."))
    with pytest.raises(Missing, match="library"):
        samples(engine, requests("a heavy ball"), sampler="ddim", steps=2)


def raised(error):
    raise error


class Narrow(StubEngine):
    """Cannot hold what `heavy` asks for, at the point `where`; its fp32 form can, unless the prompt is broken too."""

    def __init__(self, where):
        super().__init__()
        self.where, self.wide = where, StubEngine()

    def fp32_fallback(self):
        return self.wide

    def encode_text(self, prompts):
        self.heavy = torch.tensor(["heavy" in prompt for prompt in prompts])
        return super().encode_text(prompts)

    def spoiled(self, point, values):
        return (
            torch.where(self.heavy.view(-1, *[1] * (values.ndim - 1)), float("inf"), values)
            if point == self.where
            else values
        )

    def denoise_and_capture(self, latents, timestep, context):
        noise, capture = super().denoise_and_capture(latents, timestep, context)
        noise = torch.cat([self.spoiled("latents", half) for half in noise.chunk(2)])
        return noise, replace(
            capture, features=tuple(tuple(self.spoiled("features", x) for x in level) for level in capture.features)
        )

    def decode_and_check(self, latents):
        images, flags = super().decode_and_check(latents)
        return images, flags & ~self.heavy if self.where == "image" else flags

    def annotate(self, task, capture, text=None):
        values = {name: self.spoiled(task, value) for name, value in super().annotate(task, capture, text).items()}
        sound = torch.zeros(len(next(iter(values.values()))), 1)
        return {"first": sound, **values, "last": sound}  # one output of several is enough


@pytest.mark.parametrize("where", ["latents", "features", "image", "depth"])
def test_what_a_narrow_precision_cannot_hold_is_made_once_more_in_fp32(where):
    asked = requests("a ball", "heavy", "heavy broken", "a tree")
    narrow = Narrow(where)
    narrow.wide.adjustments = {"wide": 1}
    plain, found = samples(StubEngine(), asked), samples(narrow, asked)
    assert [result.provenance.get("wide") for result in (found[0], found[1], found[3])] == [None, 1, None]
    assert [type(result) for result in found] == [Sample, Sample, Quarantined, Sample]
    assert where in found[1].provenance["retried"] and "retried" not in found[0].provenance
    assert (found[1].image == plain[1].image).all() and (
        found[1].annotations["depth"].metres == plain[1].annotations["depth"].metres
    ).all()
    assert found[2].reason.endswith("in fp32 too")


def test_labels_of_other_batches_are_done_before_samples_are_made_in_fp32():
    """Their engine lets convolutions of the whole process round to TF32."""
    order = []
    first = Quarantined(Request(0, "a ball", 0), "image")
    engine = SimpleNamespace(fp32_fallback=lambda: "wide")
    generator = SimpleNamespace(make=lambda batch: order.append(batch) or [first])
    labels = SimpleNamespace(settle=lambda: order.append("labels"))
    (result,) = driver.retry_in_fp32("batch", [first], engine, lambda wide: order.append(wide) or generator, labels)
    assert order == ["labels", "wide", "batch"] and result.reason == "image, in fp32 too"


def test_every_sample_is_judged_and_may_lose_its_doubtful_pixels(monkeypatch):
    def emptied(named, labels, prompt, own):
        label = labels["semantic"]
        return {**labels, "semantic": replace(label, labels=np.full_like(label.labels, 255))}

    monkeypatch.setattr(labelling, "without_doubtful", emptied)
    asked, tasks = requests("a ball", "a tree", classes=("ball",)), ("semantic", "instance")
    plain, ignored = (samples(StubEngine(), asked, tasks=tasks, ignore=how) for how in ("nothing", "disagreeing"))
    for before, after in zip(plain, ignored, strict=True):
        judged = trust_of(("ball",), before.annotations, before.request.prompt)
        assert before.trust == after.trust == judged and before.is_doubtful
        assert not (before.annotations["semantic"].labels == 255).any()
        assert (after.annotations["semantic"].labels == 255).all()


def test_words_are_encoded_once_a_run_and_each_image_is_asked_its_own():
    engine = StubEngine()
    asked = [
        Request(0, "a ball and a tree", 0, ("ball", "tree")),
        Request(1, "nothing", 1),
        Request(2, "a cube", 2, ("cube",)),
    ]
    found = samples(engine, asked, size=1, tasks=("open-vocabulary",))
    assert [entry for entry in engine.log if entry[0] == "encode_classes"] == [("encode_classes", world.THINGS)]
    numbers = [set(np.unique(sample.annotations["open-vocabulary"].labels)) - {0} for sample in found]
    words = [{1 + world.THINGS.index(word) for word in request.classes} for request in asked]
    assert all(seen <= named for seen, named in zip(numbers, words, strict=True)) and numbers[0] and numbers[2]
    assert found[0].annotations["open-vocabulary"].classes == ("background", *world.THINGS)


def test_a_decoder_is_given_the_embeddings_of_an_image_s_own_words(monkeypatch):
    """One a word, and of an image that names fewer than its neighbour the last one again."""
    given, annotate = [], StubEngine.annotate
    monkeypatch.setattr(StubEngine, "annotate", lambda *of, text=None: given.append(of[-1]) or annotate(*of))
    asked = [Request(0, "a cone", 0, ("cone",)), Request(1, "a ball and a cube", 1, ("ball", "cube"))]
    samples(StubEngine(), asked, size=2, tasks=("open-vocabulary",))
    cone, ball, cube = StubEngine().encode_classes(("cone", "ball", "cube"))
    assert len({value.sum().item() for value in (cone, ball, cube)}) == 3
    (text,) = given
    assert text.tolist() == [[cone.tolist(), cone.tolist()], [ball.tolist(), cube.tolist()]]


def test_every_image_is_inverted_with_its_own_caption(monkeypatch):
    called, denoise = [], StubEngine.denoise
    monkeypatch.setattr(StubEngine, "denoise", lambda *of: called.append(of[-1].context) or denoise(*of))
    engine, captions = StubEngine(), ("a ball", "a cube")
    list(inversion.invert_at(engine, torch.zeros(2, 64, 64, 3, dtype=torch.uint8), captions, [1], [3, 4]))
    (context,) = called
    own = [engine.encode_text([caption]).context[0] for caption in captions]
    assert not torch.equal(*own) and torch.equal(context[-2:], torch.stack(own))


def test_a_batch_asks_each_image_for_its_own_words_alone():
    """Images that name fewer words than their neighbours are padded with their own last one."""
    asked = [
        Request(0, "a cone", 0, ("cone",)),
        Request(1, "a ball, a tree and a cube", 1, ("ball", "tree", "cube")),
        Request(2, "nothing", 2),
    ]
    together, alone = (samples(StubEngine(), asked, size, tasks=("open-vocabulary",)) for size in (3, 1))
    for one, other in zip(together, alone, strict=True):
        maps = [sample.annotations["open-vocabulary"].labels for sample in (one, other)]
        assert (maps[0] == maps[1]).all()
        assert set(np.unique(maps[0])) <= {0, *(1 + world.THINGS.index(word) for word in one.request.classes)}
    assert together[0].annotations["open-vocabulary"].labels.any()
    generator = driver.BatchGenerator(engine := StubEngine(), make_recipe(engine, ("open-vocabulary",)), list)
    words = [[world.THINGS.index(word) for word in group] for group in (("cone",) * 3, ("ball", "tree", "cube"))]
    queries = [request.classes for request in asked]
    first, second, third = generator.embed_words("open-vocabulary", queries)
    assert (first == generator.embeddings[words[0]]).all() and (second == generator.embeddings[words[1]]).all()
    assert (third == generator.embeddings[[0, 0, 0]]).all()
    assert generator.embed_words("open-vocabulary", queries[2:]).shape[:2] == (1, 1)
    assert generator.embed_words("depth", queries) is None


def test_prompts_that_a_run_does_not_reach_are_not_looked_at():
    plan = SimpleNamespace(number=2, request=str)
    assert [[*job._first_requests(SimpleNamespace(lines=lines), plan)] for lines in ("abc", "a", "")] == [
        ["0", "1"],
        ["0"],
        ["0", "1"],
    ]
    assert [job._format_bytes(count) for count in (9_999_000_000, 10**10)] == ["9,999 MB", "10 GB"]


def test_a_map_of_words_has_numbers_for_254():
    names = [f"thing {k}" for k in range(255)]
    assert class_words_of(StubEngine(), ("open-vocabulary",), names[:254]) == tuple(names[:254])
    with pytest.raises(Refused, match="255 words, an 8-bit label map holds 254"):
        class_words_of(StubEngine(), ("open-vocabulary",), names)
    assert class_words_of(StubEngine(), ("open-vocabulary",), ()) == world.THINGS  # those that its decoder learned
    with pytest.raises(Refused, match="--task attention: no class words were given"):
        class_words_of(StubEngine(), ("attention", "open-vocabulary"), ())
    with pytest.raises(Refused, match="has 82 tokens, at most 77 fit"):
        class_words_of(StubEngine(), ("open-vocabulary",), ("x " * 80,))


def test_a_model_without_guidance_takes_one_and_no_more():
    engine = StubEngine()
    engine.model.guidance = "none"
    assert make_recipe(engine, ("depth",), guidance=1.0).guidance == 1
    with pytest.raises(Refused, match="--guidance 1.5: .* is sampled without guidance here, expected at most 1"):
        make_recipe(engine, ("depth",), guidance=1.5)


@pytest.mark.parametrize("origin", [calls.FROM_NOISE, calls.FromOneGenerator()])
def test_the_first_latents_are_noise_at_the_scale_of_the_schedule(origin):
    engine, asked = StubEngine(), [Request(0, "a", 5), Request(1, "b", 6)]
    schedule = replace(walk.make_schedule({}, "ddim", 2), noise_scale=0.5)
    noise = walk.ImageNoise([5, 6], engine.model.latent_shape()).draw()
    if origin is not calls.FROM_NOISE:  # seeded with 5, which draws one after another
        noise = torch.randn(2, *noise.shape[1:], generator=torch.Generator().manual_seed(5))
    assert torch.equal(origin.begin(engine, schedule, asked).latents, noise / 2)


def test_one_generator_draws_the_noise_of_each_image_of_a_run_once(monkeypatch):
    engine, origin, made, draw = StubEngine(), calls.FromOneGenerator(), [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: made.append(shape) or draw(*shape, **options))
    schedule = walk.make_schedule({}, "ddim", 2)
    for first in (0, 2, 4):
        origin.begin(engine, schedule, [Request(k, "a", 5 + k) for k in (first, first + 1)])
    assert len(made) == 6


def test_a_guidance_that_is_embedded_is_the_one_of_the_call_or_else_the_models_own():
    engine = StubEngine()
    engine.model.guidance, engine.model.has_negative = "embedded", lambda guidance: False
    assert [calls.call_text(engine, ["a"], guidance).guidance for guidance in (3.5, 0.0)] == [3.5, 2.0]


def test_a_concept_of_several_tokens_is_their_mean():
    engine, recipe = StubEngine(), SimpleNamespace(concepts=("fire hydrant",), table=None)
    engine.encode_text = lambda texts: Text(torch.arange(8.0).view(1, 4, 2))  # of the begin, two words and the end
    made = driver.BatchGenerator.concepts.func(SimpleNamespace(engine=engine, recipe=recipe))
    assert made.tolist() == [[[3, 4]]]


def test_the_latents_are_those_of_the_sampler_with_guidance_from_each_seed():
    engine, asked = StubEngine(), [replace(requests("a ball")[0], negative="fog"), Request(1, "a tree", 11)]
    for guidance in (1.0, 3.5):
        recipe = make_recipe(engine, ("depth",), steps=6, guidance=guidance)
        context = join_texts(
            [engine.encode_text(["fog", ""]), engine.encode_text([request.prompt for request in asked])]
        )
        noise = walk.ImageNoise([request.seed for request in asked], (4, 8, 8)).draw()
        state = walk.ReferenceSampler(recipe.schedule, guidance, noise)
        for call, timestep in enumerate(recipe.schedule.timesteps):
            state.step(call, engine.denoise(state.latents, timestep, context))
        calls = iter(recipe.schedule.timesteps)
        made = driver.BatchGenerator(engine, recipe, partial(next, calls)).sample(Batch(0, tuple(asked), 0))
        torch.testing.assert_close(made.latents, state.latents, rtol=1e-5, atol=1e-5)
        assert next(calls, None) is None  # every UNet call was told of, and no other


@pytest.mark.parametrize("place", [(0, 0, 0), (3, 1, 1)])
def test_one_value_that_is_not_finite_is_enough(place):
    values = torch.ones(3, 4, 2, 2)
    values[1][place] = float("nan")
    assert driver.is_finite(values).tolist() == [True, False, True]

    def finite(capture):
        return torch.stack([*map(driver.is_finite, driver.tensors_of(capture))]).all(0)

    sound = torch.ones(3, 4, 2, 2)
    for features, maps in (
        (((sound, values),), ((sound,),)),
        (((sound,), (values,)), ((sound,),)),
        (((sound,),), ((values, sound),)),
    ):
        assert finite(Capture(features, maps)).tolist() == [True, False, True]
    sums = ProjectedCapture((sound, values), {})
    assert finite(sums).tolist() == [True, False, True]


def test_the_first_engine_is_asked_again_for_nothing_where_all_is_finite():
    class Never(StubEngine):
        def fp32_fallback(self):
            raise AssertionError("every sample was finite")

    assert all(type(result) is Sample for result in samples(Never(), requests("a ball", "a tree")))


def test_renumbered_maps_speak_of_the_words_of_the_run():
    label = SemanticMap(np.array([[0, 1], [2, 3]], np.uint8), np.ones((2, 2)), ("none", "1", "2", "3"))
    assert labelling.renumber(label, ("tree", "ball"), ("ball", "cube", "tree")).labels.tolist() == [[0, 3], [1, 1]]
    assert labelling.renumber(label, (), ("ball",)).labels.tolist() == [[0, 0], [0, 0]]


def test_a_run_is_made_once(engines, tmp_path):
    settings = config(tmp_path / "run")
    made = []
    result = write_missing(prepare(settings), on_commit=made.append)
    assert (result.done, result.made, result.is_complete, made) == (7, 7, True, [3, 3, 1])
    assert len(engines) == 1 and find_result(settings).done == 7 and len(engines) == 1
    assert len(open_run(tmp_path / "run")) == 7


def test_interrupted_limited_and_resumed_runs_are_equal(engines, tmp_path):
    write_missing(prepare(config(tmp_path / "whole")))
    for limit in (1, 4, 0):
        write_missing(prepare(config(tmp_path / "limited", limit=limit)))
    write_missing(prepare(config(tmp_path / "stopped")), is_stopping=lambda: True)
    assert len(open_run(tmp_path / "stopped")) == 3
    write_missing(prepare(config(tmp_path / "stopped")))
    assert tree(tmp_path / "whole") == tree(tmp_path / "limited") == tree(tmp_path / "stopped")


def test_batches_of_equal_size_stay_those_of_the_plan(engines, tmp_path):
    """Ten images in batches of at most 8 are two of 5, also for whoever goes on with the run or joins it."""
    settings = config(tmp_path / "run", number=10, batch_size=8)
    first = prepare(settings)
    write_missing(first, is_stopping=lambda: True)
    assert first.plan.batch_size == prepare(settings).plan.batch_size == 5
    assert write_missing(prepare(settings)).done == 10
    assert {row.recipe["batch_size"] for row in open_run(tmp_path / "run").rows()} == {5}
    grown = prepare(config(tmp_path / "run", number=20, batch_size=4))
    assert (grown.plan.batch_size, grown.document["plan"]["batch_size"]) == (4, 5)  # run.json has the first one


def test_a_limit_counts_new_images(engines, tmp_path):
    for done in (2, 4):
        assert write_missing(prepare(config(tmp_path / "run", limit=2))).done == done


def test_other_settings_weights_or_engines_are_refused(engines, tmp_path, monkeypatch):
    write_missing(prepare(config(tmp_path / "run", limit=1)))
    before = tree(tmp_path / "run")
    with pytest.raises(Refused, match="guidance: 2.0 there, 4.0 asked for; seed: 0 there, 5 asked for"):
        find_result(config(tmp_path / "run", guidance=4.0, seed=5))
    monkeypatch.setattr(StubEngine, "fingerprint", lambda self: {"engine": "stub", "dtype": "fp16", "device": "cuda:1"})
    with pytest.raises(Refused, match='engine.dtype: "fp32" there, "fp16" asked for'):
        prepare(config(tmp_path / "run"))
    stored, made = read_document(tmp_path / "run"), prepare(config(tmp_path / "other"))
    resumes = "Choose another --out, or continue with the engine and the versions of libraries"
    for command, remedy in (({}, "Run generate once alone"), ({"command": "label"}, resumes)):
        with pytest.raises(Refused, match="engine.dtype") as stop:
            merge_with_stored(made, stored | command)
        assert stop.value.remedy.startswith(remedy)
    with pytest.raises(Refused, match="engine.dtype") as stop:
        merge_with_stored(replace(made, may_mix=False), stored)
    assert stop.value.remedy.startswith(resumes)
    assert tree(tmp_path / "run") == before


def test_another_device_of_the_same_kind_may_go_on(engines, tmp_path, monkeypatch):
    write_missing(prepare(config(tmp_path / "run", limit=1)))
    monkeypatch.setattr(StubEngine, "fingerprint", lambda self: {"engine": "stub", "dtype": "fp32", "device": "cpu:1"})
    assert prepare(config(tmp_path / "run")).done == 1


def test_a_foreign_folder_is_left_alone(engines, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(Refused, match="not empty"):
        find_result(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_found_before_the_first_byte(engines, tmp_path, monkeypatch):
    monkeypatch.setattr(job.storage, "free_bytes", lambda path: 1000)
    with pytest.raises(Missing, match="are free"):
        prepare(config(tmp_path / "run"))
    with monkeypatch.context() as patch:  # what the settings tell is seen before networks are loaded
        patch.setattr(job, "open_engine", None)
        for free, size in ((1000, 0), (job.SPARE + 10**6, 512)):
            patch.setattr(job.storage, "free_bytes", lambda path, free=free: free)
            with pytest.raises(Missing, match="are free"):
                prepare(config(tmp_path / "run", size=size))
    assert not (tmp_path / "run").exists()


def test_set_aside_samples_end_the_run_with_a_failed_gate(engines, tmp_path):
    result = write_missing(prepare(config(tmp_path / "run", prompts="a ball\nbroken\n", number=4, allow_unnamed=True)))
    assert (result.done, result.quarantined, result.is_complete) == (2, 2, True)
    with pytest.raises(GateFailed, match="2 of 4 samples were quarantined"):
        result.check()
    assert [sample.id for sample in open_run(tmp_path / "run")] == ["00000000", "00000002"]
    assert find_result(config(tmp_path / "run", prompts="a ball\nbroken\n", number=4)).quarantined == 2
    with pytest.raises(Refused, match="image 00000001 would change .*broken"):  # which a larger run would make, too
        prepare(config(tmp_path / "run", prompts="a ball\na cone\na ball\na cone", number=5, allow_unnamed=True))


def test_a_quarantined_sample_is_made_again_once_its_engine_can(engines, tmp_path, monkeypatch):
    path = tmp_path / "run"
    write_missing(prepare(config(path, prompts="a ball\nbroken\n", number=4, batch_size=2, allow_unnamed=True)))
    before, again = tree(path), RunConfig(out=str(path), only="1")
    with pytest.raises(GateFailed, match="^sample 00000001: .*; nothing was written"):
        prepare_remake(again)()
    assert tree(path) == before
    encode = StubEngine.encode_text
    monkeypatch.setattr(StubEngine, "encode_text", lambda self, prompts: encode(self, ["whole"] * len(prompts)))
    made = prepare_remake(again)()
    assert "images/00000001.png" in made and all((path / name).exists() for name in made)
    assert [sample.id for sample in open_run(path)] == ["00000000", "00000001", "00000002"]


def test_a_sample_of_a_run_that_another_command_made_is_not_made_alone(tmp_path):
    write_run(tmp_path, 1, 32)
    description = json.loads((tmp_path / "run.json").read_text()) | {"command": "merge"}
    (tmp_path / "run.json").write_text(json.dumps(description))
    with pytest.raises(Refused, match="--only 0: .* was made by merge") as refused:
        find_remake_row(str(tmp_path), "0")
    assert "audit --repair" in refused.value.remedy


def test_a_process_among_several_ends_its_share_where_the_gate_closes(engines, tmp_path, monkeypatch):
    class Gate:
        is_closed = False

        def __init__(self, job, ledger):
            pass

        def evaluate(self, results):
            self.is_closed = True

        def check(self):
            raise GateFailed("the pictures are unlike", "Look at them.")

    monkeypatch.setattr(worker, "DomainGate", Gate)
    with pytest.raises(GateFailed, match="the pictures are unlike"):
        worker.work_on_folder(read_spec(config(tmp_path / "run")), worker.Callbacks())
    assert [sample.id for sample in open_run(tmp_path / "run")] == ["00000000", "00000001", "00000002"]


@pytest.mark.parametrize("index", [0, 4, 6])  # first, middle of a batch, padded tail
def test_one_sample_is_made_again_from_its_row(engines, tmp_path, index):
    path = tmp_path / "run"
    write_missing(prepare(config(path, classes=("ball", "cube", "tree"))))
    before = tree(path)
    damaged = path / "images" / f"{index:08d}.png"
    damaged.write_bytes(b"damaged")
    again = RunConfig(out=str(path), only=f"{index:08d}")
    assert prepare_remake(again)() == [f"images/{index:08d}.png"]
    assert prepare_remake(again)() == [] and tree(path) == before


def test_a_sample_that_comes_out_otherwise_fails_and_is_not_written(engines, tmp_path, monkeypatch):
    path = tmp_path / "run"
    write_missing(prepare(config(path)))
    before = tree(path)
    monkeypatch.setattr(
        StubEngine,
        "decode_image",
        lambda self, latents: __import__("torch").zeros(len(latents), 64, 64, 3, dtype=__import__("torch").uint8),
    )
    with pytest.raises(GateFailed, match="differs from the run folder in images/00000002.png"):
        prepare_remake(RunConfig(out=str(path), only="2"))()
    assert tree(path) == before


def test_making_again_checks_what_was_given(engines, tmp_path):
    write_missing(prepare(config(tmp_path / "run")))
    for only, given, message in (
        ("99", (), "no sample"),
        ("x", (), "no sample"),
        ("1", ("seed",), "seed: 0 there, 3 asked for"),
    ):
        with pytest.raises(Refused, match=message):
            prepare_remake(RunConfig(out=str(tmp_path / "run"), only=only, seed=3), given)
    with pytest.raises(Refused, match="not a run folder"):
        prepare_remake(RunConfig(out=str(tmp_path / "none"), only="1"))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--engine", "warp", "'warp' is not one of"),
        ("--sampler", "plms", "'plms' is not one of"),
        ("--number", "0", "--number 0: expected 1 or more"),
        ("--number", "-3", "--number -3"),
        ("--batch-size", "-1", "--batch-size -1"),
        ("--batch-size", "1000000", "expected 0 to 4096"),
        ("--limit", "-1", "--limit -1"),
        ("--ignore-below", "1.5", "expected 0 to 1"),
    ],
)
def test_bad_flags_are_refused_with_nothing_written(tmp_path, capsys, flag, value, message):
    assert generate.main([flag, value, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ("colour",)}, "--task colour: not one of"),
        ({"task": ()}, "names no task"),
        ({"task": ("depth", "depth")}, "named twice"),
        ({"steps": -1}, "--steps -1"),
        ({"size": 100}, "--size 100: expected a multiple of 64"),
        ({"size": -64}, "--size -64"),
        ({"size": 2**20}, "--size 1048576"),
        ({"guidance": float("nan")}, "--guidance nan"),
        ({"guidance": float("inf")}, "--guidance inf"),
        ({"guidance": -1.0}, "--guidance -1"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**63 - 3}, f"--seed {2**63 - 3}: expected a whole number from 0 to {2**63 - 7}"),
        ({"threads": -1}, "--threads -1"),
        ({"prompts": "none.txt"}, "none.txt: the prompt file cannot be read"),
        ({"prompts": "word " * 90}, "92 tokens, at most 77"),
        ({"classes": ("",)}, "class words is empty"),
        ({"classes": ("unicorn",), "task": ("semantic",)}, "no decoder of this run knows 'unicorn'"),
        ({"classes": ("word " * 90,)}, "92 tokens, at most 77"),
    ],
)
def test_bad_settings_are_refused_with_nothing_written(engines, tmp_path, changes, message):
    settings = config(tmp_path / "run", **changes)
    with pytest.raises(Refused, match=message) as refusal:
        find_result(settings)
        prepare(settings)
    assert "\n" not in refusal.value.cause and refusal.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_gpus_calls_are_counted_when_they_are_over(monkeypatch):
    """The host queues a whole batch of calls before the first of them has ended."""
    over, heard = threading.Event(), []

    class Event:
        def __init__(self, blocking):
            assert blocking  # or the thread that waits would keep a core busy

        def record(self, stream):
            pass

        def synchronize(self):
            assert over.wait(10)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with FinishedCalls(torch.device("cuda", 0), lambda: heard.append(1)) as calls:
        for _ in range(3):
            calls.on_queued()
        assert heard == []
        over.set()
    assert heard == [1, 1, 1]


@pytest.mark.parametrize("seen", ["star", "ball"])
def test_what_decoders_see_without_the_prompt_is_told(seen):
    """Held to the prompt, both kinds of labels call the thing a ball."""
    kinds = ("semantic", "instance")
    configs = {**CONFIGS, **{task: replace(CONFIGS[task], named=world.THINGS, score_threshold=0.4) for task in kinds}}

    class Sure(StubEngine):
        def annotate(self, task, capture, text=None):
            classes, count = self.decoders[task].config.classes, len(capture.features[-1][0])
            logits = torch.full((count, 2, len(classes) + 1), -9.0)
            logits[:, 0, classes.index(seen)], logits[:, 0, classes.index("ball")] = 9, 9 if seen == "ball" else 0
            logits[:, 1, 0 if task == "semantic" else -1] = 9
            masks = torch.full((count, 2, 20, 20), -9.0)
            masks[:, 0, :, :10], masks[:, 1, :, 10:] = 9, 9
            return {"pred_logits": logits, "pred_masks": masks}

    (sample,) = samples(Sure(configs=configs), [Request(0, "a ball", 1, ("ball",))], size=1, tasks=kinds)
    assert sample.annotations["instance"].class_ids.tolist() == [world.THINGS.index("ball")]
    wanted = ("without the prompt, 100% of the pixels of things are star, which it does not name",)
    assert sample.trust.reasons == (wanted if seen == "star" else ())


def test_nothing_is_committed_after_a_batch_that_could_not_be_written(tmp_path):
    committed, third = [], threading.Event()

    def write(results, recipe):
        if results == [2]:
            assert third.wait(60)
            raise Missing("the disk is full", "Free some space.")
        if results == [3]:
            third.set()
        return results

    folder = SimpleNamespace(path=tmp_path, write=write, ledger=SimpleNamespace(commit=committed.append))
    with pytest.raises(Missing), BackgroundWriter(folder, lambda rows: None) as writer:
        for number in (1, 2, 3):
            writer.put([number], {})
        wait(writer._waiting)
    assert committed == [[1]]


def test_negative_prompts_are_encoded_once_until_there_are_too_many(monkeypatch):
    monkeypatch.setattr(driver, "MOST_NEGATIVES", 2)
    asked = []
    engine = SimpleNamespace(encode_text=lambda texts: asked.extend(texts) or Text(torch.zeros(1, 77, 2)))
    generator = object.__new__(driver.BatchGenerator)
    generator.engine, generator._negatives = engine, {}
    for texts, encoded in ((["a", "b"], "ab"), (["a", "c"], "c"), (["a", "a"], "a"), (["b", "a"], "b")):
        assert len(generator._encode_negatives(texts)) == 2
        assert "".join(asked) == encoded
        asked.clear()


def test_a_plan_tells_seeds_of_prompts_and_the_products_of_a_transformer():
    backbone = SimpleNamespace(flow=None, text=lambda configs: (100, 8))
    model = SimpleNamespace(backbone=backbone, guidance_at=lambda guidance: "cfg" if guidance > 1 else "none")
    model.image_tokens, model.configs, model.denoiser = 400, {}, SimpleNamespace(numel=lambda: 10**9)
    planned = SimpleNamespace(engine=SimpleNamespace(model=model), recipe=SimpleNamespace(facts={"calls": 20}))
    planned.recipe.facts["guidance"] = 3.0
    assert run_report.describe_work(planned) == ""
    backbone.flow = "uniform"
    assert run_report.describe_work(planned) == "at most 40 TFLOP an image, without attention and decoding"
    planned.recipe.facts["guidance"] = 1.0
    assert run_report.describe_work(planned) == "at most 20 TFLOP an image, without attention and decoding"


def test_a_plan_counts_weights_by_their_precision_and_a_batch_that_is_larger_than_usual(monkeypatch):
    """1 G of a U-Net and 0.1 G of an autoencoder in fp16 and 0.5 G of text encoders, in fp32 where the family keeps
    them so: 4.2 GB or 3.2. Of five images of 512 x 512 pixels three maps of 128 channels take 1.0 GB.
    """
    monkeypatch.setattr("datasetdm_fast.engine.engines.device.device_memory", lambda device: 64e9)
    counts = {"unet": 10**9, "text_encoder": 5 * 10**8, "vae": 10**8}
    config = SimpleNamespace(block_out_channels=(128, 256))
    networks = {name: SimpleNamespace(numel=lambda n=n: n, config=config) for name, n in counts.items()}
    backbone = SimpleNamespace(of_kind=lambda kind: (kind,), text_network="a network")
    engine = SimpleNamespace(model=SimpleNamespace(networks=networks, backbone=backbone), device="cpu")
    engine.suggested_batch, engine.fingerprint = lambda: 4, lambda: {"dtype": "fp16", "device": "cuda"}
    planned = SimpleNamespace(engine=engine, recipe=SimpleNamespace(facts={"size": 512}), plan=SimpleNamespace())
    planned.plan.batch_size = 4
    assert run_report.describe_memory(planned) == "4.2 GB of weights, of 64 GB in all"
    planned.plan.batch_size, backbone.text_network = 5, ""
    told = "3.2 GB of weights and at least 1 GB for 5 images, of 64 GB in all"
    assert run_report.describe_memory(planned) == told
    monkeypatch.setattr("datasetdm_fast.engine.engines.device.half_of", lambda device: "")
    warnings = [run_report._warning({"device": device, "dtype": "bf16"}) for device in ("cuda", "cpu")]
    assert warnings == ["", "this processor has no bf16 and emulates it; fp32 is faster"]
    assert run_report._warning({"device": "cpu", "dtype": "fp32"}) == ""


def test_a_prompt_of_as_many_tokens_as_clip_reads_is_not_cut():
    tokenizer, texts = Tokenizer(), ["a red ball", "a red ball here", "a b c d e"]
    tokenizer.model_max_length, tokenizer.longer = 5, object()  # with the marks of start and end
    engine = SimpleNamespace(model=SimpleNamespace(tokenizer=tokenizer))
    plan = SimpleNamespace(number=3, request=lambda index: SimpleNamespace(prompt=texts[index]))
    planned = SimpleNamespace(engine=engine, plan=plan)
    assert run_report.describe_cut(planned) == "of 2 of the first 3 prompts CLIP reads 5 tokens, and T5 all"
    plan.number = 1
    assert run_report.describe_cut(planned) == ""


def test_two_labels_that_write_the_same_files_are_refused(monkeypatch):
    real = run_settings.kind_of
    own = copy.copy(real("instance"))
    own.coco_file = "others.json"  # but not layers of its own
    kinds = {"pose": real("depth"), "attention": real("instance"), "open-vocabulary": own}
    monkeypatch.setattr(run_settings, "kind_of", lambda label: kinds.get(label) or real(label))
    run_settings.check_settings(RunConfig(task=("depth", "semantic")))
    for task, cause in (
        (("depth", "pose"), "depth and pose both write depth/ID.png"),
        (("instance", "attention"), "instance and attention both write instances.json"),
        (("instance", "open-vocabulary"), "instance and open-vocabulary both write the gallery's layer instance"),
    ):
        with pytest.raises(Refused, match=f"--task: {cause}"):
            run_settings.check_settings(RunConfig(task=task))
    kinds["pose"] = copy.copy(real("pose"))
    kinds["pose"].roles = ("Depth",)  # where a file system knows no capitals, the folder of depth
    with pytest.raises(Refused, match="--task: depth and pose both write Depth/ID.png"):
        run_settings.check_settings(RunConfig(task=("depth", "pose")))


def test_a_guidance_of_a_call_that_needs_no_negative_prompt_has_no_row_for_it():
    engine = StubEngine()
    engine.model.has_negative = lambda guidance: guidance > 1
    assert [len(calls.call_text(engine, ["a", "b"], guidance)) for guidance in (0.0, 1.5, 1.0)] == [4, 4, 2]


def test_shares_of_narrow_captures_are_summed_in_fp32():
    third = torch.full((1, 1, 2, 2), 1 / 3, dtype=torch.float16)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    total = calls.add_share(None, ProjectedCapture((third,) * 4, {}), shares)
    total = calls.add_share(total, ProjectedCapture((third,) * 4, {}), 1 - shares)
    assert all(torch.equal(level, torch.full((1, 1, 2, 2), float(third[0, 0, 0, 0]))) for level in total.sums)
    parts = calls.add_share(None, Capture(((third, 2 * third),) * 4, ((third,),) * 4), shares)
    assert parts.features[3][1][0, 0, 0, 0] == pytest.approx(0.8 * float(third[0, 0, 0, 0]), rel=1e-6)


def test_a_capture_that_is_not_finite_is_told_whichever_it_is():
    class Narrow(StubEngine):
        def denoise_and_capture(self, latents, timestep, text):
            noise, capture = super().denoise_and_capture(latents, timestep, text)
            if timestep == self.broken:
                capture.features[0][0][1] = float("inf")
            return noise.clone(), capture

    configs = CONFIGS | {"depth": replace(CONFIGS["depth"], capture_timestep=600)}
    engine = Narrow(configs=configs)
    for timestep in (600, 0):
        engine.broken = timestep
        first, second = samples(engine, requests("a", "b"), sampler="ddim", steps=5)
        assert isinstance(first, Sample) and second.reason.startswith("NaN or infinite values in features")


def test_an_image_is_measured_by_its_own_capture_in_any_batch():
    engine = StubEngine()
    decoder = engine.decoders["depth"]
    decoder.sketch = lambda capture: capture.features[0][0].square()
    decoder.domain = SimpleNamespace(measure=lambda sketch, *_: DomainDistance(float(sketch.mean()), {}, 0.0))
    found = {}
    for size in (1, 3):
        results = samples(engine, requests("a", "b"), size, ("depth",), sampler="ddim", steps=2)
        found[size] = [result.trust.domain for result in results]
    assert found[1] == found[3] and found[1][0] != found[1][1]


def test_steps_are_told_without_the_padding_of_a_batch():
    engine, shapes = StubEngine(), []
    recipe = make_recipe(engine, ("depth",), sampler="ddim", steps=2)
    tell = lambda step, latents: shapes.append((step, len(latents)))  # noqa: E731
    driver.BatchGenerator(engine, recipe, lambda: None, tell).sample(Batch(0, tuple(requests("a", "b")), 3))
    assert shapes == [(0, 2), (1, 2)]


def test_instances_without_classes_are_what_a_prompt_names_first():
    masks = Instances(np.ones((2, 4, 4), bool), np.zeros(2, int), np.ones(2, np.float32), ("thing",))
    recipe = replace(make_recipe(StubEngine(), ("semantic",)), words=("ball", "cube", "cone"), uncaptioned="a photo")
    for prompt, classes, number in (
        ("a cube on a ball", ("ball", "cube"), 1),
        ("two things", ("cone",), 2),
        ("a photo", (), 0),  # of a picture without a caption
    ):
        found = labelling.with_prompt_class(masks, Request(0, prompt, 0, classes), recipe)
        assert found.class_ids.tolist() == [number, number] and found.classes == recipe.words
    assert not len(labelling.with_prompt_class(masks, Request(0, "two things", 0), recipe).masks)


def test_classes_that_a_list_names_beside_its_prompt_are_not_ruled_out():
    config = replace(CONFIGS["semantic"], named=("ball", "cube"))
    raw = {"pred_logits": torch.zeros(2, 1, 10), "pred_masks": torch.ones(2, 1, 8, 8)}
    raw["pred_logits"][..., 3], raw["pred_logits"][..., 2] = 8.0, 6.0  # a cube, or else a ball
    asked = [Request(0, "a ball", 0, ("ball", "cube")), Request(1, "a ball", 0, ("ball",))]
    found = labelling.postprocess(asked, raw, config, SimpleNamespace(size=8))
    assert [int(label.labels[0, 0]) for label in found] == [3, 2]


def test_pixels_may_be_ignored_as_doubtful_and_as_unsure_at_once():
    classes, ones = ("background", "ball", "cube"), np.ones((1, 4), np.float32)
    labels = SemanticMap(np.uint8([[1, 1, 2, 0]]), np.float32([[0.9, 0.2, 0.9, 0.5]]), classes)
    other = SemanticMap(np.uint8([[1, 1, 1, 0]]), ones, classes)
    sample = Sample(Request(0, "a ball", 0, ("ball",)), np.zeros((1, 4, 3), np.uint8), {"semantic": labels, "x": other})
    sample = replace(sample, annotations={"semantic": labels, "semantic:other": other})
    for is_doubtful, least, wanted in (
        (False, 0.0, [1, 1, 2, 0]),
        (True, 0.0, [1, 1, 255, 0]),
        (False, 0.5, [1, 255, 2, 0]),
        (True, 0.5, [1, 255, 255, 0]),
    ):
        recipe = SimpleNamespace(table=None, ignores_doubtful=is_doubtful, least_confidence=least, draws=())
        found = labelling.with_trust(sample, recipe)
        assert found.annotations["semantic"].labels.tolist() == [wanted]
        assert found.trust.disagreeing == 0.3333, "one of three pixels of things, whether it is ignored or not"


def test_the_outputs_of_all_calls_that_a_label_is_read_from_are_taken_on():
    """Those of a label of one call alone are made plainly, too, unless it is the last."""
    for moment, taken_on in ((600, {4}), ((600, 200), {1, 3, 4})):
        engine = StubEngine(configs=CONFIGS | {"depth": replace(CONFIGS["depth"], capture_timestep=moment)})
        recipe = make_recipe(engine, ("semantic", "depth"), sampler="ddim", steps=5)
        assert recipe.taken_on == taken_on


def test_labellers_are_given_the_images_and_what_they_were_decoded_from(monkeypatch):
    given = []
    monkeypatch.setattr(labeller, "labels_of", lambda task, place, inputs: given.append((task, inputs)) or [task])
    recipe = SimpleNamespace(
        labellers=("own", "other"), words=("ball", "cube"), query_words=lambda request: request.classes
    )
    asked = (Request(0, "a ball", 1, ("ball",)), Request(1, "a cube", 2, ("cube",)))
    images, sampled = object(), SimpleNamespace(latents=object(), captures={"other": object()})
    found = labelling.labeller_labels(Batch(0, asked, 1), images, sampled, StubEngine(), recipe)
    assert found == {"own": ["own"], "other": ["other"]} and [task for task, _ in given] == ["own", "other"]
    for task, inputs in given:
        assert inputs.requests == (*asked, asked[-1]) and inputs.words == (("ball",), ("cube",), ("cube",))
        assert inputs.classes == recipe.words and inputs.images is images and inputs.latents is sampled.latents
        assert inputs.capture is sampled.captures.get(task)


def test_captures_are_raw_for_labellers_and_all_of_them_where_sums_are_made(monkeypatch):
    monkeypatch.setattr("datasetdm_fast.engine.loop.recipe.LABELLER_KINDS", SimpleNamespace(others=("seen", "blind")))
    one = make_recipe(StubEngine(), ("semantic",), sampler="ddim", steps=5)
    for captures, tasks, captured, raw in (
        ({"semantic": (4,)}, ("semantic",), (4,), set()),
        ({"semantic": (4,), "seen": (2,)}, ("semantic", "seen"), (2, 4), {2}),
        ({"semantic": (1, 3), "seen": (2,)}, ("semantic", "seen"), (1, 2, 3), {1, 2, 3}),
        ({"semantic": (1, 3)}, ("semantic", "blind"), (1, 3), set()),
        ({}, ("blind",), (), set()),
        ({}, (), (4,), set()),
    ):
        recipe = replace(one, captures=captures, tasks=tasks)
        assert (recipe.captured, recipe.raw) == (captured, raw), captures


def test_words_that_no_decoder_knows_are_for_one_that_takes_any():
    engine = StubEngine()
    assert prompt_words(engine, ("semantic", "open-vocabulary"), ("zebra",)) == ("zebra",)
    assert prompt_words(engine, ("semantic", "depth"), ()) == tuple(world.CLASSES)
    with pytest.raises(Refused, match="no decoder of this run knows 'zebra'"):
        prompt_words(engine, ("semantic",), ("zebra",))


@pytest.mark.parametrize(
    ("size", "near"), [(100, 128), (90, 64), (1, 64), (-64, 64), (5000, 4096), (4160, 4096), (64.0, 512)]
)
def test_a_size_that_is_none_is_told_the_nearest(size, near):
    with pytest.raises(Refused, match=f"Try --size {near}; 0 takes"):
        check_size(size)
    check_size(0), check_size(4096)


class _Latents(StubEngine):
    """An engine whose network answers the same value everywhere, with a scheduler of one's own."""

    def __init__(self, scheduler, value):
        super().__init__()
        self.model.scheduler, self.value, self.times = scheduler, value, []

    def denoise(self, latents, timestep, text):
        self.times.append(timestep)
        return torch.cat([latents, torch.full_like(latents, self.value)])  # with the text last


def test_ddim_backwards_is_exact_for_an_output_that_stays_the_same():
    clean = torch.full((2, 1, 2, 2), 0.75)
    for scheduler in (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}):
        engine = _Latents(scheduler, 0.5)
        latents = inversion.ddim_latents(engine, clean, None, 10, 4)
        assert engine.times == [0, 2, 5, 8]
        signal, noisy = walk.shares_at(scheduler, 10)
        wanted = signal * 0.75 + noisy * 0.5 if scheduler is SCHEDULER else 0.75 + 0.01 * 0.5
        torch.testing.assert_close(latents, torch.full_like(clean, wanted))
    engine, latent, before = _Latents(SCHEDULER | {"prediction_type": "v_prediction"}, 0.5), 0.75, (1.0, 0.0)
    for target in (400, 800):
        signal, noisy = walk.shares_at(engine.model.scheduler, target)
        image, noise = before[0] * latent - before[1] * 0.5, before[0] * 0.5 + before[1] * latent
        latent, before = signal * image + noisy * noise, (signal, noisy)
    found = inversion.ddim_latents(engine, clean, None, 800, 2)
    torch.testing.assert_close(found, torch.full_like(clean, latent))


def test_pictures_are_not_judged_by_what_a_model_can_draw_and_tell_all_their_calls():
    engine = StubEngine(configs=CONFIGS | {"depth": replace(CONFIGS["depth"], capture_timestep=600)})
    engine.model.levels, engine.model.draws = SD1_LEVELS, ("cone",)
    recipe = make_recipe(engine, ("semantic", "depth", "attention"), classes=("ball",))
    assert recipe.draws == ("cone",)
    found = inverting.inversion_recipe(recipe, engine, (100, 300, 500))
    assert found.draws == () and found.inverted == (600, 0) and found.captures == {"semantic": (1,), "depth": (0,)}
    facts = {"sampler": "inversion", "steps": 3, "calls": 5, "timesteps": [100, 300, 500]}
    assert facts.items() <= found.facts.items()
    assert found.facts["capture_timestep"] == {"semantic": 0, "depth": 600}


def test_captions_of_pictures_name_classes_by_the_words_of_their_own():
    table = ClassTable((ClassWord("ball", "globe", ("orb",)), ClassWord("cube", "cube")))
    engine, blocks = StubEngine(), SimpleNamespace(blocks=(9,))
    recipe = SimpleNamespace(table=table, words=("ball", "cube"), attention=blocks)
    for caption, text, named in (("an orb", "an orb", ("ball",)), ("", "a photo of a globe, a cube", ("ball", "cube"))):
        line = inverting.picture_prompt(caption, recipe, recipe.words, engine, "a.png")
        assert (line.text, line.classes) == (text, named)


@pytest.mark.parametrize("attention", [None, SimpleNamespace(blocks=())])
def test_pictures_without_captions_are_searched_for_all_words_that_no_text_names(attention):
    engine = StubEngine()
    recipe = replace(make_recipe(engine, ("semantic",)), words=("ball", "cube"), attention=attention)
    found = inverting.inversion_recipe(recipe, engine, (100,))
    for caption, text, queries in (
        ("", "a photo", ("ball", "cube")),
        ("a ball", "a ball", ("ball",)),
        ("fog", "fog", ()),
    ):
        line = inverting.picture_prompt(caption, found, found.words, engine, "a.png")
        request = Request(0, line.text, 0, line.classes or ())
        assert (line.text, found.query_words(request)) == (text, queries)
    assert line.classes == () == recipe.query_words(Request(0, "a photo", 0))  # of a run that generates


@pytest.mark.parametrize(
    ("begun", "asked", "dtype"),
    [
        ({"engine": "fast", "dtype": "fp32"}, "auto", "fp32"),  # what was measured once stays
        ({"engine": "fast", "dtype": "fp16"}, "fast", "fp16"),
        ({"engine": "fast", "dtype": "tf32"}, "auto", "auto"),
        ({"engine": "torch", "dtype": "fp32"}, "fast", "auto"),
        ({"engine": "of a package", "dtype": "fp16"}, "auto", "auto"),
        (None, "auto", "bf16"),
    ],
)
def test_a_run_goes_on_in_the_precision_that_auto_chose_for_it(monkeypatch, begun, asked, dtype):
    opened = []
    monkeypatch.setattr(job.engines, "open_engine", lambda *given, **options: opened.append(options))
    stored = begun and {"engine": begun}
    job.open_engine(ModelSettings(), EngineSettings(engine=asked, dtype="auto"), ["semantic"], stored, "bf16")
    job.open_engine(ModelSettings(), EngineSettings(engine=asked, dtype="fp16"), ["semantic"], stored)
    assert [options["dtype"] for options in opened] == [dtype, "fp16"]


def test_a_half_is_tried_where_the_engine_has_one_and_all_negatives_are_checked(engines, tmp_path, monkeypatch):
    (tmp_path / "lines").write_text('{"prompt": "a ball"}\n{"prompt": "a cone", "negative": "fog"}\n')
    checked = []
    monkeypatch.setattr(job.prompts, "check_negative", lambda texts, *_: checked.append(texts))
    settings = config(tmp_path / "run", prompts=str(tmp_path / "lines"), negative_prompt="night", dtype="auto")
    for precision, half in (("fp32", ""), ("fp16", "fp16")):
        facts = {"engine": "stub", "dtype": precision, "device": "cpu"}
        monkeypatch.setattr(StubEngine, "fingerprint", lambda self, facts=facts: facts)
        made = job.build_job(read_spec(settings), None, HALF)
        assert made.half == half and job.build_job(read_spec(settings), None).half == ""
    assert checked == [["night", "", "fog"]] * 4


def test_a_text_keeps_its_guidance_and_its_concepts_whatever_becomes_of_its_numbers():
    text = Text(torch.zeros(3, 2, 4), torch.zeros(3, 5), torch.ones(3, 2, dtype=torch.bool), 3.5, 2)
    for changed in (text.to("cpu"), text.cast(torch.float16), text[:1], text[:1].expand(2)):
        assert (changed.guidance, changed.concepts, changed.mask.dtype) == (3.5, 2, torch.bool)
    assert text.cast(torch.float16).pooled.dtype == torch.float16 and len(text[:1].expand(2)) == 2
