"""Conditions on scores, such as `score >= 0.6 and not duplicate == 1`: comparisons in Python's syntax, and nothing else
of it.
"""

import ast
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.untrusted import documents

LONGEST = 2000  # characters
DEEPEST = 20  # conditions inside conditions
SIGNS: dict[type[ast.cmpop], tuple[str, Callable]] = {
    ast.GtE: (">=", np.greater_equal),
    ast.LtE: ("<=", np.less_equal),
    ast.Eq: ("==", np.equal),
    ast.NotEq: ("!=", np.not_equal),
    ast.Gt: (">", np.greater),
    ast.Lt: ("<", np.less),
}
REMEDY = "Write, for example: score >= 0.6 and duplicate == 0. There are and, or, not and parentheses."
Values = Mapping[str, np.ndarray]  # score -> [N] float64, NaN where a sample has none


@dataclass(frozen=True)
class Condition:
    """A condition whose form has been checked."""

    node: ast.expr

    def passes(self, values: Values) -> np.ndarray:  # [N] bool
        """Which samples pass."""
        match self.node:
            case ast.BoolOp(op, parts):
                combine = np.all if isinstance(op, ast.And) else np.any
                return combine([Condition(part).passes(values) for part in parts], axis=0)
            case ast.UnaryOp(_, part):
                return ~Condition(part).passes(values)
            case ast.Compare(ast.Name(name), [sign], [number]):
                column = values[name]
                return SIGNS[type(sign)][1](column, ast.literal_eval(number)) & ~np.isnan(column)
        raise AssertionError("a condition that was not checked")

    def reason(self, values: Values, k: int) -> str:
        """Why sample k does not pass."""
        match self.node:
            case ast.BoolOp(_, parts):
                row = {name: column[k : k + 1] for name, column in values.items()}
                failed = [part for part in map(Condition, parts) if not part.passes(row)[0]]
                return "; ".join(part.reason(row, 0) for part in failed)
            case ast.UnaryOp(_, part):
                return f"{ast.unparse(part)} holds"
            case ast.Compare(ast.Name(name), [sign], [number]):
                value = values[name][k]
                state = f"{name} is {value:.4g}" if value == value else f"it has no {name}"
                return f"{state}, expected {SIGNS[type(sign)][0]} {ast.literal_eval(number):g}"
        raise AssertionError("a condition that was not checked")


def parse_where(text: str, known: Collection[str], flag: str = "--where") -> tuple[Condition, tuple[str, ...]]:
    """The condition that the text after `flag` states, and the scores it names; what is no condition is refused."""
    if len(text) > LONGEST:
        raise Refused(f"{flag}: {len(text)} characters, at most {LONGEST} are read", "Write a shorter condition.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that touch a word
            node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        place = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise Refused(f"{flag}: {documents.quote(text.strip())} is not a condition{place}", REMEDY) from error
    names: list[str] = []
    _check(node, known, flag, names, DEEPEST)
    return Condition(node), tuple(dict.fromkeys(names))


def _check(node: ast.AST, known: Collection[str], flag: str, names: list[str], depth: int) -> None:
    """Refuses everything but comparisons of a score with a number, and what joins them."""
    if not depth:
        raise Refused(f"{flag}: nested more than {DEEPEST} deep", "Write a simpler condition.")
    match node:
        case ast.BoolOp(_, parts):
            for part in parts:
                _check(part, known, flag, names, depth - 1)
        case ast.UnaryOp(ast.Not(), part):
            _check(part, known, flag, names, depth - 1)
        case ast.Compare(ast.Name(name), [sign], [number]) if type(sign) in SIGNS:
            if name not in known:
                raise Refused(
                    f"{flag}: {documents.quote(name)} is not a score{nearest(name, known)}",
                    f"It can use these scores: {', '.join(known)}.",
                )
            plain = number.operand if isinstance(number, ast.UnaryOp) else number
            is_signed = plain is number or isinstance(number.op, ast.USub | ast.UAdd)
            if not (isinstance(plain, ast.Constant) and type(plain.value) in (int, float) and is_signed):
                _refuse(number, flag, "a number")
            names.append(name)
        case _:
            _refuse(node, flag, "a comparison of a score, such as score >= 0.6")


def _refuse(node: ast.AST, flag: str, expected: str) -> NoReturn:
    raise Refused(f"{flag}: {documents.quote(ast.unparse(node))} is not understood, expected {expected}", REMEDY)
