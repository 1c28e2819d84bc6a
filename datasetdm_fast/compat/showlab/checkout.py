"""Files of a user's checkout of DatasetDM: texts in its scripts, prompt files, configurations."""

import ast
import io
from collections.abc import Iterator
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
class Script:
    """A script of the checkout, read and never run: lists and sentences that it assigns."""

    path: Path

    @cached_property
    def _assigned(self) -> dict[str, list[ast.expr]]:
        """Every expression that the script's process assigns to a name, in the order of the lines."""
        text = storage.read(check_present(self.path, "DatasetDM's script", ROOT_REMEDY), LARGEST_SCRIPT)
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Refused(f"{self.path}: not readable as Python ({type(error).__name__})", GET_AGAIN) from error
        process = next(
            (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == FUNCTION), None
        )
        values: dict[str, list[ast.expr]] = {}
        for node in _walk(process) if process else ():
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                values.setdefault(node.targets[0].id, []).append(node.value)
        return values

    def texts(self, name: str, place: int = 0) -> list[str]:
        """A list of texts that is assigned to a name and not empty; of several the one at `place`."""
        values = [self._plain(each) for each in self._assigned.get(name, ()) if isinstance(each, ast.List)]
        lists = [each for each in values if each and all(isinstance(text, str) for text in each)]
        if len(lists) <= place:
            raise Refused(f"{self.path}: {FUNCTION} assigns no list of texts to {name}", GET_AGAIN)
        return lists[place]

    def lists(self, name: str) -> dict[str, list[str]]:
        """A dictionary of lists of texts that is assigned to a name."""
        value = next((self._plain(each) for each in self._assigned.get(name, ()) if isinstance(each, ast.Dict)), None)
        try:
            documents.check_form(value, dict, name)
            documents.check_form(value, dict.fromkeys(value, [str]), name)
        except ValueError as error:
            raise Refused(f"{self.path}: {error}", GET_AGAIN) from error
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
            raise Refused(f"{self.path}: {FUNCTION} builds no prompt from {argument or 'a text alone'}", GET_AGAIN)
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
