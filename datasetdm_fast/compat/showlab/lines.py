"""Command lines of DatasetDM's scripts: each takes the flags of its script and ours."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.flags import RefusingParser
from datasetdm_fast.config import ENGINE_NAMES, PROFILES
from datasetdm_fast.errors import Refused, nearest

TYPES = {"text": str, "path": str, "whole": int, "number": float}
PROMPTS = "./dataset/Prompts_From_GPT"
MODEL = "./dataset/ckpts/imagenet"


@dataclass(frozen=True)
class Flag:
    """One flag: its default and the kind of its value."""

    name: str
    default: Any = None
    kind: str = "text"  # text, path (relative to --root), whole, number or switch
    help: str = ""
    is_optional: bool = False  # whether it may stand without a value, which is then its default
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A parsed command line: the value of every flag."""

    script: str
    values: Mapping[str, Any]
    ignored: tuple[str, ...] = ()  # flags that were given and have no effect

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def root(self) -> Path:
        return Path(self["root"])

    def path(self, name: str) -> Path:
        """The path in a flag of kind path; a relative one starts from --root."""
        return self.root / self[name]


# what DatasetDM's scripts take and do not use: flags with a value, and switches
NO_EFFECT = "prompt category ddim_steps ddim_eta H W C f n_samples n_rows scale from_file sd_ckpt precision".split()
NO_EFFECT_SWITCHES = "skip_grid skip_save plms fixed_code laion400m".split()
COMMON = (
    Flag("outdir", "./DataDiffusion/VOC/", "path", "folder to write", is_optional=True),
    Flag(
        "thread_num",
        8,
        "whole",
        "number of DatasetDM's processes whose seeds and prompts are used; one process makes them all",
    ),
    Flag("seed", 42, "whole", "seed for drawing the prompts"),
)
OURS = (
    Flag("root", ".", "text", "checkout of DatasetDM; all other paths start there"),
    Flag("model", MODEL, "path", "diffusers folder of the model, or the name of one of this package's"),
    Flag("engine", "auto", help="engine that runs the networks", choices=ENGINE_NAMES),
    Flag("dtype", "auto", help="precision of the fast engines"),
    Flag("device", "auto", help="cpu, cuda or cuda:N"),
    Flag("threads", 0, "whole", "CPU threads, 0 = all cores"),
    Flag("batch_size", 0, "whole", "images written together, 0 = as many as fit into memory"),
    Flag("steps", 50, "whole", "sampling steps"),
    Flag("guidance", 0.0, "number", "guidance scale, 0 = that of the script"),
    Flag("profile", PROFILES[0], help="diffusers version whose timesteps are used", choices=PROFILES),
    Flag("limit", 0, "whole", "stop after N new images; the same command resumes"),
    Flag("dry_run", False, "switch", "show what would be made and stop"),
    Flag("json", False, "switch", "machine-readable result on stdout"),
    Flag("quiet", False, "switch", "show no progress"),
)


def read_line(prog: str, script: str, description: str, flags: Sequence[Flag], arguments: Sequence[str]) -> Line:
    """The parsed command line of a script; unknown flags are refused."""
    parser = RefusingParser(
        prog=f"{prog} {script}", description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for flag in flags:
        _add(parser, flag)
    no_effect = [*(["config"] if "config" not in {flag.name for flag in flags} else []), *NO_EFFECT]
    for name in no_effect:
        parser.add_argument(f"--{name}", nargs="?", help="without effect, as in DatasetDM")
    for name in NO_EFFECT_SWITCHES:
        parser.add_argument(f"--{name}", action="store_true", help="without effect, as in DatasetDM")
    options, unknown = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if unknown:
        word = unknown[0].partition("=")[0]
        known = [flag.name for flag in flags]
        cause = f"unknown flag {word}{nearest(word.lstrip('-'), known, before='--')}"
        if not word.startswith("-"):
            cause = f"unexpected argument {word!r}, every setting is a flag"
        raise Refused(f"{parser.prog}: {cause}", f"Run `{parser.prog} --help` for the flags.")
    defaults = {flag.name: flag.default for flag in flags}
    values = {name: value for name, value in vars(options).items() if value is not None and name in defaults}
    ignored = tuple(name for name in (*no_effect, *NO_EFFECT_SWITCHES) if name in vars(options))
    return Line(script, defaults | values, ignored)


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    if flag.kind == "switch":
        parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
        return
    default = "" if flag.default in (None, "") else f" (default: {flag.default})"
    parser.add_argument(
        f"--{flag.name}",
        type=TYPES[flag.kind],
        choices=flag.choices or None,
        nargs="?" if flag.is_optional else None,
        metavar=None if flag.choices else flag.kind.upper(),
        help=(flag.help + default).replace("%", "%%"),
    )


def _with_underscores(argument: str) -> str:
    """A flag with underscores, as DatasetDM writes all but one; values are left as they are."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument
