"""What a line of a generator asks for, decided from the line and the user's files alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasetdm_fast.compat.showlab import prompts
from datasetdm_fast.compat.showlab.checkout import Script, present, read_settings
from datasetdm_fast.compat.showlab.lines import Line
from datasetdm_fast.compat.showlab.scripts import Generator
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.semantic import BACKGROUND
from datasetdm_fast.engine.loading import PRESETS
from datasetdm_fast.engine.loop.prompts import PromptLine, PromptSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.run_settings import RunConfig
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.json_stream import JsonStream

RUN = ".run"  # of a line's output: the run folder beside its files
SAID_OTHERWISE = {"mouse": "computer mouse"}  # by DatasetDM's generator and in the names of its prompt files
SECTIONS = {"num_classes": "SEG_Decorder", "num_queries": "SEG_Decorder", "max_depth": "Depth_Decorder"}
FARTHEST = {10: "nyu", 80: "kitti"}  # metres -> kind of depth decoder


@dataclass(frozen=True)
class ClassName:
    """A class as the generator's files call it, as its sentences do, and as its decoder's labels do."""

    file: str
    said: str
    word: str


@dataclass(frozen=True)
class Order:
    """All images of a line, and the decoders that label them."""

    line: Line
    out: Path
    checkpoints: Mapping[str, tuple[str, str]]  # label -> kind of its decoder, and the flag of its weights
    guidance: float
    items: tuple[prompts.Item, ...]
    classes: tuple[ClassName, ...] = ()
    names_classes: bool = False  # whether a label is asked for the class of its image
    words: tuple[str, ...] = ()  # classes of the run where its decoders' own are not meant
    expected: Mapping[str, float] = field(default_factory=dict)  # what --config says of the decoder

    @property
    def run_folder(self) -> Path:
        return self.out / RUN

    def given(self, item: prompts.Item) -> PromptLine:
        """The prompt of an image, the class its label is asked for and its seed."""
        named = tuple(each.word for each in self.classes if each.file == item.name) if self.names_classes else ()
        return PromptLine(0, item.prompt, named, item.seed)

    @property
    def source(self) -> PromptSource:
        return PromptSource(tuple(map(self.given, self.items)), self.line.script, self.words, 0, tokenizer_cuts=True)

    @property
    def config(self) -> RunConfig:
        """The same as settings of a run; --strict takes the reference engine, whose decoders can move."""
        line, strict = self.line, self.line["strict"]
        if strict and line["engine"] not in ("auto", "torch"):
            raise Refused(
                f"--strict: the engine is {line['engine']}, and only the engine torch supports it",
                "Drop --strict or --engine.",
            )
        return RunConfig(
            model=model_of(line),
            decoder=",".join(f"{kind}:{line.path(flag)}" for kind, flag in self.checkpoints.values()),
            task=tuple(self.checkpoints),
            classes=self.words,
            number=len(self.items),
            seed=prompts.FIRST_SEED,
            guidance=line["guidance"] or self.guidance,
            engine="torch" if strict else line["engine"],
            batch_size=1 if strict else line["batch_size"],
            truncate_prompts=True,
            out=str(self.run_folder),
            **{name: line[name] for name in ("steps", "profile", "dtype", "device", "threads", "limit", "quiet")},
        )


def model_of(line: Line) -> str:
    """The model of a line: one of ours by its name, else a folder or file that must be there."""
    if line["model"] in PRESETS:
        return line["model"]
    return str(present(line.path("model"), "model", "Put Stable Diffusion 1.4 there, or name its folder with --model."))


def check_counts(line: Line, count: str) -> prompts.Counts:
    """How many images a line asks for."""
    for name in (count, "thread_num"):
        if line[name] < 1:
            raise Refused(f"--{name} {line[name]}: expected a number of 1 or more", "Choose another number.")
    if line["thread_num"] > line[count]:
        raise Refused(
            f"--thread_num {line['thread_num']}: --{count} {line[count]} gives too few images for that many processes",
            f"Give a --thread_num of at most {line[count]}.",
        )
    return prompts.Counts(line[count], line["thread_num"])


def order_of(generator: Generator, line: Line) -> Order:
    """The order of a line of one of the ten generators."""
    counts = check_counts(line, generator.count)
    settings = _settings(line) if generator.reads_config and line["config"] else {}
    kind = generator.kinds[0]
    if len(generator.kinds) > 1 and (farthest := settings.pop("max_depth", None)) is not None:
        if FARTHEST.get(farthest) not in generator.kinds:
            raise Refused(
                f"--config {line.path('config')}: max_depth is {documents.quoted(farthest)}, expected 10 or 80",
                "Name the configuration of NYU or KITTI.",
            )
        kind = FARTHEST[farthest]
    classes = _classes(generator, line)
    source = prompts.PromptTexts(
        Script(line.root / "tools" / f"{generator.script or generator.name}.py"),
        line.path("prompt_root"),
        may_lack_folder=bool(generator.script),
    )
    draws = [(each.file, generator.draw(source, each.file, each.said)) for each in classes or (ClassName("", "", ""),)]
    made = prompts.items(draws, counts, line["seed"], whole=line["all"], apart=line["fixed"])
    return Order(
        line,
        line.path("outdir"),
        {generator.task: (kind, "grounding_ckpt")},
        generator.guidance,
        tuple(made),
        classes,
        generator.asks_class,
        tuple(each.word for each in classes) if generator.classes == "lvis" else (),
        settings,
    )


def _classes(generator: Generator, line: Line) -> tuple[ClassName, ...]:
    if not generator.classes:
        return ()
    if generator.classes == "lvis":
        path = present(line.path("lvis_train_json"), "--lvis_train_json", "Name LVIS's annotation file.")
        try:
            table = class_tables.of_categories(
                [each.value for each in JsonStream(path) if each.key == "categories"], "lvis"
            )
        except ValueError as error:
            raise Refused(f"{path}: {error}", "Name LVIS's annotation file.") from error
        return tuple(ClassName(word.name, word.say, word.name) for word in table.classes)
    names = [name for name in class_tables.table(generator.classes).names if name != BACKGROUND]
    others = {name: SAID_OTHERWISE.get(name, name) for name in names}
    return tuple(ClassName(others[name], others[name], name) for name in names)


def _settings(line: Line) -> dict[str, Any]:
    """What the configuration of a line says of its decoder."""
    path = line.path("config")
    found = read_settings(path)
    values = {}
    for name, section in SECTIONS.items():
        part = found.get(section, {})
        if isinstance(part, dict) and name in part:
            values[name] = part[name]
            try:
                documents.check_form(values[name], float, f"{section}.{name}")
            except ValueError as error:
                raise Refused(f"--config {path}: {error}", "Name a file of the checkout's config folder.") from error
    return values
