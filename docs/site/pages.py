"""Pages that are generated from the sources: docs/flags.md from the commands' flags and docs/files.md from the schemas,
which `python tests/test_docs.py` writes, and messages.md of the site from every message with which a command ends.
"""

import ast
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "datasetdm_fast" / "schemas"
FILES_OPENING = """# Files

The files with which a run folder, a decoder and an export describe themselves, field by field. This page is generated
from the [JSON schemas](https://json-schema.org/draft/2020-12) in `datasetdm_fast/schemas/`. They are part of the
installed package, and the tests check every file that the commands write against them. `*` marks required fields. [The
data set](data-set.md) describes what else a run folder holds; `instances.json`, `keypoints.json` and the output of
[`convert`](formats.md) have the formats of the projects they are for.

"""
ORDER = ("run", "sample", "split", "kept", "decoder", "export", "classes")


def schema(name: str) -> dict[str, Any]:
    """A schema of the package, by the name of its file."""
    return json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))


def kind_of_value(field: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{one}`" for one in field["enum"])
    if isinstance(kind := field.get("type", "any"), list):
        return " or ".join(kind)
    return f"array of {field['items'].get('type', 'any')}s" if kind == "array" and "items" in field else kind


def field_rows(described: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """A row of a table for every field of an object, those of inner objects after it."""
    own = described.get("properties", {})
    inner = {**own, **{f"LABEL {name}": one for name, one in described.get("patternProperties", {}).items()}}
    for name, field in inner.items():
        if name.startswith("LABEL "):  # "^semantic(:.+)?$"
            name = name.removeprefix("LABEL ^").removesuffix("(:.+)?$")
        path = f"{place}{name}"
        mark = "*" if name in described.get("required", ()) else ""
        yield f"| `{path}`{mark} | {kind_of_value(field)} | {field['description']} |"
        yield from field_rows(field, f"{path}.")
        if isinstance(one := field.get("additionalProperties"), dict):
            yield from field_rows(one, f"{path}.NAME.")
        if isinstance(one := field.get("items"), dict):
            yield from field_rows(one, f"{path}[].")


def files_page() -> str:
    """docs/files.md."""
    parts = [FILES_OPENING]
    for name in ORDER:
        one = schema(name)
        number = one["$id"].rpartition(":")[2]
        parts.append(
            f"## {one['title']}\n\n{wrapped(one['description'])}\n\nFormat {number}, `schemas/{name}.json`.\n\n"
        )
        if "properties" in one:
            parts.append(table(one))
    return "".join(parts).rstrip() + "\n"


def table(described: Mapping[str, Any]) -> str:
    return "\n".join(["| field | value | meaning |", "|---|---|---|", *field_rows(described), "", ""])


def wrapped(text: str, width: int = 120) -> str:
    """Sentences in lines that fit."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


FLAGS_OPENING = """# Flags

The flags of all commands but [`convert FILE`](checkpoints.md) and [`compat.showlab`](from-datasetdm.md), as shown by
`--help`. Run a command as `python -m datasetdm_fast.NAME` or, once installed, `datasetdm-fast NAME`. All commands also
take `--help`, `--version` and `--config FILE`, a YAML file of the same settings; `no-` before the name of a switch
turns it off. [Commands](commands.md) explains what the commands do, exit codes and environment variables.

"""
EVERYWHERE = ("--help", "--version", "--config")


def cell(text: str) -> str:
    """A text inside a table."""
    return " ".join(text.split()).replace("|", "&#124;").replace("<", "&lt;")


def folded(line: str, width: int = 110) -> str:
    """A command line that fits, parted between two flags where it is long."""
    if len(line) <= width:
        return line
    place = line.rindex(" --", 0, width)
    return f"{line[:place]} \\\n    {folded(line[place + 1 :], width)}"


def flags_page() -> str:
    """docs/flags.md."""
    from datasetdm_fast.cli import COMMANDS  # the site is built where only its own libraries are installed
    from datasetdm_fast.command_line.completion import describe_flags

    parts = [FLAGS_OPENING]
    for name, (module, sentence) in COMMANDS.items():
        parts.append(f"## {name}\n\n{sentence[0].upper()}{sentence[1:]}.\n\n")
        command = import_module(module)
        if examples := getattr(command, "EXAMPLES", ()):
            lines = [f"python -m {module.removesuffix('.__main__')} {line}" for line in examples]
            parts.append("\n".join(["```bash", *map(folded, lines), "```", "", ""]))
        rows = ["| flag | meaning |", "|---|---|"]
        for flag in describe_flags(module):
            if flag["flags"] and flag["flags"][0] in EVERYWHERE:
                continue
            value = f" {flag['metavar']}" if flag["takes"] and flag["flags"] else flag["metavar"]
            spelt = f"`{cell(''.join(flag['flags'][:1]) + value)}`"
            rows.append(f"| {spelt} | {cell(flag['help'])} |")
        parts.append("\n".join([*rows, "", ""]))
    return "".join(parts).rstrip() + "\n"


MESSAGES_OPENING = """# Messages

All messages with which a command ends with exit code 2 (`Refused`: bad input or usage), 3 (`Missing`: a requirement is
missing) or 4 (`GateFailed`: the work was done, but a check failed), and what to do about each. Words in capitals stand
for what the message names; where a remedy has an "Or:", the message gives the one that fits. Search this page for a
part of your message without names of your own; every message has its own anchor. If a command ends in any other way,
that is a bug in this package: the message names a report file.

"""
PASSED_ON = "See the entry for the message it quotes."
STOPS = {"Refused": 2, "Missing": 3, "NotInstalled": 3, "GateFailed": 4}
SOURCES = ("datasetdm_fast", "export", "kernels")


def spoken(node: ast.expr | None) -> str:
    """The text of an expression, with names in capitals in the place of values; empty where it is none."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(spoken(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        inner = spoken(node.value) if isinstance(node.value, (ast.Constant, ast.JoinedStr, ast.IfExp)) else ""
        return inner or placeholder(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return spoken(node.left) + spoken(node.right)
    if isinstance(node, ast.IfExp):
        return spoken(node.body) or spoken(node.orelse)
    return ""


UNSAID = ("nearest", "named_alike", "alike")  # "did you mean" and the like, which is there only now and then
RENAMED = {"error": "reason", "stop": "reason", "strerror": "reason", "first_line": "reason", "said": "what", "k": "n"}


def placeholder(node: ast.expr) -> str:
    """The plain name that an expression is about, in capitals."""
    if isinstance(node, ast.Call):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in UNSAID:
            return ""
        about = next((one for one in node.args if not isinstance(one, ast.Constant)), None)
        if about is None and isinstance(node.func, ast.Attribute):
            about = node.func.value
        return placeholder(about) if about is not None else "VALUE"
    if isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.SetComp)):
        return placeholder(node.generators[0].iter)
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return placeholder(node.value)
    names = [one for one in ast.walk(node) if isinstance(one, (ast.Name, ast.Attribute))]
    if not names:
        return "VALUE"
    name = names[0].attr if isinstance(names[0], ast.Attribute) else names[0].id
    return "" if name in UNSAID else RENAMED.get(name, name).strip("_").upper().replace("_", " ")


def named_texts(function: ast.AST) -> dict[str, str]:
    """Texts that a function gives names to, by these names."""
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = spoken(node.value)
        elif isinstance(node, ast.NamedExpr):
            found[node.target.id] = spoken(node.value)
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def sources() -> tuple[Path, ...]:
    return tuple(sorted(path for source in SOURCES for path in (ROOT / source).rglob("*.py")))


def file_of(module: str) -> Path | None:
    """The file of a module of ours."""
    name = module.replace(".", "/")
    for folder in (ROOT, ROOT / "datasetdm_fast"):  # datasetdm_fast.export lies beside the package
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file():
                return path
    above, _, rest = module.partition(".")
    return file_of(rest) if above == "datasetdm_fast" and rest else None


@cache
def imported(path: Path) -> dict[str, tuple[Path, str]]:
    """What a file imports of ours, by its name there: the file it is from, and its name there, none of a module."""
    found = {}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for one in node.names:
                if module := file_of(f"{node.module}.{one.name}"):
                    found[one.asname or one.name] = module, ""
                elif module := file_of(node.module):
                    found[one.asname or one.name] = module, one.name
    return found


def assigned(block: ast.AST, name: str) -> list[ast.expr]:
    """Every expression that a module, at its top, or a function gives this name to."""
    found = []
    for node in block.body if isinstance(block, ast.Module) else ast.walk(block):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                found += [value for one, value in pairs if isinstance(one, ast.Name) and one.id == name]
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and isinstance(node.target, ast.Name) and node.value:
            found += [node.value] if node.target.id == name else []
    return found


@cache
def functions_of(path: Path) -> dict[ast.AST, ast.FunctionDef]:
    """The innermost function around every part of a file."""
    found = {}
    for function in ast.walk(parsed(path)):  # from the outside in
        if isinstance(function, ast.FunctionDef):
            found |= dict.fromkeys(ast.walk(function), function)
    return found


@cache
def calls() -> dict[str, list[tuple[ast.Call, Path]]]:
    """Every call in the sources, by the name of what is called, with the file it is in."""
    found = defaultdict(list)
    for path in sources():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                found[getattr(node.func, "attr", getattr(node.func, "id", ""))].append((node, path))
    return found


def given(function: ast.FunctionDef, name: str, own: Path) -> list[tuple[ast.expr, Path]]:
    """What a parameter of a function is by default, and what callers give to it."""
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
    by_name = [one.arg for one in function.args.kwonlyargs]
    if name not in (*names, *by_name):
        return []
    place = names.index(name) - (names[0] in ("self", "cls")) if name in names else name
    usual = [None] * (len(names) - len(function.args.defaults)) + function.args.defaults + function.args.kw_defaults
    found = [(one, own) for one in (usual[[*names, *by_name].index(name)],) if one is not None]
    for node, path in calls().get(function.name, ()):
        arguments = dict(enumerate(node.args)) | {one.arg: one.value for one in node.keywords}
        found += [(arguments[key], path) for key in {place, name} if key in arguments]
    return found


def meanings(node: ast.expr, path: Path) -> Iterator[tuple[ast.expr, Path]]:
    """The expressions that one may stand for, each with the file it is in; names and parts of tables are followed."""
    function = functions_of(path).get(node)
    if isinstance(node, ast.IfExp):
        for one in (node.body, node.orelse):
            yield from meanings(one, path)
    elif isinstance(node, ast.Name):
        found = [(one, path) for one in (assigned(function, node.id) if function else ())]
        found = found or (given(function, node.id, path) if function else [])
        found = found or [(one, path) for one in assigned(parsed(path), node.id)]
        if not found and node.id in imported(path):
            module, name = imported(path)[node.id]
            found = [(one, module) for one in assigned(parsed(module), name)]
            found = found or (list(meanings(ast.Name(name), module)) if name in imported(module) else [])
        for one, module in found:
            yield from meanings(one, module)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported(path):
        yield from meanings(ast.Name(node.attr), imported(path)[node.value.id][0])
    elif isinstance(node, ast.Subscript):
        yield from parts(node.value, node.slice, path)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        yield from parts(node.func.value, node.args[0], path)
        for usual in node.args[1:]:
            yield from meanings(usual, path)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in STOPS:
        module, name = imported(path).get(node.func.id, (path, node.func.id))
        told = [one.value for one in returns_of(module, name) if one.value is not None]
        for one in told:
            yield from meanings(one, module)
        if not told:
            yield node, path
    else:
        yield node, path


def returns_of(path: Path, name: str) -> list[ast.Return]:
    """What a function at the top of a file returns."""
    functions = [one for one in parsed(path).body if isinstance(one, ast.FunctionDef) and one.name == name]
    return [one for function in functions for one in ast.walk(function) if isinstance(one, ast.Return)]


def parts(table: ast.expr, key: ast.expr, path: Path) -> Iterator[tuple[ast.expr, Path]]:
    """What a table written in the code holds under a key, everything where the key is not written there."""
    for one, module in meanings(table, path):
        if isinstance(one, ast.Dict):
            names = [ast.literal_eval(name) for name in one.keys]
            values = dict(zip(names, one.values, strict=True))
        elif isinstance(one, ast.Tuple):
            values = dict(enumerate(one.elts))
        else:
            continue
        asked = key.value if isinstance(key, ast.Constant) else None
        for inner in [values[asked]] if asked in values else values.values():
            yield from meanings(inner, module)


def remedy_of(node: ast.expr, path: Path) -> str:
    """The remedies that an expression may stand for, in the order of the code."""
    told = [
        PASSED_ON if isinstance(one, ast.Attribute) and one.attr == "remedy" else spoken(one)
        for one, _ in meanings(node, path)
    ]
    several = dict.fromkeys(filter(None, told))
    return " Or: ".join(f"{one.removesuffix('.')}." for one in several) if len(several) > 1 else "".join(several)


def stops(path: Path) -> Iterator[tuple[int, str, str]]:
    """Exit code, cause and remedy of every refusal that a file can raise, in its order."""
    texts = named_texts(parsed(path))
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in STOPS:
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            cause = spoken(arguments[0]) or texts.get(getattr(arguments[0], "id", ""), "")
            if cause:
                remedy = "".join(remedy_of(one, path) for one in arguments[1:2])
                yield STOPS[node.func.id], " ".join(cause.split()), " ".join(remedy.split())


def anchor_of(sentence: str) -> str:
    """The name of a sentence's anchor, which stays while the sentence does."""
    return f"r-{hashlib.sha256(sentence.encode()).hexdigest()[:8]}"


def messages_page() -> str:
    """messages.md of the site."""
    rooms: dict[str, dict[str, str]] = {}
    for path in sources():
        place = path.relative_to(ROOT / "datasetdm_fast" if path.is_relative_to(ROOT / "datasetdm_fast") else ROOT)
        room = rooms.setdefault(place.parts[0].removesuffix(".py"), {})
        for code, cause, remedy in stops(path):
            name = anchor_of(cause)
            row = f'| <a id="{name}"></a>{cell(cause)} | {cell(remedy)} | {code} |'.replace("`", "'")
            room.setdefault(name, row)
    parts = [MESSAGES_OPENING]
    for name, rows in sorted(rooms.items()):
        if rows:
            parts.append(f"## {name}\n\n| message | what to do | exit code |\n|---|---|---:|\n")
            parts.append("\n".join([*sorted(rows.values(), key=lambda row: row.partition("</a>")[2]), "", ""]))
    return "".join(parts).rstrip() + "\n"


PAGES = {"files.md": files_page, "flags.md": flags_page}
