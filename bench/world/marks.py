"""python -m bench.world.marks --out FILE.json: are the labels of marked pictures worse than those of trusted ones?

Renders, whose truth is exact, are labelled and marked as `generate` does it with its samples, in several settings.
For each: how right the labels are by mark and by reason, and how well trust, domain, confidence, and things that are
seen without the prompt and that it does not name tell wrong labels from right ones. Prints the tables of the page.
"""

import argparse
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from scipy.stats import rankdata

from bench.machine import machine
from bench.report import results
from bench.world.judge_labels import FOUND, KINDS, RENDERS, JudgedPicture, TrueView, of_views
from bench.world.worlds import WORLDS
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.data import Trust
from datasetdm_fast.engine.engines import open_engine
from datasetdm_fast.engine.scenes import world

RIGHT = 0.8  # mean IoU of a picture's things from which on its labels are right
SIDE = 128
MARKS: dict[str, Callable[[Trust], bool]] = {
    "all": lambda trust: True,
    "trusted": lambda trust: trust.is_trusted,
    "doubtful": lambda trust: not trust.is_trusted,
    "out of domain": lambda trust: (trust.domain or 0.0) > 1,
}
SCORES: dict[str, Callable[[JudgedPicture], float]] = {  # of doubt
    "trust": lambda one: float(not one.trust.is_trusted),
    "domain": lambda one: one.trust.domain or 0.0,
    "confidence": lambda one: -(one.trust.confidence or 0.0),
    "foreign things": lambda one: one.foreign or 0.0,
}
REASONS = {  # kind -> words of it
    "a named thing is missing": "but not in semantic",
    "a thing is not named": "but not in the prompt",
    "number of instances": ", the prompt names",
    "label map and instances lie apart": " overlaps ",
    "two names": "have two names",
    "without the prompt another thing is seen": "without the prompt",
    "unlike what was learned from": " unlike ",
    "the model draws something else": "the model does not draw",
}


def views(name: str, count: int) -> Iterator[TrueView]:
    """Scenes of a world with their captions, and the classes of the demo world in their pixels."""
    numbers = np.array([(*world.CLASSES, each).index(each) for each in WORLDS[name].classes])
    numbers[numbers == len(world.CLASSES)] = 0
    for seed in range(RENDERS, RENDERS + count):
        view = WORLDS[name].view(seed, SIDE)
        yield TrueView(view.image, view.caption, numbers[view.semantic])


def photographed(shown: Iterable[TrueView]) -> Iterator[TrueView]:
    """Pictures as another camera sees them: blurred, noisy, tinted and compressed."""
    for number, view in enumerate(shown):
        random = np.random.default_rng(number)
        blurred = np.asarray(Image.fromarray(view.image).filter(ImageFilter.GaussianBlur(random.uniform(1, 2))))
        pixels = blurred * random.uniform(0.6, 1.2, 3) + random.normal(0, 12, blurred.shape)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=35)
        yield view._replace(image=np.asarray(Image.open(file)))


def captioned_by_others(shown: Iterable[TrueView]) -> Iterator[TrueView]:
    """Pictures with the captions of those before them, as of a model that draws something else than it is asked to."""
    every = list(shown)
    for view, other in zip(every, [every[-1], *every], strict=False):
        yield view._replace(caption=other.caption)


SETTINGS: dict[str, Callable[[int], Iterable[TrueView]]] = {
    "renders": lambda count: views("demo", count),
    "renders by another camera": lambda count: photographed(views("demo", count)),
    "renders with captions of others": lambda count: captioned_by_others(views("demo", count)),
    "renders of the harder world": lambda count: views("hard", count),
}


def overlap_of(picture: JudgedPicture) -> float:
    """Mean IoU of the things that labels or truth show, over both kinds of labels."""
    values = [value for kind in KINDS for value in picture.overlaps(kind).values()]
    return fmean(values) if values else 1.0


def found_of(picture: JudgedPicture) -> float:
    """Of the things that are shown or labelled as instances, the share that is where the truth has it."""
    values = picture.overlaps("instance").values()
    return fmean(value >= FOUND for value in values) if values else 1.0


def auroc(scores: Sequence[float], is_wrong: np.ndarray) -> float | None:
    """The chance that a wrong label has a higher score of doubt than a right one; None without one of either."""
    wrong, right = int(is_wrong.sum()), int((~is_wrong).sum())
    if not wrong or not right:
        return None
    return float((rankdata(scores)[is_wrong].sum() - wrong * (wrong + 1) / 2) / (wrong * right))


def risk_area(scores: Sequence[float], losses: Sequence[float]) -> float:
    """Area under the curve of risk, the mean loss of what has the lowest scores, over their share; ties by chance."""
    order = np.lexsort((np.random.default_rng(0).permutation(len(losses)), np.array(scores)))
    return float(np.mean(np.cumsum(np.array(losses)[order]) / np.arange(1, len(losses) + 1)))


def told(pictures: Sequence[JudgedPicture]) -> dict[str, Any]:
    """How right the labels of some pictures are."""
    if not pictures:
        return {"pictures": 0}
    overlaps = [overlap_of(one) for one in pictures]
    facts = {"miou": fmean(overlaps), "found": fmean(map(found_of, pictures))}
    return {"pictures": len(pictures), **facts, "wrong": fmean(value < RIGHT for value in overlaps)}


def row_of(pictures: Sequence[JudgedPicture]) -> dict[str, Any]:
    """The figures of a setting."""
    losses = [1 - overlap_of(one) for one in pictures]
    is_wrong = np.array(losses) > 1 - RIGHT
    doubts = {name: [score(one) for one in pictures] for name, score in SCORES.items()}
    by_reason = {
        kind: told([one for one in pictures if any(words in reason for reason in one.trust.reasons)])
        for kind, words in REASONS.items()
    }
    risks = {name: risk_area(scores, losses) for name, scores in {**doubts, "best": losses}.items()}
    return {
        "marks": {name: told([one for one in pictures if has(one.trust)]) for name, has in MARKS.items()},
        "reasons": {kind: found for kind, found in by_reason.items() if found["pictures"]},
        "auroc": {name: auroc(scores, is_wrong) for name, scores in doubts.items()},
        "risk": risks,
    }


def table(document: Mapping[str, Any]) -> str:
    """Markdown: each setting with its marks, then how many have each reason, then how well scores tell wrong labels."""
    rows = document["rows"]
    lines = [f"| pictures | {' | '.join(MARKS)} |", "|---" * (1 + len(MARKS)) + "|"]
    lines += [f"| {name} | {' | '.join(cell(row['marks'][mark]) for mark in MARKS)} |" for name, row in rows.items()]
    lines += ["", f"| reason | {' | '.join(rows)} |", "|---" * (1 + len(rows)) + "|"]
    for kind in REASONS:
        found = [row["reasons"].get(kind, {"pictures": 0}) for row in rows.values()]
        if any(each["pictures"] for each in found):
            lines.append(f"| {kind} | {' | '.join(map(cell, found))} |")
    lines += ["", f"| pictures | {' | '.join(SCORES)} | area under risk | at best | mean risk |"]
    lines.append("|---" * (4 + len(SCORES)) + "|")
    for name, row in rows.items():
        rates = ["–" if row["auroc"][score] is None else f"{row['auroc'][score]:.2f}" for score in SCORES]
        *areas, best = (f"{value:.3f}" for value in row["risk"].values())
        lines.append(
            f"| {name} | {' | '.join(rates)} | {', '.join(areas)} | {best} | {1 - row['marks']['all']['miou']:.3f} |"
        )
    return "\n".join(lines)


def cell(found: Mapping[str, Any]) -> str:
    """The number of pictures, their mean IoU, and the share that is wrong."""
    return f"{found['pictures']}: {found['miou']:.3f}, {100 * found['wrong']:.0f} %" if found["pictures"] else "–"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.world.marks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--number", type=int, default=300, help="renders of each setting")
    parser.add_argument("--decoder", action="append", default=[], help="others to label renders with; may be repeated")
    options = parser.parse_args(arguments)
    engine, _ = open_engine("demo", "demo", KINDS)
    rows = {}
    for name, shown in SETTINGS.items():
        rows[name] = row_of(list(of_views(engine, shown(options.number))))
        print(f"{name}: {options.number} pictures", file=sys.stderr, flush=True)
    for folder in options.decoder:
        other, _ = open_engine("demo", folder, KINDS)
        rows[f"renders, {Path(folder).name}"] = row_of(list(of_views(other, SETTINGS["renders"](options.number))))
        print(f"{folder}: {options.number} pictures", file=sys.stderr, flush=True)
    command = shlex.join(["python", "-m", "bench.world.marks", *(arguments or sys.argv[1:])])
    facts = {"format": results.FORMAT, "suite": "marks", "date": results.now(), "command": command}
    document = {**facts, "machine": machine.describe(engine.device), "rows": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
