"""Doubtful samples are recorded, set aside and replaced, and the same samples come out whatever happens on the way."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchless
import troubled
from rendered import rendered
from skips import long_test
from test_ledger import tree
from torchless import DOUBT

from datasetdm_fast import audit as audit_command
from datasetdm_fast import filter, generate
from datasetdm_fast.command_line.run_report import describe_start
from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.data import DomainDistance, Instances, Request, SemanticMap, Trust
from datasetdm_fast.engine.labels.trust import (
    named_map,
    trust_of,
    with_domain,
    with_unprompted,
    without_doubtful,
    without_unsure,
)
from datasetdm_fast.engine.loop.prompts import class_and_turn
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.jobs.writing import Quota, Result, result_of
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.goal import Goal, check_scored, goal_of
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.runs.workers import spawn
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.worker import Callbacks

NUMBER, BATCH = 12, 4
CLASSES = ("background", "table", "ball", "star", "cube")


def scene(semantic, *instances):
    """Labels of 100 pixels: a row of class numbers, and instances as pairs of class number and columns."""
    masks = np.zeros((len(instances), 10, 10), bool)
    for mask, (_, columns) in zip(masks, instances, strict=True):
        mask[:, columns] = True
    kinds, scores = np.array([kind for kind, _ in instances], np.int64), np.full(len(instances), 0.8, np.float32)
    numbers = np.repeat(np.array([semantic], np.uint8), 10, 0)
    return {
        "semantic": SemanticMap(numbers, np.full((10, 10), 0.9, np.float32), CLASSES),
        "instance": Instances(masks, kinds, scores, CLASSES[2:]),
    }


RIGHT = scene([0, 0, 2, 2, 2, 1, 1, 3, 3, 3], (0, slice(2, 5)), (1, slice(7, 10)))
SWAPPED = scene([0, 0, 2, 2, 2, 1, 1, 3, 3, 3], (1, slice(2, 5)), (0, slice(7, 10)))


def test_the_rule():
    assert trust_of(("ball", "star"), RIGHT) == Trust(confidence=0.85)
    lacking = trust_of(("ball", "star", "cube"), RIGHT)
    assert lacking.missing == ("cube",)
    assert lacking.reasons == ("cube is in the prompt, but not in semantic or instance",)
    faint = {**RIGHT, "instance": replace(RIGHT["instance"], scores=np.float32([0.8, 0.31]))}
    assert trust_of(("ball", "star"), faint).reasons == (
        "star is in the prompt, but not in instance (its score 0.31 is below 0.4)",
    )
    assert trust_of(("ball",), RIGHT).unnamed == ("star",)
    assert trust_of(("ball",), RIGHT, "a ball beside two stars").is_trusted, "not asked for, but in the text"
    assert trust_of((), RIGHT).is_trusted, "a prompt that names no thing says nothing about things"
    apart = scene([0, 0, 2, 2, 2, 1, 1, 3, 3, 3], (0, slice(2, 5)), (1, slice(9, 10)))
    assert trust_of(("ball", "star"), apart).reasons == (
        "star in semantic overlaps star in instance with an IoU of 0.33",
    )
    found = trust_of(("ball", "star"), SWAPPED)
    assert found.disagreeing == 1 and found.reasons == ("100% of the pixels of things have two names",)


def test_things_that_are_seen_without_the_prompt_make_a_sample_doubtful():
    trusted = Trust(confidence=0.9)
    found = with_unprompted(trusted, ("ball",), RIGHT, "a ball")
    assert found.reasons == ("without the prompt, 50% of the pixels of things are star, which it does not name",)
    less = scene([0, 2, 2, 3, 3, 3, 3, 3, 3, 0], (0, slice(1, 3)), (1, slice(3, 6)))  # 8 columns, 3 agreed on as stars
    assert with_unprompted(trusted, ("ball",), less, "a ball").reasons == (found.reasons[0].replace("50%", "38%"),)
    several = scene([2] * 7 + [3, 3, 4], (0, slice(0, 7)), (1, slice(7, 9)), (2, slice(9, 10)))
    told = with_unprompted(trusted, ("ball",), several, "a ball").reasons[0]
    assert told == found.reasons[0].replace("50%", "30%"), "what is on an eighth of the pixels is named"
    alone = scene([3] * 4 + [0] * 6, (1, slice(0, 4)), (0, slice(4, 10)))  # six columns of one label alone
    assert with_unprompted(trusted, ("ball",), alone, "a ball").reasons == (found.reasons[0].replace("50%", "40%"),)
    for stars, reasons in ((25, ()), (26, (found.reasons[0].replace("50%", "26%"),))):  # of 100 pixels of things
        numbers = np.repeat(np.uint8([3, 2]), (stars, 100 - stars)).reshape(10, 10)
        both = {**RIGHT, "semantic": replace(RIGHT["semantic"], labels=numbers)}
        both["instance"] = replace(RIGHT["instance"], masks=np.stack([numbers == 2, numbers == 3]))
        assert with_unprompted(trusted, ("ball",), both, "a ball").reasons == reasons
    assert with_unprompted(trusted, ("ball", "star"), RIGHT, "a ball and a star") == trusted
    assert with_unprompted(trusted, ("ball",), RIGHT, "a ball and two stars") == trusted, "in the text"
    assert with_unprompted(trusted, (), RIGHT, "a street") == trusted, "it names no thing"


def test_decoders_that_do_not_agree_or_are_unsure_without_the_prompt_doubt_nothing_by_it():
    """As those of few pictures, which read well only what the prompt names."""
    trusted = Trust(confidence=0.9)
    assert with_unprompted(trusted, ("ball",), SWAPPED, "a ball") == trusted
    unsure = RIGHT["instance"].scores * 0 + np.float32(0.79)
    assert (
        with_unprompted(trusted, ("ball",), {**RIGHT, "instance": replace(RIGHT["instance"], scores=unsure)}, "a ball")
        == trusted
    )


def test_instances_are_counted_against_the_things_that_a_prompt_names():
    two = {"instance": scene([0] * 10, (0, slice(0, 3)), (0, slice(5, 8)))["instance"]}
    assert trust_of(("ball",), two, "a red ball on a table").reasons == (
        "instance has 2 instances of ball, the prompt names 1",
    )
    for text in ("two balls", "a ball and a blue ball", "balls", "a row of balls", "the ball"):
        assert trust_of(("ball",), two, text).is_trusted, text
    assert not trust_of(("ball",), two, "a ball and two blue balls").is_trusted
    one = {"instance": scene([0] * 10, (0, slice(0, 3)))["instance"]}
    assert trust_of(("ball",), one, "two balls").reasons == ("instance has 1 instance of ball, the prompt names 2",)


def test_a_class_is_shown_from_a_250th_of_the_picture_on():
    for width, is_there in ((25, True), (26, False)):
        labels = scene([0] * width)["semantic"].labels
        labels[0, 0] = 2  # one of 250 pixels, and of 260
        shown = SemanticMap(labels, np.ones(labels.shape, np.float32), CLASSES)
        assert trust_of(("ball",), {"semantic": shown}).missing == (() if is_there else ("ball",))


def test_a_pixel_of_two_instances_is_of_the_surer_one_and_shares_are_of_all_pixels():
    masks = np.zeros((3, 2, 5), bool)
    masks[0, :, :3] = masks[1, :, 2:4] = masks[2] = True
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        scores, kinds = np.float32([0.5, 0.9, 0.3])[order], np.array([0, 1, 2])[order]
        found = named_map(Instances(masks[order], kinds, scores, ("ball", "star", "cube")))
        assert found.shares() == {"": 0.2, "ball": 0.4, "star": 0.4}  # the cube is too unsure to be shown
    for score, shown in ((0.4, {"ball": 1.0}), (0.399, {"": 1.0})):
        assert named_map(Instances(masks[2:], np.array([0]), np.float32([score]), ("ball",))).shares() == shown
    ignored = SemanticMap(np.uint8([[0, 1, 255, 255]]), np.ones((1, 4), np.float32), ("wall", "ball"))
    assert named_map(ignored).shares() == {"wall": 0.25, "ball": 0.25}


def test_an_instance_counts_from_the_score_on_at_which_it_is_shown():
    for score, is_there in ((0.4, True), (0.399, False)):
        one = replace(scene([0] * 10, (0, slice(0, 5)))["instance"], scores=np.float32([score]))
        assert trust_of(("ball",), {"instance": one}).missing == (() if is_there else ("ball",))


def test_a_small_instance_is_missing_but_not_called_unsure():
    masks = np.zeros((2, 20, 20), bool)
    masks[:, 0, 0] = True
    small = Instances(masks, np.array([0, 0]), np.float32([0.31, 0.8]), CLASSES[2:])
    assert trust_of(("ball",), {"instance": small}, "balls").reasons == ("ball is in the prompt, but not in instance",)


def test_a_class_without_an_instance_is_missing_and_not_counted_too():
    one = {"instance": scene([0] * 10, (0, slice(0, 5)))["instance"]}
    assert trust_of(("ball", "cube"), one, "a ball beside two cubes").reasons == (
        "cube is in the prompt, but not in instance",
    )


def test_pixels_of_two_names_are_a_share_of_those_that_either_label_calls_a_thing():
    assert trust_of((), scene([2, 2, 2, 2, 0, 0, 0, 0, 0, 0], (1, slice(3, 5)))).disagreeing == 0.2  # 1 of 5 columns


def test_labels_may_disagree_on_a_tenth_of_the_pixels_of_things():
    for columns, reasons in ((10, ()), (11, ("11% of the pixels of things have two names",))):
        labels = scene([2] * 100)["semantic"], scene([0] * 10)["instance"]
        masks = np.zeros((2, 10, 100), bool)
        masks[0, :, columns:], masks[1, :, :columns] = True, True
        things = replace(labels[1], masks=masks, class_ids=np.array([0, 1]), scores=np.float32([0.8, 0.8]))
        assert trust_of((), {"semantic": labels[0], "instance": things}).reasons == reasons


def test_a_class_of_map_and_instances_has_to_overlap_by_four_fifths():
    for columns, is_apart, is_wider in ((80, False, False), (79, True, False), (80, False, True), (79, True, True)):
        mask = np.zeros((1, 10, 100), bool)
        mask[..., : 100 if is_wider else columns] = True
        row = [2] * columns + [0] * (100 - columns) if is_wider else [2] * 100
        things = Instances(mask, np.array([0]), np.float32([0.8]), CLASSES[2:])
        reasons = trust_of(("ball",), {"semantic": scene(row)["semantic"], "instance": things}).reasons
        assert reasons == (("ball in semantic overlaps ball in instance with an IoU of 0.79",) if is_apart else ())


def test_a_sample_is_in_its_domain_up_to_a_distance_of_one():
    at, above = 1.0, 1.001
    assert with_domain(Trust(), {"semantic": DomainDistance(at, {"ball": at}, at)}) == Trust(domain=1.0)
    picture = with_domain(Trust(), {"semantic": DomainDistance(above, {"ball": above}, at)})
    assert picture == Trust(domain=1.001, reasons=("the picture is unlike those that semantic learned from",))
    thing = with_domain(Trust(), {"semantic": DomainDistance(at, {"ball": above, "cube": at}, at)})
    reasons = ("ball in semantic is unlike those in the pictures it learned from",)
    assert thing == Trust(domain=1.001, reasons=reasons)
    model = with_domain(Trust(), {"semantic": DomainDistance(0.5, {}, above)})
    assert model == Trust(domain=1.001, reasons=("the model does not draw what semantic learned from",))


def test_doubtful_pixels():
    def row(*said):
        return without_doubtful(*said)["semantic"].labels[0].tolist()

    assert row(("ball", "star"), RIGHT) == RIGHT["semantic"].labels[0].tolist()
    assert row(("ball", "star"), SWAPPED) == [0, 0, 255, 255, 255, 1, 1, 255, 255, 255]
    assert row(("ball",), RIGHT) == [0, 0, 2, 2, 2, 1, 1, 255, 255, 255]
    assert row(("ball",), RIGHT, "a ball and a star") == RIGHT["semantic"].labels[0].tolist()


def test_unsure_pixels():
    sure = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    sure[5, 5] = 0.5
    found = without_unsure({"semantic": replace(RIGHT["semantic"], confidence=sure)}, 0.5)["semantic"]
    assert ((found.labels == 255) == (sure < 0.5)).all()


def test_background_is_not_unsure_where_attention_shows_no_class():
    """The confidence of attention is the largest value of a class, which is small over background."""
    label = SemanticMap(np.uint8([[0, 0, 1, 1, 255]]), np.float32([[0.0, 0.3, 0.5, 0.7, 0.4]]), ("background", "ball"))
    found = without_unsure({"attention": label, "semantic": label}, 0.6)
    assert found["attention"].labels.tolist() == [[0, 0, 255, 1, 255]]
    assert found["semantic"].labels.tolist() == [[255, 255, 255, 1, 255]]


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch):
    torchless.install(monkeypatch.setattr)


def run(out: Path, *arguments: str) -> int:
    flags = ["--number", str(NUMBER), "--batch-size", str(BATCH), "--out", str(out), "--quiet"]
    return generate.main([*flags, *arguments])


def ids(path: Path, **options: bool) -> list[int]:
    return [sample.row.request.index for sample in open_run(path, **options)]


def is_doubtful(index: int) -> bool:
    return torchless.drawn(Request(index, "a ball", index), ()).is_doubtful


def test_all_samples_are_kept_and_counted(tmp_path, capsys):
    path, doubtful = tmp_path / "run", [k for k in range(NUMBER) if is_doubtful(k)]
    assert generate.main(["--number", str(NUMBER), "--out", str(path)]) == 0
    told = f"{len(doubtful)} of {NUMBER} samples are doubtful: filter --where 'trust == 1' leaves them out"
    assert told in capsys.readouterr().err and ids(path) == [*range(NUMBER)]
    assert [sample.row.request.index for sample in open_run(path) if sample.trust == DOUBT] == doubtful
    lines = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert [k for k, line in enumerate(lines) if line["trust"]["reasons"] == [*DOUBT.reasons]] == doubtful
    assert f"{len(doubtful)} of the samples are doubtful" in (path / "README.md").read_text()
    assert f'"doubtful":{len(doubtful)},' in (path / "gallery" / "run.js").read_text()
    assert filter.main([str(path), "--where", "trust == 1", "--quiet"]) == 0
    assert ids(path, kept=True) == [k for k in range(NUMBER) if k not in doubtful] and audit(path).findings == []


def test_one_doubtful_sample_is_told_in_the_singular_and_none_as_none(tmp_path, monkeypatch, capsys):
    trusted, drawn = Trust(), torchless.drawn
    monkeypatch.setattr(torchless, "drawn", lambda request, tasks: replace(drawn(request, tasks), trust=trusted))
    assert generate.main(["--number", "3", "--out", str(tmp_path / "good")]) == 0
    assert "None of the samples is doubtful" in (tmp_path / "good" / "README.md").read_text()
    monkeypatch.setattr(
        torchless,
        "drawn",
        lambda request, tasks: replace(drawn(request, tasks), trust=DOUBT if request.index == 1 else trusted),
    )
    assert generate.main(["--number", "3", "--batch-size", "1", "--out", str(tmp_path / "run")]) == 0
    told = "1 of 3 samples is doubtful: filter --where 'trust == 1' leaves it out"
    assert told in capsys.readouterr().err
    assert (
        "1 of the samples is doubtful, as its labels contradict its prompt"
        in (tmp_path / "run" / "README.md").read_text()
    )


def test_prompts_that_name_nothing_are_told_before_the_run(tmp_path, capsys):
    prompts, told = tmp_path / "prompts.txt", "prompts    {} none of the classes of the labels: wall, table, ball"
    for lines, words in (("a ball\na cat\n", "1 of 2 names"), ("a dog\na cat\na star\n", "2 of 3 name")):
        prompts.write_text(lines)
        assert generate.main(["--prompts", str(prompts), "--number", "4", "--dry-run"]) == 0
        assert told.format(words) in capsys.readouterr().err
    assert generate.main(["--prompts", "a ball", "--number", "1", "--dry-run"]) == 0
    plan = capsys.readouterr().err
    assert "prompts  " not in plan and "seed 0\n" in plan


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run that keeps trusted samples alone, made by one process without interruption."""
    path = tmp_path_factory.mktemp("trust") / "kept"
    with pytest.MonkeyPatch.context() as patch:
        torchless.install(patch.setattr)
        assert run(path, "--keep", "trusted") == 0
    return path


def test_a_run_goes_on_until_enough_are_trusted(kept):
    wanted = [k for k in range(100) if not is_doubtful(k)][:NUMBER]
    others = [k for k in range(wanted[-1]) if is_doubtful(k)]
    assert ids(kept) == wanted and ids(kept, doubtful=True) == others and others
    assert all(sample.seed == sample.row.request.index for sample in open_run(kept))
    assert {path.stem for path in (kept / "images").iterdir()} == {f"{k:08d}" for k in wanted}
    assert {path.stem for path in (kept / "doubtful" / "semantic").iterdir()} == {f"{k:08d}" for k in others}
    coco = json.loads((kept / "instances.json").read_text())
    assert [image["id"] for image in coco["images"]] == wanted
    aside = open_run(kept, doubtful=True)[0]
    assert aside.image.any() and aside.semantic is not None and aside.row.reason == DOUBT.reasons[0]
    report = audit(kept)
    assert report.findings == [] and report.is_complete and report.done == NUMBER


def test_the_doubtful_samples_of_a_run_are_searched_like_the_others(kept):
    run = open_run(kept, doubtful=True)
    word = run[0].classes[0]
    assert [row.request.id for row in run.rows(())] == [sample.id for sample in run]
    assert [sample.id for sample in run.where(classes=[word])] == [each.id for each in run if word in each.classes]


def test_stopped_anywhere_and_damaged_it_becomes_the_same(kept, tmp_path, monkeypatch):
    path, before = tmp_path / "run", tree(kept)
    for _ in range(9):
        assert run(path, "--keep", "trusted", "--limit", "3") == 0
    assert tree(path) == before and open_run(path).is_complete
    id = open_run(path, doubtful=True)[0].id
    (path / "doubtful" / "images" / f"{id}.png").unlink()
    assert audit(path).findings[0].place == f"doubtful/images/{id}.png"
    assert run(path, "--only", id) == 0 and tree(path) == before


def test_a_limit_counts_what_is_rejected_too():
    plan, config = SimpleNamespace(number=6, most=60), {"keep": "trusted"}
    job = SimpleNamespace(document={"config": config}, plan=plan, limit=3)
    ledger = SimpleNamespace(indices_between=lambda first, stop: {0}, tally=lambda number, classes: [(1, 0)])
    quota = Quota(job, ledger)
    assert quota.missing() == [1, 2, 3]
    made = [replace(rendered(k, 16), rejection="doubtful" if k == 1 else "") for k in (0, 1, 2, 3, 4)]
    assert [sample.request.index for sample in quota.take(made)] == [1, 2, 3] and quota.missing() == []


@long_test  # the test of accepted samples has ranks, too
def test_any_number_of_ranks_makes_the_same(kept, tmp_path):
    config = RunConfig(out=str(tmp_path / "run"), number=NUMBER, batch_size=BATCH, keep="trusted", quiet=True)
    places = [Place({"OMP_NUM_THREADS": "1", troubled.TROUBLE: "dies"}, 1), Place({"OMP_NUM_THREADS": "1"}, 1)]
    heard: list[int] = []
    callbacks = Callbacks(describe_start, on_start=troubled.install, on_commit=heard.append)
    result = spawn.run_spawned(places, read_spec(config), callbacks)
    assert result.is_complete and sum(heard) == NUMBER and result.made == NUMBER
    assert tree(tmp_path / "run") == tree(kept)


def test_it_gives_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchless, "Trust", lambda: DOUBT)
    assert run(tmp_path / "run", "--keep", "trusted") == 4
    assert f"0 of {10 * NUMBER} samples are trusted, {NUMBER} were requested" in capsys.readouterr().err
    assert run(tmp_path / "run", "--keep", "trusted") == 4


@pytest.mark.parametrize(
    ("accept", "classes", "said"),
    [
        ("score > 0.5", {"depth": None, "instance": ("ball",)}, ""),
        ("score > 0.5", {"instance": ("ball",), "depth": None}, ""),
        ("score > 0.5", {"depth": None}, "no sample of depth has the score score"),
        ("agreement > 0.5", {"semantic": ("background", "ball"), "instance": ("ball",)}, ""),
        (
            "agreement > 0.5",
            {"semantic": ("background", "ball"), "attention": ("background", "cube")},
            "the score agree",
        ),
        (
            "agreement > 0.5",
            {"depth": None, "instance": ("ball",)},
            "no sample of depth, instance has the score agreem",
        ),
        ("presence > 0.5", {"depth": None}, ""),
    ],
)
def test_a_condition_is_on_scores_that_samples_of_these_labels_have(accept, classes, said):
    tables = {label: {} if words is None else {"classes": list(words)} for label, words in classes.items()}
    with pytest.raises(Refused, match=f"--accept: .*{said}") if said else nullcontext():
        check_scored({"config": {"accept": accept}, "labels": tables})


def test_too_few_samples_are_told_by_what_they_lack():
    goal, missing = Goal(4, 40), {"": 1}
    for accept, told in (
        ("", "1 of 40 samples are trusted, 4 were"),
        ("score > 0", "1 of 40 samples are accepted, 4 were"),
    ):
        with pytest.raises(GateFailed, match=told):
            Result("run", 4, 1, 0, 0, goal=goal, missing=missing, accept=accept).check()
    several = Goal(4, 40, ("ball", "cube"))
    with pytest.raises(GateFailed, match=r"fewer than 4 of 40 samples with score > 0 of these classes: cube \(3\)"):
        Result("run", 8, 7, 0, 0, goal=several, missing={"cube": 3}, accept="score > 0").check()


BY_CLASS = {"task": ("semantic", "instance"), "classes": ("ball", "star"), "per_class": 3, "accept": "presence >= 0.5"}
LINE = [
    word
    for name, value in BY_CLASS.items()
    for word in (f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, tuple) else str(value))
]


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    """A run that counts the accepted samples of each class, made by one process without interruption."""
    path = tmp_path_factory.mktemp("accept") / "accepted"
    with pytest.MonkeyPatch.context() as patch:
        torchless.install(patch.setattr)
        assert run(path, *LINE) == 0
    return path


def test_of_a_class_more_are_made_for_those_that_were_quarantined_up_to_a_bound():
    goal = Goal(3, 5, ("a", "b"))
    assert [goal.stop(count) for count in (0, 1, 2, 9)] == [3, 4, 5, 5]
    assert [*goal.required_indices((0, 1))] == [0, 1, 2, 3, 4, 5, 9]
    assert [*goal.required_indices((2, 0))] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [class_and_turn(index, 3, 2) for index in (2, 3, 7, 9)] == [(0, 2), (1, 0), (0, 4), (1, 3)]
    config = {"accept": "score > 0", "per_class": 3, "classes": ["a", "b"], "most_tries": 5}
    assert goal_of(config, 6) == Goal(3, 15, ("a", "b")) and goal_of(config | {"per_class": 0}, 6) == Goal(6, 30)
    assert goal_of({"classes": ["a", "b"]}, 6) == Goal(6, 6)
    assert goal.is_reached([(3, 0), (4, 1)]) and not goal.is_reached([(3, 0), (3, 1)])
    assert goal.missing([(5, 3), (4, 1)]) == {"a": 2}
    assert goal.missing([(4, 2), (4, 1)]) == {}
    assert goal.missing([(5, 2), (5, 1)]) == {}  # no more may be made, and there are enough


@pytest.mark.parametrize(("accept", "doubtful"), [("", 7), ("score > 0", 2)])
def test_doubtful_samples_of_a_result_are_those_beside_it_where_a_condition_accepts_the_others(accept, doubtful):
    ledger = SimpleNamespace(
        tally=lambda number, classes: [(4, 0)],
        count=lambda status=DONE: {DONE: 4, DOUBTFUL: 2}[status],
        count_trust=lambda: (7, 1, 4),
        quarantined_by_reason=lambda: {"NaN": [5, 6], "black": [8]},
    )
    document = {"plan": {"number": 4}, "config": {"accept": accept}}
    result = result_of("run", document, 3, ledger, 2)
    found = (result.number, result.done, result.made, result.quarantined, result.doubtful, result.outside)
    assert found == (4, 4, 2, 3, doubtful, 1) and result.is_complete and result.reasons == ("NaN", "black")


def test_accepted_samples_are_counted_by_class_and_no_more_are_made(accepted):
    samples, others = open_run(accepted), open_run(accepted, doubtful=True)
    assert samples.is_complete and audit(accepted).findings == []
    for place, name in enumerate(BY_CLASS["classes"]):
        mine = [sample for sample in samples if sample.classes == (name,)]
        indices = sorted(
            sample.row.request.index for run in (samples, others) for sample in run if sample.classes == (name,)
        )
        assert len(mine) == 3 and indices[-1] == mine[-1].row.request.index, "the last one made is the third accepted"
        assert indices == [k for k in range(indices[-1] + 1) if k // 3 % 2 == place], "none of the class is left out"
    assert len(others) > 0 and {sample.row.reason for sample in others} == {"presence is 0, expected >= 0.5"}
    assert "Samples with `presence >= 0.5`" in (accepted / "README.md").read_text()


def test_the_scores_are_those_of_the_filter(accepted, tmp_path):
    path = shutil.copytree(accepted, tmp_path / "run")
    assert filter.main([str(path), "--where", BY_CLASS["accept"], "--quiet"]) == 0
    assert ids(path, kept=True) == ids(path)


def test_stopped_anywhere_it_accepts_the_same(accepted, tmp_path):
    for _ in range(40):
        assert run(tmp_path / "run", *LINE, "--limit", "4") == 0
        if open_run(tmp_path / "run").is_complete:
            break
    assert tree(tmp_path / "run") == tree(accepted)


def test_any_number_of_ranks_accepts_the_same(accepted, tmp_path):
    config = RunConfig(out=str(tmp_path / "run"), number=NUMBER, batch_size=BATCH, quiet=True, **BY_CLASS)
    places = [Place({"OMP_NUM_THREADS": "1", troubled.TROUBLE: "dies"}, 1), Place({"OMP_NUM_THREADS": "1"}, 1)]
    limited = replace(config, limit=9)
    assert not spawn.run_spawned(
        places[1:], read_spec(limited), Callbacks(describe_start, on_start=troubled.install)
    ).is_complete
    assert spawn.run_spawned(
        places, read_spec(config), Callbacks(describe_start, on_start=troubled.install)
    ).is_complete
    assert tree(tmp_path / "run") == tree(accepted)


def test_it_tells_the_class_that_the_model_cannot_make(tmp_path, capsys):
    """The arithmetic shows no instance of the last classes."""
    line = ["--task", "instance", "--classes", "ball,person", "--per-class", "2", "--most-tries", "4"]
    assert run(tmp_path / "run", *line, "--accept", "presence == 1") == 4
    told = "fewer than 2 of 8 samples with presence == 1 of these classes: person (0)"
    assert told in capsys.readouterr().err and len(ids(tmp_path / "run")) == 2
    assert run(tmp_path / "run", *line, "--accept", "presence == 1") == 4
    assert audit_command.main([str(tmp_path / "run"), "--quiet"]) == 0
    assert "2 of 4 samples (complete: --most-tries allows no others for 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--accept", "scor > 0.5"], "--accept: 'scor' is not a score (did you mean score?)"),
        (["--accept", "clip > 0.5"], "--accept: 'clip' is not a score"),
        (["--accept", ""], "--accept: no value was given"),
        (["--accept", "agreement > 0", "--task", "semantic"], "no sample of semantic has the score agreement"),
        (["--accept", "score > 0", "--task", "depth"], "no sample of depth has the score score"),
        (["--most-tries", "3"], "--most-tries 3: it has no effect, as no sample is quarantined"),
        (["--ignore-below", "1.5"], "--ignore-below 1.5: expected 0 to 1"),
        (["--keep", "trusted", "--prompts", '{"prompt": "a ball", "seed": 3}'], "prompts with seeds of their own"),
    ],
)
def test_what_is_refused(tmp_path, capsys, flags, told):
    if "--prompts" in flags:
        (tmp_path / "prompts.jsonl").write_text(flags[-1])
        flags = [*flags[:-1], str(tmp_path / "prompts.jsonl")]
    assert run(tmp_path / "run", *flags) == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_one_map_calls_background_is_no_thing_of_another_name():
    first, second = (
        SemanticMap(np.uint8([row] * 4), np.ones((4, 4), np.float32), CLASSES) for row in ([0, 0, 2, 3], [2, 2, 2, 3])
    )
    labels = {"semantic": first, "semantic:other": second}
    assert trust_of(("ball", "star"), labels).disagreeing == 0
    assert without_doubtful(("ball", "star"), labels)["semantic"].labels.tolist() == first.labels.tolist()
