"""Samples of a finished run go through the network again: what edit and vary share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from datasetdm_fast.data import Request, Sample
from datasetdm_fast.engine.engines import Engine
from datasetdm_fast.engine.labels import task_of_label
from datasetdm_fast.engine.loop import prompts
from datasetdm_fast.engine.loop.calls import Beginning
from datasetdm_fast.engine.loop.prompts import Plan, PromptLine
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions.composition import SourceSample, SquareSource, identity_of
from datasetdm_fast.runs.compositions.settings import RedrawSettings
from datasetdm_fast.runs.jobs.job import Job, check_least_room, describe_run, open_engine, recipe_of
from datasetdm_fast.runs.jobs.run import continue_job, settle
from datasetdm_fast.runs.jobs.writing import Result
from datasetdm_fast.runs.run_folder.document import check_same, differences, read_document, row_facts, table_of
from datasetdm_fast.runs.run_settings import LabelSettings, RunConfig
from datasetdm_fast.settings import EngineSettings, ModelSettings, SamplingSettings, flags_of

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.sampling.schedule import Schedule

# settings of a run that its compositions do not have: what its samples were chosen by, which pixels it ignored, and a
# speed, as compositions are exact
DROPPED = "prompts number per_class truncate_prompts keep accept most_tries ignore ignore_below speed".split()
COPIED = {flag.name for flag in flags_of(RunConfig) if flag.metadata["identity"] and flag.name not in DROPPED}
CHANGEABLE = ("model", "decoder", "steps", "guidance")  # settings of a run that its compositions may change


def open_source(path: Path, *, only_kept: bool) -> SquareSource:
    """A finished run whose samples were all drawn by one model."""
    source = SquareSource(path, only_kept=only_kept)
    if not set(CHANGEABLE) <= source.document["config"].keys():
        raise Refused(
            f"{path}: was made by {source.document.get('command')}, so its samples were not all drawn by one model",
            "Name a run folder that generate, edit or vary has made.",
        )
    return source


@dataclass(frozen=True)
class SourceLatents:
    """The images of a batch as latents, and the noise that is added to them."""

    scheduler: Mapping[str, Any]
    clean: Tensor  # [B, C, h, w]
    noise: Tensor
    draw: Callable[[], Tensor]  # of what calls add

    def add_noise(self, step: float) -> Tensor:
        """The latents at a training step of the forward process."""
        from datasetdm_fast.engine.sampling.schedule import add_noise

        return add_noise(self.scheduler, self.clean, self.noise, step)


class Redrawing(ABC):
    """Images made from samples of a finished run, checked in full; the origin of its run."""

    command: ClassVar[str]
    copies = 1  # images of a sample

    def __init__(self, source: SquareSource, choice: RedrawSettings):
        self.source, self.choice = source, choice
        self.requests = [row.request for row in source.run.rows(parts=())]  # by the position in the source
        self.positions = self._find_positions()

    @property
    def number(self) -> int:
        """Images to make."""
        return len(self.positions) * self.copies

    @property
    @abstractmethod
    def summary(self) -> str:
        """How the images were made, for a reader of the data set card."""

    @property
    def image_format(self) -> str:
        return self.source.document["config"]["image_format"]

    def position(self, index: int) -> int:
        """The position in the source of the sample that image `index` is made from."""
        return self.positions[index // self.copies]

    @abstractmethod
    def prompt(self, index: int) -> PromptLine:
        """Prompt, seed and class words of an image."""

    @abstractmethod
    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        """See Origin."""

    @abstractmethod
    def finish(self, sample: Sample) -> Sample:
        """See Origin."""

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the run in run.json."""
        source = self.source.document["config"]
        config = {name: value for name, value in source.items() if name in COPIED}
        config |= self.choice.identity()
        config |= {"image_format": self.image_format, "kept": self.source.filter_digest}
        if self.choice.only:  # written in one way
            config["only"] = [self.requests[position].id for position in self.positions]
        return config

    def tile(self, index: int) -> SourceSample:
        return self.source.tile(self.position(index))

    def provenance(self, index: int) -> dict[str, Any]:
        """The source of an image in its row: its id there, and the group of all images of one source."""
        row = self.tile(index).row
        return {"source": row.request.id, "group": row.group}

    def latents(self, engine: Engine, requests: Sequence[Request]) -> SourceLatents:
        import numpy as np
        import torch

        from datasetdm_fast.engine.sampling.schedule import ImageNoise

        images = torch.from_numpy(np.stack([self.tile(request.index).pixels["image"] for request in requests]))
        clean = engine.encode_image(images)
        noise = ImageNoise([request.seed for request in requests], engine.model.latent_shape(), clean.device)
        return SourceLatents(engine.model.scheduler, clean, noise.draw(), noise.draw)

    def _find_positions(self) -> list[int]:
        """Positions in the source of the requested samples."""
        if not self.choice.only:
            return list(range(min(len(self.source.run), self.choice.number or len(self.source.run))))
        positions = []
        for id in self.choice.only:
            try:
                positions.append(self.source.run.position(id))
            except KeyError:
                raise Refused(
                    f"{id}: no sample of {self.source.path} has this id",
                    "Use an id from samples.jsonl, for example 00000003.",
                ) from None
        return sorted(set(positions))[: self.choice.number or None]

    def check_folder(self, folder: Path) -> Mapping[str, Any] | None:
        """run.json of the run folder, None where there is none yet; refuses other settings and another source."""
        stored = read_document(folder)
        if stored is not None:
            identity = {"command": self.command, "config": self.config, "source": self.source.digests}
            before = identity_of(stored)
            # former versions copied the source's speed
            before["config"] = {name: value for name, value in before["config"].items() if name != "speed"}
            check_same(folder, before, identity)
        return stored

    def check_words(self, engine: Engine) -> None:
        """Refuses prompts that the model cannot take."""
        for index in range(self.number):
            prompts.fit_prompt(self.prompt(index).text, engine.model.tokenizer, f"image {index:08d}")


def find_result(redrawing: Redrawing, folder: Path, *, is_dry: bool = False) -> Result | None:
    """The result of a run with nothing left to do, found without a network."""
    stored = redrawing.check_folder(folder)
    return None if stored is None else settle(folder, stored, redrawing.number, is_dry=is_dry)


def prepare(redrawing: Redrawing, folder: Path) -> Job:
    """The job of a redrawing: engine loaded, prompts measured, run folder compared; nothing is written."""
    stored, source, choice = redrawing.check_folder(folder), redrawing.source.document, redrawing.choice
    config = _run_config(redrawing, folder, stored)
    model, engine_settings = config.group(ModelSettings), config.group(EngineSettings)
    sampling, labels = config.group(SamplingSettings), config.group(LabelSettings)
    check_least_room(folder, 0 if stored else redrawing.number, model.size, config.task)
    engine, decoders = open_engine(model, engine_settings, config.task, stored, guidance=sampling.guidance)
    _check_weights(redrawing.source, engine, decoders)
    words = tuple(source["plan"].get("words", ()))
    # Tables hold requested words after the background. Those of other packages do not; the plan of the run does.
    worded = [label for label in source["labels"] if task_of_label(label) == "open-vocabulary"]
    requested = [table["classes"][1:] for label, table in source["labels"].items() if label in worded]
    query_words = requested[0] if requested else words
    recipe = recipe_of(sampling, labels, engine, query_words, choice.strength, table_of(source))
    redrawing.check_words(engine)
    number = redrawing.number
    size = config.batch_size or (stored["plan"]["batch_size"] if stored else min(engine.suggested_batch(), number))
    digest = hashlib.sha256("\n".join(redrawing.prompt(index).text for index in range(number)).encode()).hexdigest()
    plan = Plan(redrawing.prompt, words, number, 0, size, digest, number, has_seeds=True)
    recipe = replace(recipe, origin=redrawing, facts={**recipe.facts, "strength": choice.strength})
    document = describe_run(redrawing.config, plan, engine, recipe, decoders) | {
        "command": redrawing.command,
        "composition": {
            "told": redrawing.summary,
            "sides": f"{recipe.size} × {recipe.size} pixels",
            "source": redrawing.source.provenance,
        },
    }
    recipe = replace(recipe, facts=row_facts(document))
    job = Job(folder, plan, engine, recipe, document, limit=config.limit, batch_size=config.batch_size)
    return continue_job(job, stored)


def _run_config(redrawing: Redrawing, folder: Path, stored_run: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings of the source, with the engine and the paths of this run; steps, guidance and sampler are those that
    made its images, as settings may leave them to a model, a speed or a source of their own. A run that was begun goes
    on with its own.
    """
    names, source = {field.name for field in fields(RunConfig)}, redrawing.source.document["config"]
    choice = redrawing.choice
    stored = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in redrawing.config.items()
        if name in names and name != "only"
    }
    made = (stored_run or redrawing.source.document)["sampling"]
    chosen = {name: getattr(choice, name) or source[name] for name in ("model", "decoder")}
    chosen |= {name: getattr(choice, name) or made[name] for name in ("steps", "guidance")}
    chosen["sampler"] = made.get("sampler", source["sampler"])
    return RunConfig(
        **{**stored, **choice.engine_choices(), **chosen},
        out=str(folder),
        limit=choice.limit,
        allow_download=choice.allow_download,
    )


def _check_weights(source: SquareSource, engine: Engine, decoders: Mapping[str, Any]) -> None:
    """Refuses other weights than those that made the source."""
    loaded = {"model": dict(engine.model.digests), "decoders": {name: row["digest"] for name, row in decoders.items()}}
    stored = {
        "model": source.document["model"]["digests"],
        "decoders": {name: row["digest"] for name, row in source.document["decoders"].items()},
    }
    if lines := differences(stored, loaded):
        raise Refused(
            f"{source.path}: was made with other weights ({'; '.join(lines)})",
            "Name its own weights: --model MODEL --decoder DIR.",
        )
