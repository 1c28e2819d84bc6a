"""Training straight from the model: the samples of a stream are those of a stored run, whoever reads which share."""

import importlib.util
import pickle
import tempfile
import threading
from functools import partial
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skips import long_test
from stub_engine import StubEngine
from torch.utils.data import DataLoader
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from datasetdm_fast import GateFailed, MakeSamples, Pipeline, Refused, SampleStream, generate, open_run
from datasetdm_fast.engine import sample_stream, shares

pytestmark = pytest.mark.usefixtures("tiny_has_one_layer")

PROMPTS = ("a red ball on a table", "a blue cube", "a star beside a cone")
SIZES = {"number": 8, "seed": 5, "steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained("demo")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run folder of the same prompts and seeds."""
    out = tmp_path_factory.mktemp("stored")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    line = ["--prompts", str(out / "prompts.txt"), "--task", "semantic,depth", "--out", str(out / "run"), *flags]
    assert generate.main([*line, "--force-domain", "--quiet"]) == 0
    return open_run(out / "run")


def losses(data, classes):
    """Of a small SegFormer that is trained on a data set."""
    torch.manual_seed(0)
    config = SegformerConfig(num_labels=classes, depths=[1] * 4, hidden_sizes=[8] * 4, decoder_hidden_size=16)
    config.num_attention_heads = [1] * 4
    network = SegformerForSemanticSegmentation(config)
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    for images, labels in DataLoader(data, batch_size=4):
        loss = network(pixel_values=images, labels=labels["semantic"]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()


def test_a_stream_trains_as_the_stored_run_of_the_same_seeds(pipe, stored):
    stream = SampleStream(pipe, PROMPTS, ("semantic", "depth"), **SIZES)
    assert stream.classes == stored.classes
    of_stream = list(losses(stream, len(stream.classes)))
    assert of_stream == list(losses(stored.as_dataset(("semantic", "depth")), len(stored.classes)))
    assert len(of_stream) == 2 and of_stream[0] != of_stream[1]


def stub():
    return Pipeline(StubEngine())


def keyed(data):
    """The samples of a data set by their bytes."""
    return sorted(image.numpy().tobytes() + label.numpy().tobytes() for image, label in data)


def test_loader_workers_and_ranks_share_the_samples(monkeypatch):
    """A function opens the engine in each worker process; none makes a sample of another."""
    options = {"number": 7, "steps": 2, "batch_size": 2}
    whole = keyed(SampleStream(stub(), PROMPTS, "depth", **options))
    assert len(set(whole)) == 7
    stream = SampleStream(stub, PROMPTS, "depth", **options)
    here = stream.pipeline
    assert keyed(DataLoader(stream, batch_size=None, num_workers=2)) == whole
    assert stream.pipeline is here and pickle.loads(pickle.dumps(stream))._opened is None
    parts = []
    for rank in range(3):
        monkeypatch.setattr(SampleStream, "find_share", lambda _, rank=rank: (rank, 3))
        parts.append(keyed(SampleStream(stub(), PROMPTS, "depth", **options)))
    assert [len(part) for part in parts] == [3, 2, 2] and sorted(sum(parts, [])) == whole


def test_every_worker_of_every_rank_has_a_share_of_its_own(monkeypatch):
    stream, found = SampleStream(stub, PROMPTS, "depth"), []
    for rank, worker in [(rank, worker) for rank in range(2) for worker in range(3)]:
        ranks = {"is_initialized": True, "get_rank": rank, "get_world_size": 2}
        for name, value in ranks.items():
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
        monkeypatch.setattr(shares, "get_worker_info", lambda worker=worker: SimpleNamespace(id=worker, num_workers=3))
        found.append(stream.find_share())
    assert found == [(number, 6) for number in range(6)]


def test_spawned_workers_know_the_rank_that_their_loader_is_of(monkeypatch):
    """They inherit no torch.distributed; `mp.spawn` sends a data set to ranks, which are no workers of the sender."""
    stream, distributed = SampleStream(stub, PROMPTS, "depth"), torch.distributed
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 2}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    sent = pickle.loads(pickle.dumps(stream))
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    assert sent.find_share() == (0, 1)
    monkeypatch.setattr(shares, "get_worker_info", lambda: SimpleNamespace(id=2, num_workers=3))
    assert sent.find_share() == (5, 6) and stream.find_share() == (2, 3)
    monkeypatch.setenv("WORLD_SIZE", "4")  # a launcher's environment is inherited
    monkeypatch.setenv("RANK", "3")
    assert sent.find_share() == stream.find_share() == (11, 12)


def test_trusted_samples_of_an_epoch_come_after_all_that_the_one_before_may_have_tried(monkeypatch):
    asked, pipeline = [], stub()
    monkeypatch.setattr(sample_stream, "MOST_TRIES", 2)
    pipeline.stream = lambda prompts, *, seeds, **_: asked.append((list(prompts), list(seeds))) or iter(())
    stream = SampleStream(pipeline, ("a", "b", "c", "d"), "depth", number=3, seed=10, trusted=True)
    stream.set_epoch(1)
    with pytest.raises(GateFailed, match="0 of 2 samples are"):
        list(
            stream._make_samples(1, 2, threading.Event())
        )  # the second of two shares has one of three samples, and two tries
    assert asked == [(["d", "b"], [10 + 7, 10 + 9])]  # six were tried before


def test_an_engine_in_memory_is_not_shared_with_worker_processes(monkeypatch):
    monkeypatch.setattr(sample_stream, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(Refused, match="cannot be shared with the worker processes"):
        next(iter(SampleStream(stub(), PROMPTS, "depth")))
    with pytest.raises(Refused, match="cannot be shared with the worker processes"):
        pickle.dumps(SampleStream(stub(), PROMPTS, "depth"))


def test_epochs_differ_and_an_endless_stream_stays_bounded():
    stream = SampleStream(stub(), PROMPTS, "depth", number=4, steps=2)
    first = keyed(stream)
    assert keyed(stream) == first
    stream.set_epoch(1)
    assert not set(keyed(stream)) & set(first)
    pipeline, made = stub(), []
    batches = pipeline.generate_batches
    pipeline.generate_batches = lambda *options: (made.append(1) or results for results in batches(*options))
    endless = iter(SampleStream(pipeline, PROMPTS, "depth", steps=2, batch_size=1, prefetch=3))
    for _ in range(5):
        next(endless)
    sample_stream.Event().wait(0.3)
    assert 5 <= len(made) <= 5 + 3 + 2
    endless.close()
    assert "samples" not in {thread.name for thread in threading.enumerate()}


def test_doubtful_samples_are_replaced(monkeypatch, pipe):
    """Of the demo's first samples some are; an epoch has its length all the same."""
    options = {"number": 3, "steps": 2, "batch_size": 2}
    doubtful = iter([True, False, True, True, False, False] * 20)
    monkeypatch.setattr(sample_stream.Sample, "is_doubtful", property(lambda sample: next(doubtful)))
    assert len(list(SampleStream(stub(), PROMPTS, "depth", trusted=True, **options))) == 3
    monkeypatch.setattr(sample_stream.Sample, "is_doubtful", True)
    with pytest.raises(GateFailed, match="0 of .* samples are"):
        list(SampleStream(stub(), PROMPTS, "depth", trusted=True, **options))


@pytest.mark.parametrize(
    "bad",
    [
        *({"prompts": prompts} for prompts in ("a ball", (), iter(PROMPTS))),
        *({"number": number} for number in (-1, 1.5, "3", None)),
        *({"prefetch": 0}, {"seed": "3"}),
    ],
)
def test_what_is_no_stream_is_refused(bad):
    with pytest.raises(Refused):
        SampleStream(stub, **{"prompts": PROMPTS, "task": "depth", **bad})


def test_a_single_sample_may_be_made_ahead():
    assert len(list(SampleStream(stub(), PROMPTS, "depth", number=2, steps=2, prefetch=1))) == 2


def test_a_thread_that_makes_samples_ends_before_its_process(monkeypatch):
    """PyTorch aborts a process that ends while a thread is in its code."""
    ends, before = [], threading.active_count()
    monkeypatch.setattr(sample_stream.atexit, "register", ends.append)
    reader = iter(SampleStream(stub(), PROMPTS, "depth", steps=2, prefetch=1000))
    next(reader)
    assert threading.active_count() == before + 1
    ends.pop()()
    assert threading.active_count() == before


def test_a_reader_that_ends_waits_for_one_step_and_not_for_a_batch():
    steps, amid, is_over = [], threading.Event(), threading.Event()

    def on_step(step, latents):
        steps.append(step)
        if len(steps) == 8:  # the second of the second sample
            amid.set()
            assert is_over.wait(60)

    class Over(threading.Event):
        def set(self):
            super().set()
            is_over.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_stream, "Event", Over)
        reader = iter(SampleStream(stub(), PROMPTS, "depth", steps=5, batch_size=1, callback=on_step))
        next(reader)
        assert amid.wait(60)
        reader.close()
    assert steps == [*range(6), 0, 1]


def test_a_reader_may_end_in_a_call_of_its_pipeline(monkeypatch):
    """As where an iterator in a cycle is collected: its thread waits for the turn that the call has."""
    pipe, is_waiting = stub(), threading.Event()
    turn = pipe._turn

    def acquire(*arguments, **options):
        is_waiting.set()
        return turn.acquire(*arguments, **options)

    def on_step(step, latents):
        if step == 0:
            is_waiting.clear()
            assert is_waiting.wait(60)
            reader.close()

    monkeypatch.setattr(pipe, "_turn", SimpleNamespace(acquire=acquire, release=turn.release))
    reader = iter(SampleStream(pipe, PROMPTS, "depth", steps=2, batch_size=1, prefetch=10**6))
    next(reader)
    call = threading.Thread(target=pipe, args=("a ball",), kwargs={"steps": 2, "callback": on_step}, daemon=True)
    call.start()
    call.join(60)
    assert not call.is_alive()


def test_a_refusal_of_the_thread_reaches_the_reader():
    with pytest.raises(Refused, match="holds no prompt"):
        list(SampleStream(stub(), ["a ball", ""], "depth", number=2, steps=2))


def rows(number):
    return [{"prompt": PROMPTS[k % 3], "seed": k} for k in range(number)]


def test_rows_get_images_and_labels(pipe):
    tasks = ("semantic", "instance", "depth")
    make = MakeSamples("demo", tasks, {"steps": 2})
    columns = {name: np.array([row[name] for row in rows(2)]) for name in ("prompt", "seed")}
    made, expected = make(columns), pipe(list(PROMPTS[:2]), [0, 1], tasks=tasks, steps=2)
    assert (made["image"] == np.stack(expected.images)).all() and made["depth"].shape == (2, 128, 128)
    assert (made["semantic"] == np.stack([label.labels for label in expected.semantic])).all()
    assert made["instance"][0].startswith('[{"category_id": ') and made["trusted"].dtype == bool


@long_test
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.loopback
def test_ray_data_makes_samples(monkeypatch):
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # paths of sockets have at most 107 bytes
        limits = {"num_cpus": 2, "object_store_memory": 2**28, "include_dashboard": False, "log_to_driver": False}
        ray.init("local", _temp_dir=folder, **limits)
        try:
            options = {"fn_constructor_kwargs": {"choices": {"steps": 2}}, "batch_size": 2, "concurrency": 1}
            made = ray.data.from_items(rows(4)).map_batches(MakeSamples, **options).take_all()
        finally:
            ray.shutdown()
    assert sorted(row["seed"] for row in made) == [0, 1, 2, 3]
    assert all(row["image"].shape == (128, 128, 3) and row["semantic"].shape == (128, 128) for row in made)


def test_a_function_opens_the_engine_once():
    opened = []
    stream = SampleStream(partial(lambda: opened.append(1) or stub()), PROMPTS, "depth", number=2, steps=2)
    assert len(list(stream)) == len(list(stream)) == 2 and opened == [1]


def test_pairs_are_transformed_and_prompts_of_a_share_follow_its_samples(monkeypatch):
    asked, pipeline = [], stub()
    pipeline.stream = lambda prompts, *, seeds, **_: asked.append(list(zip(prompts, seeds))) or iter(())
    with pytest.raises(GateFailed):
        list(SampleStream(pipeline, ("a", "b", "c"), "depth", number=5, seed=10)._make_samples(1, 2, threading.Event()))
    assert asked == [[("b", 11), ("a", 13)]]
    stream = SampleStream(stub(), PROMPTS, "depth", number=2, steps=2, transform=lambda image, depth: (depth, image))
    assert [(depth.ndim, image.ndim) for depth, image in stream] == [(2, 3)] * 2


def test_negative_prompts_follow_the_prompts_in_every_share_and_epoch():
    asked, pipeline = [], stub()
    pipeline.stream = lambda prompts, *, negative_prompt, **_: (
        asked.append(list(zip(prompts, negative_prompt))) or iter(())
    )
    stream = SampleStream(pipeline, ("a", "b", "c"), "depth", number=5, negative_prompt=iter(["A", "B", "C"]))
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        with pytest.raises(GateFailed):
            list(stream._make_samples(1, 2, threading.Event()))
    assert asked == [[("b", "B"), ("a", "A")], [("a", "A"), ("c", "C")]]
    with pytest.raises(Refused, match="negative_prompt: 1 given for 2 prompts"):
        SampleStream(pipeline, ("a", "b"), "depth", negative_prompt=["A"])
    with pytest.raises(Refused, match="negative_prompt: more than 2 given for 2 prompts"):
        SampleStream(pipeline, ("a", "b"), "depth", negative_prompt=repeat("A"))
    with pytest.raises(Refused, match="negative_prompt"):
        SampleStream(pipeline, ("a", "b"), "depth", negative_prompt=5)


def test_a_process_that_was_forked_opens_an_engine_of_its_own(monkeypatch):
    opened, process = [], [7]
    monkeypatch.setattr(sample_stream.os, "getpid", lambda: process[0])
    stream = SampleStream(lambda: opened.append(process[0]) or stub(), PROMPTS, "depth")
    assert stream.pipeline is stream.pipeline
    process[0] = 8
    assert stream.pipeline is stream.pipeline and opened == [7, 8]


def test_rows_tell_which_samples_are_trusted(monkeypatch):
    monkeypatch.setattr(sample_stream.Pipeline, "from_pretrained", lambda model, **options: stub())
    monkeypatch.setattr(sample_stream.Sample, "is_doubtful", property(lambda sample: sample.request.seed == 1))
    make = MakeSamples(tasks=("depth",), choices={"steps": 2, "batch_size": 2})
    made = make({"prompt": np.array(["a", "b", "c"]), "seed": np.array([0, 1, 2])})
    assert made["trusted"].tolist() == [True, False, True] and made["depth"].shape[0] == 3


def test_rows_have_the_numbers_of_a_run_of_these_labels(monkeypatch):
    """The classes of the semantic decoder, wall to person, keep 0 to 8; the background of the words asked for is 9."""
    engine = StubEngine(tasks=("semantic", "open-vocabulary"))
    monkeypatch.setattr(sample_stream.Pipeline, "from_pretrained", lambda model, **options: Pipeline(engine))
    how = {"steps": 2, "classes": ("cube", "ball")}
    make = MakeSamples(tasks=("semantic", "open-vocabulary"), choices=how)
    made = make({"prompt": np.array(["a ball and a cube"] * 3), "seed": np.arange(3)})
    own = Pipeline(engine)(["a ball and a cube"] * 3, seeds=[0, 1, 2], **how)
    words = np.stack([label.labels for label in own.open_vocabulary])
    assert len(np.unique(words)) > 1 and (made["open-vocabulary"] == np.array([9, 3, 2])[words]).all()
    assert (made["semantic"] == np.stack([label.labels for label in own.semantic])).all()


def test_a_share_without_a_sample_asks_for_none():
    stream = SampleStream(SimpleNamespace(), ("a",), "depth", number=2)
    assert list(stream._make_samples(2, 3, threading.Event())) == []


def test_what_ends_the_thread_of_a_stream_reaches_its_reader(monkeypatch):
    def leave(step, latents):
        raise SystemExit(3)

    class Impatient(sample_stream.Queue):
        def get(self):
            return super().get(timeout=30)

    monkeypatch.setattr(sample_stream, "Queue", Impatient)
    with pytest.raises(SystemExit, match="3"):
        list(SampleStream(stub(), PROMPTS, "depth", number=2, steps=2, callback=leave))
