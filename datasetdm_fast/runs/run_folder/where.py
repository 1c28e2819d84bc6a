"""Conditions on scores: `score >= 0.6 and not duplicate == 1`, read by a small grammar of their own."""

import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.untrusted import documents

LONGEST = 2000  # characters
DEEPEST = 20  # parentheses and nots
OPERATORS: dict[str, Callable] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)|(?P<word>[a-z_]\w*)|(?P<sign>[<>=!]=?|[()]))", re.ASCII
)
REMEDY = "Write, for example: score >= 0.6 and duplicate == 0. There are and, or, not and parentheses."
Values = Mapping[str, np.ndarray]  # score -> [N] float64, NaN where a sample has none


class Condition(Protocol):
    """Which samples pass."""

    def passes(self, values: Values) -> np.ndarray:  # [N] bool
        ...

    def reason(self, values: Values, k: int) -> str:
        """Why sample k does not pass."""
        ...


@dataclass(frozen=True)
class Comparison:
    name: str
    sign: str
    number: float

    def passes(self, values: Values) -> np.ndarray:
        return OPERATORS[self.sign](values[self.name], self.number) & ~np.isnan(values[self.name])

    def reason(self, values: Values, k: int) -> str:
        value = values[self.name][k]
        found = f"{self.name} is {value:.4g}" if value == value else f"it has no {self.name}"
        return f"{found}, expected {self.sign} {self.number:g}"


@dataclass(frozen=True)
class Joined:
    """Conditions of which all must hold, or any."""

    parts: tuple[Condition, ...]
    needs_all: bool

    def passes(self, values: Values) -> np.ndarray:
        return (np.all if self.needs_all else np.any)([part.passes(values) for part in self.parts], axis=0)

    def reason(self, values: Values, k: int) -> str:
        one = {name: column[k : k + 1] for name, column in values.items()}
        return "; ".join(part.reason(one, 0) for part in self.parts if not part.passes(one)[0])


@dataclass(frozen=True)
class Negated:
    part: Condition
    text: str

    def passes(self, values: Values) -> np.ndarray:
        return ~self.part.passes(values)

    def reason(self, values: Values, k: int) -> str:
        return f"{self.text} holds"


def parse_where(text: str, known: Collection[str], flag: str = "--where") -> tuple[Condition, tuple[str, ...]]:
    """The condition that the text after `flag` states, and the scores it names; what is no condition is refused."""
    if len(text) > LONGEST:
        raise Refused(f"{flag}: {len(text)} characters, at most {LONGEST} are read", "Write a shorter condition.")
    reader = _Reader(text, known, flag)
    condition = reader.either()
    if reader.at < len(reader.tokens):
        raise reader.refusal("the end")
    return condition, tuple(dict.fromkeys(reader.named))


class _Reader:
    """A recursive descent over the tokens of a condition."""

    def __init__(self, text: str, known: Collection[str], flag: str):
        self.text, self.known, self.flag, self.at, self.depth = text, known, flag, 0, 0
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, where it starts
        self.named: list[str] = []
        place = 0
        while text[place:].strip():
            match = _TOKEN.match(text, place)
            if match is None:
                raise Refused(f"{flag}: {documents.quote(text[place:].strip()[:20])} is not understood", REMEDY)
            self.tokens.append((match.lastgroup or "", match[match.lastgroup or 0], match.start(match.lastgroup or 0)))
            place = match.end()

    def either(self) -> Condition:
        parts = [self.both()]
        while self.take("or"):
            parts.append(self.both())
        return parts[0] if len(parts) == 1 else Joined(tuple(parts), False)

    def both(self) -> Condition:
        parts = [self.single()]
        while self.take("and"):
            parts.append(self.single())
        return parts[0] if len(parts) == 1 else Joined(tuple(parts), True)

    def single(self) -> Condition:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Refused(f"{self.flag}: nested more than {DEEPEST} deep", "Write a simpler condition.")
        begin = self.at
        if self.take("not"):
            part = self.single()
            found: Condition = Negated(part, self.source(begin + 1))
        elif self.take("("):
            found = self.either()
            if not self.take(")"):
                raise self.refusal("a closing parenthesis")
        else:
            found = self.comparison()
        self.depth -= 1
        return found

    def comparison(self) -> Comparison:
        name = self.next("word", "a score")
        if name not in self.known:
            raise Refused(
                f"{self.flag}: {documents.quote(name)} is not a score{nearest(name, self.known)}",
                f"It can use these scores: {', '.join(self.known)}.",
            )
        sign = self.next("sign", "a comparison such as >=")
        if sign not in OPERATORS:
            self.at -= 1
            raise self.refusal("a comparison such as >=")
        self.named.append(name)
        return Comparison(name, sign, float(self.next("number", "a number")))

    def take(self, text: str) -> bool:
        is_next = self.at < len(self.tokens) and self.tokens[self.at][1] == text
        self.at += is_next
        return is_next

    def next(self, kind: str, wanted: str) -> str:
        if self.at >= len(self.tokens) or self.tokens[self.at][0] != kind:
            raise self.refusal(wanted)
        self.at += 1
        return self.tokens[self.at - 1][1]

    def source(self, begin: int) -> str:
        """The text of the tokens from `begin` to here."""
        return " ".join(text for _, text, _ in self.tokens[begin : self.at])

    def refusal(self, wanted: str) -> Refused:
        if self.at < len(self.tokens):
            _, text, place = self.tokens[self.at]
            return Refused(f"{self.flag}: {documents.quote(text)} at character {place + 1}, expected {wanted}", REMEDY)
        return Refused(f"{self.flag}: it ends where {wanted} is expected", REMEDY)
