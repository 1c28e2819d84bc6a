"""Variants: images of a run moved to other domains, with their geometry checked against the labels of their sources."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasetdm_fast.data import Annotation, Instances, Request, Sample
from datasetdm_fast.engine.engines import Engine
from datasetdm_fast.engine.labels import by_kind, kind_of
from datasetdm_fast.engine.loop.calls import Beginning
from datasetdm_fast.engine.loop.prompts import PromptLine, count_tokens
from datasetdm_fast.engine.scenes.world import WHERE
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.runs.compositions.composition import SquareSource
from datasetdm_fast.runs.compositions.redraw import Redrawing
from datasetdm_fast.runs.compositions.settings import VarySettings

if TYPE_CHECKING:
    from datasetdm_fast.engine.sampling.schedule import Schedule

DOMAINS = {  # name -> what a prompt ends with
    **WHERE,
    "dawn": " at dawn",
    "dusk": " at dusk",
    "rain": " in the rain",
    "snow": " in the snow",
    "autumn": " in autumn",
    "winter": " in winter",
}
_WORDS = "|".join(re.escape(words.strip()) for words in DOMAINS.values() if words)
DOMAIN_WORDS = re.compile(rf"\s+(?:{_WORDS})\b")
TOKENS_OF_A_WORD = 3  # with its start and end marks, where a tokenizer knows it


def move_prompt(prompt: str, domain: str) -> str:
    """The prompt with the words of this domain at its end, in place of those of others."""
    return DOMAIN_WORDS.sub("", prompt).rstrip(" .,;") + DOMAINS[domain]


class Variants(Redrawing):
    """Every sample in every domain: image k is sample k // domains in domain k % domains."""

    command = "vary"
    choice: VarySettings

    def __init__(self, source: SquareSource, choice: VarySettings):
        names = ", ".join(DOMAINS)
        for name in choice.domain:
            if name not in DOMAINS:
                raise Refused(f"--domain {name}: unknown domain{nearest(name, DOMAINS)}", f"Choose from {names}.")
        self.copies = len(choice.domain)
        super().__init__(source, choice)

    @property
    def summary(self) -> str:
        where = f"{', '.join(self.choice.domain)}, strength {self.choice.strength:g}"
        return f"Varied from the run {self.source.path.resolve().name}: {where}, source labels"

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"labels": "source"}  # earlier versions had a choice, and their runs go on

    def domain(self, index: int) -> str:
        return self.choice.domain[index % self.copies]

    def prompt(self, index: int) -> PromptLine:
        request = self.requests[self.position(index)]
        return PromptLine(
            0,
            move_prompt(request.prompt, self.domain(index)),
            request.classes,
            request.seed,
            negative=request.negative,
            class_prompt=request.class_prompt,
        )

    def check_words(self, engine: Engine) -> None:
        """Refuses too long prompts, and domains for which a model that knows others has no word."""
        known = [name for name in DOMAINS if count_tokens(name, engine.model.tokenizer) == TOKENS_OF_A_WORD]
        for name in self.choice.domain:
            if known and name not in known:
                raise Refused(
                    f"--domain {name}: the model {engine.model.name} does not know this domain",
                    f"Choose from {', '.join(known)}.",
                )
        super().check_words(engine)

    def begin(self, engine: Engine, schedule: Schedule, requests: Sequence[Request]) -> Beginning:
        source = self.latents(engine, requests)
        return Beginning(source.add_noise(schedule.noise_steps[0]), noise=source.draw)

    def finish(self, sample: Sample) -> Sample:
        index = sample.request.index
        tile = self.tile(index)
        labels = {task: self.source.label(tile, task) for task in sample.annotations}
        # things are numbered anew: ids of an edited source would come once for each domain
        truth = {
            task: replace(each, ids=None) if isinstance(each, Instances) else each for task, each in labels.items()
        }
        facts = {"domain": self.domain(index), "consistency": measure_consistency(sample.annotations, truth)}
        provenance = {**sample.provenance, **self.provenance(index), **facts}
        return Sample(sample.request, sample.image, truth, provenance)


def measure_consistency(predicted: Mapping[str, Annotation], truth: Mapping[str, Annotation]) -> float | None:
    """Mean IoU of the source's labels with those predicted, by the first kind that has areas; None without one."""
    for task in sorted(by_kind(truth), key=lambda task: not kind_of(task).is_map):
        if (overlap := kind_of(task).overlap(predicted[task], truth[task])) is not None:
            return round(overlap, 4)
    return None
