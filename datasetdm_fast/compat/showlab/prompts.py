"""Which prompt stands behind which image: the rule of each generator, drawn as its processes draw them."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.compat.showlab.checkout import Script, prompt_lines
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

TEMPLATES_BELOW = 0.3  # random numbers up to it take the template, others a line of the list
GENERAL = "general.txt"


@dataclass(frozen=True)
class PromptTexts:
    """Where the texts of a run lie: the generator's script in the user's checkout, and the folder of prompt files."""

    script: Script
    folder: Path
    may_lack_folder: bool = False  # of a generator whose prompts DatasetDM does not ship

    def file(self, name: str, *, must: bool) -> list[str]:
        """The lines of a class's file; one that need not be there may be missing."""
        try:
            path = self.folder / documents.check_inside(f"{name}.txt")
        except ValueError as error:
            raise Refused(f"--prompt_root {self.folder}: {error}", "Give the class another name.") from error
        if storage.is_there(path):
            return prompt_lines(path)
        if must and storage.is_there(self.folder):
            raise Refused(
                f"--prompt_root {self.folder}: it has no {path.name}{storage.named_alike(path)}",
                "Add this file, with one prompt per line.",
            )
        return prompt_lines(path) if must else []

    def general(self) -> list[str]:
        """The lines for every class."""
        if self.may_lack_folder and not storage.is_there(self.folder):
            return []
        return prompt_lines(self.folder / GENERAL)


Draw = Callable[[random.Random], str]


def of_voc(source: PromptTexts, name: str, said: str) -> Draw:
    """Kinds of the class or whole prompts, both from lists in the script, and the lines of its file."""
    texts = source.script
    kinds = texts.lists("map_dict")
    if name in kinds:
        sentence = texts.texts("prompts_list")[0]
        found = [sentence.format(kind, name) for kind in kinds[name]]
    elif name == "person":
        found = [line.format(noun) for noun in texts.texts("names") for line in texts.texts("prompt_for_person")]
    else:
        found = texts.texts(f"prompt_for_{name}")
    return mixed([*found, *source.file(name, must=False)], texts.template("class_target").format(name))


def of_coco(source: PromptTexts, name: str, said: str) -> Draw:
    """The lines of the class's file, for persons sentences of the script, and the lines for every class."""
    texts = source.script
    if name == "person":
        found = [line.format(noun) for noun in texts.texts("names") for line in texts.texts("prompts_list")]
    else:
        found = source.file(name, must=False)
    return mixed([*found, *source.general()], texts.template("class_target").format(said))


def of_cityscapes(source: PromptTexts, name: str, said: str) -> Draw:
    """A line of the class's file or of the one for every class, in the script's sentence."""
    sentence = source.script.template("choice")
    return chosen([*source.file(name, must=True), *source.general()], sentence)


def of_medical(source: PromptTexts, name: str, said: str) -> Draw:
    """The script's one sentence; a line is drawn all the same."""
    draw, sentence = of_cityscapes(source, name, said), source.script.template()
    return lambda generator: draw(generator) and sentence


def of_general(source: PromptTexts, name: str, said: str) -> Draw:
    """A line as it is."""
    return chosen(source.general(), "{}")


def in_sentence(source: PromptTexts, name: str, said: str) -> Draw:
    """A line in the script's sentence."""
    return chosen(source.general(), source.script.template("choice"))


def of_pose(source: PromptTexts, name: str, said: str) -> Draw:
    """Every pairing of the script's sentences, nouns and ends."""
    texts = source.script
    ends, nouns, lines = texts.texts("body"), texts.texts("names"), texts.texts("prompts_list")
    return chosen([line.format(noun, end) for end in ends for noun in nouns for line in lines], "{}")


def mixed(lines: Sequence[str], template: str) -> Draw:
    """One of the lines seven times in ten, else the template; nothing is drawn where there are no lines."""

    def draw(generator: random.Random) -> str:
        return generator.choice(lines) if lines and generator.random() > TEMPLATES_BELOW else template

    return draw


def chosen(lines: Sequence[str], sentence: str) -> Draw:
    """One of the lines, put into a sentence."""
    if not lines:
        raise Refused("prompts: the prompt files contain no line", "Write one prompt per line.")
    return lambda generator: sentence.format(generator.choice(lines))


@dataclass(frozen=True)
class Item:
    """One image of a run: the process and place in it that DatasetDM makes it at, its seed, prompt and class."""

    process: int
    place: int  # among the images of its process
    seed: int
    prompt: str
    name: str = ""  # of its class; empty where the generator has none

    @property
    def stem(self) -> str:
        """Of the names of its files."""
        return f"{self.name}_{self.seed}" if self.name else str(self.seed)


FIRST_SEED = 200_000


@dataclass(frozen=True)
class Counts:
    """How many images are made of each class, and by how many processes DatasetDM would make them."""

    wanted: int
    processes: int

    @property
    def each(self) -> int:
        """Images of a class that a process makes: what cannot be divided is dropped."""
        return self.wanted // self.processes

    def shares(self, *, whole: bool) -> list[tuple[int, int]]:
        """Every process and its images of a class; with `whole` one more makes what DatasetDM drops."""
        rest = self.wanted - self.each * self.processes
        return [(k, self.each) for k in range(self.processes)] + ([(self.processes, rest)] if whole and rest else [])


def items(draws: Sequence[tuple[str, Draw]], counts: Counts, seed: int, *, whole: bool, apart: bool) -> Iterator[Item]:
    """The images of a run, process after process; every process draws the same prompts, or with `apart` its own."""
    for process, count in counts.shares(whole=whole):
        generator = random.Random(seed + process if apart else seed)
        first = FIRST_SEED + 2 * process * counts.each
        for k, (name, draw) in enumerate(draws):
            for n in range(count):
                yield Item(process, k * count + n, first + k * counts.each + n, draw(generator), name)
