"""python -m bench.world.judge_labels RUN --judged DIR: how accurate are the labels of generated pictures?

The labels of a run are compared with the predictions of the segmentation network of judge.py, which was trained only
on renders, for all samples and for the trusted ones; those of renders with ground truth. For a run of vary it reports
for each domain how well the pictures still fit the label maps. Prints a table and JSON.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.world.judge_net import STEPS, Judge, kept_judge, probabilities
from bench.world.things_seen import ENOUGH
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.data import Annotation, SemanticMap, Trust
from datasetdm_fast.engine.engines import Engine, open_engine
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.labels.class_tables import find_classes
from datasetdm_fast.engine.labels.trust import named_map, trust_of, with_domain, with_unprompted
from datasetdm_fast.engine.loop.inversion import invert_for
from datasetdm_fast.engine.loop.labelling import UNPROMPTED_SIDE, read_unprompted
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.tasks import TASKS, read_labels
from datasetdm_fast.engine.tasks.captions import held_to
from datasetdm_fast.runs.run_folder.reader import Run, open_run
from datasetdm_fast.training.readers.demo import DemoWorld

KINDS = ("semantic", "instance")
FOUND = 0.5  # IoU of a thing that counts as found
SAME = 0.25  # IoU below which a thing is called wrong
LEAST_KEPT = 0.7  # mean IoU of a variant that shows what its source shows
SURE = 0.9  # probability of a class in the judge, below which its pixel speaks against no label
RENDERS = 900_000  # first scene seed, as in the model card
BATCH = 10


@dataclass(frozen=True)
class JudgedPicture:
    """The labels of a picture beside what is to be seen in it."""

    named: tuple[str, ...]  # things of its caption
    labels: dict[str, Annotation]
    seen: np.ndarray  # [H, W] class of each pixel
    is_sure: np.ndarray  # [H, W] whether that is beyond doubt
    trust: Trust
    domain: str = ""  # of a variant
    foreign: float | None = None  # of the pixels that are things without the prompt, the share of things it names not

    def shown(self, name: str) -> np.ndarray:
        return self.seen == world.CLASSES.index(name)

    def overlaps(self, kind: str, counted: np.ndarray | None = None) -> dict[str, float]:
        """IoU of every thing that is labelled or seen on ENOUGH pixels, of those `counted` where these are given."""
        found, overlaps = named_map(self.labels[kind]), {}
        counted = np.ones(self.seen.shape, bool) if counted is None else counted
        for name in world.THINGS:
            labelled, shown = (found.numbers == found.names.index(name)) & counted, self.shown(name) & counted
            if max(labelled.sum(), shown.sum()) >= ENOUGH:
                overlaps[name] = float((labelled & shown).sum() / (labelled | shown).sum())
        return overlaps

    @property
    def is_wrong(self) -> bool:
        """Whether a thing of the caption is not to be seen, or a label contradicts what is beyond doubt."""
        is_lacking = any(self.shown(name).sum() < ENOUGH for name in self.named)
        return is_lacking or any(value < SAME for kind in KINDS for value in self.overlaps(kind, self.is_sure).values())


def share_of(hits: Sequence[bool] | np.ndarray) -> float | None:
    """The share of hits, None of nothing."""
    return float(np.mean(hits)) if len(hits) else None


def figures(pictures: Sequence[JudgedPicture], kind: str) -> dict[str, float | None]:
    """Of the things that captions name and pictures show, the share that is found, None where they show none; of the
    pixels that are labelled as things, the share where that thing is seen, and where another one is.
    """
    found, right, swapped, labelled = [], 0, 0, 0
    things = [world.CLASSES.index(name) for name in world.THINGS]
    for one in pictures:
        overlaps, told = one.overlaps(kind), named_map(one.labels[kind])
        found += [overlaps.get(name, 0) >= FOUND for name in one.named if one.shown(name).sum() >= ENOUGH]
        numbers = told.numbers_in({name: world.CLASSES.index(name) for name in world.THINGS})
        is_thing = numbers > 0
        labelled += int(is_thing.sum())
        right += int((is_thing & (numbers == one.seen)).sum())
        swapped += int((is_thing & (numbers != one.seen) & np.isin(one.seen, things)).sum())
    count = max(labelled, 1)
    return {"found": share_of(found), "precision": right / count, "swapped": swapped / count}


def geometry(pictures: Sequence[JudgedPicture]) -> dict[str, dict[str, float]]:
    """For each domain of variants, the mean over pictures of the mean IoU of the label map with what is to be seen, and
    the share of pictures where that is below LEAST_KEPT.
    """
    found: dict[str, list[float]] = {}
    for one in pictures:
        label = one.labels["semantic"]
        seen = SemanticMap(one.seen.astype(np.uint8), label.confidence, world.CLASSES)
        found.setdefault(one.domain, []).append(kind_of("semantic").overlap(seen, label))
    return {
        domain: {"miou": float(np.mean(ious)), "below": float(np.mean(np.array(ious) < LEAST_KEPT))}
        for domain, ious in found.items()
    }


def of_run(run: Run, judge: Judge) -> list[JudgedPicture]:
    """The samples of a run, as the judge sees them."""
    pictures, left = [], iter(run)
    while samples := list(islice(left, BATCH)):
        images = np.stack([sample.image for sample in samples])
        mirrored = probabilities(judge, images[:, :, ::-1].copy()).flip(3)
        sure, seen = (found.numpy() for found in ((probabilities(judge, images) + mirrored) / 2).max(1))
        for sample, classes, probability in zip(samples, seen, sure, strict=True):
            named = tuple(name for name in sample.classes if name in world.THINGS)
            labels = {kind: sample.label(kind) for kind in KINDS}
            domain = sample.meta.get("domain", "")
            pictures.append(JudgedPicture(named, labels, classes, probability >= SURE, sample.trust, domain))
    return pictures


class TrueView(NamedTuple):
    """A picture whose truth is known."""

    image: np.ndarray
    caption: str
    seen: np.ndarray  # [H, W] class of each pixel


def of_renders(count: int) -> list[JudgedPicture]:
    """Renders with the labels that the demo decoders give them, beside their truth."""
    engine, _ = open_engine("demo", "demo", KINDS)
    source = DemoWorld(count, RENDERS, engine.model.size)
    return list(of_views(engine, (TrueView(item.image, item.caption, item.semantic) for item in source)))


def of_views(engine: Engine, views: Iterable[TrueView]) -> Iterator[JudgedPicture]:
    """Pictures with the labels that an engine's decoders give them, marked as samples are."""
    decoders, seeds, left = {task: engine.decoders[task] for task in KINDS}, count(), iter(views)
    able = read_unprompted({task: decoder.config for task, decoder in decoders.items()})
    while some := list(islice(left, BATCH)):
        captions = [view.caption for view in some]
        images = torch.from_numpy(np.stack([view.image for view in some]))
        captures = invert_for(engine, KINDS, images, captions, list(islice(seeds, len(some))))
        labels, free = {}, {}
        for task, decoder in decoders.items():
            raw = engine.annotate(task, captures[task], None)
            free[task] = list(TASKS[decoder.config.task].postprocess(raw, decoder.config, UNPROMPTED_SIDE))
            raw = held_to(raw, decoder.config, captions, tokenizer=engine.model.tokenizer)
            labels[task] = read_labels(raw, images.numpy(), decoder.config, engine.model.size)
        measured = [task for task, decoder in decoders.items() if decoder.domain]
        sketches = {task: decoders[task].sketch(captures[task].of(task)).numpy() for task in measured}
        for k, view in enumerate(some):
            named = find_classes(view.caption, world.THINGS)
            found: dict[str, Annotation] = {task: labels[task][k] for task in KINDS}
            trust = trust_of(named, found, view.caption)
            if able:
                trust = with_unprompted(trust, named, {task: free[task][k] for task in able}, view.caption)
            distances = {task: decoders[task].domain.measure(sketches[task][k], found[task]) for task in measured}
            trust = with_domain(trust, distances) if distances else trust
            is_sure, foreign = np.ones(view.seen.shape, bool), foreign_share(free["instance"][k], named)
            yield JudgedPicture(named, found, view.seen, is_sure, trust, foreign=foreign)


def foreign_share(label: Annotation, named: Sequence[str]) -> float:
    """Of the pixels of things, the share of those that are not named."""
    shares = named_map(label).shares()
    things = {name: share for name, share in shares.items() if name in world.THINGS}
    return sum(share for name, share in things.items() if name not in named) / max(sum(things.values()), 1e-9)


def table(sets: dict[str, Sequence[JudgedPicture]]) -> Iterable[str]:
    yield "| pictures | | named things found | pixels of things right | pixels of another thing |"
    yield "|---|---|---|---|---|"
    for name, pictures in sets.items():
        for kind in KINDS:
            row = figures(pictures, kind)
            shares = " | ".join("–" if value is None else f"{100 * value:.1f} %" for value in row.values())
            yield f"| {name}, {len(pictures)} | {kind} | {shares} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.world.judge_labels", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--judged", type=Path, required=True, help="folder of bench.world.judge; if it has no network, one is trained"
    )
    parser.add_argument("--renders", type=int, default=500, help="renders to compare with")
    parser.add_argument("--judge-steps", type=int, default=STEPS, help="training steps of the network")
    options = parser.parse_args(arguments)
    run = open_run(options.run)  # before a net may be trained for minutes
    judge = kept_judge(options.judged, 128, steps=options.judge_steps)
    renders, made = of_renders(options.renders), of_run(run, judge)
    sets = {"renders": renders, "trusted renders": [one for one in renders if one.trust.is_trusted]}
    sets |= {"generated": made, "trusted generated": [one for one in made if one.trust.is_trusted]}
    for number in sorted({len(one.named) for one in (*renders, *made)}):
        for name, pictures in (("renders", renders), ("generated", made)):
            if some := [one for one in pictures if len(one.named) == number]:
                sets[f"{name}, {number} named"] = some
    print("\n".join(table(sets)), file=sys.stderr)
    wrong = np.array([one.is_wrong for one in made])
    doubtful = np.array([not one.trust.is_trusted for one in made])
    facts = {"pictures": len(made), "wrong": int(wrong.sum()), "doubtful": int(doubtful.sum())}
    facts |= {"doubtful_of_wrong": share_of(doubtful[wrong]), "doubtful_of_right": share_of(doubtful[~wrong])}
    rows = {name: {kind: figures(pictures, kind) for kind in KINDS} for name, pictures in sets.items()}
    print(json.dumps({**facts, "geometry": geometry(made), "sets": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
