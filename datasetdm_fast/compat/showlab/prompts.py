"""The prompt of every image: the rule of each generator, sampled as its processes sample them."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.compat.showlab.checkout import Script, read_prompt_lines
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

TEMPLATES_BELOW = 0.3  # random numbers up to it take the template, others a line of the list
GENERAL = "general.txt"
FIRST_SEED = 200_000


@dataclass(frozen=True)
class PromptTexts:
    """The texts of a run: the generator's script in the user's checkout, and the folder of prompt files."""

    script: Script
    folder: Path

    def file(self, name: str, *, must_exist: bool) -> list[str]:
        """The lines of a class's file."""
        try:
            path = self.folder / documents.check_inside(f"{name}.txt")
        except ValueError as error:
            raise Refused(f"--prompt_root {self.folder}: {error}", "Give the class another name.") from error
        if must_exist and storage.is_there(self.folder) and not storage.is_there(path):
            raise Refused(
                f"--prompt_root {self.folder}: it has no {path.name}{storage.named_alike(path)}",
                "Add this file, with one prompt per line.",
            )
        return read_prompt_lines(path) if must_exist or storage.is_there(path) else []

    def general(self) -> list[str]:
        """The lines for every class."""
        return read_prompt_lines(self.folder / GENERAL)


Sampler = Callable[[random.Random], str]  # the next prompt of a class
SamplerOf = Callable[[PromptTexts, str, str], Sampler]  # of texts, a class as files name it and as sentences do


def voc(texts: PromptTexts, name: str, spoken: str) -> Sampler:
    """Kinds of the class or whole prompts, both from lists in the script, and the lines of its file."""
    script = texts.script
    kinds = script.lists("map_dict")
    if name in kinds:
        sentence = script.texts("prompts_list")[0]
        lines = [sentence.format(kind, name) for kind in kinds[name]]
    elif name == "person":
        lines = [line.format(noun) for noun in script.texts("names") for line in script.texts("prompt_for_person")]
    else:
        lines = script.texts(f"prompt_for_{name}")
    lines = [*lines, *texts.file(name, must_exist=False)]
    return sample_line_or_template(lines, script.template("class_target").format(name))


def coco(texts: PromptTexts, name: str, spoken: str) -> Sampler:
    """The lines of the class's file, for persons sentences of the script, and the lines for every class."""
    script = texts.script
    if name == "person":
        lines = [line.format(noun) for noun in script.texts("names") for line in script.texts("prompts_list")]
    else:
        lines = texts.file(name, must_exist=False)
    return sample_line_or_template([*lines, *texts.general()], script.template("class_target").format(spoken))


def cityscapes(texts: PromptTexts, name: str, spoken: str) -> Sampler:
    """A line of the class's file or of the one for every class, in the script's sentence."""
    sentence = texts.script.template("choice")
    return sample_line([*texts.file(name, must_exist=True), *texts.general()], sentence)


def medical(texts: PromptTexts, name: str, spoken: str) -> Sampler:
    """The script's one sentence; a line is sampled all the same."""
    sampler, sentence = cityscapes(texts, name, spoken), texts.script.template()
    return lambda generator: sampler(generator) and sentence


def general(texts: PromptTexts, name: str, spoken: str) -> Sampler:
    """A line as it is."""
    return sample_line(texts.general(), "{}")


def sentence(texts: PromptTexts, name: str, spoken: str) -> Sampler:
    """A line in the script's sentence."""
    return sample_line(texts.general(), texts.script.template("choice"))


def pose(texts: PromptTexts, name: str, spoken: str) -> Sampler:
    """Every pairing of the script's sentences, nouns and ends."""
    script = texts.script
    ends, nouns, lines = script.texts("body"), script.texts("names"), script.texts("prompts_list")
    return sample_line([line.format(noun, end) for end in ends for noun in nouns for line in lines], "{}")


def sample_line_or_template(lines: Sequence[str], template: str) -> Sampler:
    """Samples a line seven times in ten, else the template; without lines no random number is used."""

    def sample(generator: random.Random) -> str:
        return generator.choice(lines) if lines and generator.random() > TEMPLATES_BELOW else template

    return sample


def sample_line(lines: Sequence[str], sentence: str) -> Sampler:
    """Samples a line and puts it into a sentence."""
    if not lines:
        raise Refused("prompts: the prompt files contain no line", "Write one prompt per line.")
    return lambda generator: sentence.format(generator.choice(lines))


@dataclass(frozen=True)
class Item:
    """One image of a run: the process by which DatasetDM makes it, its seed, prompt and class."""

    process: int
    seed: int
    prompt: str
    name: str = ""  # of its class; empty where the generator has none

    @property
    def stem(self) -> str:
        """The stem of the names of its files."""
        return f"{self.name}_{self.seed}" if self.name else str(self.seed)


@dataclass(frozen=True)
class Counts:
    """How many images are made of each class, and by how many processes DatasetDM would make them."""

    total: int
    processes: int

    @property
    def each(self) -> int:
        """Images of a class that a process makes; the remainder is dropped."""
        return self.total // self.processes


def make_items(samplers: Sequence[tuple[str, Sampler]], counts: Counts, seed: int) -> Iterator[Item]:
    """The images of a run, process after process; all processes sample the same prompts."""
    for process in range(counts.processes):
        generator = random.Random(seed)
        first = FIRST_SEED + 2 * process * counts.each
        for k, (name, sample) in enumerate(samplers):
            for n in range(counts.each):
                yield Item(process, first + k * counts.each + n, sample(generator), name)
