"""The settings of the command evaluate."""

from dataclasses import dataclass

from datasetdm_fast.config import SEEDS, TASKS
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import EngineSettings, ModelSettings, OutputSettings, setting
from datasetdm_fast.training.evaluation.networks import BUILT_IN, MULTIPLE, NETWORKS, STUDENTS
from datasetdm_fast.training.truth.selection import DataSettings

MOST_DRAWS = 10_000  # bootstrap resamples of an interval


@dataclass(frozen=True)
class EvaluateConfig(DataSettings, ModelSettings, EngineSettings, OutputSettings):
    FLAGS = (
        "decoder outlines data task model select images limit_per_class min_area limit_images only_classes framing "
        "skip_bad allow_download class_names unseen captions bootstrap level curve learn_from repeats steps more "
        "student student_size weights only_synthetic both self_train tta real run size out engine dtype device "
        "batch_size seed threads dry_run json quiet"
    ).split()

    data: str = setting(
        "demo:500@900000",
        "labelled images: KIND:PATH, KIND:PATH[SPLIT] or demo:COUNT@FIRST_SEED; several, "
        "comma-separated, are evaluated one after the other",
        metavar="DATA",
    )
    class_names: tuple[str, ...] = setting(
        (),
        "other names for the classes of --data, each as theirs=ours, comma-separated; auto: where the decoder uses "
        "another word for a class",
        metavar="LIST",
    )
    task: tuple[str, ...] = setting(
        (),
        "labels to evaluate, comma-separated, each TASK or TASK:NAME; default: every decoder for which the data has "
        "ground truth",
        choices=TASKS,
        metavar="LIST",
        has_names=True,
    )
    unseen: tuple[str, ...] = setting(
        (), "classes not seen in training, comma-separated; default: those the decoder does not name", metavar="LIST"
    )
    captions: str = setting(
        "true",
        "true: condition on each image's caption, and predict only classes it names where the decoder was trained "
        "so; unread: condition only; none: neither",
        choices=("true", "unread", "none"),
    )
    bootstrap: int = setting(
        500, f"bootstrap resamples per interval, at most {MOST_DRAWS}, 0 = no intervals", metavar="N"
    )
    level: float = setting(0.95, "confidence level of the intervals", metavar="SHARE")
    curve: tuple[str, ...] = setting(
        (),
        "learning curve: train with these numbers of labels, such as 10,30,100,300, and evaluate each",
        metavar="LIST",
    )
    learn_from: str = setting(
        "",
        "labelled images for --curve and --student; default: the train split of --data, or demo scenes",
        metavar="DATA",
    )
    repeats: int = setting(
        1,
        "repeats with other seeds: decoders per number of --curve, or students of each kind (then 3, at least 2)",
        metavar="N",
    )
    steps: int = setting(0, "steps of each training of --curve or --student, 0 = the usual number", metavar="N")
    more: int = setting(50, "additional labels whose gain is forecast, beyond the last number of --curve", metavar="N")
    student: str = setting(
        "",
        "whether a run's images help: train this network on real images alone and together with those of --run, "
        "evaluate both on --data; small is built in, the others are those of transformers, without any download",
        choices=STUDENTS,
    )
    student_size: str = setting(
        "", "size of a --student of transformers, such as tiny or b0; default: its usual one", metavar="NAME"
    )
    weights: str = setting(
        "",
        "local folder of transformers from whose weights a --student starts; default: random weights",
        metavar="DIR",
    )
    only_synthetic: bool = setting(False, "train the --student on the images of --run alone")
    both: bool = setting(False, "train the --student only on real images together with those of --run")
    self_train: bool = setting(
        False,
        "train a second --student on the labels that the first gives the images of --run; ignored pixels stay ignored",
    )
    tta: bool = setting(False, "a --student's prediction is the mean over six scales and their mirror images")
    real: int = setting(100, "real images for the student, the first of --learn-from, 0 = all of them", metavar="N")
    run: str = setting(
        "",
        "run folder whose images --student adds; RUN[attention] for its labels from attention where it has others, too",
        metavar="RUN",
    )
    size: int = setting(
        0,
        "image side in pixels for a --student of transformers, a multiple of 32; 0 = that of the images of --run",
        metavar="N",
    )
    out: str = setting(
        "",
        "folder of students of transformers, their checkpoints and figures; the same command resumes; default: "
        "runs/students",
        metavar="OUT",
        output="folder",
    )
    batch_size: int = setting(10, "images per batch", metavar="N")
    seed: int = setting(0, "seed of the noise of image 0; image k has seed + k", metavar="N")
    json: bool = setting(False, "the figures as one JSON object on stdout")

    def check(self) -> None:
        bounds = {"batch_size": 1, "bootstrap": 0, "threads": 0, "seed": 0}
        bounds |= {"repeats": 1, "real": 0, "steps": 0, "more": 1}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise Refused(
                    f"--{name.replace('_', '-')}: {getattr(self, name)} is not at least {least}",
                    f"Give {least} or more.",
                )
        for name, most in (("seed", SEEDS - 1), ("bootstrap", MOST_DRAWS)):
            if getattr(self, name) > most:
                raise Refused(f"--{name}: {getattr(self, name)} is not at most {most}", "Choose a smaller number.")
        named = [label for label in self.task if ":" in label]
        if named and (self.curve or self.student or self.run):
            raise Refused(
                f"--task {named[0]}: --curve and --student train networks of their own, which have no names",
                f"Ask for {named[0].partition(':')[0]}.",
            )
        self._check_student()
        if not 0 < self.level < 1:
            raise Refused(f"--level: {self.level:g} is not between 0 and 1", "For example --level 0.95.")

    def _check_student(self) -> None:
        """Refuses flags of a student that is not there, or is not one of transformers."""
        if bool(self.student) != bool(self.run):
            raise Refused(
                f"--student and --run belong together, {'--run' if self.student else '--student'} is missing",
                f"Add --student NAME --run RUN; students: {', '.join(STUDENTS)}.",
            )
        if self.student and self.curve:
            raise Refused("--student and --curve cannot be combined", "Leave out one of the two.")
        own = ("student_size", "weights", "only_synthetic", "both", "self_train", "tta", "size", "out")
        given = [name for name in own if getattr(self, name)]
        if given and self.student in ("", BUILT_IN):
            raise Refused(
                f"--{given[0].replace('_', '-')}: for students of transformers, "
                f"{'no --student is named' if not self.student else f'--student {self.student} is built in'}",
                f"Leave it out, or give --student one of {', '.join(NETWORKS.names)}.",
            )
        if self.student_size and self.weights:
            raise Refused("--student-size: the folder of --weights determines it", "Leave one of the two out.")
        if self.only_synthetic and self.both:
            raise Refused("--only-synthetic and --both cannot be combined", "Leave both out to compare real with both.")
        if self.student in NETWORKS and self.batch_size < 2:
            raise Refused(
                f"--batch-size: {self.batch_size} is not at least 2, which a --student needs",
                "For example --batch-size 10.",
            )
        if self.size % MULTIPLE or self.size < 0:
            raise Refused(
                f"--size: {self.size} is not a multiple of {MULTIPLE}",
                "For example --size 512; 0 takes that of the images of --run.",
            )
