"""Command lines of DatasetDM's scripts: each takes the flags of its script and ours."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from datasetdm_fast.errors import Refused, nearest

TYPES = {"text": str, "path": str, "whole": int, "number": float}


@dataclass(frozen=True)
class Flag:
    """One flag: its default, what stands after it, and whether it changes what is made."""

    name: str
    default: Any = None
    kind: str = "text"  # text, path (relative to --root), whole, number or switch
    help: str = ""
    has_effect: bool = True
    is_optional: bool = False  # whether it may stand without a value, which is then its default
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A command line that was read: the value of every flag, and those that were given."""

    script: str
    values: Mapping[str, Any]
    given: frozenset[str]
    idle: tuple[str, ...] = ()  # flags that were given and have no effect

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def root(self) -> Path:
        return Path(self["root"])

    def path(self, name: str) -> Path:
        """What a flag of kind path names, from --root on where it is relative."""
        return self.root / self[name]


class ScriptParser(argparse.ArgumentParser):
    """A parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{self.prog}: {message.removeprefix('argument ')}", f"Run `{self.prog} --help` for the flags.")


def read_line(
    prog: str, script: str, told: str, flags: Sequence[Flag], arguments: Sequence[str], others: Mapping[str, Collection]
) -> Line:
    """The line of a script; `others` are the flags of all scripts by name, to say whose a flag is."""
    parser = ScriptParser(
        prog=f"{prog} {script}", description=told, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for flag in flags:
        _add(parser, flag)
    found, unknown = parser.parse_known_args([_spelled(argument) for argument in arguments])
    if unknown:
        _refuse(unknown[0].partition("=")[0], script, parser.prog, [flag.name for flag in flags], others)
    given = {name: value for name, value in vars(found).items() if value is not None}  # None: without its value
    idle = tuple(flag.name for flag in flags if flag.name in vars(found) and not flag.has_effect)
    return Line(script, {flag.name: flag.default for flag in flags} | given, frozenset(vars(found)), idle)


def _add(parser: ScriptParser, flag: Flag) -> None:
    told = flag.help + ("" if flag.has_effect else "without effect, as in DatasetDM")
    if flag.kind == "switch":
        parser.add_argument(f"--{flag.name}", action="store_true", help=told)
        return
    shown = "" if flag.default in (None, "") else f" (default: {flag.default})"
    parser.add_argument(
        f"--{flag.name}",
        type=TYPES[flag.kind],
        choices=flag.choices or None,
        nargs="?" if flag.is_optional else None,
        metavar=None if flag.choices else flag.kind.upper(),
        help=(told + shown).replace("%", "%%"),
    )


def _spelled(argument: str) -> str:
    """A flag with underscores, as DatasetDM writes all but one; values are left as they are."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _refuse(word: str, script: str, prog: str, known: Sequence[str], others: Mapping[str, Collection]) -> NoReturn:
    remedy = f"Run `{prog} --help` for the flags."
    if not word.startswith("-"):
        raise Refused(f"{prog}: unexpected argument {word!r}, every setting is a flag", remedy)
    name = word.lstrip("-")
    owners = [each for each, flags in others.items() if name in flags]
    if owners:
        raise Refused(f"{prog}: {word} is a flag of {owners[0]}, not of {script}", remedy)
    raise Refused(f"{prog}: unknown flag {word}{nearest(name, known, before='--')}", remedy)
