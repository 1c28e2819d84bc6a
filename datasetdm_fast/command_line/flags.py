"""Command lines: flags made from a frozen dataclass, and a YAML file of the same settings."""

import argparse
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from datasetdm_fast.command_line.output import check_output
from datasetdm_fast.errors import Missing, Refused, nearest
from datasetdm_fast.settings import flags_of
from datasetdm_fast.untrusted import documents
from datasetdm_fast.version import __version__

DESCRIBE = "--describe-flags"
YES, NO = ("true", "yes", "on"), ("false", "no", "off")  # as YAML 1.1 spells them
Config = TypeVar("Config")
Converter = Callable[[str], Any]


def parse(
    arguments: Sequence[str],
    cls: type[Config],
    prog: str = "datasetdm-fast generate",
    description: str | None = None,
    examples: Sequence[str] = (),
) -> tuple[Config, set[str]]:
    """The settings of a command line, and the names of those that flags or --config give; `examples` are for --help."""
    fields, hints = flags_of(cls), get_type_hints(cls)
    converters = {field.name: _converter(field, hints[field.name]) for field in fields}
    parser = _build_parser(fields, hints, converters, prog, description, examples)
    split = [argument.partition("=") for argument in arguments]  # as values may have underscores
    hyphenated = [(name.replace("_", "-") if name.startswith("--") else name, *value) for name, *value in split]
    options, unknown = parser.parse_known_intermixed_args(["".join(parts) for parts in hyphenated])
    if unknown:
        _refuse_unknown(unknown, fields, prog)
    path = vars(options).pop("config", None)
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()}
    values = ({} if path is None else _read_yaml(Path(path), hints, converters)) | flags
    for field in fields:
        is_empty = field.metadata.get("required") and not values.get(field.name)
        if is_empty or (field.default is MISSING and field.name not in values):
            name = field.metadata["metavar"] if field.metadata.get("positional") else _flag(field.name)
            raise Refused(f"{prog}: {name} is missing", f"Add {name}: {field.metadata['help']}.")
    config = cls(**values)
    for field in fields:
        flag, value = _flag(field.name), getattr(config, field.name)
        if (kind := field.metadata.get("output")) and (value or field.name in values):
            check_output(flag, value, kind)
        if value == "" and field.name in values and isinstance(field.default, str) and field.default:
            raise Refused(f"{flag}: no value was given", f"Give one, or drop the flag for {field.default}.")
        if field.name in values and isinstance(value, int | float):
            least, most = field.metadata.get("least"), field.metadata.get("most")
            if least is not None and value < least or most is not None and value > most:
                bounds = f"{least} or more" if most is None else f"{least} to {most}"
                expected = f"at most {most}" if least is None else bounds
                raise Refused(f"{flag} {value}: expected {expected}", "Choose another number.")
    return config, set(values)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help whose description is wrapped to the terminal, and whose examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


class _Describe(argparse.Action):
    """Prints the flags as JSON, for shell completion and the page of flags."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        flags = [
            {
                "flags": [flag for flag in action.option_strings if flag.startswith("--")],
                "metavar": action.metavar if isinstance(action.metavar, str) else "",
                "takes": action.nargs != 0,
                "help": (action.help or "").replace("%%", "%"),
            }
            for action in parser._actions
            if action.help != argparse.SUPPRESS
        ]
        print(json.dumps(flags))
        parser.exit()


class RefusingParser(argparse.ArgumentParser):
    """A parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise Refused(
            f"{self.prog}: {message.removeprefix('argument ')}",
            f"Run `{self.prog} --help` for the flags and their values.",
        )


def _build_parser(
    fields: Sequence[Field[Any]],
    hints: dict[str, Any],
    converters: dict[str, Converter],
    prog: str,
    description: str | None,
    examples: Sequence[str],
) -> RefusingParser:
    parser = RefusingParser(
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
    for field in fields:
        choices = field.metadata.get("choices", ())
        options: dict[str, Any] = {"help": _help(field)}
        if hints[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            metavar = "{" + ",".join(choices) + "}" if choices else field.name.upper()
            options |= {"type": converters[field.name], "metavar": field.metadata.get("metavar") or metavar}
        if field.metadata.get("positional"):
            options |= {"nargs": "*", "type": str} if hints[field.name] == tuple[str, ...] else {"nargs": "?"}
            parser.add_argument(field.name, **options)
        else:
            parser.add_argument(_flag(field.name), dest=field.name, **options)
    return parser


def _flag(name: str) -> str:
    """The flag of a setting; one whose name is a word of Python ends with an underscore, as in `class_`."""
    return "--" + name.rstrip("_").replace("_", "-")


def _help(field: Field[Any]) -> str:
    default = "" if field.default is MISSING else field.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    least = field.metadata.get("least")
    is_told = default == "" or isinstance(default, bool) or (least is not None and default < least)  # in words
    ending = "" if is_told else f" (default: {default})"
    return (field.metadata.get("help", "") + ending).replace("%", "%%")


def _refuse_unknown(unknown: list[str], fields: Sequence[Field[Any]], prog: str) -> NoReturn:
    remedy = f"Run `{prog} --help` for the flags."
    positional = {_flag(field.name): field.metadata["metavar"] for field in fields if field.metadata.get("positional")}
    known = [flag[2:] for field in fields if (flag := _flag(field.name)) not in positional]
    flag = next((argument.partition("=")[0] for argument in unknown if argument.startswith("-")), "")
    if not flag:
        raise Refused(
            f"{prog}: unexpected argument {unknown[0]!r}, every {'other ' if positional else ''}setting is a flag",
            f"{remedy} Quote a value that contains spaces.",
        )
    if flag in positional:
        raise Refused(f"{prog}: {flag} is not a flag", f"Give {positional[flag]} without a flag before it.")
    suggestion = nearest(flag.lstrip("-"), [*known, "config", "version", "help"], before="--")
    raise Refused(f"{prog}: unknown flag {flag}{suggestion}", remedy)


def _converter(field: Field[Any], hint: Any) -> Converter:
    """Text to a value of the field's type; a refusal is a sentence to which callers add the name."""
    choices = field.metadata.get("choices", ())

    def check_choice(text: str) -> str:
        choice = text.partition(":")[0] if field.metadata.get("has_names") else text
        if choices and choice not in choices:
            known = [each for each in choices if each]  # "" is the default of a flag
            other = field.metadata.get("other_names", {}).get(choice.lower())
            suggestion = f" (did you mean {other}?)" if other else nearest(choice, known)
            raise argparse.ArgumentTypeError(f"{choice!r} is not one of {', '.join(known)}{suggestion}")
        # shells leave a home folder so in --out=~/runs
        return ",".join(os.path.expanduser(part) if part.startswith("~/") else part for part in text.split(","))

    def split_list(text: str) -> tuple[str, ...]:
        words = tuple(check_choice(word.strip()) for word in text.split(",") if word.strip())
        if not field.metadata.get("may_repeat"):
            words = tuple(dict.fromkeys(words))
        if choices and not words:
            raise argparse.ArgumentTypeError(f"the list is empty, expected one or more of {', '.join(choices)}")
        return words

    return {tuple[str, ...]: split_list, str: check_choice, int: _whole, float: _finite, bool: _truth}[hint]


def _whole(text: str) -> int:
    try:
        return int(text.replace("_", "?"))  # Python would read 1_0 as 10
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _finite(text: str) -> float:
    try:
        value = float(text.replace("_", "?"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _truth(text: str) -> bool:
    if text.lower() not in (*YES, *NO):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in YES


def _read_yaml(path: Path, hints: dict[str, Any], converters: dict[str, Converter]) -> dict[str, Any]:
    """The settings of a YAML file, whose values are read as the text after a flag is."""
    try:
        loaded = documents.read_yaml(path, as_text=True)
    except Missing as stop:
        raise Refused(
            f"--config: {path} cannot be read ({getattr(stop.__cause__, 'strerror', '')})", "Give a readable YAML file."
        ) from stop
    except Refused as stop:
        raise Refused(f"--config: {stop.cause}", stop.remedy) from stop
    if not isinstance(loaded, dict | None):
        raise Refused(
            f"--config: {path} holds a {type(loaded).__name__}, expected settings", "Write one `name: value` per line."
        )
    values = {}
    for key, value in (loaded or {}).items():
        name = str(key).replace("-", "_")
        name = f"{name}_" if f"{name}_" in converters else name
        if name not in converters:
            cause = f"--config: {path} has the unknown setting {documents.quote(key)}{nearest(name, converters)}"
            raise Refused(cause, "Settings are the long flags without the leading hyphens.")
        if name in values:
            raise Refused(f"--config: {path} has the setting {key} twice", "Keep one of the two lines.")
        if hints[name] == tuple[str, ...] and isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = ",".join(value)
        try:
            if not isinstance(value, str):
                raise argparse.ArgumentTypeError(f"{reprlib.repr(value)} has the wrong type for this setting")
            values[name] = converters[name](value)
        except argparse.ArgumentTypeError as error:
            raise Refused(f"--config: {path}: {key}: {error}", f"Correct the line `{key}:` of {path}.") from None
    return values
