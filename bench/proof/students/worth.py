"""What the images of a run are worth: one small student taught with and without them, scored on unseen images."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.training.evaluation.meter import check_count, nothing_shown
from datasetdm_fast.training.evaluation.metrics import METRICS

# Student's t, two-sided, from one degree of freedom on.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
FIGURES = {"semantic": "miou", "instance": "ap", "depth": "absrel", "pose": "oks_ap"}  # by which students are compared


def student_tasks(learnt: LabelledSource, judged: LabelledSource, run: Run, asked: Sequence[str]) -> tuple[str, ...]:
    """The labels that both data sets and the run have, or those asked for."""
    from bench.proof.students.student import LEARNT_TASKS

    there = [task for task in LEARNT_TASKS if task in learnt.tasks and task in judged.tasks and task in run.tasks]
    if absent := [task for task in asked if task not in there]:
        raise Refused(
            f"--task: no student can learn {', '.join(absent)} here",
            f"Data and run have {', '.join(there) or 'no label in common'}.",
        )
    if not there:
        raise Refused(
            f"{run.path}: has {', '.join(run.tasks)}, the data {', '.join(learnt.tasks)}: no label in common",
            "Choose another run or other data.",
        )
    return tuple(asked) or tuple(there)


def worth(
    learnt: LabelledSource,
    judged: LabelledSource,
    run: Run,
    tasks: Sequence[str],
    count: int,
    *,
    seeds: int,
    steps: int = 0,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """{task: {real, both, gain, interval, ...}} of students of the first `count` real images, 0 = all, without and with
    the run.
    """
    from bench.proof.students import student_data
    from bench.proof.students.student import StudentSchedule, answers, teach

    if count > len(learnt):
        raise Refused(f"--real {count}: the data set has {len(learnt)} images", "Ask for fewer.")
    count, vocabulary = count or len(learnt), student_data.vocabulary_of(learnt)
    check_classes(vocabulary.classes, student_data.vocabulary_of(judged).classes)
    real = student_data.real((learnt[k] for k in range(count)), learnt, vocabulary).balanced()
    generated = student_data.synthetic(run, vocabulary).balanced()
    lacking = {task: student_data.lack(task, run, vocabulary) for task in tasks if not generated.teaches(task)}
    for task, why in lacking.items():
        told(f"{task} is left out: {why}")
    taught = [task for task in tasks if task not in lacking]
    if not taught:
        raise Refused(
            f"--run: none of its {len(generated)} images teaches {', '.join(tasks)}, as "
            f"{' and '.join(dict.fromkeys(lacking.values()))}",
            "Choose a run whose prompts, classes and joints have the names that the data gives them.",
        )
    items = tuple(judged)
    exam = student_data.real(items, judged, vocabulary)
    for task in (task for task in taught if not exam.teaches(task)):
        told(f"{task} is left out: no image of --data shows anything to compare with")
    if not (taught := [task for task in taught if exam.teaches(task)]):
        raise nothing_shown()
    told(f"{len(real)} real images, {len(generated)} generated ones ({generated.left_out} left out)")
    course = StudentSchedule(**({"steps": steps} if steps else {}))
    scores: dict[str, dict[str, list[float]]] = {task: {"real": [], "both": []} for task in taught}
    for seed in range(seeds):
        for arm, sets in (("real", (real,)), ("both", (real, generated))):
            student = teach(sets, course, seed, taught)
            shown = []
            for task, figures in graded(judged, items, answers(student, exam.images), taught).items():
                name = FIGURES[task]
                scores[task][arm].append(figures[name])
                shown.append(f"{task} {name} {figures[name]:.3f}")
            told(f"seed {seed}, {arm}: {', '.join(shown)}")
    images = {"real": len(real), "synthetic": len(generated), "left_out": generated.left_out, "judged": len(items)}
    facts = {"images": images, "steps": course.steps}
    return {task: compared(task, found["real"], found["both"]) | facts for task, found in scores.items()}


def check_classes(learnt: Sequence[str], judged: Sequence[str]) -> None:
    """Refuses data sets of other classes, or of the same ones in another order."""
    if tuple(learnt) != tuple(judged):
        lacking = [name for name in (*learnt, *judged) if name not in learnt or name not in judged]
        told = "the same ones in another order"
        if lacking:
            told = f"only {'--learn-from' if lacking[0] in learnt else '--data'} has {lacking[0]}"
        raise Refused(
            f"--student: the training images and the images for scoring have different classes: {told}",
            "Choose --data and --learn-from of one data set, or put the same classes.txt into both.",
        )


def graded(
    source: LabelledSource, items: Iterable[Labelled], answers: Iterable[Any], tasks: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """{task: figures} of a student's answers to the labelled images of a data set."""
    meters = {task: METRICS[task](source) for task in tasks}
    for truth, answer in zip(items, answers):
        for task, meter in meters.items():
            meter.add(truth, getattr(answer, task))
    return {task: check_count(meter) for task, meter in meters.items()}


def gain_of(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean gain, its standard deviation and half of its 95 % interval.

    Students of one seed begin with the same parameters in every arm, so the gain is taken seed by seed.
    """
    gains = [second - first for first, second in zip(before, after, strict=True)]
    if len(gains) < 2:
        return gains[0], math.inf, math.inf
    sigma = statistics.stdev(gains)
    return statistics.fmean(gains), sigma, t95(len(gains)) * sigma / math.sqrt(len(gains))


def compared(task: str, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Means over the seeds, the gain with its 95 % interval, and whether all of the interval is a gain."""
    gain, _, half = gain_of(before, after)
    helps = gain + half < 0 if METRICS[task].less_is_better else gain - half > 0
    means = {"real": statistics.fmean(before), "both": statistics.fmean(after), "gain": gain}
    means |= {"interval": [gain - half, gain + half], "figure": FIGURES[task], "helps": helps}
    return means | {"seeds": {"real": list(before), "both": list(after)}}


def t95(count: int) -> float:
    """How many standard errors the 95 % interval of a mean of `count` values reaches."""
    if count - 2 < len(T95):
        return T95[count - 2]
    from scipy.special import stdtrit  # which takes longer to import than few values need

    return float(stdtrit(count - 1, 0.975))


def verdict(gain: Mapping[str, Any]) -> str:
    """What a gain and its interval say in words."""
    if gain["helps"]:
        return "helps"
    low, high = gain["interval"]
    return "no clear help" if low <= 0 <= high else "harms"


def table(found: dict[str, Any]) -> str:
    """The figures for a reader."""
    lines = [f"{'task':10}  {'figure':8}  {'real':>6}  {'both':>6}  gain (95 % interval)"]
    for task, row in found.items():
        low, high = row["interval"]
        lines.append(
            f"{task:10}  {row['figure']:8}  {row['real']:6.3f}  {row['both']:6.3f}  {row['gain']:+.3f} ({low:+.3f} "
            f"to {high:+.3f}): {verdict(row)}"
        )
    row = next(iter(found.values()))
    images, seeds = row["images"], len(row["seeds"]["real"])
    lines.append(
        f"{images['real']} real and {images['synthetic']} generated images, {seeds} students of each kind, "
        f"{row['steps']} steps, {images['judged']} unseen images"
    )
    return "\n".join(lines)
