"""python -m bench labels: scores of a student network by number of labelled scenes, on the same unseen scenes.

With --run, half of its training images are those of a run: generated images, or scenes labelled by `label`. The same
command resumes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.options import chosen, say
from bench.world.hard.reader import register
from bench.world.worlds import WORLDS, World
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import setting

if TYPE_CHECKING:
    from datasetdm_fast.runs.run_folder.reader import Run

PROG = "python -m bench labels"
LEARN_FROM, JUDGE = 1_000, 900_000  # first seeds


@dataclass(frozen=True)
class LabelsConfig:
    world: str = setting("hard", "the world of the scenes", choices=tuple(WORLDS))
    labels: tuple[str, ...] = setting(
        ("100", "1000", "10000"), "numbers of real scenes to learn from, comma-separated", metavar="LIST"
    )
    tasks: tuple[str, ...] = setting((), "what a student learns, comma-separated (default: all)", metavar="LIST")
    augmentation: str = setting("strong", "augmentation of the training scenes", choices=("none", "mild", "strong"))
    size: str = setting("small", "size of the student", choices=("small", "large"))
    steps: int = setting(4_800, "optimiser steps of a student", metavar="N")
    run: str = setting("", "run folder whose trusted images are half of every batch", metavar="DIR")
    seeds: int = setting(1, "students of each number", metavar="N")
    test: int = setting(500, "unseen scenes for evaluation", metavar="N")
    processes: int = setting(1, "students trained at once", metavar="N")
    out: str = setting("runs/labels", "folder of scenes and students", metavar="DIR", output="folder")
    json: bool = setting(False, "the figures as one JSON object on stdout")

    def counts(self) -> list[int]:
        """The numbers of scenes, checked."""
        for name in ("steps", "seeds", "test", "processes"):
            if getattr(self, name) < 1:
                raise Refused(f"--{name} {getattr(self, name)}: expected at least 1", "choose another number")
        for given in self.labels:
            if not (given.isdecimal() and int(given)):
                raise Refused(f"--labels {given}: expected numbers of 1 or more, comma-separated", "e.g. 100,1000")
            if LEARN_FROM + int(given) > JUDGE:
                raise Refused(f"--labels {given}: so many scenes would be among those that judge", "ask for fewer")
        return sorted(map(int, self.labels))


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, LabelsConfig, PROG, __doc__)
    register()
    counts = config.counts()
    import torch

    torch.set_num_threads(1)
    from bench.proof.claims.students import Arm, StudentStore, TestSet
    from bench.proof.students import student_data
    from bench.proof.students.student import LEARNT_TASKS, StudentSchedule
    from bench.proof.students.student_data import SIDE
    from datasetdm_fast.training.readers import open_data

    tasks, folder = chosen("tasks", config.tasks, LEARNT_TASKS, LEARNT_TASKS), Path(config.out)
    run = _fitting(Path(config.run), WORLDS[config.world], tasks) if config.run else None
    test = TestSet(config.world, open_data(f"{config.world}:{config.test}@{JUDGE}", SIDE))
    schedule = StudentSchedule(steps=config.steps, size=config.size, augmentation=config.augmentation)
    real, added = {n: _scenes(config.world, n, folder) for n in counts}, ()
    if run is not None:
        added = (student_data.synthetic(run, real[counts[0]].vocabulary),)
    beside = f" + {len(added[0]):,} of {Path(config.run).name}" if added else ""
    arms = {n: Arm(f"{n} real{beside}", (data, *added), schedule, tuple(tasks)) for n, data in real.items()}
    store, is_done = StudentStore(folder, say, config.processes), False
    try:
        for arm in arms.values():
            for seed in range(config.seeds):
                store.start(arm, seed, test)
        found = {n: [store.figures(arm, seed, test) for seed in range(config.seeds)] for n, arm in arms.items()}
        is_done = True
    finally:
        store.close(is_done)
    print(json.dumps({str(n): rows for n, rows in found.items()}) if config.json else table(found, beside))
    return 0


def _fitting(path: Path, world: World, tasks: Sequence[str]) -> Run:
    """The run in a folder, refused where a student of a world's scenes could learn nothing from it."""
    from datasetdm_fast.runs.run_folder.reader import open_run

    run = open_run(path)
    if strange := [name for name in run.classes if name not in world.classes]:
        raise Refused(f"--run {path}: the {world.name} world has no {strange[0]}", "Choose its world by --world.")
    if not set(tasks) & set(run.tasks):
        raise Refused(f"--run {path}: it has no labels of {' or '.join(tasks)}", f"It has {', '.join(run.tasks)}.")
    return run


def _scenes(world: str, count: int, folder: Path):
    """Rendered scenes as a student reads them; they are rendered once."""
    from bench.proof.claims import sets
    from bench.proof.students import student_data
    from bench.proof.students.student_data import SIDE
    from datasetdm_fast.training.readers import open_data

    source = open_data(f"{world}:{count}@{LEARN_FROM}", SIDE)
    vocabulary = student_data.vocabulary_of(source)
    path = folder / f"{world}-{count}-{LEARN_FROM}.pt"
    return sets.stored(path, vocabulary, lambda: student_data.real(source, source, vocabulary))


def table(found: dict[int, list[dict]], beside: str = "") -> str:
    """Markdown, a row for each number of scenes and what is learnt `beside` them, a figure for each student."""
    from bench.proof.claims.page import figure
    from bench.proof.claims.search import QUESTIONS

    there = {task: QUESTIONS[task] for task in next(iter(found.values()))[0]}
    lines = [["real scenes", *(question.figure for question in there.values())], ["---:"] * (1 + len(there))]
    for count, rows in found.items():
        own = (", ".join(figure({"figure": one.figure}, one.pick(row)) for row in rows) for one in there.values())
        lines.append([f"{count:,}{beside}", *own])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
