"""Command lines of DatasetDM's scripts: each takes the flags of its script and ours."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasetdm_fast.command_line.flags import RefusingParser
from datasetdm_fast.config import ENGINE_NAMES, PROFILES
from datasetdm_fast.errors import Refused, nearest

TYPES = {"text": str, "path": str, "whole": int, "number": float}
PROMPTS = "./dataset/Prompts_From_GPT"
MODEL = "./dataset/ckpts/imagenet"


@dataclass(frozen=True)
class Flag:
    """One flag: its default, the kind of its value, and whether it changes what is made."""

    name: str
    default: Any = None
    kind: str = "text"  # text, path (relative to --root), whole, number or switch
    help: str = ""
    has_effect: bool = True
    is_optional: bool = False  # whether it may stand without a value, which is then its default
    choices: tuple[str, ...] = ()


class ScriptFlags(Protocol):
    """The part of a script that its command line needs."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def flags(self) -> tuple[Flag, ...]: ...


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


NO_EFFECT = (
    Flag("prompt", "a photo of a lion on a mountain top at sunset", has_effect=False, is_optional=True),
    Flag("category", "lion", has_effect=False, is_optional=True),
    Flag("skip_grid", False, "switch", has_effect=False),
    Flag("skip_save", False, "switch", has_effect=False),
    Flag("ddim_steps", 50, "whole", has_effect=False),
    Flag("plms", False, "switch", has_effect=False),
    Flag("fixed_code", False, "switch", has_effect=False),
    Flag("ddim_eta", 0.0, "number", has_effect=False),
    Flag("H", 512, "whole", has_effect=False),
    Flag("W", 512, "whole", has_effect=False),
    Flag("C", 4, "whole", has_effect=False),
    Flag("f", 8, "whole", has_effect=False),
    Flag("n_samples", 1, "whole", has_effect=False),
    Flag("n_rows", 0, "whole", has_effect=False),
    Flag("scale", 7.5, "number", has_effect=False),
    Flag("from_file", None, has_effect=False),
    Flag("sd_ckpt", "stable_diffusion.ckpt", has_effect=False),
    Flag("precision", "autocast", has_effect=False, choices=("full", "autocast")),
)
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


def read_line(prog: str, script: ScriptFlags, arguments: Sequence[str]) -> Line:
    """The parsed command line of a script; unknown flags are refused."""
    parser = RefusingParser(
        prog=f"{prog} {script.name}",
        description=script.description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for flag in script.flags:
        _add(parser, flag)
    options, unknown = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    if unknown:
        word = unknown[0].partition("=")[0]
        known = [flag.name for flag in script.flags]
        cause = f"unknown flag {word}{nearest(word.lstrip('-'), known, before='--')}"
        if not word.startswith("-"):
            cause = f"unexpected argument {word!r}, every setting is a flag"
        raise Refused(f"{parser.prog}: {cause}", f"Run `{parser.prog} --help` for the flags.")
    values = {name: value for name, value in vars(options).items() if value is not None}  # None: without its value
    ignored = tuple(flag.name for flag in script.flags if flag.name in vars(options) and not flag.has_effect)
    defaults = {flag.name: flag.default for flag in script.flags}
    return Line(script.name, defaults | values, ignored)


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    text = flag.help + ("" if flag.has_effect else "without effect, as in DatasetDM")
    if flag.kind == "switch":
        parser.add_argument(f"--{flag.name}", action="store_true", help=text)
        return
    default = "" if flag.default in (None, "") else f" (default: {flag.default})"
    parser.add_argument(
        f"--{flag.name}",
        type=TYPES[flag.kind],
        choices=flag.choices or None,
        nargs="?" if flag.is_optional else None,
        metavar=None if flag.choices else flag.kind.upper(),
        help=(text + default).replace("%", "%%"),
    )


def _with_underscores(argument: str) -> str:
    """A flag with underscores, as DatasetDM writes all but one; values are left as they are."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument
