"""The flags of the command evaluate, and the groups of settings that its modules take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import SEEDS, TASKS
from datasetdm_fast.engine.labels import tasks_of
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import CommandSettings, EngineSettings, ModelSettings, OutputSettings, setting
from datasetdm_fast.training.truth.selection import DataSettings, Selection

if TYPE_CHECKING:  # these import torch, which --help does without
    from datasetdm_fast.engine.pictures.labelled import LabelledSource

MOST_DRAWS = 10_000  # bootstrap resamples of an interval
ANY_SIZE = 64  # pixels per side, where no image is read yet


@dataclass(frozen=True)
class ScoreSettings:
    """How decoders are scored."""

    captions: str = setting(
        "true",
        "true: condition on each image's caption, and predict only classes it names where the decoder was trained "
        "so; unread: condition only; none: neither",
        choices=("true", "unread", "none"),
    )
    batch_size: int = setting(10, "images per batch", metavar="N", least=1)
    seed: int = setting(0, "seed of the noise of image 0; image k has seed + k", metavar="N", least=0, most=SEEDS - 1)
    unseen: tuple[str, ...] = setting(
        (), "classes not seen in training, comma-separated; default: those the decoder does not name", metavar="LIST"
    )
    bootstrap: int = setting(
        500,
        f"bootstrap resamples per interval, at most {MOST_DRAWS}, 0 = no intervals",
        metavar="N",
        least=0,
        most=MOST_DRAWS,
    )
    level: float = setting(0.95, "confidence level of the intervals", metavar="SHARE")


@dataclass(frozen=True)
class EvaluateConfig(ScoreSettings, DataSettings, ModelSettings, EngineSettings, OutputSettings, CommandSettings):
    FLAGS = (
        "decoder outlines data task model select images limit_per_class min_area limit_images only_classes framing "
        "skip_bad size allow_download class_names unseen captions bootstrap level "
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
    json: bool = setting(False, "the figures as one JSON object on stdout")

    def check(self) -> None:
        if not 0 < self.level < 1:
            raise Refused(f"--level: {self.level:g} is not between 0 and 1", "For example --level 0.95.")

    @property
    def addresses(self) -> list[str]:
        """The data sets of --data: a comma separates them where a kind and a colon follow."""
        return re.split(r",\s*(?=[a-z0-9-]+:)", self.data)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tasks_of(self.task)

    def open_data(self, address: str, size: int, tasks: Sequence[str], selection: Selection) -> LabelledSource:
        from datasetdm_fast.training.readers import open_data

        options = {"skip_bad": self.skip_bad, "framing": self.framing, "selection": selection}
        return open_data(address, size, tasks=tasks, **options)

    def open_engine(self, decoder: str | None = None) -> Any:
        from datasetdm_fast.engine.engines import open_engine

        options = {"size": self.size, "allow_download": self.allow_download, "outlines": self.outlines}
        return open_engine(self.model, decoder, **options, **self.engine_choices())[0]
