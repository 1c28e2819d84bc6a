"""python -m datasetdm_fast.compat.showlab run SCRIPT.py: a script of a checkout of DatasetDM, as it is."""

from __future__ import annotations

import argparse
import ast
import sys
import tokenize
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

from datasetdm_fast.compat.showlab.lines import ScriptParser
from datasetdm_fast.config import PROFILES
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.engines import ENGINE_NAMES
from datasetdm_fast.errors import Missing, Refused, nearest
from datasetdm_fast.untrusted import documents

PROG = "python -m datasetdm_fast.compat.showlab"
FLAGS = ("model", "engine", "dtype", "device", "profile", "steps", "limit")
WITHOUT_MODEL = ("splicing_augmentation_", "vis_")  # how names of scripts begin that run no network


def main(arguments: Sequence[str]) -> int:
    """Runs a script within this process, with the modules of `showlab_modules` in place of the checkout's own."""
    given = _given(arguments)
    path = Path(given.script)
    code = compiled(path, given.device)
    has_model = not path.stem.startswith(WITHOUT_MODEL)
    if has_model and not given.model and not Path("dataset/ckpts/imagenet").is_dir():
        raise Missing(
            "model: ./dataset/ckpts/imagenet is missing, where DatasetDM's scripts look for the model",
            "Start in the checkout, or name a diffusers folder with --model before the script.",
        )
    from datasetdm_fast.compat.showlab_modules.importing import ScriptImports
    from datasetdm_fast.compat.showlab_modules.names import modules_of_scripts  # after the line was read: torch
    from datasetdm_fast.compat.showlab_modules.session import EnoughImages, ScriptSettings, opened

    settings = ScriptSettings(**{name: getattr(given, name) for name in FLAGS})
    modules = modules_of_scripts(has_gpu=given.device != "cpu", is_trainer=is_trainer(path))
    imports = ScriptImports(modules, (Path.cwd(), path.resolve().parent, path.resolve().parent.parent))
    with opened(settings) as session, _arguments([given.script, *given.arguments]):
        try:
            exec(code, imports.globals_of("__main__", path))
        except EnoughImages:
            pass
        except Exception as error:
            raise _refusal(path, error) from error
    print(f"{path.name}: {session.images} images", file=sys.stderr)
    return 0


def _given(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = unknown[0].partition("=")[0]
        raise Refused(
            f"{parser.prog}: unknown flag {word}{nearest(word.lstrip('-'), FLAGS, before='--')}",
            f"Run `{parser.prog} --help` for the flags; those of the script stand after it.",
        )
    return given


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


def compiled(path: Path, device: str) -> CodeType:
    """The code of a script; refused where it is none, or one that cannot run on this device."""
    if not path.is_file():
        raise Refused(f"{path}: no such script", "Name a script of the checkout's folder tools.")
    if path.stem == "train":
        raise Refused(f"{path}: it trains a decoder that no generator of DatasetDM reads", "Run one of tools/train_*.")
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read(), str(path))
        code = compile(tree, str(path), "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(
            f"{path}: not a Python script ({documents.one_line(str(error))})", "Name another file."
        ) from error
    if is_trainer(path) and (line := _moved_to_gpu(tree)):
        _check_gpu(path, line, device)
    return code


def is_trainer(path: Path) -> bool:
    return path.stem.startswith("train_")


def _moved_to_gpu(tree: ast.Module) -> int:
    """The first line that moves a tensor by `.cuda()`, whatever the machine has; 0 where there is none."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return min((node.lineno for node in calls if node.func.attr == "cuda"), default=0)


def _check_gpu(path: Path, line: int, device: str) -> None:
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        why = "--device is cpu" if device == "cpu" else "this machine has no GPU"
        raise Refused(
            f"{path}, line {line}: it calls .cuda(), and {why}", f"`{PROG} {path.stem}` does the same on any machine."
        )


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
    where = f"{path}, line {lines[-1] if lines else '?'}"
    if isinstance(error, FileNotFoundError) and error.filename:
        alike = storage.named_alike(Path(error.filename))
        return Missing(
            f"{where}: {error.filename} is not there{alike}", "Relative paths start from the current folder."
        )
    said = documents.one_line(f"{type(error).__name__}: {error}")
    return Refused(
        f"{where}: {said}",
        "The page docs/from-datasetdm.md lists the modules and names that a script finds.",
    )
