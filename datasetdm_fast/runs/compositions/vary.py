"""Variants: images of a run moved to other domains, with their geometry checked against the labels of their sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasetdm_fast.data import Annotation, Instances, Request, Sample
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.labels import by_kind, kind_of
from datasetdm_fast.engine.labels.kind import LabelKind
from datasetdm_fast.engine.loop.origin import Beginning
from datasetdm_fast.engine.loop.prompts import PromptLine, count_tokens
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions.domains import DOMAINS, check_domains, moved
from datasetdm_fast.runs.compositions.redraw import Redrawing
from datasetdm_fast.runs.compositions.settings import VarySettings
from datasetdm_fast.runs.compositions.source import Source

if TYPE_CHECKING:
    from datasetdm_fast.engine.sampling.schedule import Schedule

ONE_WORD = 3  # tokens of a word that a tokenizer knows, its start and end marks among them
CHOSEN: dict[str, Callable[[LabelKind, Any, Any], Any]] = {  # --labels -> (kind, label of the source, predicted one)
    "source": lambda kind, source, predicted: source,
    "predicted": lambda kind, source, predicted: predicted,
    "agreeing": lambda kind, source, predicted: kind.agreeing(source, predicted),
}


class Variants(Redrawing):
    """Every sample in every domain: image k is sample k // domains in domain k % domains."""

    command = "vary"
    settings: VarySettings

    def __init__(self, source: Source, settings: VarySettings):
        check_domains(settings.domain)
        super().__init__(source, settings)

    @property
    def number(self) -> int:
        return len(self.places) * len(self.settings.domain)

    @property
    def told(self) -> str:
        where = f"{', '.join(self.settings.domain)}, strength {self.settings.strength:g}"
        return f"Varied from the run {self.source.path.resolve().name}: {where}, {self.settings.labels} labels"

    def place(self, index: int) -> int:
        return self.places[index // len(self.settings.domain)]

    def domain(self, index: int) -> str:
        return self.settings.domain[index % len(self.settings.domain)]

    def prompt(self, index: int) -> PromptLine:
        request = self.requests[self.place(index)]
        return PromptLine(
            0,
            moved(request.prompt, self.domain(index)),
            request.classes,
            request.seed,
            negative=request.negative,
            class_prompt=request.class_prompt,
        )

    def check_words(self, engine: Engine) -> None:
        """Refuses too long prompts, and domains for which a model that knows others has no word."""
        known = [name for name in DOMAINS if count_tokens(name, engine.model.tokenizer) == ONE_WORD]
        for name in self.settings.domain:
            if known and name not in known:
                raise Refused(
                    f"--domain {name}: the model {engine.model.name} does not know this domain",
                    f"Choose from {', '.join(known)}.",
                )
        super().check_words(engine)

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        return Beginning(self.latents(engine, requests).noised(schedule.noise_step(0)))

    def finish(self, sample: Sample) -> Sample:
        index = sample.request.index
        tile = self.tile(index)
        truth = {task: _without_ids(self.source.label(tile, task)) for task in sample.annotations}
        labels = {
            task: CHOSEN[self.settings.labels](kind_of(task), truth[task], predicted)
            for task, predicted in sample.annotations.items()
        }
        facts = {"domain": self.domain(index), "consistency": consistency(sample.annotations, truth)}
        provenance = {**sample.provenance, **self.provenance(index), **facts}
        return Sample(sample.request, sample.image, labels, provenance)


def _without_ids(label: Annotation) -> Annotation:
    """The label with its things numbered anew: those of an edited source would be there once for each domain."""
    return replace(label, ids=None) if isinstance(label, Instances) else label


def consistency(predicted: Mapping[str, Annotation], truth: Mapping[str, Annotation]) -> float | None:
    """Mean IoU of the source's labels with those predicted on the variant, by the first kind of labels that has areas,
    label maps before instances; None where there is none.
    """
    for task in sorted(by_kind(truth), key=lambda task: not kind_of(task).is_map):
        if (overlap := kind_of(task).overlap(predicted[task], truth[task])) is not None:
            return round(overlap, 4)
    return None
