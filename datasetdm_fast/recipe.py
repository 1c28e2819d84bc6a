"""python -m datasetdm_fast.recipe NAME --root DATA: run the steps of a published experiment, one after the other."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.disk import locks, storage
from datasetdm_fast.errors import Missing, Refused, nearest
from datasetdm_fast.settings import dry_run_setting, setting
from datasetdm_fast.untrusted import documents

PROG = "python -m datasetdm_fast.recipe"
EXAMPLES = ("voc-semantic --root DATA --dry-run", "nyu-depth --root DATA --model SD --out runs/nyu")
FOLDER = Path(__file__).parent / "recipes"
DONE = "recipe.json"  # in the folder of a recipe: the lines that are finished
WITH_DEVICE = ("train", "generate", "evaluate", "compat.vinai")


@dataclass(frozen=True)
class RecipeConfig:
    name: str = setting("", "recipe; without one they are listed", metavar="NAME", positional=True)
    root: str = setting("data", "folder of the data sets", metavar="DATA")
    model: str = setting("", "diffusion model; default: stable-diffusion-v1-4 in --root", metavar="MODEL")
    out: str = setting("", "folder of decoders, runs and figures; default: runs/NAME", metavar="OUT", output="folder")
    real: int = setting(0, "labelled images, 0 = as published", metavar="N", least=0)
    device: str = setting("auto", "cpu, cuda or cuda:N", metavar="DEVICE")
    dry_run: bool = dry_run_setting()

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")


@dataclass(frozen=True)
class Step:
    """One command line of a recipe, and the files and folders that it needs."""

    name: str
    words: tuple[str, ...]
    needs: Mapping[Path, str]  # path -> what it is

    @property
    def line(self) -> str:
        return f"python -m datasetdm_fast.{shlex.join(self.words)}"

    @property
    def missing(self) -> list[tuple[Path, str]]:
        return [(path, what) for path, what in self.needs.items() if not path.exists()]


@command
def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, RecipeConfig, PROG, __doc__, EXAMPLES)
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if not config.name:
        for name in names:
            print(f"{name:28}{read(name)['title']}")
        return 0
    if config.name not in names:
        raise Refused(
            f"{PROG}: there is no recipe {config.name!r}{nearest(config.name, names)}", f"{', '.join(names)}."
        )
    recipe = read(config.name)
    steps = steps_of(recipe, config)
    if config.dry_run:
        for step in steps:
            print(f"{step.name + ':':10}{step.line}")
            for path, what in step.missing:
                print(f"{'':10}missing: {path} ({what})")
    elif code := run(config.folder, steps):
        return code
    for figure in recipe["published"] or ["no figure to compare with"]:
        print(f"published: {figure}", file=sys.stdout if config.dry_run else sys.stderr)
    if not config.dry_run:
        print(config.folder)
    return 0


def run(out: Path, steps: Sequence[Step]) -> int:
    """Runs the steps that are not finished, and records each in the folder."""
    done = documents.read_object(out / DONE) if (out / DONE).exists() else {}
    remaining = [step for step in steps if done.get(step.name) != step.line]
    for step in remaining:
        if step.name in done:
            raise Refused(
                f"{out}: its step {step.name} was run with other flags: {done[step.name]}",
                "Choose another --out, or give the flags that it was started with.",
            )
        for path, what in step.missing:
            raise Missing(
                f"{path}: {what} is not there, and step {step.name} needs it",
                "Put it there, or name the folders of data and model with --root and --model; --dry-run lists all.",
            )
    storage.make_folder(out)
    with locks.hold_lock(out / "recipe.lock"):
        for step in remaining:
            print(f"{step.name + ':':10}{step.line}", file=sys.stderr, flush=True)
            if code := import_module(f"datasetdm_fast.{step.words[0]}").main(list(step.words[1:])):
                return code
            done[step.name] = step.line
            storage.publish({out / DONE: (json.dumps(done, indent=1) + "\n").encode()})
    return 0


def read(name: str) -> dict[str, Any]:
    return documents.read_yaml(FOLDER / f"{name}.yaml")


def steps_of(recipe: Mapping[str, Any], config: RecipeConfig) -> list[Step]:
    """The lines of a recipe for the user's folders."""
    root = Path(config.root)
    model = config.model or str(root / "stable-diffusion-v1-4")
    values = {"root": str(root), "model": model, "out": str(config.folder)}
    values |= {"real": str(config.real or recipe.get("real", 0)), "synthetic": str(recipe.get("synthetic", 0))}
    steps = []
    for name, line in recipe["steps"].items():
        words = [word.format(**values) for word in line.split()]
        needs = {
            root / path: what for path, what in recipe["needs"].items() if f"{{root}}/{path.split('/')[0]}" in line
        }
        if model in words and not config.model:
            needs[Path(model)] = "Stable Diffusion 1.4 as a diffusers folder"
        if config.device != "auto" and words[0] in WITH_DEVICE:
            words += ["--device", config.device]
        steps.append(Step(name, tuple(words), needs))
    return steps


if __name__ == "__main__":
    sys.exit(main())
