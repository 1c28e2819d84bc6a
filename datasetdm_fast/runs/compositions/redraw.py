"""Samples of a finished run go through the network again: what edit and vary share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from datasetdm_fast.data import Request, Sample
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.labels.names import LabelName
from datasetdm_fast.engine.loop import prompts
from datasetdm_fast.engine.loop.origin import Beginning, drawn_noise
from datasetdm_fast.engine.loop.plan import Plan
from datasetdm_fast.engine.loop.prompts import PromptLine
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions.settings import RedrawSettings
from datasetdm_fast.runs.compositions.source import Source, Tile, decisive, source_path
from datasetdm_fast.runs.jobs import job
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.result import Result
from datasetdm_fast.runs.jobs.run import Remake
from datasetdm_fast.runs.jobs.run_settings import RunConfig
from datasetdm_fast.runs.run_folder.document import check_same, differences, read_document, table_of
from datasetdm_fast.runs.run_folder.remaking import remakable
from datasetdm_fast.settings import EngineSettings, flags_of, json_values

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.sampling.schedule import Schedule

# settings of a run that its compositions do not have: what its samples were chosen by, and which pixels it ignored
NOT_KEPT = "prompts number per_class truncate_prompts keep accept most_tries ignore ignore_below".split()
KEPT = {flag.name for flag in flags_of(RunConfig) if flag.metadata["identity"] and flag.name not in NOT_KEPT}
CHANGED = ("model", "decoder", "steps", "guidance")  # settings of a run that its compositions may change


def drawn_source(path: Path, *, only_kept: bool) -> Source:
    """A finished run whose settings tell how one model drew its samples."""
    source = Source(path, only_kept=only_kept)
    if not set(CHANGED) <= source.document["config"].keys():
        raise Refused(
            f"{path}: was made by {source.document.get('command')}, so its samples were not all drawn by one model",
            "Name a run folder that generate, edit or vary has made.",
        )
    return source


@dataclass(frozen=True)
class SourceLatents:
    """The images of a batch as latents, and the noise that is added to them."""

    scheduler: Mapping[str, Any]
    clean: Tensor  # [B, 4, h, w]
    noise: Tensor

    def noised(self, step: int) -> Tensor:
        """The latents at a training step of the forward process."""
        from datasetdm_fast.engine.sampling.times import add_noise

        return add_noise(self.scheduler, self.clean, self.noise, step)


class Redrawing(ABC):
    """Images that are made from samples of a finished run; checked in full, and nothing is written yet.

    It is the origin of its run: it says what the latents begin as, and what is written of a sample that was made.
    """

    command: ClassVar[str]

    def __init__(self, source: Source, settings: RedrawSettings):
        self.source, self.settings = source, settings
        self.requests = [row.request for row in source.run.rows(parts=())]  # by the position in the source
        self.places = self._places()
        self.digests = source.digests()

    @property
    @abstractmethod
    def number(self) -> int:
        """Images to make."""

    @property
    @abstractmethod
    def told(self) -> str:
        """How the images were made, for a reader of the data set card."""

    @property
    def image_format(self) -> str:
        return self.source.document["config"]["image_format"]

    @abstractmethod
    def place(self, index: int) -> int:
        """The position in the source of the sample that image `index` is made from."""

    @abstractmethod
    def prompt(self, index: int) -> PromptLine:
        """Prompt, seed and class words of an image."""

    @abstractmethod
    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        """See Origin."""

    @abstractmethod
    def finish(self, sample: Sample) -> Sample:
        """See Origin."""

    def own_settings(self) -> dict[str, Any]:
        """The settings of the command that decide the bytes, as run.json has them."""
        return json_values(self.settings.identity())

    @property
    def config(self) -> dict[str, Any]:
        source = self.source.document["config"]
        kept = {name: value for name, value in source.items() if name in KEPT}
        own = {"image_format": self.image_format, "kept": self.source.kept_digest}
        if self.settings.only:  # written in one way
            own["only"] = [self.requests[place].id for place in self.places]
        return kept | self.own_settings() | own

    def tile(self, index: int) -> Tile:
        return self.source.tile(self.place(index))

    def provenance(self, index: int) -> dict[str, Any]:
        """What a row says of the source of its image: the id there, and what all images of one source share."""
        row = self.tile(index).row
        return {"source": row.request.id, "group": row.group}

    def latents(self, engine: Engine, requests: Sequence[Request]) -> SourceLatents:
        import numpy as np
        import torch

        from datasetdm_fast.kernels.to_device import to_device

        images = torch.from_numpy(np.stack([self.tile(request.index).pixels["image"] for request in requests]))
        clean = engine.encode_image(images)
        noise = to_device(drawn_noise(requests, engine.model.size), clean.device)
        return SourceLatents(engine.model.scheduler, clean, noise)

    def _places(self) -> list[int]:
        """Positions in the source of the samples that are taken."""
        if not self.settings.only:
            return list(range(len(self.source.run)))
        found = []
        for id in self.settings.only:
            try:
                found.append(self.source.run.position(id))
            except KeyError:
                raise Refused(
                    f"--only {id}: no sample of {self.source.path} has this id",
                    "Use an id from samples.jsonl, for example 00000003.",
                ) from None
        return sorted(set(found))

    def check(self, folder: Path) -> Mapping[str, Any] | None:
        """run.json of the run folder, None where there is none yet; other settings and another source are refused."""
        stored = read_document(folder)
        if stored is not None:
            wanted = {"command": self.command, "config": self.config, "source": self.digests}
            check_same(folder, decisive(stored), wanted)
        return stored

    def check_words(self, engine: Engine) -> None:
        """Refuses prompts that the model cannot take."""
        for index in range(self.number):
            prompts.fit_prompt(self.prompt(index).text, engine.model.tokenizer, f"image {index:08d}")

    @classmethod
    def restored(cls, source: Source, settings: RedrawSettings, config: Mapping[str, Any]) -> Self:
        """The one of these settings, and of what run.json holds of them."""
        return cls(source, settings)

    @classmethod
    def resumed(cls, folder: Path, stored: Mapping[str, Any], settings: RedrawSettings) -> Self:
        """The one that a run folder tells of; `settings` say where source and weights lie now, and the device."""
        config = stored["config"]
        opened = drawn_source(source_path(folder, stored, settings.run), only_kept=bool(config.get("kept")))
        own = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config.items()
            if name in settings.identity() and not isinstance(value, dict)
        }
        try:
            restored = replace(settings, **own, kept=bool(config["kept"]))
            restored.check()
            return cls.restored(opened, restored, config)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise Refused(f"{folder}: its run.json is damaged ({error})", "Restore the file from a copy.") from error


def finished(redrawing: Redrawing, folder: Path) -> Result | None:
    """The result of a run with nothing left to do, found without a network."""
    stored = redrawing.check(folder)
    is_dry = redrawing.settings.dry_run
    return None if stored is None else job.settled(folder, stored, redrawing.number, is_dry=is_dry)


def prepare(redrawing: Redrawing, folder: Path) -> Job:
    """The job of a redrawing: engine loaded, prompts measured, run folder compared; nothing is written."""
    stored, source, settings = redrawing.check(folder), redrawing.source.document, redrawing.settings
    config = _run_config(redrawing, folder)
    engine, decoders = job.engine_of(config, stored)
    _check_weights(redrawing.source, engine, decoders)
    # A label of another package tells nothing of the words that it was asked for: the plan of the run does.
    words = [table["classes"][1:] for label, table in source["labels"].items() if _is_asked(label)]
    asked = words[0] if words else source["plan"].get("words", ())
    recipe = job.recipe_of(config, engine, asked, settings.strength, table_of(source))
    redrawing.check_words(engine)
    number = redrawing.number
    size = config.batch_size or (stored["plan"]["batch_size"] if stored else min(engine.suggested_batch(), number))
    words = tuple(source["plan"].get("words", ()))
    digest = hashlib.sha256("\n".join(redrawing.prompt(index).text for index in range(number)).encode()).hexdigest()
    plan = Plan(redrawing.prompt, words, number, 0, size, digest, number, has_seeds=True)
    recipe = replace(recipe, origin=redrawing, facts={**recipe.facts, "strength": settings.strength})
    document = job.describe(redrawing.config, plan, engine, recipe, decoders) | {
        "command": redrawing.command,
        "composition": {
            "told": redrawing.told,
            "sides": f"{recipe.size} × {recipe.size} pixels",
            "source": redrawing.source.provenance,
        },
    }
    made = Job(config, plan, engine, replace(recipe, facts=job.row_facts(document)), document, 0)
    if stored is not None:
        made = replace(job.adopt(made, stored), done=job.count_rows(config))
    job.check_room(made)
    return made


def _is_asked(label: str) -> bool:
    """Whether the decoder of a label was asked for words, which its table then holds after the background."""
    return LabelName.parse(label).task == "open-vocabulary"


def _run_config(redrawing: Redrawing, folder: Path) -> RunConfig:
    """The settings of the source, with the engine and the places of this run."""
    names, settings = {field.name for field in fields(RunConfig)}, redrawing.settings
    told = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in redrawing.config.items()
        if name in names and name != "only"
    }
    own = {name: getattr(settings, name) or redrawing.source.document["config"][name] for name in CHANGED}
    here = {field.name: getattr(settings, field.name) for field in fields(EngineSettings)}
    return RunConfig(
        **{**told, **here, **own},
        out=str(folder),
        limit=settings.limit,
        allow_download=settings.allow_download,
    )


def _check_weights(source: Source, engine: Engine, decoders: Mapping[str, Any]) -> None:
    """Refuses other weights than those that made the source."""
    digests = {"model": dict(engine.model.digests), "decoders": {name: one["digest"] for name, one in decoders.items()}}
    known = {
        "model": source.document["model"]["digests"],
        "decoders": {name: one["digest"] for name, one in source.document["decoders"].items()},
    }
    if found := differences(known, digests):
        raise Refused(
            f"{source.path}: was made with other weights ({'; '.join(found)})",
            "Name its own weights: --model MODEL --decoder DIR.",
        )


def prepare_remake(cls: type[Redrawing], settings: RedrawSettings) -> Remake:
    """The one sample `settings.only` of the run folder `settings.out`, in the batch that it was made in."""
    folder, id = Path(settings.out), ",".join(settings.only)
    stored, row = remakable(cls.command, folder, id)
    made = prepare(cls.resumed(folder, stored, replace(settings, only=())), folder)
    index, place = divmod(row.request.index, made.plan.batch_size)
    return Remake(folder, dict(stored), row, made.engine, made.recipe, made.plan.batch(index), place)
