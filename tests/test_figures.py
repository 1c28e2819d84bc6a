"""Tables of pages and cards tell the figures of bench/world's result files, in the rounding of the page."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bench.machine.machine import ROOT

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
