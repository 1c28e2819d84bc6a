"""Samples of what a decoder was not trained on are doubtful, and a run of them stops after its first batch."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skips
import torch
from foreign_domains import DOMAINS, write_domain
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.world.hard.reader import register
from bench.world.worlds import WORLDS
from datasetdm_fast import Pipeline, filter, generate, open_run, train
from datasetdm_fast.command_line import output, run_report
from datasetdm_fast.data import DepthMap, DomainDistance, Instances, Request, Sample, SemanticMap, Trust
from datasetdm_fast.engine.decoders import domain
from datasetdm_fast.engine.decoders.checkpoint import load_decoder
from datasetdm_fast.engine.decoders.config import DEMO
from datasetdm_fast.engine.labels.trust import with_domain, with_undrawn
from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.writing import DomainGate
from datasetdm_fast.runs.run_folder.indexes import card
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row
from datasetdm_fast.training import page, workflow
from datasetdm_fast.training.cross_validation import bound_of
from datasetdm_fast.training.report import describe_framing, describe_plans, describe_result, describe_warnings
from datasetdm_fast.training.settings import TaskSettings
from datasetdm_fast.training.workflow import read_check

pytestmark = pytest.mark.usefixtures("tiny_has_one_layer", "one_engine_of_a_kind")

D, SIDE = 8, 4  # numbers of a descriptor, cells of a side
RESULT = {"steps": 1, "images": 36, "held_out_images": 4, "held_out": {}}
CAPTION = "a red ball beside a cube"


def sketches(count, seed=0, shift=0.0):
    """Pictures whose left half is a thing of class a and whose right half is one of class b."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).normal(size=(D, D))
    cells = (rng.normal(size=(count, D)) @ mixing)[:, :, None, None] + 0.1 * rng.normal(size=(count, D, SIDE, SIDE))
    cells[..., : SIDE // 2] += 3
    return (cells + shift).astype(np.float32)


def label():
    labels = np.repeat(np.array([[1, 1, 2, 2]], np.uint8), 4, 0).repeat(4, 0).repeat(4, 1)
    return SemanticMap(labels, np.ones(labels.shape, np.float32), ("background", "a", "b"))


def learn(count=40):
    return domain.learn_domain(sketches(count), [label()] * count, range(count))


def test_pictures_like_those_are_inside_and_others_outside():
    learned = learn()
    distances = [learned.measure(each, label()) for each in sketches(200, seed=2)]
    assert np.mean([each.picture <= 1 for each in distances]) >= 0.97
    assert np.mean([max(each.things.values()) <= 1 for each in distances]) >= 0.97
    assert min(learned.measure(each, label()).picture for each in sketches(50, seed=3, shift=12.0)) > 1
    swapped = [learned.measure(each[..., ::-1].copy(), label()) for each in sketches(50, seed=4)]
    assert (
        np.mean([max(each.things.values()) > max(inside.things.values()) for each, inside in zip(swapped, distances)])
        > 0.8
    )
    assert learn(7) is None and learn(8) is not None, "too few pictures tell no spread"


def test_things_that_few_pictures_show_are_compared_with_their_own_mean():
    """Two pictures of a c and two of a d, which lie apart."""
    names, moved = ("background", "a", "b", "c", "d"), np.zeros((D, SIDE, SIDE), np.float32)
    moved[:, :, SIDE // 2 :] = 60
    pictures = sketches(40)
    labels = [replace(label(), classes=names) for _ in pictures]
    for k, (number, sign) in enumerate([(3, 1), (3, 1), (4, -1), (4, -1)]):
        labels[9 * k] = replace(labels[0], labels=np.where(label().labels == 2, number, 1).astype(np.uint8))
        pictures[9 * k] += sign * moved
    learned = domain.learn_domain(pictures, labels, range(40))
    new = sketches(50, seed=6)
    distances = [[learned.measure(each + sign * moved, labels[0]).things["c"] for each in new] for sign in (1, -1)]
    assert np.mean(np.array(distances[0]) <= 1) >= 0.97 and min(distances[1]) > 1
    assert learned.things.limits == pytest.approx(
        learned.things.limits[0] * np.sqrt([1, 37 / 36 / (41 / 40), 1.5 / (41 / 40), 1.5 / (41 / 40), 1]), rel=1e-6
    ), "and the means of few pictures are less certain"


def test_things_of_which_no_two_pictures_show_the_same_are_not_compared():
    labels = [replace(label(), classes=("background", f"a{k}", f"b{k}")) for k in range(40)]
    learned = domain.learn_domain(sketches(40), labels, range(40))
    assert learned.things is None and learned.pictures is not None


def test_things_may_lie_in_every_fifth_picture_alone():
    nothing = replace(label(), labels=np.zeros_like(label().labels))
    learned = domain.learn_domain(sketches(40), [nothing if k % 5 else label() for k in range(40)], range(40))
    assert np.isfinite(learned.things.limits).all() and learned.classes == ("a", "b")


def test_the_file_of_a_domain(tmp_path):
    learned = replace(learn(), model=1.25)
    domain.write_domain(tmp_path, learned)
    assert (tmp_path / domain.FILE).stat().st_size < 16_000
    read, sketch = domain.read_domain(tmp_path, D), sketches(1, seed=5)[0]
    before, after = learned.measure(sketch, label()), read.measure(sketch, label())
    assert read.classes == ("a", "b") and before.picture == pytest.approx(after.picture, rel=0.01)
    assert before.things == pytest.approx(after.things, rel=0.01) and before.model == after.model == 1.25
    arrays = load_file(tmp_path / domain.FILE)
    arrays["things.limit"] = arrays["things.limit"][:1]
    save_file(arrays, tmp_path / domain.FILE, {"classes": json.dumps(learned.classes)})
    assert domain.read_domain(tmp_path, D).things.limits.tolist() == [float(arrays["things.limit"])] * 3, "as before"
    assert domain.read_domain(tmp_path / "other", D) is None, "decoders of earlier versions have none"
    with pytest.raises(Refused, match="not the domain of this decoder"):
        domain.read_domain(tmp_path, 2 * D)
    (tmp_path / domain.FILE).write_bytes((tmp_path / domain.FILE).read_bytes()[:-8])
    with pytest.raises(Refused):
        domain.read_domain(tmp_path, D)


def test_things_are_described_from_a_hundredth_of_the_picture_on():
    sketch = np.arange(2 * SIDE**2, dtype=np.float32).reshape(2, SIDE, SIDE)
    for side, count in ((10, 1), (11, 0)):
        labels = np.zeros((side, side), np.uint8)
        labels[side - 1, 0] = 1  # in the lowest left cell
        shown = SemanticMap(labels, np.ones(labels.shape, np.float32), ("background", "a"))
        found = list(domain.describe_things(sketch, shown))
        assert [(name, descriptor.tolist()) for name, descriptor in found] == [("a", [12, 28])] * count


def test_means_are_as_certain_as_pictures_are_many_and_correlations_are_of_both_sides(tmp_path):
    rng = np.random.default_rng(3)
    descriptors, pictures = rng.normal(size=(12, D)), np.repeat([0, 1, 2, 3], 3)
    descriptors[:, 1] += descriptors[:, 0]
    spread = domain._spread(descriptors, pictures, np.repeat([0, 0, 1, 3], 3), 5)
    assert spread.limits == pytest.approx(np.sqrt([1 + 1 / 2, 2, 1 + 1 / 4, 2, 1 + 1 / 4]))
    assert spread.means[2] == pytest.approx(descriptors.mean(0)) and spread.means[3] == pytest.approx(
        descriptors[9:].mean(0)
    )
    one = replace(spread, means=spread.means[:1], limits=spread.limits[:1])
    domain.write_domain(tmp_path, domain.Domain(one, spread, tuple("abcd")))
    read = domain.read_domain(tmp_path, D)
    assert np.abs(read.pictures.correlations - spread.correlations).max() < 1e-3
    assert read.things.means == pytest.approx(spread.means, rel=1e-5)
    assert read.things.limits == pytest.approx(spread.limits, rel=1e-5)


@pytest.mark.parametrize(("drawn", "distance"), [([3, 3], 3), ([3, -3], 0), ([1, 2, 3], (22 / 6) ** 0.5)])
def test_the_square_of_a_distance_is_the_mean_product_of_two_different_descriptors(drawn, distance):
    spread = domain.Spread(np.zeros((1, 1)), np.ones(1), np.ones((1, 1)), np.ones(1))  # of unit length as they are
    assert spread.distance_of_mean(np.array(drawn, float)[:, None]) == pytest.approx(distance)


def test_a_model_that_draws_a_part_of_what_was_taught_is_found_by_the_mean():
    learned, moved = learn(), np.zeros((D, 1, 1), np.float32)
    moved[:3, 0, 0] = 0.6 * learned.pictures.scale[:3] * (1, -1, 1)
    one_kind = (sketches(16, seed=8) + moved).astype(np.float32)
    assert all(learned.measure(each, label()).picture <= 1 for each in one_kind), "no picture is far by itself"
    assert learned.with_generated(one_kind, 40).model > 1 > learned.with_generated(sketches(16, seed=8), 40).model


def test_the_mean_of_few_pictures_is_off_by_chance():
    learned = learn(12)
    drawn = [learned.with_generated(sketches(16, seed=seed), 12).model for seed in range(2, 22)]
    assert np.mean(np.array(drawn) > 1) <= 0.05
    far = sketches(16, seed=8, shift=12.0)
    assert learned.with_generated(far, 12).model > 1
    distance, model = learned.pictures.distance_of_mean(far.mean((2, 3))), learned.with_generated(far, 12, 1.0).model
    limit = learned.pictures.limits[0] / domain.MARGIN  # without what generated pictures vary more
    assert 12 * (distance**2 - model**2) == pytest.approx(limit**2)


def test_a_domain_whose_numbers_are_none_is_refused_and_one_of_an_earlier_version_is_not_there(tmp_path):
    learned, path = learn(), tmp_path / domain.FILE
    assert domain.read_domain(tmp_path, D) is None
    domain.write_domain(tmp_path, learned)
    arrays, width = load_file(path), learned.pictures.scale.shape[0]
    for change, said in (
        ({}, ""),
        ({"model": torch.tensor(-1.0)}, "the distance of its model is -1.0"),
        ({"model": torch.tensor(torch.inf)}, "the distance of its model is inf"),
        ({"pictures.scale": arrays["pictures.scale"] * 0}, "or no spread"),
        ({"pictures.means": arrays["pictures.means"] * torch.nan}, "a value is NaN"),
        ({"pictures.limit": arrays["pictures.limit"] * 0}, "or no spread"),
        ({"things.limit": arrays["things.limit"] * torch.arange(3)}, "or no spread"),  # of one of them
    ):
        save_file(arrays | change, path, {"classes": json.dumps(learned.classes)})
        with pytest.raises(Refused, match=f"not the domain of this decoder .*{said}") if said else nullcontext():
            assert domain.read_domain(tmp_path, width).classes == learned.classes


def test_things_are_the_shown_regions_of_a_label():
    masks = np.zeros((2, 8, 8), bool)
    masks[:, :4] = True
    few = Instances(masks, np.array([0, 0]), np.float32([0.9, 0.3]), ("a",))
    described = list(domain.describe_things(np.arange(SIDE * SIDE, dtype=np.float32).reshape(1, SIDE, SIDE), few))
    assert [(name, float(value[0])) for name, value in described] == [("a", 3.5)], "the faint one is not described"


def test_of_several_things_of_a_class_the_farthest_counts():
    masks = np.zeros((3, SIDE, SIDE), bool)
    masks[0, :2], masks[1, 2, :2], masks[2, 3] = True, True, True
    sketch = np.zeros((1, SIDE, SIDE), np.float32)
    sketch[0, :2], sketch[0, 2, :2], sketch[0, 3] = 2, 3, -1
    plain = domain.Spread(np.zeros((3, 1)), np.ones(1), np.ones((1, 1)), np.ones(3))
    learned = domain.Domain(plain, plain, ("a", "b"))
    for order in ([0, 1, 2], [1, 0, 2]):
        kinds = np.array([0, 0, 1])[order]
        shown = Instances(masks[order], kinds, np.ones(3, np.float32), ("a", "b"))
        assert learned.measure(sketch, shown).things == {"a": 3.0, "b": 1.0}
        strange = replace(learned, things=replace(plain, means=np.array([[0], [0], [5]])), classes=("a", "other"))
        assert strange.measure(sketch, shown).things == {"a": 3.0, "b": 6.0}  # b is measured from the mean of all


def test_channels_are_mixed_by_the_first_rows_of_a_cosine_transform():
    rows = domain.mixtures(20)
    assert rows.shape == (16, 20) and (rows[0] == 1).all() and domain.mixtures(8).shape == (8, 8)
    assert rows @ rows.T == pytest.approx(np.diag([20] + [10] * 15), abs=1e-4)


def test_the_limit_is_that_of_99_in_100_held_out_views_by_their_farthest_thing():
    pictures, views = np.arange(20) // 2 % 10, np.arange(20) // 2  # ten pictures of two things each
    values = np.random.default_rng(1).normal(size=20)
    distances = np.zeros(20)
    for fold in range(5):
        held = pictures % 5 == fold
        others = values[~held]
        scale = others.std() * (0.9 * 16 / 15 + 0.1) ** 0.5  # of 16 others; correlations shrunk by a tenth
        distances[held] = abs(values[held] - others.mean()) / scale
    farthest = np.log(distances.reshape(10, 2).max(1))
    spread = domain._fit(values[:, None], pictures, np.zeros(20, np.int64), 1, views, 1.0)
    # the mean of 10 pictures is as uncertain as a tenth of a picture, that of the 8 others as an eighth
    limit = np.exp(farthest.mean() + 2.326 * farthest.std()) / (1 + 1 / 8) ** 0.5
    assert spread.limits == pytest.approx([limit * (1 + 1 / 10) ** 0.5], rel=1e-4)
    assert limit > np.exp(farthest.max()) / (1 + 1 / 8) ** 0.5  # of so few the quantile is less


def test_no_more_than_one_held_out_picture_in_a_hundred_is_beyond_the_limit_however_far_a_few_are():
    values = np.random.default_rng(1).normal(size=200)
    values[::51] = -1000, 1000, 900, -900  # each in another fold
    spread = domain._fit(values[:, None], np.arange(200), np.zeros(200, np.int64), 1, np.arange(200), 1.0)
    assert (spread.distances(values[:, None]) > 1).sum() <= 2


def test_limits_of_pictures_leave_15_in_100_and_those_of_things_30():
    shown, of_pictures = sketches(20), (np.arange(20), np.zeros(20, np.int64), 1, np.arange(20))
    learned = domain.learn_domain(shown, [label()] * 20, range(20))
    assert learned.pictures.limits == pytest.approx(1.15 * domain._fit(shown.mean((2, 3)), *of_pictures, 1.0).limits)
    halves = np.stack([shown[..., :2].mean((2, 3)), shown[..., 2:].mean((2, 3))], 1).reshape(40, D)
    views, kinds = np.arange(40) // 2, np.arange(40) % 2  # of either class
    assert learned.things.limits == pytest.approx(
        1.3 * domain._fit(halves, views, kinds, 3, views, 1.0).limits, rel=1e-4
    )
    few = [label()] * 3 + [replace(label(), labels=label().labels * (label().labels == 2))] * 17  # three pictures of a
    limits = domain.learn_domain(shown, few, range(20)).things.limits
    assert limits[0] / limits[1] == pytest.approx(((1 + 1 / 3) / (1 + 1 / 20)) ** 0.5)


def test_the_reasons():
    near = {"semantic": DomainDistance(0.4, {"ball": 0.9}), "depth": DomainDistance(0.6)}
    assert with_domain(Trust(), near) == Trust(domain=0.9)
    thing = {"semantic": DomainDistance(0.4, {"ball": 1.2, "cube": 0.3})}
    told = with_domain(Trust(reasons=("another",)), thing)
    assert told.reasons == ("ball in semantic is unlike those in the pictures it learned from", "another")
    depth = DomainDistance(0.2, model=0.7)
    undrawn = with_domain(Trust(), {"semantic": DomainDistance(0.5, model=1.4), "depth": depth})
    assert undrawn == Trust(domain=1.4, reasons=("the model does not draw what semantic learned from",))
    assert with_domain(Trust(), {"depth": depth}).domain == 0.2, "a near model is no distance"
    far = with_domain(Trust(), {"semantic": DomainDistance(1.9, {"ball": 1.2}), "depth": DomainDistance(1.1)})
    assert far.domain == 1.9 and far.reasons == ("the picture is unlike those that semantic and depth learned from",)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The demo's decoder of label maps, taught on other pictures as far as its domain says."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(DEMO / "semantic", folder / "semantic")
    own = load_decoder(folder / "semantic").domain
    own.pictures.means[:] += 20 * own.pictures.scale
    domain.write_domain(folder / "semantic", own)
    return folder


def run(out, *flags):
    line = ["--prompts", CAPTION, "--number", "4", "--batch-size", "2", "--steps", "8", "--engine", "fast"]
    return generate.main([*line, "--task", "semantic", "--device", "cpu", "--out", str(out), "--quiet", *flags])


def test_the_demo_is_in_its_own_domain(tmp_path):
    assert run(tmp_path / "own") == 0
    with open_run(tmp_path / "own") as own:
        assert all(0 < sample.trust.domain < 1 for sample in own)
    pipe = Pipeline.from_pretrained("demo", engine="torch", device="cpu")
    (sample,) = pipe([CAPTION], seeds=[0], tasks=("semantic",), steps=8).samples
    with open_run(tmp_path / "own") as own:
        assert sample.trust.domain == pytest.approx(own[0].trust.domain, abs=0.01), "as every engine measures it"


@pytest.mark.parametrize(
    ("batches", "is_closed"),
    [([[2.0], [0.5]], False), ([[2.0], [2.0]], True), ([[1.0, 2.0]], False), ([[1.5] * 3], True)],
)
def test_a_run_stops_where_more_than_half_of_its_first_samples_are_outside(batches, is_closed):
    plan = SimpleNamespace(most=20, batch_size=3)
    gate = DomainGate(SimpleNamespace(place="run", stops_outside=True, plan=plan, done=0, limit=0))
    for distances in (*batches, [0.5] * 9):  # the last batch is not evaluated any more
        trusts = [Trust(domain=distance) for distance in distances]
        gate.evaluate([Sample(Request(0, "a ball", 0), np.zeros(0), {}, {}, trust) for trust in trusts])
    assert gate.is_closed == is_closed and gate.measured == sum(map(len, batches))


@pytest.mark.parametrize(("largest", "is_closed"), [(0, False), (3, True), (10, False)])
def test_a_shard_bounds_the_first_batch_that_the_gate_evaluates(largest, is_closed):
    plan = SimpleNamespace(most=8, batch_size=12)
    job = SimpleNamespace(place="run", stops_outside=True, plan=plan, done=0, limit=0)
    gate = DomainGate(job, largest=largest)
    gate.evaluate([Sample(Request(0, "a ball", 0), np.zeros(0), {}, {}, Trust(domain=2.0))] * 3)
    assert gate.is_closed == is_closed


def test_pictures_of_ones_own_are_all_labelled_however_foreign():
    gate = DomainGate(Job(Path("run"), SimpleNamespace(most=20, batch_size=3), None, None, {}))  # as `label` has it
    gate.evaluate([Sample(Request(0, "a ball", 0), np.zeros(0), {}, {}, Trust(domain=2.0))] * 3)
    gate.check()
    assert not gate.is_closed


def test_a_single_sample_stops_no_run(foreign, tmp_path, capsys):
    """One in a hundred right ones is out of the domain."""
    out, flags = tmp_path / "run", ("--decoder", str(foreign), "--batch-size", "1")
    assert run(out, *flags, "--limit", "1") == 0
    assert run(out, *flags) == 4 and len(open_run(out)) == 2
    assert "2 of the first 2 samples" in capsys.readouterr().err


def test_a_run_of_one_batch_that_replaces_doubtful_samples_stops_after_it(foreign, tmp_path):
    """It would make ten times as many in their place."""
    flags = ("--decoder", str(foreign), "--number", "2", "--keep", "trusted")
    assert run(tmp_path / "run", *flags) == 4 and len(open_run(tmp_path / "run", doubtful=True)) == 2
    assert run(tmp_path / "limited", *flags, "--limit", "2") == 0, "which makes no more"


@pytest.mark.parametrize(("count", "text"), [(1, "\n1 of these shows what"), (3, "\n3 of these show what")])
def test_the_card_counts_samples_out_of_the_domain(count, text):
    ledger = SimpleNamespace(
        count_trust=lambda: (4, count, 9),
        rows=lambda parts: iter([SimpleNamespace(trust=True)]),
    )
    assert text in "\n".join(card._trust({"config": {"accept": "", "quarantine": False}}, ledger))


def test_a_run_out_of_the_domain_stops_after_its_first_batch(foreign, tmp_path, capsys):
    out, flags = tmp_path / "run", ("--decoder", str(foreign))
    assert run(out, *flags) == 4
    told = capsys.readouterr().err
    assert "2 of the first 2 samples are out of the domain of the decoders" in told and "--force-domain" in told
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["trust"]["domain"] > 1 for row in rows), "they can be looked at"
    assert run(out, *flags) == 4 and len(open_run(out)) == 2, "and is not resumed by accident"
    assert run(out, *flags, "--force-domain") == 0
    assert "4 of 4 samples are doubtful (4 out of the domain of the decoders)" in _report(out, capsys)
    assert "4 of these show what the decoders were not trained on" in (out / "README.md").read_text()
    assert '"domain"' in (out / "gallery" / "run.js").read_text(), "samples can be sorted by it"
    assert filter.main([str(out), "--where", "domain <= 1", "--quiet"]) == 0
    assert len(open_run(out, kept=True)) == 0


def test_the_progress_tells_samples_out_of_the_domain(capsys, monkeypatch):
    monkeypatch.setattr(output, "SECONDS_PER_LINE", 0.0)
    with output.ImageProgress(8, is_quiet=False, count_outside=lambda: 3) as shown:
        shown.on_commit(4)
    assert "4/8 images, 3 out of domain, " in capsys.readouterr().err


def test_no_model_is_said_to_be_unable_to_draw_a_background():
    request = SimpleNamespace(prompt="a ball")
    plan = SimpleNamespace(words=("background", "ball", "mug"), number=1, request=lambda index: request)
    job = SimpleNamespace(plan=plan, recipe=SimpleNamespace(draws=("ball", "cube")))
    assert run_report._describe_undrawn(job).endswith("it cannot draw mug")
    plan.words = ("background", "ball")
    assert run_report._describe_undrawn(job) == ""


def test_what_the_model_cannot_draw_is_told_before_the_first_image(tmp_path, monkeypatch, capsys):
    line = ["--prompts", "a photo of a penguin", "--number", "4", "--task", "open-vocabulary", "--allow-unnamed"]
    line += ["--classes", "fire hydrant,ball", "--dry-run", "--out", str(tmp_path / "run"), "--engine", "fast"]
    warning = (
        "draws      the model's card lists ball, cube, cone, ring, star, tree, person, table, wall and nothing else:"
    )
    warning += f"\n{'':<11}it cannot draw fire hydrant; 4 of the first 4 prompts name none of these"
    assert generate.main([*line, "--device", "cpu"]) == 0 and warning in capsys.readouterr().err

    def stop(*_, **_options):
        raise Refused("an image", "None is made.")

    monkeypatch.setattr(generate, "write_missing", stop)
    line.remove("--dry-run")
    assert generate.main([*line, "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert warning in told and "an image" in told
    assert generate.main(["--classes", "owl", "--task", "semantic", "--dry-run", "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "the model draws nothing else" in told and "any word" not in told


def test_trusted_samples_of_what_the_model_cannot_draw_are_refused(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    line = ["--prompts", str(prompts), "--number", "8", "--keep", "trusted", "--allow-unnamed", "--dry-run"]
    line += ["--task", "semantic", "--device", "cpu", "--engine", "fast", "--out", str(tmp_path / "run")]
    prompts.write_text("a photo of a penguin\nan owl\n")
    assert generate.main(line) == 2
    told = capsys.readouterr().err
    assert "can be trusted: the model draws ball, cube, cone" in told and "the prompt names none of these" in told
    prompts.write_text("a photo of a penguin\na penguin beside a ball\n")
    assert generate.main(line) == 0, "some can be"
    assert "images     8 of 8, for which at most 80 are made, 128 x 128 pixels" in capsys.readouterr().err
    assert generate.main([*line, "--keep", "all"]) == 0 and "images     8 of 8, 128 x 128" in capsys.readouterr().err


def test_samples_of_what_the_model_cannot_draw_are_doubtful():
    draws = ("ball", "cube")
    assert with_undrawn(Trust(), ("ball",), "a ball", draws).is_trusted
    assert with_undrawn(Trust(), ("owl",), "an owl on a cube", draws).reasons == (
        "the model draws ball, cube alone, not owl",
    )
    assert with_undrawn(Trust(), (), "a penguin", draws).reasons == (
        "the model draws ball, cube alone, and the prompt names none of these",
    )


def _report(out, capsys):
    capsys.readouterr()
    from datasetdm_fast.runs.jobs.writing import result_of
    from datasetdm_fast.runs.run_folder.document import LEDGER, read_document
    from datasetdm_fast.runs.run_folder.ledger import Ledger

    with Ledger(out / LEDGER, read_only=True) as ledger:
        return result_of(out, read_document(out), 4, ledger).trust_message


def test_a_training_writes_the_domain_of_its_decoder(tmp_path, monkeypatch):
    measured = []

    def with_generated(self, sketches, pictures, farthest):
        measured.append((len(sketches), pictures, farthest))
        return replace(self, model=0.5)

    monkeypatch.setattr(domain.Domain, "with_generated", with_generated)
    monkeypatch.setattr(workflow, "CHECK_STEPS", 2)
    line = ["--model", "tiny", "--size", "64", "--draws", "1", "--batch-size", "4", "--engine", "torch", "--quiet"]
    line += ["--data", "demo:12@1000", "--task", "semantic", "--steps", "1", "--threads", "1", "--folds", "no"]
    assert train.main([*line, "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "decoder")]) == 0
    folder = tmp_path / "decoder" / "semantic"
    assert load_decoder(folder).domain.pictures.limits.min() > 0
    check, page = read_check(folder), (folder / "training" / "page.html").read_text()
    assert check["samples"] == 11 and page.count(" &middot; distance ") == 11
    assert load_decoder(folder).domain.model == 0.5 and measured == [(11, 12, 1 / 3)], (
        "what the model draws is measured"
    )
    told = "\n".join(describe_result(tmp_path, "semantic", {**RESULT}, None, {"samples": 8, "out_of_domain": 7}))
    assert told.splitlines()[-1].startswith("semantic: 7 of 8 samples generated from its captions are unlike")


def test_a_training_that_ended_badly_tells_so_in_its_last_line():
    figures = [0.352, 0.371, 0.382, 0.397, 0.404]
    bound = bound_of("semantic", figures)
    assert 0.2 < bound < 0.35
    for value, is_bad in ((0.36, False), (0.174, True)):
        final = {"figure": "mIoU", "value": value, "folds": figures[::-1], "bound": bound}
        folds = {"folds": 5, "images": 40, "held_out": {}, "held_out_intervals": {}, "final": final}
        last = list(describe_result(Path("out"), "semantic", RESULT, folds))[-1]
        assert last.startswith("semantic: the training ended badly: ") == is_bad
    assert "have 0.352, 0.371, 0.382, 0.397, 0.404;" in last
    assert bound_of("depth", [0.10, 0.11, 0.12]) > 0.12, "of errors, less is better"
    alike = 0.4 - 4.604 * 0.02 * 0.4 * (1 + 1 / 5) ** 0.5
    assert bound_of("semantic", [0.4] * 5) == pytest.approx(alike, abs=1e-5), "folds may agree by chance"


def test_the_self_check_reads_captions_from_all_over_the_data_that_the_text_encoder_reads_whole():
    def tokens(text):
        return SimpleNamespace(input_ids=text.split())

    tokens.model_max_length = 3
    model = SimpleNamespace(tokenizer=tokens)

    def chosen(count, long=()):
        items = [SimpleNamespace(caption=f"{k} is here" + " and long" * (k in long)) for k in range(count)]
        session = SimpleNamespace(engine=SimpleNamespace(model=model), split=(range(count), ()), source=items)
        return [int(item.caption.split()[0]) for item in workflow._choose_captioned(session)]

    assert chosen(5) == [0, 1, 2, 3, 4] and chosen(5, long=(1, 3)) == [0, 2, 4] and chosen(2, long=(0, 1)) == []
    assert chosen(32) == [*range(0, 32, 2)]
    assert chosen(81) == [3 * (k * 27 // 16) for k in range(16)]  # of every third, 27, every 27 / 16


def test_the_domain_is_measured_on_pictures_from_all_over_the_data(monkeypatch):
    asked, batches = [], []

    class Decoder:
        config = SimpleNamespace(task="semantic")

        def to(self, device):
            return self

        def sketch(self, levels):
            return torch.stack(levels)

    def views(task, numbers, draws, on_views):
        asked.append((task, list(numbers), draws))

        def batch(chosen):
            batches.append(list(chosen))
            return torch.tensor(list(chosen))[:, None]

        class Views(list):
            captures, item = SimpleNamespace(batch=batch), staticmethod(lambda view: f"item {view}")

        return Views(range(len(numbers) * draws))

    monkeypatch.setattr(workflow, "project", lambda decoder, levels: levels)
    monkeypatch.setattr(workflow, "TASKS", {"semantic": SimpleNamespace(truth=lambda source, item: (source, item))})
    monkeypatch.setattr(workflow.domain, "learn_domain", lambda *given: given)
    engine, source = SimpleNamespace(device=torch.device("cpu")), LabelledSource(64, 301)

    def measured(count):
        session = SimpleNamespace(numbers=range(count), views=views, engine=engine, source=source)
        session.watch_work = lambda *given: lambda count: None
        return workflow.measure_domain(session, Decoder())

    assert measured(7) is None
    sketches, labels, images = measured(8)
    assert asked[-1] == ("semantic", list(range(8)), 4) and sketches[:, 0].tolist() == list(range(32))
    assert labels == [(source, f"item {view}") for view in range(32)] and images == [view // 4 for view in range(32)]
    assert sum(batches, []) == list(range(32)) and max(map(len, batches)) == 8
    assert len(measured(301)[1]) == 800 and asked[-1][1] == [k * 301 // 200 for k in range(200)]
    source.origins = lambda record: (f"{record // 3}",)  # copies of a picture count as one
    assert measured(21) is None and measured(24)[2] == [view // 12 * 3 for view in range(96)]
    source.sequence = lambda record: f"{record // 6}"  # and so do frames, of which few sequences are left one by one
    assert measured(48)[2] == [view // 24 * 6 for view in range(192)] and len({*measured(42)[2]}) == 14


def test_pictures_that_the_model_has_not_drawn_are_not_doubted_for_what_it_draws():
    pipe = Pipeline.from_pretrained("demo")
    decoder = pipe.engine.decoders["semantic"]
    decoder.domain = replace(decoder.domain, model=2.0)
    reason = "the model does not draw what semantic learned from"
    drawn = pipe("a red ball on a table", seeds=[7], tasks=("semantic",), steps=2).samples[0].trust
    assert reason in drawn.reasons and drawn.domain >= 2
    shown = pipe.label(world.view(0, 128).image, tasks=("semantic",)).samples[0].trust
    assert reason not in shown.reasons and shown.domain < 2


@pytest.mark.parametrize(("named", "outside"), [(None, 16), (("ball",), 0)])
def test_a_model_may_draw_captions_that_are_lists_of_names_otherwise(named, outside, monkeypatch, tmp_path):
    learned, moved = replace(learn(), model=2.0), np.zeros((D, 1, 1), np.float32)
    moved[:3, 0, 0] = 0.35 * learned.pictures.scale[:3] * (1, -1, 1)
    drawn = (sketches(16, seed=8) + moved).astype(np.float32)
    assert 1 / 3 < learned.with_generated(drawn, 40, 1.0).model < 1 / 2

    class Drawing:
        def __init__(self, engine):
            self.engine = SimpleNamespace(suggested_batch=lambda: 16)

        def __call__(self, captions, *, steps, batch_size, **_):
            assert (steps, batch_size) == (2, 16)  # no more than the model's own
            requests = [Request(k, caption, k) for k, caption in enumerate(captions)]
            trusts = [Trust(domain=max(own, decoder.domain.model)) for own in (1.5, *[0.5] * 15)]  # as measured before
            samples = [Sample(request, np.zeros(0), {}, {}, trust) for request, trust in zip(requests, trusts)]
            return SimpleNamespace(samples=samples)

    monkeypatch.setattr(workflow, "Pipeline", Drawing)
    monkeypatch.setattr(workflow, "build_engine", lambda *_, **__: None)
    monkeypatch.setattr(workflow, "_sketch_samples", lambda *_: drawn)

    def tokenizer(text):
        return SimpleNamespace(input_ids=[])

    tokenizer.model_max_length = 77
    model = SimpleNamespace(tokenizer=tokenizer, defaults=SimpleNamespace(steps=2))
    engine = SimpleNamespace(name="fast", model=model, device="cpu", fingerprint=lambda: {"dtype": "fp32"})
    source = LabelledSource(64, 900)
    source.load = lambda record, seed: SimpleNamespace(caption="a photo of a ball", named=named)
    session = SimpleNamespace(engine=engine, source=source, numbers=range(40), split=(range(16), ()))
    session.watch_work = lambda *given: lambda count: None
    decoder = SimpleNamespace(domain=learned, config=SimpleNamespace(task="semantic"))
    checked = workflow.check_itself(session, decoder, tmp_path)
    assert read_check(tmp_path) == {"samples": 16, "out_of_domain": max(outside, 1)}  # the first by its own distance
    if named:  # the mean of all, which is near enough, moves no sample
        assert [sample.trust.domain for sample in checked] == [1.5, *[0.5] * 15]
    counts = []
    monkeypatch.setattr(domain.Domain, "with_generated", lambda self, _, count, farthest: counts.append(count) or self)
    source.origins = lambda record: (f"{record // 2}",)  # copies count as one, of as many as the domain is measured on
    for session.numbers in (range(40), range(900)):
        workflow.check_itself(session, decoder, tmp_path)
    assert counts == [20, workflow.DOMAIN_IMAGES]


def test_a_decoder_without_a_domain_or_memory_for_it_is_not_checked(monkeypatch, tmp_path):
    assert workflow.check_itself(None, SimpleNamespace(domain=None), tmp_path) == ()
    errors = [torch.OutOfMemoryError("CUDA out of memory"), KeyError("a fault")]
    monkeypatch.setattr(workflow, "build_engine", lambda *_, **__: (_ for _ in ()).throw(errors.pop(0)))
    monkeypatch.setattr(workflow, "_choose_captioned", lambda session: [SimpleNamespace(caption="a ball", named=None)])
    engine = SimpleNamespace(name="fast", model=None, device="cpu", fingerprint=lambda: {"dtype": "fp32"})
    decoder = SimpleNamespace(domain=learn(), config=SimpleNamespace(task="semantic"))
    assert workflow.check_itself(SimpleNamespace(engine=engine), decoder, tmp_path) == ()
    with pytest.raises(KeyError, match="a fault"):
        workflow.check_itself(SimpleNamespace(engine=engine), decoder, tmp_path)
    monkeypatch.setattr(workflow, "_choose_captioned", lambda session: [])
    assert workflow.check_itself(SimpleNamespace(engine=engine), decoder, tmp_path) == () and not errors


@pytest.mark.parametrize(("distance", "what"), [(None, ""), (1.0, " 1.00"), (1.5, " 1.50, out of the domain")])
def test_the_page_tells_how_far_a_generated_sample_is_from_the_domain(distance, what):
    depth = DepthMap(np.ones((8, 8), np.float32), 10.0)
    trust = None if distance is None else Trust(domain=distance)
    sample = Sample(Request(0, "a <ball>", 0), np.zeros((8, 8, 3), np.uint8), {"depth": depth}, trust=trust)
    end = f"a &lt;ball&gt;{f' &middot; distance{what}' if what else ''}</figcaption></figure>"
    assert page._sample("depth", None, sample).endswith(end)


@pytest.mark.parametrize(
    ("result", "finished", "steps"),
    [(None, "", "600 steps in all, 6 times"), ({}, " - finished", "500 steps in all, 5")],
)
def test_a_plan_counts_the_trainings_that_are_left(result, finished, steps):
    session = SimpleNamespace(
        split=([0] * 40, [0] * 30),
        engine=SimpleNamespace(model=SimpleNamespace(size=64)),
        framing={"scaled": 0, "cut_to_a_square": 0, "pictures": 70},
        view_settings=SimpleNamespace(draws=1),
        address="demo:70",
        cache_plan=lambda task: f"of {task}",
    )
    schedule = SimpleNamespace(steps=100, batch_size=4)
    plan = SimpleNamespace(schedule=schedule, decoder=SimpleNamespace(kind="segmentation", named=tuple("abcdefg")))
    lines = list(describe_plans(session, {"semantic": plan}, {"semantic": result}, TaskSettings(), folds=5))
    assert lines[1] == "images     40 to learn from in 1 view each, 30 held out, 64 pixels a side"
    early = ", fewer once 4 of 10 evaluations in turn bring no improvement"
    assert lines[2:4] == [
        "captures   of semantic",
        f"semantic   segmentation decoder, 100 steps of 4 views{early}{finished}",
    ]
    assert "by name    a, b, c, d, e and 2 more: only where" in lines[4] and lines[-1].startswith(f"semantic   {steps}")


def test_samples_are_sketched_with_their_own_captions_and_seeds(monkeypatch):
    asked = []

    def invert(engine, labels, images, captions, seeds):
        asked.append((labels, [int(image[0, 0, 0]) for image in images], captions, seeds))
        return {"semantic": SimpleNamespace(of=lambda task: images[:, :1, :1, 0].float()[:, None])}

    monkeypatch.setattr(workflow, "invert_for", invert)
    engine = SimpleNamespace(decoders={"semantic": SimpleNamespace(sketch=lambda capture: capture + 1)})
    samples = [Sample(Request(k, f"a {k}", 50 + k), np.full((2, 2, 3), k, np.uint8), {}) for k in range(10)]
    found = workflow._sketch_samples(engine, "semantic", samples)
    assert found.shape == (10, 1, 1, 1) and found.ravel().tolist() == list(range(1, 11))
    parts = (range(8), range(8, 10))
    assert asked == [
        (("semantic",), list(part), tuple(f"a {k}" for k in part), tuple(50 + k for k in part)) for part in parts
    ]


@pytest.mark.parametrize(
    ("result", "folds", "has_page", "is_run"),
    [(None, 0, False, True), ({}, 0, True, False), ({}, 5, True, True), ({}, 0, False, True)],
)
def test_a_finished_training_is_left_alone_unless_folds_or_its_page_are_missing(
    tmp_path, monkeypatch, result, folds, has_page, is_run
):
    ran, removed = [], []
    outcome = workflow.TrainingOutcome({"steps": 1}, None)
    monkeypatch.setattr(workflow.Workflow, "_fold_count", folds)
    monkeypatch.setattr(workflow.Workflow, "_run_task", lambda self, task, *_: ran.append(task) or outcome)
    monkeypatch.setattr(workflow, "find_result", lambda folder, plan: result)
    monkeypatch.setattr(workflow.checkpoint, "remove", removed.append)
    (tmp_path / "depth" / "training").mkdir(parents=True)
    if has_page:
        (tmp_path / "depth" / "training" / "page.html").touch()
    work = workflow.Workflow(None, tmp_path, ["depth"], None, "no")
    found = work.run({"depth": None}, "train", None, lambda: False)["depth"]
    assert ran == ["depth"] * is_run and found == (outcome if is_run else workflow.TrainingOutcome({}, None))
    assert removed == [tmp_path / "depth" / "training"] * (result is not None)


def test_the_page_shows_the_truth_before_the_answer(monkeypatch):
    shown = {}
    monkeypatch.setattr(page, "_figure", lambda pictures, caption: shown.update(pictures, caption=caption) or "")
    ramp = np.repeat(np.linspace(1, 9, 8, dtype=np.float32)[None], 8, 0)
    near, far = (DepthMap(metres, 10.0) for metres in (ramp, ramp[:, ::-1]))
    item = SimpleNamespace(id="<a>", caption="a & b", image=np.zeros((8, 8, 3), np.uint8), depth=near.metres)
    page._views("depth", SimpleNamespace(max_depth=10.0), item, far)
    kind = page.LABEL_KINDS["depth"]
    for name, label in (("truth", near), ("answer", far)):
        assert (np.asarray(shown[name]) == np.asarray(kind.picture(label, item.image))).all()
    assert (np.asarray(shown["truth"]) != np.asarray(shown["answer"])).any()
    assert list(shown) == ["image", "truth", "answer", "caption"] and shown["caption"] == "&lt;a&gt; &middot; a &amp; b"


def test_what_a_training_is_told_to_be_wrong_with():
    for outside, is_told in ((4, False), (5, True)):
        warnings = describe_warnings("semantic", None, {"samples": 8, "out_of_domain": outside})
        assert [text.startswith(f"{outside} of 8 samples") for text in warnings] == [True] * is_told
    told = list(describe_result(Path("out"), "semantic", RESULT, None, {"samples": 8, "out_of_domain": 3}))
    assert "  5 of 8 samples generated from its captions are like its pictures" in told
    whole = workflow.TrainingOutcome({"steps": 1}, {"folds": 5}, {"samples": 8}).document
    assert whole == {"steps": 1, "folds": {"folds": 5}, "self_check": {"samples": 8}}
    assert workflow.TrainingOutcome({"steps": 1}, None).document == {"steps": 1}
    assert workflow.TrainingOutcome(None, {"folds": 5}).document is None


@pytest.mark.parametrize(("result", "last"), [(None, [("depth", "depth", 100, 0)]), ({"steps": 100}, [])])
def test_progress_of_a_fold_tells_the_steps_that_follow_it(monkeypatch, tmp_path, result, last):
    asked = []

    def progress(*given):
        asked.append(given)
        return nullcontext(SimpleNamespace(on_step=None))

    def cross_validate(session, task, folder, count, settings, fold_progress, is_stopping):
        for number in range(1, count + 1):
            fold_progress(number, 40)
        return {"folds": count}

    for name, answer in {
        "cross_validate": cross_validate,
        "find_result": lambda *given: result,
        "run_training": lambda *given: {"steps": 100},
        "compare_with_folds": lambda *given: {"folds": 3, "final": {}},
        "load_decoder": lambda folder: None,
        "measure_domain": lambda *given: None,
    }.items():
        monkeypatch.setattr(workflow, name, answer)
    session = SimpleNamespace(open_training=lambda *given: object())
    own = SimpleNamespace(session=session, out=tmp_path, settings=None, _fold_count=3)
    own._write_page = lambda *given: None
    plan = SimpleNamespace(schedule=SimpleNamespace(steps=100))
    outcome = workflow.Workflow._run_task(own, "depth", plan, "train", progress, lambda: False)
    assert outcome.document == {"steps": 100, "folds": {"folds": 3, "final": {}}}
    later = 0 if result else 100
    folds = [("depth", f"depth, fold {k} of 3,", 40, (3 - k) * 40 + later) for k in (1, 2, 3)]
    assert asked == folds + last


@pytest.mark.parametrize(
    ("pictures", "scaled", "cut", "framing", "told"),
    [
        (3, 0, 0, "fit", ""),
        (3, 3, 0, "fit", "all 3 pictures are scaled to that"),
        (3, 3, 3, "fit", "all 3 pictures are scaled to that and cut to the square in the middle"),
        (3, 1, 0, "fit", "1 of 3 pictures is scaled to that"),
        (
            4,
            2,
            1,
            "upstream",
            "2 of 4 pictures are scaled to that, 1 of them cut to a square that DatasetDM's rule draws",
        ),
        (1, 1, 1, "fit", "1 of 1 picture is scaled to that and cut to the square in the middle"),
        (1, 1, 1, "person", "1 person, in the middle of a square that is cut out and scaled to that"),
        (2, 2, 2, "person", "2 persons, each in the middle of a square that is cut out and scaled to that"),
    ],
)
def test_how_pictures_are_brought_to_the_models_size_in_words(pictures, scaled, cut, framing, told):
    facts = {"pictures": pictures, "scaled": scaled, "cut_to_a_square": cut, "framing": framing}
    assert describe_framing(facts) == told


@skips.long_test
def test_a_decoder_that_is_worse_than_those_of_its_folds_is_told(tmp_path, capsys):
    line = ["--data", "demo:12@1000", "--task", "semantic", "--folds", "5", "--held-out", "0", "--steps", "80"]
    line += ["--draws", "1", "--batch-size", "4", "--engine", "fast", "--device", "cpu", "--threads", "1"]
    line += ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "decoder")]
    assert train.main(line) == 0
    told = capsys.readouterr().err
    assert "5-fold" in told and "ended badly" not in told
    folder = tmp_path / "decoder" / "semantic"
    weights = load_file(folder / "model.safetensors")
    save_file({name: -value for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "training" / "page.html").unlink()
    assert train.main(line) == 0, "which only measures and shows what is there"
    told = [line for line in capsys.readouterr().err.splitlines() if "the training ended badly: mIoU 0." in line]
    assert len(told) == 1 and "--seed" in told[0]
    assert "the training ended badly" in (folder / "training" / "page.html").read_text()


def teach(name, out, *flags, images=40, model="demo"):
    """The decoder of a domain that a demo model cannot draw, or of an address of scenes."""
    data = name if ":" in name else f"folder:{write_domain(name, out / 'pictures', images)}"
    line = ["--model", model, "--data", data, "--task", "semantic", "--folds", "no", "--held-out", "0"]
    line += ["--engine", "fast", "--device", "cpu", "--cache-dir", str(out / "cache"), "--out", str(out / "decoder")]
    assert train.main([*line, *flags, "--quiet"]) == 0
    return out / "decoder"


def draw_by(decoder, captions, model="demo", **options):
    pipe = Pipeline.from_pretrained(model, decoder=str(decoder), engine="fast", device="cpu")
    return pipe(captions, tasks=("semantic",), batch_size=8, **options).samples


def test_samples_of_a_foreign_domain_are_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "CHECK_STEPS", 4)
    decoder = teach("letters", tmp_path, "--steps", "2", "--draws", "1", "--batch-size", "4", images=12)
    assert "12 of 12 samples generated from its captions" in (decoder / "semantic/training/page.html").read_text()
    samples = draw_by(decoder, ["a photo of a word, a stamp"] * 4, steps=4)
    assert all(sample.trust.domain > 1 for sample in samples)


@skips.long_test
@pytest.mark.parametrize("name", DOMAINS)
def test_nearly_all_samples_of_foreign_domains_are_marked(name, tmp_path):
    decoder = teach(name, tmp_path, "--steps", "80", "--draws", "4")
    captions = [f"a photo of {', '.join(f'a {thing}' for thing in [*DOMAINS[name][1]][k % 2 :])}" for k in range(24)]
    assert np.mean([sample.trust.domain > 1 for sample in draw_by(decoder, captions)]) >= 0.95


@skips.long_test
@pytest.mark.parametrize("model", ["demo", "demo-dit"])
@pytest.mark.parametrize(("world_name", "is_marked"), [("hard", True), ("demo", False)])
def test_the_model_has_to_draw_what_was_taught(world_name, is_marked, model, tmp_path):
    """A decoder of the harder world contains the demo world, so that no sample is far by itself."""
    register()
    decoder = teach(f"{world_name}:40@1000", tmp_path, "--steps", "80", "--draws", "4", model=model)
    captions = [WORLDS[world_name].sample_scene(600_000 + k).caption for k in range(16)]
    reason = "the model does not draw what semantic learned from"
    samples = draw_by(decoder, captions, model, steps=8)
    assert [reason in sample.trust.reasons for sample in samples] == [is_marked] * 16


@skips.long_test
@pytest.mark.parametrize(("world_name", "is_marked"), [("hard", True), ("demo", False)])
def test_the_model_has_to_draw_what_was_taught_without_captions(world_name, is_marked, tmp_path):
    """From lists of class names, wall and table among them, the demo model draws crowds of things."""
    folder, classes = tmp_path / "pictures", WORLDS[world_name].classes
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    for k in range(40):
        view = WORLDS[world_name].view(800_000 + k, 128)
        Image.fromarray(view.image).save(folder / "images" / f"{k:04d}.png")
        Image.fromarray(view.semantic).save(folder / "masks" / f"{k:04d}.png")
    decoder = teach(f"folder:{folder}", tmp_path, "--steps", "80", "--draws", "4")
    samples = draw_by(decoder, ["a photo of a ball, a table", "a red cube on a black table"] * 8, steps=8)
    assert [sample.trust.domain > 1 for sample in samples] == [is_marked] * 16
    walls = [np.mean(sample.annotations["semantic"].labels == classes.index("wall")) for sample in samples]
    assert np.mean(walls) > 0.2, "which no prompt names, as every picture shows one"


@skips.long_test
def test_few_right_samples_of_the_demo_are_marked():
    samples = draw_by("demo", [world.sample_scene(700_000 + k).caption for k in range(100)])
    right = [sample for sample in samples if all("unlike" in reason for reason in sample.trust.reasons)]
    assert len(right) >= 90 and np.mean([sample.trust.domain > 1 for sample in right]) <= 0.03


@pytest.mark.parametrize(
    ("known", "others", "text"),
    [
        ((), (), ""),
        (("depth", "pose"), (), "samples are compared with what depth, pose learned from"),
        ((), ("depth",), "depth: unknown, as fewer than 8 images or 0.2.0 trained it"),
        (
            ("pose",),
            ("depth",),
            "samples are compared with what pose learned from; depth: unknown, as fewer than 8 images",
        ),
    ],
)
def test_the_plan_tells_with_which_pictures_samples_are_compared(known, others, text):
    decoders = {task: SimpleNamespace(domain=task in known) for task in (*known, *others)}
    job = SimpleNamespace(engine=SimpleNamespace(decoders=decoders), recipe=SimpleNamespace(decoded=decoders))
    told = run_report._describe_domain(job)
    assert told.startswith(text) and bool(told) == bool(text)


@pytest.mark.parametrize(("outside", "measured", "later"), [(2, 2, 2), (1, 1, 4), (0, 2, 2), (0, 0, 3)])
def test_stored_samples_close_a_run_or_let_it_go_on_from_two_on(outside, measured, later):
    plan = SimpleNamespace(most=20, batch_size=3)
    job = SimpleNamespace(place="run", stops_outside=True, plan=plan, done=measured, limit=0)
    ledger = SimpleNamespace(count_trust=lambda stop: (0, outside, measured))
    if outside == 2:
        with pytest.raises(GateFailed, match="2 of the first 2 samples"):
            DomainGate(job, ledger)
        return
    gate = DomainGate(job, ledger)
    gate.evaluate([Sample(Request(0, "a ball", 0), np.zeros(0), {}, {}, Trust(domain=0.5))] * 3)
    assert gate.measured == later  # more samples are evaluated where fewer than two were there


def test_a_run_whose_first_batch_was_right_resumes_whatever_came_after_it(tmp_path):
    """As it would have gone on without the interruption."""
    job = SimpleNamespace(place="run", stops_outside=True, plan=SimpleNamespace(most=20, batch_size=3), done=8, limit=0)
    distances = [0.5, 2.0, 0.5, *[2.0] * 5]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.commit([Row(Request(k, "a", k), {}, trust=Trust(domain=each)) for k, each in enumerate(distances)])
        assert not DomainGate(job, ledger).is_closed
