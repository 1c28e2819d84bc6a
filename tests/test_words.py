"""Names are words of the field: `python tests/test_words.py [STOREY]` lists the identifiers that are not, file by file.

`words.toml` holds the words that are no names here, and how many of them each storey may still have; that only falls.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from layers import HERE, modules, storey_of, tree_of

pytestmark = pytest.mark.core

RULES = tomllib.loads((Path(__file__).with_name("words.toml")).read_text(encoding="utf-8"))
WORDS: dict[str, str] = RULES["words"]
BUDGET: dict[str, int] = RULES["budget"]
PARTICIPLES: set[str] = {*RULES["participles"]["irregular"]}
ALLOWED: set[str] = {*RULES["participles"]["allowed"]}


class Finding(NamedTuple):
    """One identifier that is no word of the field, or a docstring that says what it stands beside."""

    line: int
    name: str
    reason: str


def named(node: ast.AST) -> str | None:
    """The identifier that a node of the syntax tree writes."""
    match node:
        case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.keyword(arg=name):
            return name
    return None


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.dump(decorator) for decorator in function.decorator_list)


def is_participle(name: str) -> bool:
    """Whether a function is named by a participle alone; its name should be a verb and the object of it."""
    bare = name.strip("_")
    return "_" not in bare and bare not in ALLOWED and bool(re.search(r"[^e]ed$", bare) or bare in PARTICIPLES)


def findings(path: Path) -> Iterator[Finding]:
    for node in ast.walk(tree_of(path)):
        name = named(node)
        if name and name.strip("_").lower() in WORDS:
            line = getattr(node, "end_lineno" if isinstance(node, ast.Attribute) else "lineno")
            yield Finding(line, name, f"say {WORDS[name.strip('_').lower()]}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if is_participle(node.name) and not is_property(node):
                yield Finding(node.lineno, node.name, "a verb and its object")
            if (ast.get_docstring(node) or "").startswith("The same"):
                yield Finding(node.lineno, node.name, 'the docstring begins with "The same"')


@cache
def places(root: Path = HERE) -> dict[str, list[tuple[Path, Finding]]]:
    """The findings of each storey of the product."""
    by_storey: dict[str, list[tuple[Path, Finding]]] = {}
    for module, path in modules(root).items():
        if not module.startswith("bench"):
            by_storey.setdefault(storey_of(module), []).extend((path, finding) for finding in findings(path))
    return by_storey


@pytest.mark.parametrize("storey", BUDGET)
def test_names_are_words_of_the_field(storey):
    count = len(places()[storey])
    assert count <= BUDGET[storey], f"run python tests/test_words.py {storey}"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def read_rows(rows): return rows", []),
        ("def f(found): return found", ["found", "found"]),
        ("result.told", ["told"]),
        ("f(kept=1)", ["kept"]),
        ("def judged(sample): ...", ["judged", "judged"]),
        ("def opened(path): ...", ["opened"]),
        ("@property\ndef opened(self): ...", []),
        ("class Asked: ...", ["Asked"]),
        ("def need(): ...", []),
        ('def f():\n    """The same, twice."""', ["f"]),
        ("text = 'found'  # told", []),
    ],
)
def test_what_is_no_name_is_found(tmp_path, source, names):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert [finding.name for finding in findings(path)] == names


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(BUDGET)
    for storey, entries in places().items():
        if storey in chosen:
            for path, finding in sorted(entries):
                print(f"{path.relative_to(HERE)}:{finding.line} {finding.name}: {finding.reason}")
    print(Counter({storey: len(entries) for storey, entries in places().items()}), file=sys.stderr)
