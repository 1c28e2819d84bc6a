"""Faults drawn at random into copies of this checkout, one at a time: `python tests/drawn_mutants.py --number 300`.

Every comparison, number, truth value, sum, product, order of two arguments, condition, `and` and `or` of the rooms
below is a place for a fault. The tests of its room are run on each that is drawn; the program lists those that no test
notices, and ends with 1 where fewer than 80 of a hundred are noticed. Those that change nothing a user could see are
listed in survivors.toml with the reason, and are not counted.
"""

from __future__ import annotations

import argparse
import ast
import copy
import random
import re
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import mutants
from mutants import BROKEN, HANGS, HERE, MISSED, NOTICED, Mutant

PACKAGE = "datasetdm_fast"
HARMLESS = "changes nothing"
SURVIVORS = HERE / "tests" / "survivors.toml"
LEAST_DRAWN = 0.8  # of this version; the aim is 0.95
LONGEST = 600  # seconds of the tests of a room on a busy machine
DECIDING = 1000  # a whole number beyond it is a limit or a size, where one more or less is no fault

# room -> its quick tests, those that notice most first
ROOMS = {
    "engine/labels": "mask_rle label_files tiles tasks export_values gallery trust named_words attention redraw",
    "engine/loading": "loading",
    "engine/loop": "driver batch prompts tiles attention redraw pipeline",
    "engine/pictures": "readers tiles redraw",
    "engine/sampling": "guided_step sampling flow_sampling",
    "engine/tasks": "tasks outlines many_labels attention",
    "runs/curation": "split filter drop",
    "runs/exporting": "export_values plugins convert",
    "runs/jobs": "decisions prompts generate",
    "runs/run_folder": "ledger audit card split corrections drop trust hostile_folders filter generate gallery_command",
    "training/evaluation": "metrics evaluate",
    "training/readers": "export_values label_files readers corrections",
    "training/truth": "training readers",
    "training": "metrics training curve domain several_calls named_words",
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
PRODUCTS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
SYMMETRIC = ("max", "min", "maximum", "minimum", "gcd")  # of two arguments in any order
TOLD = ("setting", "print", "Refused", "GateFailed", "warn")  # their arguments are texts, or what a text says


def faults(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of this node by mistake."""
    wrong = copy.copy(node)  # with the same parts, of which none is changed
    match wrong:
        case ast.Compare(ops=[op, *others]) if type(op) in COMPARISONS:
            wrong.ops = [COMPARISONS[type(op)](), *others]
        case ast.Constant(value=bool()):
            wrong.value = not wrong.value
        case ast.Constant(value=int()) if abs(wrong.value) <= DECIDING:
            wrong.value += -1 if wrong.value > 1 else 1
        case ast.Constant(value=float()):
            wrong.value = 2 * wrong.value + (wrong.value == 0)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.BitAnd() | ast.BitOr()) if not _is_text(wrong):
            yield wrong.left
            return
        case ast.BinOp(op=op) if type(op) in PRODUCTS and not _is_text(wrong):
            wrong.op = PRODUCTS[type(op)]()
        case ast.BoolOp():
            wrong.op = ast.And() if isinstance(wrong.op, ast.Or) else ast.Or()
        case ast.UnaryOp(op=ast.Not()):
            yield wrong.operand
            return
        case ast.IfExp() | ast.If() | ast.While() | ast.comprehension():
            return  # by its condition
        case ast.Call(args=[ast.Name() | ast.Attribute() as first, second, *_]) if not isinstance(second, ast.Starred):
            if ast.dump(first) == ast.dump(second):
                return
            wrong.args = [second, first, *wrong.args[2:]]
        case _:
            return
    yield wrong


def _is_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", 0), str) for side in sides)


def _conditions(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return [node.test]
    return node.ifs if isinstance(node, ast.comprehension) else []


def _places(node: ast.AST) -> Iterator[tuple[ast.expr, list[ast.AST]]]:
    """Every expression that decides something, with what may stand there by mistake; no texts, types and messages."""
    called = node.func if isinstance(node, ast.Call) else None
    name = getattr(called, "id", getattr(called, "attr", ""))
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert) or name in TOLD or getattr(node, "arg", "") == "strict":
        return  # a `strict` of zip is against mistakes of our own
    conditions = _conditions(node)
    for condition in conditions:
        if isinstance(condition, ast.Name | ast.Attribute | ast.Call):
            yield condition, [ast.UnaryOp(ast.Not(), condition)]
    if isinstance(node, ast.BinOp) and re.fullmatch(r"(\d+ \* )?(2|10) \*\* \d+", ast.unparse(node)):
        return  # a limit or a size, as a whole number beyond DECIDING is
    if isinstance(node, ast.expr) and name not in SYMMETRIC and (found := list(faults(node))):
        yield node, found
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _places(child)


def drawn_from(file: str, source: str, tests: str) -> Iterator[Mutant]:
    """Every fault of a file: the top-level statement that holds it, whole and with the fault."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def offset(line: int | None, column: int | None) -> int:
        assert line is not None and column is not None
        return starts[line - 1] + column

    code = source.encode()
    for statement in ast.parse(source).body:
        begin, end = (
            offset(statement.lineno, statement.col_offset),
            offset(statement.end_lineno, statement.end_col_offset),
        )
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        for place, wrongs in _places(statement):
            first, last = offset(place.lineno, place.col_offset), offset(place.end_lineno, place.end_col_offset)
            old = code[first:last].decode()
            for wrong in wrongs:
                new = f"({ast.unparse(ast.fix_missing_locations(wrong))})"
                new = new[1:-1] if isinstance(wrong, ast.Constant) else new
                changed = code[begin:first] + new.encode() + code[last:end]
                told = f"{place.lineno}: {' '.join(old.split())} -> {' '.join(new.split())}"
                yield Mutant(file, code[begin:end].decode(), changed.decode(), told, tests)


def all_faults(only: str = "") -> list[Mutant]:
    """Every fault that can be drawn, or those of one room, without the rooms inside of it."""
    found, seen = [], set()
    for room, names in ROOMS.items():
        tests = " ".join(f"test_{name}.py" for name in names.split())
        for path in sorted((HERE / PACKAGE / room).rglob("*.py")):
            file = str(path.relative_to(HERE))
            if file not in seen:
                seen.add(file)
                found += list(drawn_from(file, path.read_text(), tests)) if only in ("", room) else []
    return found


@cache
def known_survivors() -> dict[str, dict[str, str]]:
    """File -> fault, after how its line begins where others of the file are alike -> why nobody can see it."""
    return tomllib.loads(SURVIVORS.read_text())


def find_survivor(mutant: Mutant) -> tuple[str, str]:
    """The file of a fault and its key there in survivors.toml, "" where it is not listed."""
    file, (number, fault) = mutant.file.removeprefix(f"{PACKAGE}/"), mutant.harm.split(": ", 1)
    listed = [key.rpartition(" | ") for key in known_survivors().get(file, {})]
    if not any(each[2] == fault for each in listed):
        return file, ""
    line = (HERE / mutant.file).read_text().splitlines()[int(number) - 1].strip()
    return file, next(("".join(each) for each in listed if each[2] == fault and line.startswith(each[0])), "")


def run(drawn: list[Mutant], workers: int, write: Callable[[str], object]) -> Counter[str]:
    """How many of the faults had which outcome."""
    counts = Counter[str]()
    for mutant, said, seconds in mutants.outcomes(HERE, drawn, workers):
        file, key = find_survivor(mutant)
        said = HARMLESS if said == MISSED and key else said
        counts[said] += 1
        reason = f"  ({known_survivors()[file][key]})" if key else ""
        write(f"{said:15} {seconds:4.0f} s  {file}:{mutant.harm}{reason}")
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20, help="faults that are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--room", default="", choices=("", *ROOMS), help="only of this room", metavar="ROOM")
    parser.add_argument("--workers", type=int, default=2, help="faults tested at the same time")
    chosen = parser.parse_args(arguments)
    every = all_faults(chosen.room)
    drawn = random.Random(chosen.seed).sample(every, min(chosen.number, len(every)))
    mutants.LONGEST, begun = LONGEST, time.monotonic()
    counts = run(drawn, chosen.workers, lambda line: print(line, flush=True))
    noticed, counted = counts[NOTICED] + counts[HANGS], len(drawn) - counts[HARMLESS]
    share = noticed / max(counted, 1)
    print(
        f"{noticed} of {counted} faults noticed ({share:.1%}), {counts[HARMLESS]} more change nothing a user can see;"
    )
    print(f"drawn from {len(every)} places with seed {chosen.seed}, in {time.monotonic() - begun:.0f} s")
    return int(counts[BROKEN] > 0 or share < LEAST_DRAWN)


if __name__ == "__main__":
    sys.exit(main())
