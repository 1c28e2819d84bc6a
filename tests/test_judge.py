"""bench.world.judge: what its nets see of a picture is held against the caption thing by thing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from skips import long_test

from bench.machine.machine import ROOT
from bench.world import judge, judge_labels, judge_net, marks
from bench.world.distance import frechet
from bench.world.things_seen import follows, shares, things_seen
from bench.world.worlds import WORLDS
from datasetdm_fast.data import SemanticMap, Trust
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import Refused

COLOURS = tuple(world.COLOURS)


def painted(*things: tuple[str, str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Class and colour maps with a square of 12 x 12 for each (kind, colour, first column)."""
    classes, colours = np.zeros((64, 64), int), np.zeros((64, 64), int)
    for kind, colour, column in things:
        classes[20:32, column : column + 12] = world.CLASSES.index(kind)
        colours[20:32, column : column + 12] = 1 + COLOURS.index(colour)
    return classes, colours


def seen(*things: tuple[str, str, int]) -> list:
    return things_seen(*painted(*things), world.CLASSES, COLOURS)


def scene_of(*things: tuple[str, str]) -> world.TableTop:
    placed = tuple(world.Thing(kind, colour, k / 10, 1.5, 0.5) for k, (kind, colour) in enumerate(things))
    return world.TableTop(placed, "grey", "day")


ASKED = scene_of(("ball", "red"), ("cube", "blue"))


@pytest.mark.parametrize(
    "things, wrong",
    [
        ([("ball", "red", 4), ("cube", "blue", 30)], set()),
        ([("cube", "blue", 4), ("ball", "red", 30)], {"order"}),
        ([("ball", "blue", 4), ("cube", "red", 30)], {"colours", "order"}),
        ([("ball", "red", 4), ("cube", "green", 30)], {"colours", "order"}),
        ([("ball", "red", 4)], {"things", "colours", "order", "number"}),
        ([("ball", "red", 4), ("cone", "blue", 30)], {"things", "colours", "order"}),
        ([("ball", "red", 4), ("cube", "blue", 20), ("cube", "white", 44)], {"number"}),
    ],
    ids=["right", "swapped places", "swapped colours", "another colour", "one lacks", "another kind", "one too many"],
)
def test_a_picture_follows_its_caption_in_things_colours_order_and_number(things, wrong):
    assert {name for name, holds in follows(seen(*things), ASKED).items() if not holds} == wrong


def test_two_cubes_that_touch_are_told_apart_by_their_colours():
    found = seen(("cube", "red", 10), ("cube", "blue", 22))
    assert [(one.kind, one.colour, one.x) for one in found] == [("cube", "red", 15.5), ("cube", "blue", 27.5)]


def test_a_spot_of_another_colour_and_a_crumb_of_another_kind_are_no_things():
    classes, colours = painted(("ball", "red", 10))
    colours[20:24, 10:16] = 1 + COLOURS.index("green")
    classes[50:55, 50:55] = world.CLASSES.index("star")
    assert [(one.kind, one.colour) for one in things_seen(classes, colours, world.CLASSES, COLOURS)] == [
        ("ball", "red")
    ]


def test_two_of_a_kind_ask_for_two():
    twins = scene_of(("cube", "red"), ("cube", "red"))
    assert not follows(seen(("cube", "red", 10)), twins)["things"]
    assert all(follows(seen(("cube", "red", 10), ("cube", "red", 40)), twins).values())


@pytest.mark.parametrize("name", WORLDS)
def test_the_truth_of_renders_follows_their_captions(name):
    own = WORLDS[name]
    scenes = judge.asked_scenes(own, 4_500_000, 20)
    assert [len(scene.things) for scene in scenes[:8]] == [1, 2, 3, 4, 1, 2, 3, 4]
    views = [own.render(scene, 128) for scene in scenes]
    maps = [(judge_net.class_map(own, view), judge_net.colour_map(own, view)) for view in views]
    pictures = [things_seen(*both, own.classes, tuple(own.colours)) for both in maps]
    rows = shares(pictures, scenes)
    assert rows[1] == {"things": 1.0, "colours": 1.0, "order": 1.0, "number": 1.0}
    assert min(rows[2].values()) >= 0.8  # one thing may hide another
    others = shares(pictures, [*scenes[4:], *scenes[:4]])
    assert max(others[count]["colours"] for count in others) <= 0.2


def test_the_distance_of_two_gaussians_is_what_the_formula_says():
    one = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(frechet(one, one)) < 1e-9
    assert frechet(one + torch.tensor([3.0, 0.0, 4.0]), one) == pytest.approx(25, rel=1e-9)
    assert frechet(3 * (one - one.mean(0)), one - one.mean(0)) == pytest.approx(4 * one.var(0).sum().item(), rel=1e-9)


@long_test
def test_the_program_judges_pictures_renders_and_their_distance(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge_net, "RENDERS", 24)
    monkeypatch.setattr(judge_net, "TESTED", 4)
    out = tmp_path / "judged"
    command = ["--out", str(out), "--number", "3", "--steps", "2", "--judge-steps", "2", "--sampler", "ddim"]
    assert judge.main(command) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert json.loads((out / "judge.json").read_text()) == result
    assert result["pictures"] == 12 and list(result["generated"]) == list(result["renders"]) == ["1", "2", "3", "4"]
    assert set(result["frechet"]) == {"renders", "renders through the autoencoder", "generated"}
    assert "| renders | 4 |" in told.err and (out / "contact.png").exists()
    assert judge.main(command) == 0
    again = capsys.readouterr()
    assert "loss" not in again.err  # the nets are kept
    assert json.loads(again.out) == result


def test_one_picture_of_each_is_refused_as_there_are_no_other_captions(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        judge.main(["--out", str(tmp_path), "--number", "1"])
    assert end.value.code == 2 and "at least 2" in capsys.readouterr().err


def test_a_colour_map_gives_every_thing_the_colour_of_its_caption():
    own = WORLDS["demo"]
    scene = own.sample_scene(4_500_001, count=2)
    view = own.render(replace(scene, things=tuple(replace(one, colour="white") for one in scene.things)), 64)
    assert set(np.unique(judge_net.colour_map(own, view))) == {0, 1 + COLOURS.index("white")}


def test_a_run_that_is_not_there_is_refused_before_a_net_is_trained(tmp_path):
    with pytest.raises(Refused, match="not a run folder"):
        judge_labels.main([str(tmp_path / "none"), "--judged", str(tmp_path / "judged")])
    assert not (tmp_path / "judged").exists()


def test_shares_of_nothing_are_left_open():
    """As of pictures that show none of the things they name, or of a run none of whose pictures is wrong."""
    shape = (16, 16)
    label = SemanticMap(np.zeros(shape, np.uint8), np.ones(shape, np.float32), world.CLASSES)
    picture = judge_labels.JudgedPicture(
        ("ball",), {"semantic": label, "instance": label}, np.zeros(shape, int), np.ones(shape, bool), Trust()
    )
    assert judge_labels.figures([picture], "semantic") == {"found": None, "precision": 0.0, "swapped": 0.0}
    assert list(judge_labels.table({"generated": [picture]}))[-1] == "| generated, 1 | instance | – | 0.0 % | 0.0 % |"
    assert judge_labels.share_of([True, False]) == 0.5


def test_renders_are_asked_for_all_that_their_captions_name(monkeypatch):
    first = next(seed for seed in range(900_000, 901_000) if len(world.sample_scene(seed).things) == 3)
    monkeypatch.setattr(judge_labels, "RENDERS", first)
    (picture,) = judge_labels.of_renders(1)
    assert set(picture.named) == {thing.kind for thing in world.sample_scene(first).things}
    assert not picture.trust.unnamed


def labelled(seen: np.ndarray, shown: np.ndarray, trust: Trust) -> judge_labels.JudgedPicture:
    """A picture of these classes whose two labels show those."""
    labels = {kind: SemanticMap(shown, np.ones(shown.shape, np.float32), world.CLASSES) for kind in judge_labels.KINDS}
    return judge_labels.JudgedPicture(("ball",), labels, seen, np.ones(seen.shape, bool), trust)


def test_marks_are_held_against_the_truth_of_their_pictures():
    """A right label that is trusted, half of a thing that is doubtful, and a thing for another that is trusted."""
    ball, cube = world.CLASSES.index("ball"), world.CLASSES.index("cube")
    seen = np.zeros((40, 40), np.uint8)
    seen[:20, :20] = ball
    half, other = seen.copy(), np.where(seen == ball, cube, 0).astype(np.uint8)
    half[:10] = 0
    doubt = Trust(confidence=0.7, domain=1.2, reasons=("ball in semantic is unlike those in the pictures",))
    pictures = [
        labelled(seen, seen, Trust(confidence=0.9, domain=0.5)),
        labelled(seen, half, doubt),
        labelled(seen, other, Trust(confidence=0.8, domain=0.4)),
    ]
    row = marks.row_of(pictures)
    assert row["marks"]["trusted"] == {"pictures": 2, "miou": 0.5, "found": 0.5, "wrong": 0.5}
    assert row["marks"]["doubtful"] == row["marks"]["out of domain"] == row["reasons"]["unlike what was learned from"]
    assert row["marks"]["doubtful"] == {"pictures": 1, "miou": 0.5, "found": 1.0, "wrong": 1.0}
    assert row["auroc"] == {"trust": 0.75, "domain": 0.5, "confidence": 1.0, "foreign things": 0.5}
    assert row["risk"]["confidence"] == pytest.approx((0 + 1 / 2 + 1.5 / 3) / 3)  # losses 0, 1, 0.5 in this order
    assert row["risk"]["best"] == pytest.approx((0 + 0.25 + 0.5) / 3)
    assert marks.row_of(pictures[:1])["auroc"]["trust"] is None
    line = "| renders | 3: 0.500, 67 % | 2: 0.500, 50 % | 1: 0.500, 100 % | 1: 0.500, 100 % |"
    assert line in marks.table({"rows": {"renders": row}})


def test_the_page_tells_the_marks_that_were_measured():
    document = json.loads((ROOT / "bench/world/demo-marks.json").read_text())
    assert marks.table(document) in (ROOT / "docs/demo-model.md").read_text()


def test_the_page_compares_both_models_as_they_were_measured():
    document = json.loads((ROOT / "bench/world/demo-models.json").read_text())
    models = [document[name] for name in ("demo-dit", "demo")]

    def shown(things, kind="generated"):
        return [f"{model['judged'][kind][things]['order']:.0%}".replace("%", " %") for model in models]

    rows = {
        "pictures of one thing that show it, in its colour": shown("1"),
        "of two things, in their colours and order": shown("2"),
        "of three things": shown("3"),
        "renders of the same captions": [
            ", ".join(f"{model['judged']['renders'][count]['order']:.0%}"[:-1] for count in "123") + " %"
            for model in models
        ],
        "Fréchet distance from renders": [f"{model['judged']['frechet']['generated']:.3f}" for model in models],
    }
    for title, task, figure in (
        ("semantic, mIoU", "semantic", "miou"),
        ("instance, AP50", "instance", "ap50"),
        ("open vocabulary, mIoU", "open-vocabulary", "miou"),
        ("depth, AbsRel (less is better)", "depth", "absrel"),
        ("pose, PCK@0.1", "pose", "pck"),
    ):
        rows[title] = [f"{model['figures'][task][figure]:.3f}" for model in models]
    page = (ROOT / "docs/demo-model.md").read_text()
    assert [title for title, cells in rows.items() if f"| {title} | {' | '.join(cells)} |\n" not in page] == []


def test_the_pages_tell_the_accuracy_of_the_demo_s_labels_as_it_was_measured():
    document = json.loads((ROOT / "bench/world/demo-evaluated.json").read_text())
    figures = {name: document[name]["figures"] for name in ("image", "decoder", "unread", "none")}

    def masks(found):
        values = found["semantic"]["miou"], found["instance"]["ap50"], found["instance"]["ap"]
        return [f"{value:.3f}" for value in values]

    lines = []
    for title, count in (("one", "1"), ("two", "2"), ("three", "3")):
        rows = {task: found["by_things"][count] for task, found in figures["image"].items() if "by_things" in found}
        lines.append(f"| {title} | {rows['semantic']['images']} | {' | '.join(masks(rows))} |")
    lines.append(f"| all | 500 | {' | '.join(masks(figures['image']))} |")
    page = " ".join((ROOT / "docs/demo-model.md").read_text().split())
    for name in ("unread", "none"):
        lines.append("`--captions {}` gives {}, {} and {}".format(name, *masks(figures[name])))
    lines.append("the table's last row is {}, {} and {} ".format(*masks(figures["decoder"])))
    assert [line for line in lines if line not in page] == []
    page = (ROOT / "docs/training.md").read_text()
    for name in ("decoder", "image"):
        words, depth = figures[name]["open-vocabulary"]["miou"], figures[name]["depth"]["absrel"]
        assert f"| `{name}` | {' | '.join(masks(figures[name]))} | {words:.3f} | {depth:.4f} |" in page


def test_the_pages_tell_how_the_network_judged_the_samples():
    document = json.loads((ROOT / "bench/world/demo-labels.json").read_text())
    page, titles = (ROOT / "docs/demo-model.md").read_text(), {"renders": "{} renders", "generated": "{} generated"}
    titles |= {f"trusted {name}": "the {} trusted of these" for name in titles}
    for number, things in enumerate(("one thing", "two things", "three things"), 1):
        titles[f"generated, {number} named"] = f"{{}} generated, {things} named"
    for name, title in titles.items():
        rows = [
            f"| {kind} | {' | '.join(f'{100 * row[key]:.1f} %' for key in ('found', 'precision', 'swapped'))} |"
            for kind, row in document["sets"][name].items()
        ]
        assert f"| {title.format(document['counts'][name])} {rows[0]}\n| {rows[1]}\n" in page, name
    by, wrong = document["doubtful_by"], document["wrong"]
    trusted = document["pictures"] - document["doubtful"]
    for told in (
        f"Of 500 default samples (seeds from 0 on), {document['doubtful']} are",
        f"{by['labels']} for their labels alone, {by['domain']} as their pictures",
        f"learned from, and {by['both']} for both.",
        f"The network judges {wrong} of the 500 samples wrong.",
        f"Of these {wrong} samples, {wrong * document['doubtful_of_wrong']:.0f} are doubtful; of the samples judged "
        f"right, {document['doubtful_of_right']:.1%}".replace("%", " %"),
    ):
        assert told in " ".join(page.split())
    quick = document["quickstart"]
    told = f"{quick['with_more_instances']} have more instances than things named, which makes them doubtful, and "
    assert f"{told}{quick['missing_a_thing']} lack a named thing." in " ".join(page.split())
    told = (
        f"Of the {trusted + by['domain']} of 500 default samples that nothing else makes doubtful, {by['domain']} were."
    )
    assert told in " ".join((ROOT / "docs/data-set.md").read_text().split())


def test_the_page_tells_how_good_labels_from_attention_are():
    document = json.loads((ROOT / "bench/world/demo-attention.json").read_text())
    page = (ROOT / "docs/attention.md").read_text()
    for title, figure in (
        ("default, 255 left out", "iou"),
        ("uncertain pixels given to their class", "iou_filled"),
        ("exponent 0: no self-attention", "iou_exponent_0"),
        ("class prompts of other pictures", "iou_shuffled"),
    ):
        assert f"| {title} | {document[figure]['all']:.2f} |" in page


def test_pictures_of_every_setting_are_labelled_and_marked(tmp_path, capsys):
    assert marks.main(["--out", str(tmp_path / "marks.json"), "--number", "2"]) == 0
    document = json.loads((tmp_path / "marks.json").read_text())
    assert capsys.readouterr().out.startswith(marks.table(document)) and list(document["rows"]) == list(marks.SETTINGS)
    assert document["rows"]["renders"]["marks"]["all"]["miou"] > 0.9
    assert document["rows"]["renders of the harder world"]["marks"]["all"]["miou"] < 0.8
