"""python -m datasetdm_fast.compat.showlab run SCRIPT.py: a script of a checkout of DatasetDM, as it is."""

from __future__ import annotations

import argparse
import builtins
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from datasetdm_fast.compat.showlab.lines import ScriptParser
from datasetdm_fast.config import PROFILES
from datasetdm_fast.engines import ENGINE_NAMES
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.foreign import documents

PROG = "python -m datasetdm_fast.compat.showlab"
WITHOUT = ("train", "splicing_augmentation_", "vis_", "parallel_demo")  # scripts that need more than the names here


def main(arguments: Sequence[str]) -> int:
    """Runs a script within this process, with the modules of `showlab_modules` in place of the checkout's own."""
    given = _parser().parse_args(arguments)
    path = Path(given.script)
    code = compiled(path)
    if not given.model and not Path("dataset/ckpts/imagenet").is_dir():
        raise Missing(
            "model: ./dataset/ckpts/imagenet is not there, which DatasetDM's scripts read",
            "Start in the checkout, or name a diffusers folder with --model before the script.",
        )
    from datasetdm_fast.compat.showlab_modules.names import modules_of_scripts  # after the line was read: torch
    from datasetdm_fast.compat.showlab_modules.session import EnoughImages, ScriptSettings, opened

    names = ("model", "engine", "dtype", "device", "profile", "steps", "limit")
    settings = ScriptSettings(**{name: getattr(given, name) for name in names})
    modules = modules_of_scripts(has_gpu=given.device != "cpu")
    with opened(settings) as session, _arguments([given.script, *given.arguments]):
        try:
            exec(code, _globals(path, modules))
        except EnoughImages:
            pass
        except Exception as error:
            raise _refusal(path, error) from error
    print(f"{path.name}: {session.images} images", file=sys.stderr)
    return 0


def _parser() -> ScriptParser:
    parser = ScriptParser(
        prog=f"{PROG} run",
        allow_abbrev=False,
        description="A script of a checkout of DatasetDM, unmodified. Flags before the script are this command's.",
    )
    parser.add_argument("--model", default="", help="diffusers folder, or one of ours, instead of the script's own")
    parser.add_argument("--engine", default="auto", choices=ENGINE_NAMES, help="engine that runs the U-Net")
    parser.add_argument("--dtype", default="auto", help="precision of the fast engines")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where networks run, for the script, too"
    )
    parser.add_argument(
        "--profile", default=PROFILES[0], choices=PROFILES, help="diffusers version whose timesteps are used"
    )
    parser.add_argument("--steps", default=0, type=_count, help="sampling steps instead of the script's own")
    parser.add_argument("--limit", default=0, type=_count, help="end the script after so many images")
    parser.add_argument("script", help="path of the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def compiled(path: Path) -> CodeType:
    """The code of a script; refused where it is none, or one that a command of ours does instead."""
    if not path.is_file():
        raise Refused(f"{path}: no such script", "Name a script of the checkout's folder tools.")
    if path.stem.startswith(WITHOUT):
        raise Refused(
            f"{path}: {path.stem} imports modules of DatasetDM that have no counterpart here",
            f"`{PROG} {path.stem} --help` shows our command of that name, if it has one.",
        )
    try:
        with tokenize.open(path) as file:
            return compile(file.read(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        raise Refused(
            f"{path}: not a Python script ({documents.one_line(str(error))})", "Name another file."
        ) from error


def _globals(path: Path, modules: Mapping[str, ModuleType]) -> dict[str, Any]:
    """Globals of a script whose imports find these modules first; no other code's imports change."""
    own = {**vars(builtins), "__import__": _importer(modules)}
    return {"__name__": "__main__", "__file__": str(path), "__builtins__": own}


def _importer(modules: Mapping[str, ModuleType]) -> Callable[..., ModuleType]:
    def importing(
        name: str, scope: Any = None, local: Any = None, wanted: Sequence[str] | None = (), level: int = 0
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or top not in modules:
            return __import__(name, scope, local, wanted, level)
        if name in modules:
            return modules[name if wanted else top]
        library = getattr(modules[top], "_library", None)
        if library is None:
            raise ImportError(f"{name} is none of the modules that compat.showlab has")
        found = __import__(name, scope, local, wanted, level)
        return found if wanted else modules[top]

    return importing


@contextmanager
def _arguments(line: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = line
    try:
        yield
    finally:
        sys.argv = before


def _refusal(path: Path, error: Exception) -> Refused | Missing:
    """What a script ended with: a refusal of ours that it may have caught, or its own error and line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (Refused, Missing)):
            return cause
        cause = cause.__cause__ or cause.__context__
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    said = documents.one_line(f"{type(error).__name__}: {error}")
    return Refused(
        f"{path}, line {lines[-1] if lines else '?'}: {said}",
        "docs/from-datasetdm.md lists the modules and names that a script finds.",
    )
