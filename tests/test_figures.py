"""Tables of pages and cards tell the figures of bench/world's result files, in the rounding of the page."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from bench.machine.machine import ROOT
from bench.world.intervals import SomeImages, coverage
from datasetdm_fast.training.evaluation.metrics import Depth

CARD = "datasetdm_fast/demo/model/README.md"
ROWS = (  # of the cards: title, task and figure
    ("semantic, mIoU over 9 classes", "semantic", "miou"),
    ("instance, AP50", "instance", "ap50"),
    ("instance, AP", "instance", "ap"),
    ("open vocabulary, mIoU over 7 words", "open-vocabulary", "miou"),
    ("depth, AbsRel (less is better)", "depth", "absrel"),
    ("pose, PCK@0.1 of the figure's box", "pose", "pck"),
    ("pose, OKS-AP", "pose", "oks_ap"),
)

VERDICT = ("IoU semantic", "IoU instance", "REL depth", "PCK pose", "doubtful")


def measured(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "world" / f"demo-{name}.json").read_text(encoding="utf-8"))


def missing(page: str, told: Sequence[str]) -> list[str]:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    return [line for line in told if line not in text]


def with_interval(figures: Mapping[str, Any], name: str) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(figures[name], *figures["intervals"][name])


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def test_the_card_of_the_demo_tells_the_accuracy_of_its_labels():
    found = {name: row["figures"] for name, row in measured("evaluated").items() if "figures" in row}
    told = []
    for title, task, name in ROWS:
        first = found["image"][task]
        cell = f"{first[name]:.3f}" if task == "pose" else with_interval(first, name)
        others = (f"{found[captions][task][name]:.3f}" for captions in ("unread", "none"))
        told.append(f"| {title} | {cell} | {' | '.join(others)} |")
    masks = [f"{found['decoder'][task][name]:.3f}" for _, task, name in ROWS[:4]]
    told.append(f"the first column is {', '.join(masks)} and {found['decoder']['depth']['absrel']:.4f}.")
    judged = measured("models")["demo"]["judged"]
    for title, kind in (("generated", "generated"), ("renders of these captions", "renders")):
        for count, row in judged[kind].items():
            told.append(f"| {title} | {count} | {' | '.join(map(percent, row.values()))} |")
    told.append(f"(means over the pixels, of all four resolutions), is {judged['frechet']['generated']:.3f}.")
    assert missing(CARD, told) == []


def test_the_card_of_the_second_demo_compares_both_models():
    document, told = measured("models"), []
    models = [document[name] for name in ("demo-dit", "demo")]
    for title, task, name in ROWS:
        found = [model["figures"][task] for model in models]
        cells = [with_interval(one, name) if name in one["intervals"] else f"{one[name]:.3f}" for one in found]
        told.append(f"| {title} | {' | '.join(cells)} |")
    pictures = {
        "this model, Euler, 16 steps, guidance 2.5": models[0]["judged"]["generated"],
        "first model, PNDM, 50 steps, guidance 3": models[1]["judged"]["generated"],
        "renders of these captions": models[0]["judged"]["renders"],
    }
    for title, counts in pictures.items():
        lines = [f"{count} | {' | '.join(map(percent, row.values()))} |" for count, row in counts.items()]
        told.append(f"| {title} | {' | | '.join(lines)}")
    apart = [f"{document['guidance'][name]['frechet']['generated']:.3f}" for name in ("2.0", "2.5", "3.0")]
    told.append(f"pictures of the first model, and for this one {', '.join(apart)}")
    assert missing("datasetdm_fast/demo/model-dit/README.md", told) == []


def test_the_page_tells_the_verdicts_on_approximate_speeds():
    document, told = measured("speeds"), []
    assert {row["images"] for row in document["rows"]} == {64}
    for row in document["rows"]:
        for speed, figures in (("exact", row["exact"]), (row["speed"], row["figures"])):
            *others, joints, doubtful = (figures[name] for name in VERDICT)
            cells = [f"{value:.4f}" for value in others] + [f"{joints:.3f}", f"{doubtful:.4f}"]
            told.append(f"| `{row['model']}` | `{speed}` | {' | '.join(cells)} |")
    assert missing("docs/samplers.md", told) == []


def test_the_page_tells_how_far_models_are_from_what_was_taught():
    rows = measured("domain")["rows"]
    told = [
        f"| {row['taught_on']} | `{row['model']}` | {row['distance']:.2f} | {row['out_of_domain']} of 16 |"
        for row in rows
        if row["samples"] == 16
    ]
    assert len(told) == len(rows) > 0 and missing("docs/data-set.md", told) == []


def test_the_page_tells_how_often_intervals_hold():
    images, told = measured("intervals")["images"], []
    for title, name in (
        ("mIoU", "miou"),
        ("IoU of a class", "per_class"),
        ("PCK", "pck"),
        ("PCK of a joint", "per_joint"),
        ("OKS-AP", "oks_ap"),
        ("delta < 1.25", "delta_1.25"),
        ("AbsRel", "absrel"),
        ("RMSE", "rmse"),
    ):
        told.append(f"| {title} | {' | '.join(percent(row[name]['held']) for row in images.values())} |")
    widths = (f"{row['miou']['width']:.2f}" for row in images.values())
    told.append(f"| width for mIoU | {' | '.join(widths)} |")
    assert missing("docs/training.md", [f"| images | {' | '.join(images)} |", *told]) == []


def test_intervals_of_all_images_but_one_hold_their_mean_and_those_of_two_are_wider():
    meter = Depth(None)
    meter.rows = [(0.1 + k / 100, 0.01, 1.0, 1.0, 1.0) for k in range(20)]
    (few, most) = (coverage(meter, ("absrel",), count, 20, 200)["absrel"] for count in (2, 19))
    assert few["intervals"] == most["intervals"] == 20 and most["held"] == 1
    assert few["width"] > most["width"] == pytest.approx(0.055, rel=0.1)
    for outlier in (-100.0, 100.0):  # few hold a mean that it moves far below or above all others
        one = Depth(None)
        one.rows = [(outlier, 0.01, 1.0, 1.0, 1.0), *meter.rows[1:]]
        assert 0 < coverage(one, ("absrel",), 2, 40, 200)["absrel"]["held"] < 0.5
    some = SomeImages(meter, [3, 5])
    assert some.result()["absrel"] == pytest.approx(0.14) and some.telling == some.count == 2


def test_the_page_compares_blocks_as_they_were_measured():
    told = []
    for row in measured("blocks")["rows"]:
        first = "| |" if row["flags"] == "--timestep -1" else f"| `{row['flags']}` |"
        cells = [with_interval(row[captions], "miou") for captions in ("true", "none")]
        told.append(f"{first} {row['blocks']} | {row['timesteps'][0]} | {' | '.join(cells)} |")
        if known := row.get("explained"):
            told.append(f"they explain {known['chosen']} of the variance, the others {known['family']} there.")
    assert len(told) > 2 and missing("docs/training.md", told) == []
