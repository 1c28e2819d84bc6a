"""The settings of the command evaluate."""

from dataclasses import dataclass

from datasetdm_fast.config import SEEDS, TASKS
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import EngineSettings, ModelSettings, OutputSettings, setting
from datasetdm_fast.training.truth.selection import DataSettings

MOST_DRAWS = 10_000  # bootstrap resamples of an interval


@dataclass(frozen=True)
class EvaluateConfig(DataSettings, ModelSettings, EngineSettings, OutputSettings):
    FLAGS = (
        "decoder outlines data task model select images limit_per_class min_area limit_images only_classes framing "
        "skip_bad allow_download class_names unseen captions bootstrap level curve learn_from repeats steps more "
        "engine dtype device batch_size seed threads dry_run json quiet"
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
        "labelled images for --curve; default: the train split of --data, or demo scenes",
        metavar="DATA",
    )
    repeats: int = setting(1, "decoders with other seeds for each number of --curve", metavar="N")
    steps: int = setting(0, "steps of each training of --curve, 0 = the usual number", metavar="N")
    more: int = setting(50, "additional labels whose gain is forecast, beyond the last number of --curve", metavar="N")
    batch_size: int = setting(10, "images per batch", metavar="N")
    seed: int = setting(0, "seed of the noise of image 0; image k has seed + k", metavar="N")
    json: bool = setting(False, "the figures as one JSON object on stdout")

    def check(self) -> None:
        bounds = {"batch_size": 1, "bootstrap": 0, "threads": 0, "seed": 0}
        bounds |= {"repeats": 1, "steps": 0, "more": 1}
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
        if named and self.curve:
            raise Refused(
                f"--task {named[0]}: --curve trains decoders of its own, which have no names",
                f"Ask for {named[0].partition(':')[0]}.",
            )
        if not 0 < self.level < 1:
            raise Refused(f"--level: {self.level:g} is not between 0 and 1", "For example --level 0.95.")
