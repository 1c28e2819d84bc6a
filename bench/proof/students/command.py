"""python -m bench student: whether the images of a run help a student network.

It is trained on real images alone and together with those of --run, for equally many steps, and scored on --data. The
same command resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.options import say
from bench.proof.students.networks import BUILT_IN, MULTIPLE, NETWORKS, STUDENTS, open_network
from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import print_end
from datasetdm_fast.config import TASKS
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import EngineSettings, OutputSettings, setting
from datasetdm_fast.training.truth.selection import DataSettings, Selection

if TYPE_CHECKING:
    from datasetdm_fast.engine.pictures.labelled import LabelledSource

PROG = "python -m bench student"
STUDENTS_FOLDER = "runs/students"  # the default of --out
ANY_SIZE = 64  # pixels of a side, where no image is read yet
SEEDS = 3  # students of each kind
TRANSFORMERS_ONLY = ("student_size", "weights", "only_synthetic", "both", "self_train", "tta", "size", "out")


@dataclass(frozen=True)
class StudentConfig(DataSettings, EngineSettings, OutputSettings):
    FLAGS = (
        "student run data learn_from real task select images limit_per_class min_area limit_images only_classes "
        "framing skip_bad student_size weights only_synthetic both self_train tta size repeats steps batch_size out "
        "dtype device threads dry_run json quiet"
    ).split()

    student: str = setting(BUILT_IN, "network: small is built in, the others are of transformers", choices=STUDENTS)
    run: str = setting("", "run folder of the generated images; RUN[attention] for its labels from attention")
    data: str = setting("demo:500@900000", "labelled images for scoring", metavar="DATA")
    learn_from: str = setting("", "real images; default: the train split of --data, or demo scenes", metavar="DATA")
    real: int = setting(100, "real images, the first of --learn-from, 0 = all of them", metavar="N")
    task: tuple[str, ...] = setting(
        (), "what it learns, comma-separated; default: all it can", choices=TASKS, metavar="LIST"
    )
    student_size: str = setting("", "size such as tiny or b0; default: the usual one", metavar="NAME")
    weights: str = setting("", "local folder of transformers with initial weights", metavar="DIR")
    only_synthetic: bool = setting(False, "train on the images of --run alone")
    both: bool = setting(False, "train only on real images together with those of --run")
    self_train: bool = setting(False, "train a second student on the labels that the first gives the images of --run")
    tta: bool = setting(False, "a prediction is the mean over six scales and their mirror images")
    size: int = setting(0, "image side in pixels, a multiple of 32; 0 = that of the images of --run", metavar="N")
    repeats: int = setting(SEEDS, "students of each kind, at least 2", metavar="N")
    steps: int = setting(0, "training steps, 0 = the usual number", metavar="N")
    batch_size: int = setting(10, "images per batch", metavar="N")
    out: str = setting("", f"folder of students; default: {STUDENTS_FOLDER}", metavar="OUT", output="folder")
    json: bool = setting(False, "the figures as one JSON object on stdout")

    def check(self) -> None:
        if not self.run:
            raise Refused("--run is missing", "Name the run folder whose images a student learns from.")
        least = {"repeats": 2, "real": 0, "steps": 0, "size": 0, "threads": 0}
        least["batch_size"] = 1 if self.student == BUILT_IN else 2
        for name, number in least.items():
            if getattr(self, name) < number:
                flag = f"--{name.replace('_', '-')}"
                raise Refused(f"{flag}: {getattr(self, name)} is not at least {number}", "Choose a larger number.")
        if self.size % MULTIPLE:
            raise Refused(f"--size: {self.size} is not a multiple of {MULTIPLE}", "For example --size 512.")
        given = [name for name in TRANSFORMERS_ONLY if getattr(self, name)]
        if given and self.student == BUILT_IN:
            flag = f"--{given[0].replace('_', '-')}"
            raise Refused(f"{flag}: for students of transformers", f"Add --student, one of {', '.join(NETWORKS)}.")
        if self.student_size and self.weights:
            raise Refused("--student-size: the folder of --weights determines it", "Leave one of the two out.")
        if self.only_synthetic and self.both:
            raise Refused("--only-synthetic and --both cannot be combined", "Leave both out to compare real with both.")


@command
def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, StudentConfig, PROG, __doc__)
    config.check()
    return compare_small(config) if config.student == BUILT_IN else compare_networks(config)


def compare_small(config: StudentConfig) -> int:
    """Students of the built-in network."""
    import torch

    from bench.proof.curve import training_address
    from bench.proof.students import worth
    from bench.proof.students.student_data import SIDE
    from datasetdm_fast.runs.run_folder.reader import open_run

    address = training_address(config.data, config.learn_from, config.real)
    torch.set_num_threads(config.threads or 1)  # more gain a net of this size nothing
    with open_run(config.run, kept=True) as run:
        learnt = open_source(config, address, SIDE, selection=config.selection())
        judged = open_source(config, config.data, SIDE)
        if config.skip_bad:
            learnt, judged = learnt.readable(), judged.readable()
        tasks = worth.student_tasks(learnt, judged, run, config.task)
        if config.dry_run:
            return print_students(config, len(judged), tasks)
        found = worth.worth(
            *(learnt, judged, run, tasks, config.real),
            seeds=config.repeats,
            steps=config.steps,
            told=(lambda line: None) if config.quiet else say,
        )
        seen = shared_images(judged, learnt, config.real)
    return print_figures(config, found, seen, learnt.skipped | judged.skipped, worth.table(found))


def compare_networks(config: StudentConfig) -> int:
    """Students of a network of transformers."""
    from bench.proof.curve import check_shown, training_address
    from bench.proof.students import arms
    from bench.proof.students.course import Course
    from bench.proof.students.examples import Examples, shared_vocabulary
    from bench.proof.students.networks.weights import check_folder, size_of
    from bench.proof.students.worth import check_classes
    from datasetdm_fast.runs.run_folder.document import read_document

    network = open_network(config.student)
    task, tasks = network.task, (network.task,)
    if other := [name for name in config.task if name != task]:
        raise Refused(f"--task {other[0]}: {config.student} learns {task}", "Leave --task out, or name another.")
    if config.tta and network.mirror is None:
        raise Refused(f"--tta: the predictions of {config.student} cannot be averaged", "Leave it out.")
    if config.self_train and task != "semantic":
        raise Refused(f"--self-train: {config.student} learns {task}, no label map", "Leave it out.")
    names = ("synthetic",) if config.only_synthetic else ("both",) if config.both else ("real", "both")
    has_real = any("real" in arms.ARMS[name] for name in names)
    address = training_address(config.data, config.learn_from, config.real) if has_real else ""
    size = "" if config.weights else size_of(network, config.student_size)
    if config.weights:
        check_folder(network, Path(config.weights))
    folder = config.run if Path(config.run).is_dir() else config.run.partition("[")[0]  # RUN[LABEL], as readers take it
    document = read_document(Path(folder)) or {"sampling": {"size": ANY_SIZE}}
    side = config.size or -(-document["sampling"]["size"] // MULTIPLE) * MULTIPLE
    try:
        run = open_source(config, f"run:{config.run}", side, tasks)
    except Refused as stop:
        raise Refused(stop.cause.replace("--data run:", "--run "), stop.remedy) from stop
    judged = open_source(config, config.data, side, tasks)
    learnt = open_source(config, address, side, tasks, config.selection()) if has_real else None
    if config.skip_bad:
        run, judged, learnt = (source and source.readable() for source in (run, judged, learnt))
    check_shown(judged, task)  # otherwise noticed only once a student is trained
    if learnt is not None:
        if config.real > len(learnt):
            raise Refused(f"--real {config.real}: the data set has {len(learnt)} images", "Ask for fewer.")
        check_classes(learnt.classes, judged.classes)
    vocabulary = shared_vocabulary(judged, run)
    sets = {} if learnt is None else {"real": Examples(learnt, vocabulary, task, count=config.real)}
    import torch
    from tqdm import tqdm

    from datasetdm_fast.command_line.output import shows_bar
    from datasetdm_fast.engine.engines.device import multiplies_bf16, resolve_device

    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    is_short = config.dtype == "bf16" or (config.dtype == "auto" and multiplies_bf16(device))
    given = {"steps": config.steps} if config.steps else {}
    experiment = arms.Experiment(
        *(config.student, network, vocabulary),
        sets | {"run": Examples(run, vocabulary, task, is_generated=True)},
        Examples(judged, vocabulary, task),
        Course(batch_size=config.batch_size, is_fine=bool(config.weights), **given),
        Path(config.out or STUDENTS_FOLDER),
        size,
        config.weights,
        seeds=config.repeats,
        is_averaged=config.tta,
        trains_itself=config.self_train,
        device=device,
        dtype=torch.bfloat16 if is_short else torch.float32,
    )
    if config.dry_run:
        return print_students(config, len(judged), names, str(experiment.folder))
    with tqdm(total=experiment.course.steps, disable=not shows_bar(config.quiet), file=sys.stderr) as bar:

        def on_step(name: str, step: int, loss: float) -> None:
            bar.n = step
            bar.set_description(f"{name}, loss {loss:.3f}")

        on_message = (lambda line: None) if config.quiet else lambda line: bar.write(line, file=sys.stderr)
        found = arms.compare(experiment, names, on_message, on_step)
    skipped = {**run.skipped, **judged.skipped, **({} if learnt is None else learnt.skipped)}
    seen = {} if learnt is None else shared_images(judged, learnt, config.real)
    return print_figures(config, found, seen, skipped, arms.table(found))


def open_source(
    config: StudentConfig, address: str, size: int, tasks: Sequence[str] = (), selection: Selection | None = None
) -> LabelledSource:
    from datasetdm_fast.training.readers import EVERYTHING, open_data

    options = {"skip_bad": config.skip_bad, "framing": config.framing, "selection": selection or EVERYTHING}
    return open_data(address, size, tasks=tasks, **options)


def shared_images(judged: LabelledSource, learnt: LabelledSource, count: int) -> dict[str, int]:
    """How many images for scoring are among the first `count` to learn from, 0 = all; empty for none."""
    from bench.proof.decoders import count_shared

    seen = count_shared(judged, learnt, count or len(learnt))
    return {"seen_in_training": seen} if seen else {}


def print_students(config: StudentConfig, images: int, kinds: Sequence[str], folder: str = "") -> int:
    """The exit code of a dry run of students of some kinds, whose checkpoints `folder` would keep."""
    each, judged = count_noun(config.repeats, "student"), count_noun(images, "image")
    text = f"{each} for each of {', '.join(kinds)} would be taught and judged on {judged}"
    facts = {"students": config.repeats * len(kinds), "images": images, **({"path": folder} if folder else {})}
    more = [f"their checkpoints and figures would be in {folder}"] if folder else []
    return print_end(config, facts, text, *more)


def print_figures(
    config: StudentConfig, found: dict[str, Any], seen: dict[str, int], skipped: dict[str, str], table: str
) -> int:
    if config.json:
        print(json.dumps({"student": found, **seen, **({"skipped": skipped} if config.skip_bad else {})}))
    else:
        print(table)
        if seen:
            count = seen["seen_in_training"]
            print(f"student: the training data held {count} of these images; expect lower figures on others")
    if skipped and not config.quiet:
        say("\n".join([f"{count_noun(len(skipped), 'image')} skipped:", *(f"  {line}" for line in skipped.values())]))
    return 0
