"""What no command and no library call reaches: `python tests/test_reachable.py [ROOT]` prints the figures and every
unreached function, class, constant, method, property, field, form of an operation and name bound to C++.

Definitions are read with `ast` and followed from the commands, the programs of `compat` and the library
surface. A method is reached where its class is and its name occurs in reached code; a form of an operation where the
table of forms names it or product code calls it, so that tests and bench keep nothing alive.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
PACKAGE = "datasetdm_fast"
MAPPED = {"kernels": f"{PACKAGE}.kernels", "export": f"{PACKAGE}.export"}
NATIVE = f"{PACKAGE}._C"
SURFACE = ("data", "config", "errors")  # modules whose every public name is for users of the library
FORM_NAMES = ("reference", "plain", "compiled", "native", "fused")  # of an operation in kernels/
SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
MOST_ALLOWED = 10

# What nothing reaches and why it stays: a pattern of full names -> the reason.
ALLOWED = {
    f"{PACKAGE}._C.depth_head_vector_bytes": "tests compare every vector width that this CPU has",
    f"{PACKAGE}._C.take_times": "the bench tells by it what a call spends its time on",
    f"{PACKAGE}.serve.build": "docs/serve.yaml names it for Ray Serve",
    f"{PACKAGE}.*._repr_html_": "notebooks show values by it",
    f"{PACKAGE}.runs.gallery.server.Handler.do_*": "the library's server calls them by the method of a request",
}


@dataclass
class Definition:
    """One name of a module, or one method or field of its class, and what its code uses."""

    module: str
    name: str  # NAME, or CLASS.METHOD
    place: str
    kind: str = "name"  # name, method, field or body: the statements of a module outside its definitions
    uses: set[str] = field(default_factory=set)  # full dotted names
    words: set[str] = field(default_factory=set)  # attributes of values, and strings that are identifiers or modules
    patterns: set[str] = field(default_factory=set)  # of attributes whose names are put together
    bases: tuple[str, ...] = ()
    returns: set[str] = field(default_factory=set)

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


class Reader(ast.NodeVisitor):
    """Collects into one Definition what a piece of code uses, names of functions resolved scope by scope."""

    def __init__(self, found: Definition, bindings: dict[str, str]):
        self.found, self.scopes = found, [bindings]

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._chain(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._chain(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._text(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._text("".join(part.value if isinstance(part, ast.Constant) else "0" for part in node.values))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if getattr(node.func, "id", "") == "getattr" and isinstance(node.args[1], ast.JoinedStr):
            parts = (re.escape(p.value) if isinstance(p, ast.Constant) else r"\w+" for p in node.args[1].values)
            self.found.patterns.add("".join(parts))
        self.generic_visit(node)

    def _text(self, text: str) -> None:
        """What a string stands for: the name of an attribute or a module, or code for a process of its own."""
        if re.fullmatch(r"[\w.]+", text):
            self.found.words.add(text)
        elif match := re.fullmatch(rf"({PACKAGE}[\w.]*):(\w+)", text):
            self.found.uses.add(f"{match[1]}.{match[2]}")
        for module, names in re.findall(rf"from ({PACKAGE}[\w.]*) import (\w+(?:, \w+)*)", text):
            for name in names.split(", "):
                for chain in re.findall(rf"\b{name}\b((?:\.\w+)*)", text):
                    self.found.uses.add(f"{module}.{name}{chain}")

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring uses nothing
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = node.args
        for part in (*getattr(node, "decorator_list", ()), *arguments.defaults, *filter(None, arguments.kw_defaults)):
            self.visit(part)
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        for part in [each.annotation for each in every if each] + [getattr(node, "returns", None)]:
            if part:
                self.visit(part)
        body = node.body if isinstance(node.body, list) else [node.body]
        local = dict.fromkeys((each.arg for each in every if each), "")
        for statement in body:
            local |= bound(statement, self.found.module)
        self.scopes.append(local)
        for statement in body:
            self.visit(statement)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        self.scopes.append({name: "" for part in node.generators for name in bound(part.target, "")})
        self.generic_visit(node)
        self.scopes.pop()

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def _chain(self, node: ast.Name | ast.Attribute) -> None:
        attributes: list[str] = []
        at: ast.expr = node
        while isinstance(at, ast.Attribute):
            attributes.insert(0, at.attr)
            at = at.value
        base = None
        if isinstance(at, ast.Name):
            base = next((scope[at.id] for scope in reversed(self.scopes) if at.id in scope), None)
        else:
            self.visit(at)
        if base:
            self.found.uses.add(".".join([base, *attributes]))
        elif attributes:
            stored = isinstance(node.ctx, (ast.Store, ast.Del))
            self.found.words.update(attributes[:-1] if stored else attributes)


def bound(node: ast.AST, module: str) -> dict[str, str]:
    """Names that a statement binds in its scope, with the full names of those that it imports."""
    found: dict[str, str] = {}
    for each in _own(node):
        if isinstance(each, ast.Import):
            for alias in each.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(each, ast.ImportFrom) and not each.level:
            found |= {alias.asname or alias.name: f"{each.module}.{alias.name}" for alias in each.names}
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            found.setdefault(each.id, "")
        elif isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[each.name] = ""
        elif isinstance(each, ast.ExceptHandler) and each.name:
            found[each.name] = ""
    return found


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what lies in it, without the insides of what has a scope of its own."""
    yield node
    if not isinstance(node, SCOPES):
        for child in ast.iter_child_nodes(node):
            yield from _own(child)


@dataclass
class Module:
    name: str
    definitions: dict[str, Definition] = field(default_factory=dict)
    bindings: dict[str, str] = field(default_factory=dict)
    tree: ast.Module = field(default_factory=lambda: ast.Module([], []))


def read(root: Path) -> dict[str, Module]:
    """Every module of the product, by its full name."""
    found = {}
    for folder in (PACKAGE, *MAPPED):
        for path in sorted((root / folder).rglob("*.py")):
            parts = list(path.relative_to(root).with_suffix("").parts)
            name = ".".join([MAPPED.get(parts[0], parts[0]), *parts[1:]]).removesuffix(".__init__")
            found[name] = _module(name, path, str(path.relative_to(root)))
    return found


def _module(name: str, path: Path, shown: str) -> Module:
    module = Module(name, tree=ast.parse(path.read_text(encoding="utf-8")))
    statements = list(_statements(module.tree.body))
    for node, _ in statements:
        module.bindings |= {word: full or f"{name}.{word}" for word, full in bound(node, name).items()}
    for node, is_program in statements:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [word for target in node.targets for word in bound(target, name)]
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            names = list(bound(node.target, name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        else:
            names = []
        place = f"{shown}:{node.lineno}"
        if names == ["__all__"]:
            continue
        for word in names or ["__main__" if is_program else "<body>"]:
            one = module.definitions.setdefault(word, Definition(name, word, place, "name" if names else "body"))
            if isinstance(node, ast.ClassDef):
                _class(module, node, one, shown)
            else:
                Reader(one, module.bindings).visit(node)
                if isinstance(node, ast.FunctionDef):
                    one.returns = _returned(node, module)
    return module


def _statements(body: Iterable[ast.stmt], is_program: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Statements of a module, those under `if` and `try` too, and whether they run for `python -m` only."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            starts = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            inner = [*node.body, *node.orelse, *(each for h in getattr(node, "handlers", ()) for each in h.body)]
            yield from _statements(inner, is_program or starts)
            if isinstance(node, ast.If) and not starts:
                yield ast.Expr(node.test, lineno=node.lineno, col_offset=0), is_program
        else:
            yield node, is_program


def _class(module: Module, node: ast.ClassDef, one: Definition, shown: str) -> None:
    reader = Reader(one, module.bindings)
    one.bases = tuple(_full(base, module) for base in node.bases)
    for part in (*node.bases, *node.decorator_list, *(each.value for each in node.keywords)):
        reader.visit(part)
    for statement in node.body:
        names = {statement.name: "method"} if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)) else {}
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names = {statement.target.id: "field"}
        if isinstance(statement, ast.Assign):
            names = {word: "field" for target in statement.targets for word in bound(target, "")}
        if not names:
            reader.visit(statement)
        for word, kind in names.items():
            full = f"{node.name}.{word}"
            member = module.definitions.setdefault(
                full, Definition(module.name, full, f"{shown}:{statement.lineno}", kind)
            )
            # what a field is made of belongs to its class: the class statement runs it
            Reader(member if kind == "method" else one, module.bindings).visit(statement)
            if isinstance(statement, ast.FunctionDef):
                member.returns = _returned(statement, module)


def _full(node: ast.AST, module: Module) -> str:
    first, _, rest = ast.unparse(node.value if isinstance(node, ast.Subscript) else node).partition(".")
    return ".".join(filter(None, (module.bindings.get(first, first), rest)))


def _returned(node: ast.FunctionDef, module: Module) -> set[str]:
    if not node.returns:
        return set()
    return {_full(each, module) for each in ast.walk(node.returns) if isinstance(each, (ast.Name, ast.Attribute))}


class Search:
    """Follows uses from the roots until nothing new is reached."""

    def __init__(self, modules: dict[str, Module]):
        self.modules = modules
        self.reached: set[str] = set()
        self.bodies: set[str] = set()
        self.values: set[str] = set()  # modules that stand in a dict or a variable
        self.words: set[str] = set()
        self.patterns: set[tuple[str, str]] = set()  # module, pattern of attributes that it puts together
        self.native: set[str] = set()
        self.library: set[str] = set()  # classes whose every public member is for users
        self.operations = _operations(modules)

    def run(self, roots: Iterable[str] = ()) -> None:
        self._roots()
        for root in roots:
            self._reach(self._by_name(root))
        before = -1
        while before != (before := len(self.reached) + len(self.words) + len(self.library)):
            self._members()
            self._forms()

    def use(self, dotted: str) -> None:
        """Marks what a full dotted name stands for."""
        if dotted.startswith(f"{NATIVE}."):
            self.native.add(dotted.split(".")[2])
        elif found := self.find(dotted):
            name, rest = found
            self._body(name)
            if not rest:
                self.values.add(name)
            elif rest[0] in self.modules[name].definitions:
                self._reach(self.modules[name].definitions[rest[0]])
                self.words.update(rest[1:])

    def find(self, dotted: str) -> tuple[str, list[str]] | None:
        """The module that defines a full dotted name and what is asked of it, through those that only import it; None
        for other libraries.
        """
        parts = dotted.split(".")
        for count in range(len(parts), 0, -1):
            if (name := ".".join(parts[:count])) in self.modules:
                break
        else:
            return None
        module, rest = self.modules[name], parts[count:]
        if rest and rest[0] not in module.definitions:
            target = module.bindings.get(rest[0], f"{name}.{rest[0]}")
            if target != f"{name}.{rest[0]}":
                self._body(name)
                return self.find(".".join([target, *rest[1:]]))
        return name, rest

    def absent(self) -> Iterator[str]:
        """Names of the product that its code uses and that are nowhere defined."""
        for module in self.modules.values():
            for one in module.definitions.values():
                for dotted in sorted(one.uses):
                    name, rest = self.find(dotted) or ("", [])
                    if rest and rest[0] not in self.modules[name].definitions and not rest[0].startswith("__"):
                        if f"{name}.{rest[0]}" != NATIVE:
                            yield f"{one.place}: {one.full} uses {name}.{rest[0]}, which is not there"

    def _by_name(self, full: str) -> Definition:
        return next(
            module.definitions[full.removeprefix(f"{module.name}.")]
            for module in self.modules.values()
            if full.removeprefix(f"{module.name}.") in module.definitions
        )

    def _body(self, name: str) -> None:
        """The statements that run when a module, and so every package above it, is imported."""
        for above in (name, *_above(name)):
            if above in self.modules and above not in self.bodies:
                self.bodies.add(above)
                if body := self.modules[above].definitions.get("<body>"):
                    self._reach(body)

    def _reach(self, one: Definition) -> None:
        if one.full in self.reached:
            return
        self.reached.add(one.full)
        self._body(one.module)
        is_list_of_forms = one.module == f"{PACKAGE}.kernels"
        for dotted in one.uses:
            self.use(dotted)
        if not is_list_of_forms:
            self.words |= one.words
            self.patterns |= {(one.module, pattern) for pattern in one.patterns}
        for word in one.words & self.modules.keys():
            self._program(word)

    def _program(self, name: str) -> None:
        """A module that a string names is imported by it, or run as a program."""
        self._body(name)
        self.values.add(name)
        if program := self.modules[name].definitions.get("__main__"):
            self._reach(program)

    def _roots(self) -> None:
        for name in self.modules:
            if name in (f"{PACKAGE}.cli", f"{PACKAGE}.__main__"):
                self._program(name)
            if name.startswith(f"{PACKAGE}.compat.") and "__main__" in self.modules[name].definitions:
                self._program(name)
            if name in {f"{PACKAGE}.{word}" for word in SURFACE} | {PACKAGE}:
                for word, one in self.modules[name].definitions.items():
                    if not word.startswith("_") or name == PACKAGE:
                        self._reach(one)
                        self.library.add(one.full)
        if main := self.modules.get(f"{PACKAGE}.cli", Module("")).definitions.get("main"):
            self._reach(main)
        for node in ast.walk(self.modules[PACKAGE].tree if PACKAGE in self.modules else ast.Module([], [])):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PLACES":
                for word, place in ast.literal_eval(node.value).items():  # what the package loads on demand
                    self.use(f"{PACKAGE}.{place}.{word}")
                    self.library.add(f"{PACKAGE}.{place}.{word}")

    def _members(self) -> None:
        for module in self.modules.values():
            for word, one in list(module.definitions.items()):
                owner, _, member = word.rpartition(".")
                is_library = f"{module.name}.{owner}" in self.library if owner else one.full in self.library
                if owner and one.kind == "field" and "dataclasses.asdict" in self._uses_of(module, owner):
                    self._reach(one)  # it is written with the others
                elif owner and f"{module.name}.{owner}" in self.reached:
                    special = member.startswith("__") and member.endswith("__")
                    known = (
                        special
                        or member in self.words
                        or any(at == module.name and re.fullmatch(pattern, member) for at, pattern in self.patterns)
                        or self._overrides(module.definitions[owner], member)
                    )
                    if known or is_library and not member.startswith("_"):
                        self._reach(one)
                elif module.name in self.values and word in self.words and not self._is_form(module.name, word):
                    self._reach(one)
                if is_library and one.full in self.reached and not member.startswith("_"):
                    self.library |= {self._defined(full) for full in one.returns}

    def _uses_of(self, module: Module, owner: str) -> set[str]:
        members = (one for word, one in module.definitions.items() if word.startswith(f"{owner}."))
        return {dotted for one in members if one.full in self.reached for dotted in one.uses}

    def _defined(self, dotted: str) -> str:
        module, _, word = dotted.rpartition(".")
        target = self.modules[module].bindings.get(word, dotted) if module in self.modules else dotted
        return target if target == dotted else self._defined(target)

    def _overrides(self, owner: Definition, member: str) -> bool:
        """Whether a library that the class derives from calls its method of that name."""
        for base in owner.bases:
            module, _, word = self._defined(base).rpartition(".")
            if module in self.modules:
                found = self.modules[module].definitions.get(word)
                if found and self._overrides(found, member):
                    return True
            elif (theirs := _imported(base)) is not None and hasattr(theirs, member):
                return True
        return False

    def _is_form(self, module: str, word: str) -> bool:
        return module in self.operations.values() and word in FORM_NAMES

    def _forms(self) -> None:
        """Forms that the table of forms names, and those of a namespace whose operations other rooms call."""
        namespaces = {
            one.name: {word.rpartition(".")[2] for word in one.uses}
            for one in self.modules.get(f"{PACKAGE}.kernels", Module("")).definitions.values()
        }
        asked = {
            dotted.split(".")[2]
            for module in self.modules.values()
            if not module.name.startswith(f"{PACKAGE}.kernels")
            for one in module.definitions.values()
            if one.full in self.reached
            for dotted in one.uses
            if dotted.startswith(f"{PACKAGE}.kernels.")
        } & namespaces.keys()
        while more := {inner for name in asked for inner in namespaces[name] & namespaces.keys()} - asked:
            asked |= more
        for op, name in self.operations.items():
            definitions = self.modules[name].definitions
            named = {form for table in self._tables(op, name) for form in table}
            for form in (named | (asked if op in self.words else set())) & definitions.keys():
                self._reach(definitions[form])

    def _tables(self, op: str, name: str) -> Iterator[set[str]]:
        """Words that stand for the operation in a table of forms: under its key in choice.py, or in its own file."""
        choice = self.modules.get(f"{PACKAGE}.kernels.choice")
        for node in ast.walk(choice.tree) if choice else ():
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values):
                    if isinstance(key, ast.Constant) and key.value == op:
                        yield _strings(value)
        for node in self.modules[name].tree.body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
                yield {word for value in node.value.values for word in _strings(value)}


def _strings(node: ast.AST) -> set[str]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def _operations(modules: dict[str, Module]) -> dict[str, str]:
    """Operation -> module, as the dict OPS of kernels lists them."""
    kernels = modules.get(f"{PACKAGE}.kernels", Module(""))
    for node in ast.walk(kernels.tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPS" and isinstance(node.value, ast.Dict):
            return {key.value: f"{PACKAGE}.kernels.{key.value}" for key in node.value.keys}
    return {}


def _above(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _imported(dotted: str):
    """The class of another library, or None where there is none of that name."""
    module, _, word = dotted.rpartition(".")
    if not module:
        return getattr(builtins, word, None) if word != "object" else None
    try:
        found = import_module(module)
    except ImportError:
        return None
    return getattr(found, word, None) if word not in ("Protocol", "NamedTuple") else None


@dataclass(frozen=True)
class Survey:
    figures: dict[str, int]
    faults: list[str]


def survey(root: Path, allowed: dict[str, str] = ALLOWED) -> Survey:
    modules = read(root)
    bare = [name for name, _ in _unreached(modules, root, ())]
    stale = [pattern for pattern in allowed if not any(fnmatchcase(name, pattern) for name in bare)]
    kept = [name for name in bare if any(fnmatchcase(name, pattern) for pattern in allowed)]
    left = _unreached(modules, root, [name for name in kept if not name.startswith(NATIVE)])
    every = [one for module in modules.values() for one in module.definitions.values() if one.kind != "body"]
    figures = {
        "functions, classes and constants": sum(one.kind == "name" for one in every),
        "methods and properties": sum(one.kind == "method" for one in every),
        "fields": sum(one.kind == "field" for one in every),
        "names bound in C++": len(bound_in_cpp(root)),
        "operations": len(_operations(modules)),
        "unreached": len(bare),
        "entries on the list": len(allowed),
    }
    faults = [
        f"{place}: {name} is reached by no command and no library call" for name, place in left if name not in kept
    ]
    faults += Search(modules).absent()
    faults += [f"{pattern}: stands on the list and is reached, or is gone" for pattern in stale]
    if len(allowed) > MOST_ALLOWED:
        faults.append(f"{len(allowed)} entries on the list, at most {MOST_ALLOWED}")
    return Survey(figures, faults)


def bound_in_cpp(root: Path) -> dict[str, str]:
    """Names of the compiled module -> file:line."""
    path = root / "csrc" / "bindings.cpp"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = ((re.search(r'\bm\.(?:def|attr)\("(\w+)"', line), number) for number, line in enumerate(lines, 1))
    return {match[1]: f"csrc/bindings.cpp:{number}" for match, number in found if match}


def _unreached(modules: dict[str, Module], root: Path, roots: Iterable[str]) -> list[tuple[str, str]]:
    """Full names that nothing reaches and where they stand; members only of classes that are reached."""
    search = Search(modules)
    search.run(roots)
    found = [(f"{NATIVE}.{name}", place) for name, place in bound_in_cpp(root).items() if name not in search.native]
    for module in modules.values():
        for one in module.definitions.values():
            owner, _, word = one.name.rpartition(".")
            is_shown = not owner or f"{module.name}.{owner}" in search.reached
            if one.kind != "body" and is_shown and not word.startswith("__") and one.full not in search.reached:
                found.append((one.full, one.place))
    return found


def test_nothing_stands_that_nobody_runs(capsys):
    found = survey(HERE)
    with capsys.disabled():
        print("\n" + ", ".join(f"{count} {name}" for name, count in found.figures.items()))
    assert found.faults == []


CLI = """
from importlib import import_module
COMMANDS = {"make": "datasetdm_fast.make"}
def main():
    import_module(COMMANDS["make"]).main()
"""
MAKE = """
from datasetdm_fast import _C
from datasetdm_fast.kernels import reference
from datasetdm_fast.things import Thing, used as called
def main():
    called()
    Thing().run()
    _C.bound()
    reference.norm()
"""
THINGS = """
import json
LIMIT = 3
def used():
    return LIMIT
class Thing(json.JSONEncoder):
    size: int
    def run(self):
        return getattr(self, f"_of_{self.size}")()
    def default(self, value): ...
    def _of_one(self): ...
"""
TREE = {
    "datasetdm_fast/__init__.py": "",
    "datasetdm_fast/cli.py": CLI,
    "datasetdm_fast/make.py": MAKE,
    "datasetdm_fast/things.py": THINGS,
    "kernels/__init__.py": "from types import SimpleNamespace\nfrom datasetdm_fast.kernels import norm\n"
    'OPS = {"norm": norm}\nreference = SimpleNamespace(**{name: op.reference for name, op in OPS.items()})\n',
    "kernels/norm.py": "def reference(): ...\n",
    "csrc/bindings.cpp": 'm.def("bound", &bound);\n',
}


@pytest.mark.parametrize(
    "path, text, named",
    [
        ("datasetdm_fast/things.py", "", None),
        ("datasetdm_fast/things.py", "def idle():\n    return idle()", "things.py:12: datasetdm_fast.things.idle"),
        ("datasetdm_fast/things.py", "def first(LEFT): return LEFT\nprint(first)\nLEFT = 1", "things.LEFT"),
        ("datasetdm_fast/things.py", "if LIMIT:\n    IDLE = 1", "datasetdm_fast.things.IDLE"),
        ("datasetdm_fast/things.py", "    def idle(self): ...", "datasetdm_fast.things.Thing.idle"),
        ("datasetdm_fast/things.py", "    @property\n    def idle(self): ...", "datasetdm_fast.things.Thing.idle"),
        ("datasetdm_fast/things.py", "    idle: int = 0", "datasetdm_fast.things.Thing.idle"),
        ("datasetdm_fast/other.py", "def main(): ...", "datasetdm_fast.other.main"),
        ("datasetdm_fast/make.py", "    Thing('datasetdm_fast.make:named')\ndef named(): ...", None),
        (
            "datasetdm_fast/make.py",
            "    from datasetdm_fast.thing import gone\n    gone()",
            "thing, which is not there",
        ),
        ("datasetdm_fast/make.py", "    code = 'from datasetdm_fast.things import Thing; Thing.run()'", None),
        ("kernels/norm.py", "def fused(): ...", "datasetdm_fast.kernels.norm.fused"),
        ("kernels/norm.py", "def fused(): ...\nCHOSEN = {'cpu': 'fused'}", None),
        ("kernels/choice.py", "FORMS = {'cpu': {'norm': 'reference'}}", None),
        ("csrc/bindings.cpp", 'm.def("idle", &idle);', "csrc/bindings.cpp:2: datasetdm_fast._C.idle"),
    ],
)
def test_what_nothing_reaches_is_named(tmp_path, path, text, named):
    for file, content in TREE.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    with open(tmp_path / path, "a") as file:
        file.write(f"{text}\n")
    faults = [fault for fault in survey(tmp_path, {}).faults if "FORMS is" not in fault and "CHOSEN is" not in fault]
    assert (faults == []) if named is None else (len(faults) == 1 and named in faults[0]), faults


def test_the_list_keeps_what_its_entries_use_and_no_more(tmp_path):
    for file, content in {**TREE, "datasetdm_fast/kept.py": "SIZE = 1\ndef kept(): return SIZE\n"}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    assert survey(tmp_path, {"datasetdm_fast.kept.kept": "soon"}).faults == []
    (stale,) = survey(tmp_path, {"datasetdm_fast.kept.*": "soon", "datasetdm_fast.make.main": "why"}).faults
    assert "datasetdm_fast.make.main: stands on the list" in stale
    assert "11 entries" in survey(tmp_path, {f"datasetdm_fast.kept.{k}": "" for k in range(11)}).faults[-1]


if __name__ == "__main__":
    surveyed = survey(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
    print("\n".join([*(f"{count:5} {name}" for name, count in surveyed.figures.items()), *surveyed.faults]))
    sys.exit(bool(surveyed.faults))
