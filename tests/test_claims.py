"""Students learn, arms are equal, scenes that judge teach nobody, and a claim holds by its figures alone."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skips import long_test

from bench.proof.claims import labels, page, rows, search, sets, training_free, tuned, tuned_page
from bench.proof.claims.rows import CLAIMS, judged, row_of
from bench.proof.claims.students import Arm, StudentStore, TestSet
from bench.proof.students import command, student_data, student_views, worth
from bench.proof.students.student import Student, StudentSchedule, answers, shares, teach
from bench.proof.students.student_data import CELLS, IGNORED, SIDE
from bench.proof.students.student_views import mild, strong
from bench.world.worlds import WORLDS
from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap, Trust
from datasetdm_fast.engine.decoders.config import DEMO
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.tasks import TASKS as TASK_PARTS
from datasetdm_fast.errors import Refused

TASKS = ("semantic", "instance", "depth", "pose")
SOURCE = sets.scenes(sets.LABELLED, 12, SIDE)
VOCABULARY = student_data.vocabulary_of(SOURCE)
SHORT = StudentSchedule(steps=12, batch_size=4)


@pytest.fixture(scope="module")
def lessons():
    return student_data.real(SOURCE, SOURCE, VOCABULARY)


@pytest.fixture(scope="module")
def unseen():
    return TestSet("few", sets.scenes(sets.TEST, 8, SIDE))


def some(lessons, chosen):
    """A few of the images."""
    return replace(
        lessons,
        **{
            name: getattr(lessons, name)[chosen]
            for name in ("images", "semantic", "instance", "depth", "joints", "weights")
        },
    )


class TrustedSample(sets.RelabelledSample):
    trust = Trust()


def generated(prompt_classes=("ball",), kind=sets.RelabelledSample, **changes):
    """A generated sample of 128 pixels that shows a ball on a table."""
    rows_, columns = np.mgrid[:128, :128]
    ball = (rows_ - 64) ** 2 + (columns - 40) ** 2 < 20**2
    semantic = np.where(rows_ < 30, 0, 1).astype(np.uint8)
    semantic[ball] = VOCABULARY.classes.index("ball")
    sure = np.full((128, 128), 0.9, np.float32)

    labels = {
        "semantic": SemanticMap(semantic, sure, VOCABULARY.classes),
        "instances": Instances(ball[None], np.array([0]), np.array([0.8], np.float32), VOCABULARY.things),
        "depth": DepthMap(np.full((128, 128), 2.0, np.float32), 4.0),
    }
    facts = {"id": "00000000", "image": np.full((128, 128, 3), 90, np.uint8), "classes": prompt_classes}
    return kind(**facts | labels | changes)


def trusted(*arguments, **changes):
    """The same, trusted whatever its labels say."""
    return generated(*arguments, kind=TrustedSample, **changes)


def test_loss_falls_and_every_answer_is_there(lessons, unseen):
    told = []
    course = StudentSchedule(steps=30, batch_size=4)
    student = teach([lessons], course, 0, told=lambda step, loss: told.append(loss))
    assert len(told) == course.steps and np.mean(told[-5:]) < 0.7 * np.mean(told[:5])
    assert sum(parameter.numel() for parameter in student.parameters()) < 1_000_000
    answer = answers(student, unseen.images)[0]
    assert answer.semantic.labels.shape == answer.depth.metres.shape == (SIDE, SIDE) and (answer.depth.metres > 0).all()
    assert answer.instance.masks.shape[1:] == (SIDE, SIDE) and answer.pose.points.shape[1:] == (len(world.JOINTS), 3)


def test_large_student_has_less_than_a_million_parameters():
    assert sum(parameter.numel() for parameter in Student(VOCABULARY, "large").parameters()) < 1_000_000


def test_training_free_compares_arms_seed_by_seed():
    figures = {"decoder": (80.0, 82.0, 84.0), "ignored": (60.0, 62.0, 64.0), "filled": (61.0, 60.0, 63.0)}
    figures |= {"self": (50.0, 52.0, 54.0)}
    arms = {
        name: {"mean": float(np.mean(each)), "spread": float(np.std(each, ddof=1)), "seeds": list(each)}
        for name, each in figures.items()
    }
    found = {one.title: training_free.answered(one, arms) for one in training_free.COMPARISONS}
    share, filled, itself = found.values()
    assert share["holds"] and 0.75 < share["value"] < 0.77 and share["interval"][0] > 0.5
    assert not filled["holds"] and filled["reason"].startswith("the seeds differ")
    assert not itself["holds"] and itself["reason"].startswith("less") and itself["value"] == -10
    row = {"arms": arms, "questions": found, "images": 300, "steps": 2000, "uncertain": 0.04, "figure": "mIoU"}
    document = {"setting": {"seeds": 3, "test": 1000}, "machine": {"device": "a CPU", "commit": "0"}, "command": "c"}
    section = training_free.section(document | {"date": "2026-11-21", "rows": {training_free.NAME: row}})
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(lines) == 5 and lines[2].endswith("| yes |") and "no: " in lines[3] and "-10.0" in lines[4]


def test_training_free_knows_things_and_a_background():
    numbers = training_free.renumbered(world.CLASSES)
    assert all(
        training_free.CLASSES[numbers[k]] == name for k, name in enumerate(world.CLASSES) if name in world.THINGS
    )
    assert not numbers[[k for k, name in enumerate(world.CLASSES) if name not in world.THINGS]].any()
    assert numbers[IGNORED] == IGNORED
    item = training_free.ThingScenes(SOURCE)[0]
    assert np.array_equal(item.semantic, numbers[SOURCE[0].semantic]) and item.semantic.max() < len(
        training_free.CLASSES
    )


def test_same_seed_same_student(lessons):
    first, again, other = (teach([lessons], replace(SHORT, steps=3), seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_arms_take_equal_steps_and_batches(lessons):
    seen = {}
    for name, found in {"real": (lessons,), "both": (lessons, lessons)}.items():
        counts = shares(SHORT, len(found))
        views = [mild(some, count, torch.Generator().manual_seed(0)) for some, count in zip(found, counts)]
        told = []
        teach(found, replace(SHORT, steps=3), 0, told=lambda step, loss, told=told: told.append(step))
        seen[name] = (len(told), sum(len(view.images) for view in views))
    assert seen["real"] == seen["both"] == (3, SHORT.batch_size)


def test_scenes_that_judge_teach_nobody():
    taught = set().union(
        *(sets.seeds(sets.scenes(sets.LABELLED, 100, SIDE, fits)) for fits in (sets.is_any, sets.is_seen, sets.is_day))
    )
    asked = set().union(
        *(sets.seeds(sets.scenes(sets.TEST, 300, SIDE, fits)) for fits in (sets.is_any, sets.is_elsewhere))
    )
    chosen_on = sets.seeds(sets.scenes(sets.VALIDATION, 300, SIDE))
    assert not taught & asked and not taught & chosen_on and not asked & chosen_on and len(asked) > 300
    assert max(taught | asked | chosen_on) < 10_000_000  # where the scenes begin that taught the demo model


def test_no_repetition_has_scenes_or_students_of_another():
    scales = [replace(sets.FULL, repetition=one) for one in range(sets.REPETITIONS)]
    counts = {sets.LABELLED: 10 * sets.FULL.real, sets.POOL_SEED: sets.POOL, tuned.UNLABELLED: sets.FULL.synthetic}
    counts |= {sets.VALIDATION: sets.FULL.test, sets.TEST: sets.FULL.test}
    begun = [(sets.LABELLED, counts.pop(sets.LABELLED))]
    begun += [(scale.first(seed), count) for seed, count in counts.items() for scale in scales]
    ordered = sorted(begun)
    assert all(first + count <= after for (first, count), (after, _) in zip(ordered, ordered[1:]))
    assert ordered[-1][0] < 9_000_000
    seen = sets.scenes(scales[-1].first(sets.TEST), sets.FULL.test, SIDE, sets.is_elsewhere)
    assert max(sets.seeds(seen)) < scales[-1].first(sets.TEST) + sets.APART
    assert sorted(seed for scale in scales for seed in scale.students) == list(range(3 * sets.REPETITIONS))


def test_scenes_of_a_kind():
    day = sets.scenes(sets.LABELLED, 10, SIDE, sets.is_day)
    assert {world.sample_scene(seed).domain for seed in sets.seeds(day)} == {"day"} and len(day) == 10
    seen = sets.scenes(sets.LABELLED, 10, SIDE, sets.is_seen)
    assert not {thing.kind for seed in sets.seeds(seen) for thing in world.sample_scene(seed).things} & set(sets.UNSEEN)


def test_mirrored_views_keep_labels_on_their_things(lessons):
    """Wherever an image was moved, its own label map was: the colours under a label stay those of the scene."""
    one = some(lessons, torch.tensor([k for k in range(len(lessons)) if (lessons.joints[k, :, 2] > 0).all()][:1]))
    person = VOCABULARY.classes.index("person")
    before = one.joints[0, :, :2].floor().long()
    on_it = (
        (one.semantic[0, before[:, 1].clamp(0, CELLS - 1), before[:, 0].clamp(0, CELLS - 1)] == person).float().mean()
    )
    for seed in range(6):
        view = mild(one, 1, torch.Generator().manual_seed(seed))
        kept = view.joints[0, :, 2] > 0
        places = view.joints[0, kept, :2].floor().long()
        assert (
            view.semantic[0, places[:, 1].clamp(0, CELLS - 1), places[:, 0]] == person
        ).float().mean() >= on_it - 0.35


@pytest.mark.parametrize("augmentation", [mild, strong])
def test_classes_with_a_side_change_places_in_mirrored_views(lessons, augmentation):
    """A picture whose left half is one class and whose right half is the other looks alike in a mirror."""
    vocabulary = student_data.Vocabulary(
        ("background", "left eye", "right eye"), (), ("left eye", "nose", "right eye"), 0.0
    )
    halves = torch.where(torch.arange(CELLS) < CELLS // 2, 1, 2).to(torch.uint8).expand(1, CELLS, CELLS)
    joints = torch.tensor([[[8.0, 16.0, 1.0], [16.0, 16.0, 1.0], [24.0, 16.0, 1.0]]])
    one = replace(some(lessons, torch.tensor([0])), vocabulary=vocabulary, semantic=halves, joints=joints)
    view = augmentation(one, 16, torch.Generator().manual_seed(0))
    known = view.semantic != student_data.IGNORED
    assert ((view.semantic[:, :, 1:] >= view.semantic[:, :, :-1]) | ~(known[:, :, 1:] & known[:, :, :-1])).all()
    assert (view.joints[:, 0, 0] < view.joints[:, 2, 0]).all()


def test_weights_draw_the_rarer_more_often(lessons):
    few = lessons.balanced()
    assert few.weights.min() >= 1 and few.weights.max() <= student_data.MOST_TIMES and len(few) == len(lessons)
    without_things = replace(lessons, vocabulary=student_data.Vocabulary(("background",), (), (), 10.0))
    assert (without_things.balanced().weights == 1).all()  # as in data of depths
    first = replace(lessons, weights=torch.tensor([1.0] + [0.0] * 11))
    view = mild(first, 8, torch.Generator().manual_seed(0))
    assert set(view.depth.unique().tolist()) <= set(lessons.depth[0].unique().tolist())


def test_a_small_thing_lies_on_a_large_one_whichever_is_listed_first():
    """As in the label map that a data set of masks has; as COCO lists them, masks may overlap in any order."""
    item = next(item for item in SOURCE if len(item.masks))
    small, large = np.zeros((2, SIDE, SIDE), bool)
    small[20:30, 20:30], large[10:50, 10:50] = True, True
    ball, cone = (VOCABULARY.things.index(name) for name in ("ball", "cone"))
    for order in ((0, 1), (1, 0)):
        masks, kinds = np.stack([small, large])[list(order)], np.array([ball, cone])[list(order)]
        nested = replace(item, masks=masks, mask_classes=kinds, semantic=None)
        found = student_data.real([nested], SOURCE, VOCABULARY)
        assert (found.instance[0, 10:15, 10:15] == 1 + order.index(0)).all()
        assert (found.semantic[0, 10:15, 10:15] == VOCABULARY.classes.index("ball")).all()
        shown = TASK_PARTS["open-vocabulary"].truth(SOURCE, nested).labels
        assert (shown[20:30, 20:30] == ball + 1).all() and shown[40, 40] == cone + 1


def test_what_is_not_trusted_is_ignored():
    ball, cone = VOCABULARY.classes.index("ball"), VOCABULARY.classes.index("cone")
    _, semantic, instance, depth, joints = student_data.of_sample(generated(), VOCABULARY)
    assert (
        (semantic == ball).sum() > 60 and (instance == 1).sum() > 60 and (depth == 2).all() and not joints[:, 2].any()
    )
    foreign = trusted()
    foreign.semantic.labels[100:120, 100:120] = cone
    _, semantic, *_ = student_data.of_sample(foreign, VOCABULARY)
    assert not (semantic == cone).any() and (semantic[26:29, 26:29] == IGNORED).all()
    assert student_data.of_sample(generated(("ball", "star")), VOCABULARY) is None, (
        "the star that the prompt names is not there"
    )
    other = Instances(generated().instances.masks, np.array([2]), np.array([0.8], np.float32), VOCABULARY.things)
    _, semantic, instance, *_ = student_data.of_sample(trusted(("ball", "cone"), instances=other), VOCABULARY)
    assert not (semantic == ball).any() and not (instance == 1).any(), "one label says ball, the other cone"


def test_joints_come_along():
    points = np.concatenate([np.full((1, 7, 2), 64.0), np.full((1, 7, 1), 0.9)], 2).astype(np.float32)
    points[0, 0, 2] = 0.1
    found = Keypoints(points, np.full((1, 7), 2), np.array([0.9], np.float32), world.JOINTS)
    _, _, _, _, joints = student_data.of_sample(trusted(("ball", "person"), keypoints=found), VOCABULARY)
    assert joints[0, 2] == 0 and (joints[1:] == [CELLS / 2, CELLS / 2, 1]).all()
    found.visibility[0, 1] = 0  # as `edit` leaves a joint without a place, not a score
    _, _, _, _, joints = student_data.of_sample(trusted(("ball", "person"), keypoints=found), VOCABULARY)
    assert joints[1, 2] == 0 and joints[2:, 2].all()


def test_a_run_of_odd_size_is_refused():
    odd = generated(image=np.zeros((100, 100, 3), np.uint8))
    with pytest.raises(Refused, match="100 x 100 pixels, expected a square whose side is a multiple of 64"):
        student_data.of_sample(odd, VOCABULARY)


def test_figures_are_found_again_for_the_labels_and_metrics_alone_that_they_were_scored_with(
    lessons, unseen, monkeypatch
):
    arm, other = Arm("real", (lessons,), SHORT, TASKS), TestSet("few", unseen.source)
    first, *rest = unseen.items
    vars(other)["items"] = (replace(first, depth=first.depth + 1), *rest)
    assert arm.digest(0, other) != arm.digest(0, unseen)
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or b"")
    arm.digest(0, unseen)
    assert {"student.py", "worth.py", "metrics.py", "meter.py", "ranking.py"} <= {*read}


@long_test
def test_figures_are_kept_and_found_again(lessons, unseen, tmp_path):
    arm = Arm("real", (lessons,), SHORT, TASKS)
    store = StudentStore(tmp_path, lambda line: None)
    first = store.figures(arm, 0, unseen)
    assert (store.trained, store.found) == (1, 0) and set(first) == set(TASKS)
    again = StudentStore(tmp_path, lambda line: None)
    assert again.figures(arm, 0, unseen) == first and (again.trained, again.found) == (0, 1)
    changed = (
        replace(arm, schedule=replace(SHORT, rate=1e-3)),
        replace(arm, sets=(some(lessons, torch.arange(6)),)),
        replace(arm, tasks=("semantic",)),
    )
    assert len({one.digest(0, unseen) for one in (arm, *changed)} | {arm.digest(1, unseen)}) == 5
    students_again = answers(again.student(arm, 0, unseen), unseen.images)[0]
    assert np.isfinite(students_again.depth.metres).all()


HELD = [
    ("semantic", (60.0, 61.0, 62.0), (70.0, 71.0, 72.0), True),
    ("semantic", (60.0, 61.0, 62.0), (64.0, 65.0, 66.0), False),  # 4 points are less than 5
    ("semantic", (50.0, 61.0, 72.0), (70.0, 66.0, 77.0), False),  # 10 points within 2 sigma
    ("instance", (10.0, 10.5, 11.0), (15.0, 15.5, 16.0), True),
    ("instance", (10.0, 10.5, 11.0), (13.0, 13.5, 14.0), False),
    ("depth", (0.10, 0.101, 0.102), (0.07, 0.071, 0.072), True),
    ("depth", (0.10, 0.101, 0.102), (0.09, 0.091, 0.092), False),
    ("depth", (0.07, 0.071, 0.072), (0.10, 0.101, 0.102), False),  # worse by as much
    ("pose", (40.0, 40.5, 41.0), (44.0, 44.5, 45.0), True),
    ("zero-shot", (0.0, 0.0, 0.0), (40.0, 41.0, 42.0), True),
    ("long-tail", (30.0, 31.0, 32.0), (39.0, 40.0, 41.0), False),
    ("parity", (40.0, 41.0, 42.0), (40.5, 40.6, 42.2), True),
    ("parity", (40.0, 40.1, 40.2), (50.0, 50.1, 50.2), False),
]


@pytest.mark.parametrize("name, before, after, holds", HELD)
def test_holds_comes_from_the_figures(name, before, after, holds):
    row = row_of(CLAIMS[name], {"real": before, "synthetic": after, "both": after}, {"images": {}})
    assert row["holds"] is holds and bool(row["reason"]) is not holds
    assert row["real"] == pytest.approx(np.mean(before)) and row["gain"] == pytest.approx(
        np.mean(after) - np.mean(before)
    )
    assert row["sigma"] == pytest.approx(np.std(np.subtract(after, before), ddof=1))
    low, high = row["interval"]
    assert low <= row["gain"] <= high
    json.dumps(row, allow_nan=False)


def test_a_student_that_data_cannot_help_is_said_to_be_one():
    facts = {"images": {"real": 50, "synthetic": 1000}, "ceiling": 0.09, "ceiling_scenes": 1000}
    scores = {"real": (0.1, 0.101, 0.102), "synthetic": (0.1, 0.1, 0.1), "both": (0.095, 0.096, 0.097)}
    row = row_of(CLAIMS["depth"], scores, facts)
    assert not row["holds"] and "even 1,000 real scenes" in row["reason"]
    assert "even" not in row_of(CLAIMS["depth"], scores, facts | {"ceiling": 0.05})["reason"]


def test_one_student_proves_nothing():
    assert not judged(CLAIMS["semantic"], [10.0], [90.0])["holds"]


def document():
    images = {"real": 100, "synthetic": 600, "left_out": 100}
    found = {}
    for name, claim in CLAIMS.items():
        values = (
            {"real": (0.1, 0.11), "synthetic": (0.09, 0.1), "both": (0.05, 0.06)}
            if claim.rule == "less"
            else {"real": (40.0, 41.0), "both": (60.0, 61.0)}
        )
        found[name] = row_of(
            claim, values, {"steps": 100, "images": images if name != "parity" else {"torch": 60, "fast": 61}}
        )
    found["instance"]["cells"] = [found["instance"] | {"student": "small", "real_scenes": count} for count in (100, 50)]
    setting = {"real": 100, "synthetic": 600, "seeds": 2, "steps": 100, "test": 1000}
    machine = {"device": "Some CPU", "commit": "abc1234", "versions": {"torch": "2.13.0"}}
    return {
        "format": 1,
        "suite": "claims",
        "date": "2026-01-01",
        "command": "python -m bench claims",
        "machine": machine,
        "setting": setting,
        "rows": found,
    }


def test_page_chart_and_table_show_what_does_not_hold():
    import xml.etree.ElementTree as ET

    found = document()
    ET.fromstring(page.chart(found))
    text, written = page.section(found, "charts"), page.page(found, {"real": "Real <scenes>"})
    assert (
        found["rows"]["parity"]["holds"] is False and "no: the two engines" in text and "no: the two engines" in written
    )
    assert "Real &lt;scenes&gt;" in written and text.count("\n|") == 2 + len(CLAIMS) + 1
    assert "20.0 (" in text and "small student, 50 real" in text
    scrolling = '<div class="wide" tabindex="0">'  # what is wider than a phone, so that the page itself is not
    assert written.count(scrolling) == 3 == written.count(f"{scrolling}<table") + written.count(f"{scrolling}<svg")


def test_the_share_of_a_gap_is_shown_where_there_is_one():
    row = {"figure": "AP", "real": 0.0, "both": 1.0}
    assert [page.closed(row | {"ceiling": most}) for most in (4.0, 0.0, None)] == ["25 %", "–", "–"]
    assert page.closed(row | {"real": 2.0, "ceiling": 1.5}) == "–"
    less = {"figure": "REL (less is better)", "real": 0.3, "both": 0.2}
    assert [page.closed(less | {"ceiling": least}) for least in (0.1, 0.35)] == ["50 %", "–"]
    found = document()
    found["rows"]["semantic"]["ceiling"] = 80.5
    assert "| gap to 600 real closed |" in page.figures(found) and "| 50 % |" in page.figures(found)


def test_a_set_whose_storing_is_cut_is_made_again(lessons, tmp_path, monkeypatch):
    path, saved = tmp_path / "sets" / "set.pt", torch.save

    def cut(value, file):
        saved(value, file)
        if isinstance(file, Path):
            file.write_bytes(file.read_bytes()[:99])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", cut)
        sets.stored(path, VOCABULARY, lambda: lessons)
    for _ in range(2):
        assert torch.equal(sets.stored(path, VOCABULARY, lambda: lessons).semantic, lessons.semantic)
    assert [one.name for one in path.parent.iterdir()] == ["set.pt"]


class Generated(list):
    """Samples in place of a run folder."""

    tasks, path = ("semantic", "instance", "depth"), "run"


def test_worth_of_a_run(capsys):
    run, unseen = Generated([generated(), generated(), generated(("star",))]), sets.scenes(sets.TEST, 4, SIDE)
    tasks = worth.student_tasks(SOURCE, unseen, run, ())
    assert tasks == run.tasks
    found = json.loads(json.dumps(worth.worth(SOURCE, unseen, run, tasks, 6, seeds=2, steps=2)))
    for row in found.values():
        assert row["images"] == {"real": 6, "synthetic": 2, "left_out": 1, "judged": 4} and row["steps"] == 2
        assert (
            len(row["seeds"]["real"]) == len(row["seeds"]["both"]) == 2
            and row["interval"][0] <= row["gain"] <= row["interval"][1]
        )
    assert "6 real and 2 generated images, 2 students of each kind" in worth.table(found)
    assert set(worth.worth(SOURCE, unseen, run, (*tasks, "pose"), 6, seeds=2, steps=2)) == set(tasks)  # shows no person
    with pytest.raises(Refused, match="can learn pose"):
        worth.student_tasks(SOURCE, unseen, run, ("pose",))
    with pytest.raises(Refused, match="--real 13: the data set has 12 images"):
        worth.worth(SOURCE, unseen, run, tasks, 13, seeds=2)
    with pytest.raises(Refused, match="the run holds no image that is kept"):
        worth.worth(SOURCE, unseen, Generated([]), tasks, 6, seeds=2)
    with pytest.raises(Refused, match="all of 1 generated images are doubtful"):
        worth.worth(SOURCE, unseen, Generated([generated(("star",))]), tasks, 6, seeds=2)


def test_what_no_judged_image_shows_is_left_out_of_the_worth_of_a_run():
    points = np.concatenate([np.full((1, 7, 2), 64.0), np.full((1, 7, 1), 0.9)], 2).astype(np.float32)
    person = Keypoints(points, np.full((1, 7), 2), np.array([0.9], np.float32), world.JOINTS)
    run, nobody = Generated([trusted(("ball", "person"), keypoints=person)]), sets.scenes(sets.TEST, 3, SIDE)
    assert not any(len(item.keypoints) for item in nobody)
    said: list[str] = []
    given = {"seeds": 2, "steps": 2, "told": said.append}
    assert set(worth.worth(SOURCE, nobody, run, ("depth", "pose"), 6, **given)) == {"depth"}
    assert "pose is left out: no image of --data shows anything to compare with" in said
    with pytest.raises(Refused, match="no image has the ground truth to compare with"):
        worth.worth(SOURCE, nobody, run, ("pose",), 6, **given)


def test_what_helps_is_outside_its_interval(capsys):
    assert (worth.t95(11), worth.t95(12), worth.t95(31)) == pytest.approx((2.228, 2.201, 2.042), abs=5e-4)
    row = worth.compared("depth", [0.1, 0.11, 0.12], [0.05, 0.051, 0.052])
    assert row["helps"] and row["gain"] < 0 and row["interval"][1] < 0
    assert worth.verdict(row) == "helps"
    unclear = worth.compared("semantic", [0.5, 0.6, 0.7], [0.48, 0.65, 0.73])
    assert not unclear["helps"] and worth.verdict(unclear) == "no clear help"
    worse = worth.compared("semantic", [0.5, 0.6, 0.7], [0.4, 0.501, 0.6])
    assert not worse["helps"] and worth.verdict(worse) == "harms"
    assert command.main(["--student", "small"]) == 2 and "--run is missing" in capsys.readouterr().err


def test_commands_refuse_what_proves_nothing(capsys, tmp_path):
    from bench import __main__ as bench
    from datasetdm_fast.command_line.ending import run_command

    assert (
        run_command(bench.dispatch, ["claims", "--seeds", "1"]) == 2
        and "one student has no spread" in capsys.readouterr().err
    )
    assert run_command(bench.dispatch, ["claims", "--rows", "semantics"]) == 2 and "semantic" in capsys.readouterr().err
    assert (
        run_command(bench.dispatch, ["claims", "--real", "25"]) == 2 and "belongs to --tuned" in capsys.readouterr().err
    )
    assert run_command(bench.dispatch, ["claims", "--tuned", "--real", "1"]) == 2
    assert "expected at least 2 scenes" in capsys.readouterr().err
    assert run_command(bench.dispatch, ["claims", "--tuned", "--finished", "--out", str(tmp_path)]) == 2
    assert "no student has been judged yet" in capsys.readouterr().err
    assert run_command(bench.dispatch, ["claims", "--repetition", "20"]) == 2
    assert "expected 0 to 19" in capsys.readouterr().err
    assert rows.OUTSIDE == 2


def test_labels_refuses_what_it_cannot_compare():
    for given, why in {
        "0": "expected numbers of 1 or more",
        "many": "expected numbers of 1 or more",
        "899001": "would be among those that judge",
    }.items():
        with pytest.raises(Refused, match=why):
            labels.LabelsConfig(labels=("10", given)).counts()
    with pytest.raises(Refused, match="--steps 0"):
        labels.LabelsConfig(steps=0).counts()
    assert labels.LabelsConfig(labels=("899000", "25")).counts() == [25, 899_000]


def test_labels_refuses_a_run_of_another_world_or_without_a_label_to_learn(tmp_path, monkeypatch):
    made = SimpleNamespace(classes=("wall", "table", "ball"), tasks=("semantic", "depth"))
    monkeypatch.setattr("datasetdm_fast.runs.run_folder.reader.open_run", lambda path: made)
    assert labels._fitting(tmp_path, WORLDS["hard"], ("semantic", "pose")) is made
    with pytest.raises(Refused, match="no labels of pose or instance"):
        labels._fitting(tmp_path, WORLDS["hard"], ("pose", "instance"))
    made.classes += ("dog",)
    with pytest.raises(Refused, match="the demo world has no dog"):
        labels._fitting(tmp_path, WORLDS["demo"], ("semantic",))


def test_labels_shows_a_figure_of_every_student():
    found = {25: [{"semantic": {"miou": 0.5}, "depth": {"absrel": 0.0625}}] * 2}
    assert labels.table(found).splitlines() == [
        "| real scenes | mIoU | REL (less is better) |",
        "| ---: | ---: | ---: |",
        "| 25 | 50.0, 50.0 | 0.062, 0.062 |",
    ]
    assert labels.table(found, " + 4 of run").splitlines()[2] == "| 25 + 4 of run | 50.0, 50.0 | 0.062, 0.062 |"


@long_test
def test_every_row_is_made_and_found_again(tmp_path, monkeypatch):
    """All labellers, sets, students and exams, each in the smallest number that is one."""
    from bench.proof.claims.experiments import Experiments
    from bench.proof.claims.run import described

    scale = sets.Scale(
        seeds=2,
        steps=4,
        short=3,
        real=3,
        fewer=(2,),
        synthetic=8,
        parity=4,
        varied=0,
        test=60,
        labeller_steps=1,
        labeller_draws=1,
        sizes=("small",),
    )
    for folder, tasks in {
        "is_any-2": TASKS[:3],
        "is_seen-3": TASKS[:1],
        "is_day-3": TASKS[:1],
    }.items():  # one step teaches nothing that could be trusted
        for task in tasks:
            shutil.copytree(DEMO / task, tmp_path / "labellers" / f"{folder}-1-1" / task)
    said = []
    with Experiments(tmp_path, scale, said.append) as experiments:
        found = experiments.rows(tuple(CLAIMS))
        page.write(tmp_path, described(found, scale, ["claims"], True, 1.0), experiments)
    assert set(found) == set(CLAIMS) and (tmp_path / "index.html").exists() and (tmp_path / "answers.png").exists()
    assert found["parity"]["real"] == pytest.approx(found["parity"]["both"], rel=0.05), (
        "both engines give the same images but for rounding"
    )
    assert found["instance"]["cells"][0]["images"]["real"] == 2 and found["semantic"]["images"]["real"] == 3
    kinds = [line for line in said if line.startswith(("real, seed", "synthetic, seed", "both, seed", "many real"))]
    assert len(kinds) == experiments.store.trained == len(list((tmp_path / "students").glob("*.json")))
    with Experiments(tmp_path, scale, said.append) as experiments:
        assert experiments.rows(tuple(CLAIMS)) == found and experiments.store.trained == 0
        names = ("real", "self", "many")
        monkeypatch.setattr(sets.RelabelledSample, "trust", Trust())  # a few steps teach nothing that could be trusted
        arms = tuned.TunedArms(experiments, names, scale.real)
        assert arms.missing() == 3 * (4 + 2) and arms.rows() == {}
        assert all(arms.missing() for _ in arms.train()) is False and len(arms.tried()) >= 3 * 6
        assert {len(cell["seeds"]) for row in arms.rows().values() for cell in row["arms"].values()} == {2}
        again = tuned.TunedArms(experiments, names, scale.real)
        again.look_for_students()
        assert again.rows() == arms.rows() and set(again.rows()["depth"]["arms"]) == set(names)
    with Experiments(tmp_path, replace(scale, repetition=1), said.append) as experiments:
        row = experiments.rows(("semantic",))["semantic"]
        assert row["seeds"] != found["semantic"]["seeds"] and experiments.store.trained == 2 * 3 + 1
    run = json.loads((tmp_path / "repetition-1" / "pool" / "run.json").read_text())
    assert run["config"]["seed"] == sets.POOL_SEED + sets.APART


def figures_of(value):
    """The same number for every figure, but for depth, of which less is better."""
    return {
        "semantic": {"miou": value, "per_class": dict.fromkeys(sets.RARE, value)},
        "instance": {"ap": value},
        "pose": {"oks_ap": value},
        "depth": {"absrel": 1 - value, "delta_1.25": value},
    }


def test_a_student_ends_where_looks_no_longer_improve(lessons, unseen, tmp_path, monkeypatch):
    values = iter((0.2, 0.5, 0.4, 0.3, 0.9))
    monkeypatch.setattr(search, "graded", lambda *given: figures_of(next(values)))
    arm, path = Arm("real", (), SHORT, TASKS), tmp_path / "student.json"
    data, scenes = pickle.dumps(lessons), pickle.dumps(unseen)
    student = search.SearchedStudent(arm, 0, search.Looking(2, 2), is_judged=True)
    search.learn_and_look(student, [data], scenes, scenes, path)
    found = json.loads(path.read_text())
    assert list(found["figures"]) == ["2", "4", "6", "8"] and found["judged"] == {"4": figures_of(0.9)}
    assert list(torch.load(path.with_suffix(".pt"), weights_only=True)) == [4]


def test_the_pictures_of_a_repetition_are_of_its_own_students(lessons, unseen, monkeypatch):
    asked = []
    store = SimpleNamespace(student=lambda arm, seed, test: asked.append(seed))
    experiments = SimpleNamespace(scale=replace(sets.QUICK, repetition=3), store=store, test_set=lambda: unseen)
    experiments.arm = lambda name, data: Arm(name, data, SHORT, TASKS)
    experiments.arms = lambda: {"real": lambda: (lessons,), "both": lambda: (lessons, lessons)}
    drawn = [SimpleNamespace(semantic=SimpleNamespace(labels=np.zeros((64, 64), np.uint8)))] * page.SHOWN
    monkeypatch.setattr(page.student, "answers", lambda student, images: drawn[: len(images)])
    (first, *_) = experiments.scale.students
    assert first > 0 and f"(seed {first})" in page.drawn_sheets(experiments)["answers"][1]
    assert asked == [first, first]


class ToldStudents:
    """In place of students that learn: `strong` is the best augmentation, but for ten times real and for depth, and
    0.001 the better rate; the second student of `both` is not there yet.
    """

    def arms(self):
        return set(tuned.ARMS)

    def is_started(self, student):
        return False

    def looks(self, student):
        course, name = student.arm.schedule, student.arm.name
        best = {"strong": 0.6, "mild": 0.5, "none": 0.7 if name == "many" else 0.3}[course.augmentation]
        best += 0.1 * (course.rate == 1e-3) + 0.01 * student.seed
        if student.seed and name == "both":
            return None
        figures = {step: figures_of(0.1 if step == 1500 else best) for step in (1000, 1500)}
        if course.augmentation == "mild":
            figures[1000]["depth"]["absrel"] = 0.1
        return search.StudentLooks(figures, {1000: figures_of(best + 0.1 * (name == "both"))}, 1.0)


def test_every_arm_has_the_best_of_equally_many_courses(lessons):
    scale = replace(sets.QUICK, seeds=2)
    experiments = SimpleNamespace(scale=scale, store=None, test_set=lambda: None)
    experiments.arm = lambda name, data, **facts: Arm(name, data, replace(SHORT, **facts), TASKS)
    experiments.real = lambda count: lessons
    experiments.generated = lambda engine, count: lessons
    arms = tuned.TunedArms(experiments, ("real", "both", "many"), scale.real)
    arms.students = ToldStudents()
    arms.look_for_students()
    found = [arms.best(name, group).title for name in ("real", "many") for group in tuned.CHOSEN_TOGETHER]
    assert found == ["strong, 0.001", "mild, 0.003", "none, 0.001", "mild, 0.003"]
    rows, tried = arms.rows(), arms.tried()
    assert len(tried) == 3 * (3 + 4 + 3) - 2 and arms.missing() == 2  # to a plateau, to compare rates, best courses
    assert tried[0]["looks"][1000]["semantic"] == pytest.approx(60)
    cell = rows["depth"]["arms"]["real"]
    assert cell["steps"] == [1000, 1000] and cell["seeds"] == pytest.approx([0.5, 0.49])
    gain = rows["semantic"]["gains"]["both"]
    assert gain["students"] == 1 and not gain["holds"] and gain["gain"] == pytest.approx(10)
    setting = {"real": 100, "synthetic": 1000, "steps": 1600, "test": 300}
    document = {"rows": rows, "tried": tried, "missing": 2, "setting": setting, "command": "c", "date": "2026-01-01"}
    document["machine"] = {"device": "a CPU", "commit": "0"}
    document = json.loads(json.dumps(document, allow_nan=False))
    front, whole = tuned_page.front([document]), tuned_page.section([document])
    assert "**Not finished:** 2 students are missing" in front and "24,576 captioned scenes" in front
    assert front.count("| **One student of each kind:** ") == len(search.QUESTIONS)
    assert "70.5 ± 0.7 (strong, 0.001; 1,000/1,000)" in whole
    fewer = [{**row, "real": 25} for row in document["tried"]]
    titled = {f"{key}-25": {**row, "title": f"{row['title']}, 25 real"} for key, row in document["rows"].items()}
    fewer = {**document, "tried": fewer, "rows": titled, "missing": 0, "command": "c --real 25"}
    front, whole = tuned_page.front([document, fewer]), tuned_page.section([document, fewer])
    assert front.count("| **One student of each kind:** ") == 2 * len(search.QUESTIONS)
    assert front.index("Semantic segmentation, 25 real") < front.index("Semantic segmentation, 100 real")
    assert "; for rows with 25 real scenes (`c --real 25`, commit 0), on those.\n" in front
    assert "25 real scenes, 1,000 generated images;" in whole and "| 25 | real |" in whole
    repeated = tuned_page.section([document], [{**document, "command": "c --repetition 1"}])
    assert "The same with other images, unlabelled, validation and unseen scenes, and students. `c --rep" in repeated
    assert "gap closed |" in repeated and repeated.count("24,576 captioned scenes") == 2
    scale = replace(scale, repetition=3)
    experiments.scale, arms = scale, tuned.TunedArms(experiments, ("real",), scale.real)
    assert [arms._student("real", tuned.FIRST_COURSES[0], one).seed for one in (None, 0, 1)] == [6, 6, 7]


def test_a_tuned_row_that_does_not_hold_says_so_first():
    cells = {"real": {"seeds": [50.0, 51.0], "mean": 50.5}, "both": {"seeds": [50.0, 53.0], "mean": 51.5}}
    cells["many"] = {"seeds": [60.0, 61.0], "mean": 60.5}
    row = {"title": "T", "figure": "mIoU", "arms": {}, **tuned._verdict(search.QUESTIONS["semantic"], cells)}
    line = dict(zip(*(one if isinstance(one[0], str) else one[0] for one in tuned_page.front_table().cells([row]))))
    assert line["claim"] == "**Does not hold:** T" and line["gap closed"] == "10 %"
    assert line["gain of generated (95 % interval)"].startswith("+1.0 (−")


def test_a_share_of_the_gap_is_over_the_seeds_that_all_its_arms_have():
    cells = {"real": {"seeds": [50.0, 20.0], "mean": 35.0}, "both": {"seeds": [55.0], "mean": 55.0}}
    for many in ([60.0], [60.0, 80.0]):
        cells["many"] = {"seeds": many, "mean": sum(many) / len(many)}
        found = tuned._verdict(search.QUESTIONS["semantic"], cells)["gains"]["both"]
        assert found["gain"] == 5 and found["closed"] == 0.5 and found["students"] == 1
    cells |= {"both": {"seeds": [55.0, 65.0], "mean": 60.0}, "many": {"seeds": [60.0], "mean": 60.0}}
    found = tuned._verdict(search.QUESTIONS["semantic"], cells)["gains"]["both"]
    assert found["gain"] == 25 and found["closed"] == 0.5 and found["students"] == 2


def test_a_strong_view_moves_labels_and_joints_with_the_image(lessons):
    """Where an image has the colour of its labels, its views have, too, but for what other colours change."""
    painted = torch.stack([lessons.semantic * 20] * 3, -1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    view = student_views.framed(replace(lessons, images=painted), 40, torch.Generator().manual_seed(3))
    shown = (view.images[:, ::2, ::2, 0] * 255 / 20).round().long()
    is_known = view.semantic != IGNORED
    assert 0.5 < is_known.float().mean() < 0.99 and (shown == view.semantic)[is_known].float().mean() > 0.97
    people = VOCABULARY.classes.index("person")
    inside = [
        int(view.semantic[k, int(y), int(x)]) == people
        for k, joints in enumerate(view.joints)
        for x, y, is_there in joints.tolist()
        if is_there
    ]
    assert len(inside) > 20 and np.mean(inside) > 0.6
    strongly = strong(lessons, 16, torch.Generator().manual_seed(3))
    assert strongly.images.shape == (16, 3, SIDE, SIDE) and 0 < strongly.images.std() < 1
    assert not torch.equal(
        strongly.semantic, student_views.framed(lessons, 16, torch.Generator().manual_seed(3)).semantic
    )


def test_the_newest_claims_are_found_beside_other_results(tmp_path):
    from bench.report import results

    for name, date in (("a", "2026-01-01"), ("b", "2026-01-02")):
        results.ResultFile(tmp_path / f"{name}.claims.json", document() | {"date": date, "parts": {}}).save()
    assert results.newest("claims", tmp_path).name == "b.claims.json" and results.newest("cpu", tmp_path) is None
