"""The settings of the command evaluate."""

from dataclasses import dataclass

from datasetdm_fast.config import TASKS, EngineSettings, ModelSettings, OutputSettings, setting
from datasetdm_fast.errors import Refused
from datasetdm_fast.truth.selection import DataSettings


@dataclass(frozen=True)
class EvaluateConfig(DataSettings, ModelSettings, EngineSettings, OutputSettings):
    FLAGS = (
        "select images limit_per_class min_area limit_images only_classes framing skip_bad model allow_download "
        "decoder data task unseen captions bootstrap level curve learn_from repeats steps more student real run engine "
        "dtype device batch_size seed threads json quiet"
    ).split()

    data: str = setting(
        "demo:500@900000", "labelled images: KIND:PATH, KIND:PATH[SPLIT] or demo:COUNT@FIRST_SEED", metavar="ADDRESS"
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
    bootstrap: int = setting(500, "bootstrap resamples per interval, 0 = no intervals", metavar="N")
    level: float = setting(0.95, "confidence level of the intervals", metavar="SHARE")
    curve: tuple[str, ...] = setting(
        (),
        "learning curve: train with these numbers of labels, such as 10,30,100,300, and evaluate each",
        metavar="LIST",
    )
    learn_from: str = setting(
        "",
        "labelled images for --curve and --student; default: the train split of --data, or demo scenes",
        metavar="ADDRESS",
    )
    repeats: int = setting(
        1,
        "repeats with other seeds: decoders per number of --curve, or students of each kind (then 3, at least 2)",
        metavar="N",
    )
    steps: int = setting(0, "steps of each training of --curve or --student, 0 = as usual", metavar="N")
    more: int = setting(50, "additional labels whose gain is forecast, beyond the last number of --curve", metavar="N")
    student: bool = setting(
        False,
        "whether a run's images help: train a small network on real images alone and together with those of --run, "
        "evaluate both on --data",
    )
    real: int = setting(100, "real images for the student, the first of --learn-from", metavar="N")
    run: str = setting("", "run folder whose images --student adds", metavar="RUN")
    batch_size: int = setting(10, "images per batch", metavar="N")
    seed: int = setting(0, "seed of the noise of image 0; image k has seed + k", metavar="N")
    json: bool = setting(False, "the figures as one JSON object on stdout")

    def check(self) -> None:
        bounds = {"batch_size": 1, "bootstrap": 0, "threads": 0, "seed": 0}
        bounds |= {"repeats": 1, "real": 1, "steps": 0, "more": 1}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise Refused(f"--{name.replace('_', '-')}: {getattr(self, name)} is not at least {least}")
        named = [label for label in self.task if ":" in label]
        if named and (self.curve or self.student or self.run):
            raise Refused(
                f"--task {named[0]}: --curve and --student teach networks of their own, which have no names",
                f"Ask for {named[0].partition(':')[0]}.",
            )
        if not 0 < self.level < 1:
            raise Refused(f"--level: {self.level:g} is not between 0 and 1")
