"""Command lines: flags made from a frozen dataclass, a YAML file under them, and the one way a command ends."""

import argparse
import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from datasetdm_fast.command_line.outputs import check_output
from datasetdm_fast.errors import Missing, Refused, nearest
from datasetdm_fast.settings import flags_of
from datasetdm_fast.untrusted import documents
from datasetdm_fast.version import __version__

DESCRIBE = "--describe-flags"
Config = TypeVar("Config")
Converter = Callable[[str], Any]


def parse(
    arguments: Sequence[str],
    cls: type[Config],
    prog: str = "datasetdm-fast generate",
    description: str | None = None,
    examples: Sequence[str] = (),
) -> tuple[Config, set[str]]:
    """The settings of a command line, and the names of those the user set by flag or by --config.

    A field of `cls` is one flag with `help`, `choices` and `metavar` in its metadata; without a default it is required.
    `examples` are what may stand after `prog`, for --help.
    """
    hints = get_type_hints(cls)
    converters = {
        field.name: _converter(
            hints[field.name], field.metadata.get("choices", ()), field.metadata.get("has_names", False)
        )
        for field in flags_of(cls)
    }
    parser = _build_parser(cls, hints, converters, prog, description, examples)
    flags, unknown = parser.parse_known_intermixed_args(_hyphenate(arguments))
    if unknown:
        _refuse_unknown(unknown, cls, prog)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(flags).items()}
    path = given.pop("config", None)
    values = ({} if path is None else _read_yaml(Path(path), hints, converters)) | given
    for field in flags_of(cls):
        if (
            field.name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise Refused(
                f"{prog}: {_flag(field.name)} is missing",
                f"Add {_flag(field.name)}: {field.metadata.get('help', 'it has no default')}.",
            )
    config = cls(**values)
    for field in flags_of(cls):
        if (kind := field.metadata.get("output")) and getattr(config, field.name):
            check_output(_flag(field.name), getattr(config, field.name), kind)
        if isinstance(value := getattr(config, field.name), int | float):
            _check_range(_flag(field.name), value, field.metadata.get("least"), field.metadata.get("most"))
    return config, set(values)


def _check_range(flag: str, value: float, least: float | None, most: float | None) -> None:
    """Refuses a number outside of a range, of which either end may be open."""
    if (least is None or value >= least) and (most is None or value <= most):
        return
    expected = (
        f"at most {most:,}" if least is None else f"{least:,} or more" if most is None else f"{least:,} to {most:,}"
    )
    raise Refused(f"{flag} {value}: expected {expected}", "Choose another number.")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help whose description is wrapped to the terminal, and whose examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


class _Describe(argparse.Action):
    """Prints the flags as JSON, for shells that complete them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        found = [
            {
                "flags": [flag for flag in action.option_strings if flag.startswith("--")],
                "metavar": action.metavar if isinstance(action.metavar, str) else "",
                "takes": action.nargs != 0,
                "help": (action.help or "").replace("%%", "%"),
            }
            for action in parser._actions
            if action.help != argparse.SUPPRESS
        ]
        print(json.dumps(found))
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(
            f"{self.prog}: {message.removeprefix('argument ')}",
            f"Run `{self.prog} --help` for the flags and their values.",
        )


def _build_parser(
    cls: type,
    hints: dict[str, Any],
    converters: dict[str, Converter],
    prog: str,
    description: str | None,
    examples: Sequence[str],
) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        epilog="\n".join(["examples:", *(f"  {prog} {line}" for line in examples)]) if examples else None,
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # also lists of numbers, such as -5,105, are no flags
    parser.add_argument(DESCRIBE, action=_Describe, nargs=0, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"datasetdm-fast {__version__}")
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; flags win over it")
    for field in flags_of(cls):
        choices = field.metadata.get("choices", ())
        options: dict[str, Any] = {"dest": field.name, "help": _help(field)}
        if hints[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            shown = "{" + ",".join(choices) + "}" if choices else field.name.upper()
            options |= {"type": converters[field.name], "metavar": field.metadata.get("metavar") or shown}
        if field.metadata.get("positional"):
            del options["dest"]
            several = {"nargs": "*", "type": str} if hints[field.name] == tuple[str, ...] else {"nargs": "?"}
            parser.add_argument(field.name, **options | several)
        else:
            parser.add_argument(_flag(field.name), **options)
    return parser


def _flag(name: str) -> str:
    """The flag of a setting; one whose name is a word of Python ends with an underscore, as in `class_`."""
    return "--" + name.rstrip("_").replace("_", "-")


def _help(field: dataclasses.Field) -> str:
    default = "" if field.default is dataclasses.MISSING else field.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    shown = "" if default == "" or isinstance(default, bool) else f" (default: {default})"
    return (field.metadata.get("help", "") + shown).replace("%", "%%")


def _hyphenate(arguments: Sequence[str]) -> list[str]:
    """Flags with underscores written with hyphens; values are left as they are."""
    split = [argument.partition("=") for argument in arguments]
    return [
        name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in split
    ]


def _refuse_unknown(unknown: list[str], cls: type, prog: str) -> NoReturn:
    remedy, fields = f"Run `{prog} --help` for the flags.", flags_of(cls)
    bare = {_flag(field.name): field.metadata["metavar"] for field in fields if field.metadata.get("positional")}
    known = [*(flag[2:] for field in fields if (flag := _flag(field.name)) not in bare), "config", "version", "help"]
    flag = next((argument.partition("=")[0] for argument in unknown if argument.startswith("-")), None)
    if flag is None:
        raise Refused(
            f"{prog}: unexpected argument {unknown[0]!r}, every {'other ' if bare else ''}setting is a flag",
            f"{remedy} Quote a value that contains spaces.",
        )
    if flag in bare:
        raise Refused(f"{prog}: {flag} is not a flag", f"Give {bare[flag]} without a flag before it.")
    raise Refused(f"{prog}: unknown flag {flag}{nearest(flag.lstrip('-'), known, before='--')}", remedy)


def _converter(hint: Any, choices: tuple[str, ...], has_names: bool = False) -> Converter:
    """Text to a value of the field's type; a refusal is a sentence to which callers add the name."""

    def one(text: str) -> str:
        choice = text.partition(":")[0] if has_names else text
        if choices and choice not in choices:
            named = [each for each in choices if each]  # "" stands for a flag that was not given
            raise argparse.ArgumentTypeError(f"{choice!r} is not one of {', '.join(named)}{nearest(choice, named)}")
        return text

    def listed(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(one(word.strip()) for word in text.split(",") if word.strip()))
        if choices and not words:
            raise argparse.ArgumentTypeError(f"the list is empty, expected one or more of {', '.join(choices)}")
        return words

    return {tuple[str, ...]: listed, str: one, int: _whole, float: _finite, bool: _truth}[hint]


def _whole(text: str) -> int:
    try:
        return int(_without_underscores(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _finite(text: str) -> float:
    try:
        value = float(_without_underscores(text))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _without_underscores(text: str) -> str:
    """The digits of a number, which Python alone reads with underscores in between."""
    if "_" in text:
        raise ValueError
    return text


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _read_yaml(path: Path, hints: dict[str, Any], converters: dict[str, Converter]) -> dict[str, Any]:
    try:
        loaded = documents.read_yaml(path, is_strict=True)
    except Missing as stop:
        raise Refused(
            f"--config: {path} cannot be read ({getattr(stop.__cause__, 'strerror', '')})", "Give a readable YAML file."
        ) from stop
    except Refused as stop:
        raise Refused(f"--config: {stop.cause}", stop.remedy) from stop
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise Refused(
            f"--config: {path} holds a {type(loaded).__name__}, expected settings", "Write one `name: value` per line."
        )
    values = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        name = f"{name}_" if f"{name}_" in converters else name
        if name not in converters:
            cause = f"--config: {path} has the unknown setting {documents.quoted(key)}{nearest(name, converters)}"
            raise Refused(cause, "Settings are the long flags without the leading hyphens.")
        if name in values:
            raise Refused(f"--config: {path} has the setting {key} twice", "Keep one of the two lines.")
        try:
            values[name] = converters[name](_as_text(value, hints[name]))
        except argparse.ArgumentTypeError as error:
            raise Refused(f"--config: {path}: {key}: {error}", f"Correct the line `{key}:` of {path}.") from None
    return values


def _as_text(value: Any, hint: Any) -> str:
    """What the user would have typed after the flag; words that YAML read as numbers or dates are refused."""
    if (
        hint == tuple[str, ...]
        and isinstance(value, list)
        and all(isinstance(item, str) and "," not in item for item in value)
    ):
        return ",".join(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, str) or (is_number and hint in (int, float)) or (isinstance(value, bool) and hint is bool):
        return str(value)
    raise argparse.ArgumentTypeError(f"{reprlib.repr(value)} has the wrong type for this setting; put text in quotes")
