"""All images of a generator's command line, decided from the line and the user's files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datasetdm_fast.compat.showlab import prompts
from datasetdm_fast.compat.showlab.checkout import check_present
from datasetdm_fast.compat.showlab.lines import Line
from datasetdm_fast.engine.loading import PRESETS
from datasetdm_fast.engine.loop.prompts import PromptLine, PromptSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_settings import RunConfig

if TYPE_CHECKING:
    from datasetdm_fast.compat.showlab.scripts import Generator

RUN = ".run"  # of a line's output: the run folder beside its files


@dataclass(frozen=True)
class ClassName:
    """A class as the generator's files, its sentences and its decoder's labels name it."""

    file: str
    spoken: str
    label: str


@dataclass(frozen=True)
class Order:
    """All images of a line, and the decoder that labels them."""

    script: Generator
    line: Line
    kind: str  # of the decoder's checkpoint
    items: tuple[prompts.Item, ...]
    classes: tuple[ClassName, ...] = ()

    @property
    def out(self) -> Path:
        return self.line.path("outdir")

    @property
    def run_folder(self) -> Path:
        return self.out / RUN

    @property
    def prompts(self) -> tuple[PromptLine, ...]:
        """Of each image its prompt, the class that its label is requested for, and its seed."""
        labels = {each.file: (each.label,) for each in self.classes} if self.script.asks_class else {}
        return tuple(PromptLine(0, item.prompt, labels.get(item.name, ()), item.seed) for item in self.items)

    @property
    def source(self) -> PromptSource:
        return PromptSource(self.prompts, self.line.script, (), 0, is_part=True, tokenizer_cuts=True)

    @property
    def config(self) -> RunConfig:
        """The order as settings of a run."""
        line = self.line
        return RunConfig(
            model=model_of(line),
            decoder=f"{self.kind}:{line.path('grounding_ckpt')}",
            task=(self.script.task,),
            number=len(self.items),
            seed=prompts.FIRST_SEED,
            guidance=line["guidance"] or self.script.guidance,
            truncate_prompts=True,
            allow_unnamed=True,
            out=str(self.run_folder),
            **{name: line[name] for name in "engine batch_size steps profile dtype device threads limit quiet".split()},
        )


def model_of(line: Line) -> str:
    """The model of a line: one of ours by its name, else a folder or file that must exist."""
    if line["model"] in PRESETS:
        return line["model"]
    remedy = "Put Stable Diffusion 1.4 there, or name its folder with --model."
    return str(check_present(line.path("model"), "model", remedy))


def read_counts(line: Line, count: str) -> prompts.Counts:
    """How many images a line requests, and from how many processes."""
    for name in (count, "thread_num"):
        if line[name] < 1:
            raise Refused(f"--{name} {line[name]}: expected a number of 1 or more", "Choose another number.")
    if line["thread_num"] > line[count]:
        raise Refused(
            f"--thread_num {line['thread_num']}: --{count} {line[count]} gives too few images for that many processes",
            f"Give a --thread_num of at most {line[count]}.",
        )
    return prompts.Counts(line[count], line["thread_num"])
