"""The rooms of the product and what each may import: `python tests/layers.py [ROOT]` prints the figures and every
fault of a checkout.

Imports are read with `ast`, those inside functions and under TYPE_CHECKING too; `kernels` and `export` are resolved as
the packages they are mapped to.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parents[1]
PACKAGE = "datasetdm_fast"
MAPPED = {
    "kernels": f"{PACKAGE}.kernels",
    "export": f"{PACKAGE}.export",
}  # folders that setup.py makes packages of the product
FOLDERS = (PACKAGE, "kernels", "export", "bench")

# From the top down: a storey imports only itself and storeys below it. A storey is a folder of the package; the files
# that lie flat beside them are commands, but for those that every storey uses.
STOREYS: tuple[str, ...] = ("commands", "training", "runs", "engine", "foundation")
FOUNDATION = (
    "bug_report",
    "cores",
    "messages",
    "data",
    "config",
    "settings",
    "errors",
    "plugins",
    "stages",
    "version",
    "disk",
    "untrusted",
)
PLACES = {"kernels": "engine", "export": "engine", **dict.fromkeys(FOUNDATION, "foundation")}
DOOR = (f"{PACKAGE}.export.__main__", "commands")  # `python -m datasetdm_fast.export` hands its line to the command
# Files that only lead on: the package offers the library, and running it runs the commands.
DOORS = {f"{PACKAGE}": "commands"}
MOST = {"arrows": 250}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def statements_of(path: Path) -> list[ast.AST]:
    """Every statement of a file, those inside others too: imports and classes are statements."""
    found: list[ast.AST] = [tree_of(path)]
    for node in found:
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            found += getattr(node, part, ())
    return found


@dataclass(frozen=True)
class Arrow:
    """One import: the file and line it stands in, and the module it names."""

    source: str
    target: str
    place: str


def modules(root: Path) -> dict[str, Path]:
    """Every module of the product and the bench, by its full name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = list(path.relative_to(root).with_suffix("").parts)
            name = ".".join([MAPPED.get(parts[0], parts[0]), *parts[1:]])
            found[name.removesuffix(".__init__") if name != f"{PACKAGE}.__init__" else PACKAGE] = path
    return found


def arrows(root: Path, known: Mapping[str, Path]) -> Iterator[Arrow]:
    """Every import of one module of the checkout by another."""
    for source, path in known.items():
        package = source if path.name == "__init__.py" else source.rpartition(".")[0]
        for node in statements_of(path):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")
                    base = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
                wanted = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in wanted:
                target = next((each for each in (name, name.rpartition(".")[0]) if each in known), None)
                if target and target not in (
                    source,
                    PACKAGE,
                ):  # the package itself offers its compiled module and its surface
                    yield Arrow(source, target, f"{path.relative_to(root)}:{node.lineno}")


def storey_of(module: str) -> str:
    parts = module.split(".")
    if module in DOORS:
        return DOORS[module]
    name = parts[0] if parts[0] == "bench" else parts[1]
    if name in STOREYS:
        return name
    return PLACES.get(name, "commands")


def room_of(module: str) -> str:
    """The folder of a storey that a module lies in; a file that lies flat in one is a room of its own."""
    parts = module.split(".")
    if parts[0] == "bench" or len(parts) == 1:
        return parts[0]
    return ".".join(parts[1:3]) if parts[1] in STOREYS else parts[1]


def top_of(module: str) -> str:
    """The folder or file of the package, or the folder beside it, that a module lies in."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in graph.get(node, ()):
            if following not in index:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def upward(every: Iterable[Arrow]) -> list[str]:
    """Imports that name a storey above their own."""
    height = {storey: len(STOREYS) - row for row, storey in enumerate(STOREYS)}
    faults = []
    for arrow in every:
        source, target = storey_of(arrow.source), storey_of(arrow.target)
        if height[source] < height[target] and (arrow.source, target) != DOOR:
            faults.append(f"{arrow.place}: {source} imports {arrow.target}, which is of {target}")
    return faults


def doubled_classes(root: Path, known: Mapping[str, Path]) -> list[str]:
    """Class names that two files of the product or the bench bear."""
    places = defaultdict(list)
    for path in known.values():
        for node in statements_of(path):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(root)}:{node.lineno}")
    return [f"class {name}: {' and '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]


def undescribed(root: Path, known: Mapping[str, Path]) -> list[str]:
    """Rooms whose `__init__.py` has no sentence, and files without one."""
    return [str(path.relative_to(root)) for path in known.values() if not ast.get_docstring(tree_of(path))]


def longest_chain(graph: Mapping[str, Iterable[str]]) -> int:
    """Files on the longest way down; 0 where there are circles."""
    if circles(graph):
        return 0
    depth: dict[str, int] = {}

    def visit(node: str) -> int:
        if node not in depth:
            depth[node] = 1 + max(map(visit, graph.get(node, ())), default=0)
        return depth[node]

    return max(map(visit, graph), default=0)


@dataclass(frozen=True)
class House:
    """What the imports of a checkout look like."""

    figures: dict[str, int]
    up: list[str]
    room_circles: list[list[str]]
    file_circles: list[list[str]]
    doubled: list[str]
    undescribed: list[str]

    @property
    def faults(self) -> list[str]:
        return [
            *self.up,
            *(f"circle of {len(each)} rooms: {', '.join(each)}" for each in self.room_circles),
            *(f"circle of {len(each)} files: {', '.join(each)}" for each in self.file_circles),
            *self.doubled,
            *(f"{path}: no sentence says what it is for" for path in self.undescribed),
            *(
                f"{self.figures[name]} {name}, at most {most}"
                for name, most in MOST.items()
                if self.figures[name] > most
            ),
        ]


def survey(root: Path) -> House:
    known = modules(root)
    every = list(arrows(root, known))
    files: dict[str, set[str]] = {name: set() for name in known}
    rooms: dict[str, set[str]] = {room_of(name): set() for name in known}
    for arrow in every:
        files[arrow.source].add(arrow.target)
        if (source := room_of(arrow.source)) != (target := room_of(arrow.target)) and arrow.source != DOOR[0]:
            rooms[source].add(target)
    connected = {(top_of(arrow.source), top_of(arrow.target)) for arrow in every}
    of_rooms, of_files = circles(rooms), circles(files)
    up = upward(every)
    figures = {
        "rooms": len(rooms),
        "arrows": sum(source != target for source, target in connected),
        "arrows up": len(up),
        "circles of rooms": len(of_rooms),
        "circles of files": len(of_files),
        "files": len(files),
        "longest chain of files": longest_chain(files),
    }
    return House(figures, up, of_rooms, of_files, doubled_classes(root, known), undescribed(root, known))


if __name__ == "__main__":
    surveyed = survey(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
    print("\n".join([*(f"{count:4} {name}" for name, count in surveyed.figures.items()), *surveyed.faults]))
    sys.exit(bool(surveyed.faults))
