"""The prompt of every image, by the rule of each generator, from scripts and files of a checkout of DatasetDM."""

import ast
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import documents

LARGEST_SCRIPT = 2**20  # bytes
LARGEST_PROMPTS = 2**26
FUNCTION = "sub_processor"  # of a generator's process
GET_AGAIN = "Get the file again from a checkout of DatasetDM."


def check_present(path: Path, what: str, remedy: str) -> Path:
    """The path; a missing one is refused."""
    if not storage.is_there(path):
        raise Missing(f"{what}: {path} is not there{storage.named_alike(path)}", remedy)
    return path


@dataclass(frozen=True)
class PromptTexts:
    """The texts of a run: lists and sentences that a script of the checkout assigns, which is read and never run, and
    the lines of prompt files.
    """

    script: Path
    folder: Path

    @cached_property
    def _assigned(self) -> dict[str, list[ast.expr]]:
        """Every expression that the script's process assigns to a name, in the order of the lines."""
        text = storage.read(check_present(self.script, "DatasetDM's script", ROOT_REMEDY), LARGEST_SCRIPT)
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Refused(f"{self.script}: not readable as Python ({type(error).__name__})", GET_AGAIN) from error
        process = next(
            (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == FUNCTION), None
        )
        values: dict[str, list[ast.expr]] = {}
        for node in _walk(process) if process else ():
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                values.setdefault(node.targets[0].id, []).append(node.value)
        return values

    def strings(self, name: str) -> list[str]:
        """The first list of texts that is assigned to a name and not empty."""
        values = [self._plain(each) for each in self._assigned.get(name, ()) if isinstance(each, ast.List)]
        lists = [each for each in values if each and all(isinstance(text, str) for text in each)]
        if not lists:
            raise Refused(f"{self.script}: {FUNCTION} assigns no list of texts to {name}", GET_AGAIN)
        return lists[0]

    def lists(self, name: str) -> dict[str, list[str]]:
        """A dictionary of lists of texts that is assigned to a name."""
        value = next((self._plain(each) for each in self._assigned.get(name, ()) if isinstance(each, ast.Dict)), None)
        try:
            documents.check_form(value, dict, name)
            documents.check_form(value, dict.fromkeys(value, [str]), name)
        except ValueError as error:
            raise Refused(f"{self.script}: {error}", GET_AGAIN) from error
        return value

    def template(self, argument: str = "") -> str:
        """The sentence of a prompt: the last that is formatted with `argument`, or without one the last plain text."""
        sentences = []
        for each in self._assigned.get("prompts", ()):
            inner = each.elts[0] if isinstance(each, ast.List) and len(each.elts) == 1 else None
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr == "format":
                value = inner.args[0].func if inner.args and isinstance(inner.args[0], ast.Call) else inner.args[0]
                sentence = inner.func.value
                if argument and isinstance(value, ast.Name) and value.id == argument:
                    sentences.append(sentence.value if isinstance(sentence, ast.Constant) else None)
            elif isinstance(inner, ast.Constant) and not argument:
                sentences.append(inner.value)
        if not sentences or not isinstance(sentences[-1], str) or (argument and sentences[-1].count("{}") != 1):
            raise Refused(f"{self.script}: {FUNCTION} builds no prompt from {argument or 'a text alone'}", GET_AGAIN)
        return sentences[-1]

    def _plain(self, node: ast.expr) -> Any:
        """The value of a literal, names in it resolved; None for any other expression."""
        if isinstance(node, ast.Name):
            return next((self._plain(each) for each in self._assigned.get(node.id, ()) if each is not node), None)
        if isinstance(node, ast.List):
            return [self._plain(each) for each in node.elts]
        if isinstance(node, ast.Dict):
            return {self._plain(key): self._plain(each) for key, each in zip(node.keys, node.values) if key}
        return node.value if isinstance(node, ast.Constant) else None

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


ROOT_REMEDY = "Give a checkout of showlab/DatasetDM with --root: its lists and sentences are read there."


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below a node, in the order of their lines."""
    for child in ast.iter_child_nodes(node):
        yield child
        yield from _walk(child)


def read_prompt_lines(path: Path) -> list[str]:
    """The lines of a prompt file as DatasetDM reads them: empty ones count, spaces stay."""
    data = storage.read(check_present(path, "prompts", "Name the folder with --prompt_root."), LARGEST_PROMPTS)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Refused(f"{path} line {line}: not valid UTF-8", "Save the file as UTF-8.") from error
    return [line.replace("\n", "") for line in io.StringIO(text, newline=None)]


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of DatasetDM's configurations."""
    check_present(path, "--config", "Name a file of the checkout's config folder, or leave --config out.")
    settings = documents.read_yaml(path)
    if not isinstance(settings, dict):
        raise Refused(f"{path}: holds a {type(settings).__name__}, expected sections of settings", "Name another file.")
    return settings


TEMPLATES_BELOW = 0.3  # random numbers up to it take the template, others a line of the list
GENERAL = "general.txt"
FIRST_SEED = 200_000


Sampler = Callable[[random.Random], str]  # the next prompt of a class
SamplerOf = Callable[[PromptTexts, str], Sampler]  # of texts, and a class as files and sentences name it


def voc(texts: PromptTexts, name: str) -> Sampler:
    """Kinds of the class or whole prompts, both from lists in the script, and the lines of its file."""
    kinds = texts.lists("map_dict")
    if name in kinds:
        sentence = texts.strings("prompts_list")[0]
        lines = [sentence.format(kind, name) for kind in kinds[name]]
    elif name == "person":
        lines = [line.format(noun) for noun in texts.strings("names") for line in texts.strings("prompt_for_person")]
    else:
        lines = texts.strings(f"prompt_for_{name}")
    lines = [*lines, *texts.file(name, must_exist=False)]
    return sample_line_or_template(lines, texts.template("class_target").format(name))


def coco(texts: PromptTexts, name: str) -> Sampler:
    """The lines of the class's file, for persons sentences of the script, and the lines for every class."""
    if name == "person":
        lines = [line.format(noun) for noun in texts.strings("names") for line in texts.strings("prompts_list")]
    else:
        lines = texts.file(name, must_exist=False)
    return sample_line_or_template([*lines, *texts.general()], texts.template("class_target").format(name))


def cityscapes(texts: PromptTexts, name: str) -> Sampler:
    """A line of the class's file or of the one for every class, in the script's sentence."""
    sentence = texts.template("choice")
    return sample_line([*texts.file(name, must_exist=True), *texts.general()], sentence)


def medical(texts: PromptTexts, name: str) -> Sampler:
    """The script's one sentence; a line is sampled all the same."""
    sampler, sentence = cityscapes(texts, name), texts.template()
    return lambda generator: sampler(generator) and sentence


def general(texts: PromptTexts, name: str) -> Sampler:
    """A line as it is."""
    return sample_line(texts.general(), "{}")


def sentence(texts: PromptTexts, name: str) -> Sampler:
    """A line in the script's sentence."""
    return sample_line(texts.general(), texts.template("choice"))


def pose(texts: PromptTexts, name: str) -> Sampler:
    """Every pairing of the script's sentences, nouns and ends."""
    ends, nouns, lines = texts.strings("body"), texts.strings("names"), texts.strings("prompts_list")
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
    """One image of a run: its seed, prompt and class."""

    seed: int
    prompt: str
    name: str = ""  # of its class; empty where the generator has none

    @property
    def stem(self) -> str:
        """The stem of the names of its files."""
        return f"{self.name}_{self.seed}" if self.name else str(self.seed)


def make_items(samplers: Sequence[tuple[str, Sampler]], total: int, processes: int, seed: int) -> Iterator[Item]:
    """The images of a run, `total` of each class, process after process as DatasetDM would make them; all processes
    sample the same prompts, and what is left over by them is dropped.
    """
    each = total // processes
    for process in range(processes):
        generator = random.Random(seed)
        first = FIRST_SEED + 2 * process * each
        for k, (name, sample) in enumerate(samplers):
            for n in range(each):
                yield Item(first + k * each + n, sample(generator), name)
