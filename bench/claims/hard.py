"""python -m bench.claims.hard --out DIR: how many labels of a world are few? A student's mIoU by number of real scenes.

Every student is taught by the strong course (views.strong, three times the usual steps) and judged on the same unseen
scenes; figures lie in DIR, so that the same line again resumes.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from bench.claims import sets
from bench.claims.students import Arm, StudentStore, TestSet
from datasetdm_fast.evaluation import student_data
from datasetdm_fast.evaluation.student import LEARNT_TASKS, StudentSchedule
from datasetdm_fast.evaluation.student_data import SIDE, StudentData
from datasetdm_fast.readers import open_data
from datasetdm_fast.scenes.worlds import WORLDS

LEARN_FROM, JUDGE = 1_000, 900_000  # first seeds
STEPS = 4_800


def scenes(world: str, count: int, first: int, folder: Path) -> StudentData:
    """Rendered scenes as a student reads them; they are rendered once."""
    source = open_data(f"{world}:{count}@{first}", SIDE)
    vocabulary = student_data.vocabulary_of(source)
    path = folder / f"{world}-{count}-{first}.pt"
    return sets.stored(path, vocabulary, lambda: student_data.real(source, source, vocabulary))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.claims.hard", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", choices=tuple(WORLDS), default="hard")
    parser.add_argument("--labels", default="100,1000,10000", help="numbers of real scenes, comma-separated")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", choices=("small", "large"), default="small", help="of the student")
    parser.add_argument("--seeds", type=int, default=1, help="students of each number")
    parser.add_argument("--test", type=int, default=500, help="unseen scenes that judge")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    store = StudentStore(options.out, lambda line: print(line, file=sys.stderr, flush=True))
    test = TestSet(options.world, open_data(f"{options.world}:{options.test}@{JUDGE}", SIDE))
    schedule = StudentSchedule(steps=options.steps, size=options.size, augmentation="strong")
    rows = {}
    for count in map(int, options.labels.split(",")):
        data = scenes(options.world, count, LEARN_FROM, options.out)
        arm = Arm(f"{count} real", (data,), schedule, LEARNT_TASKS)
        rows[count] = [store.figures(arm, seed, test) for seed in range(options.seeds)]
    store.close(is_waiting=True)
    print("| real scenes | mIoU |\n|---:|---:|")
    for count, found in rows.items():
        shares = ", ".join(f"{100 * one['semantic']['miou']:.1f}" for one in found)
        print(f"| {count:,} | {shares} |")
    print(json.dumps(rows), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
