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
STEPS = 3  # of a quick one
QUICK = {  # command -> flags that take the place of a recipe's own
    "train": f"--steps {STEPS} --limit-images {STEPS} --batch-size 2 --draws 1 --held-out 0 --cache off",
    "prompts": "--per-class 1",
    "generate": f"--steps {STEPS} --number {STEPS} --batch-size 2 --truncate-prompts",
    "splice": "--number 2",
    "convert": "",
    "evaluate": "--batch-size 2 --bootstrap 0",
    "compat.vinai": f"--steps {STEPS}",
}
NOT_QUICK = ("--select", "--min-area")  # flags with a value that a few small images would not pass


@dataclass(frozen=True)
class RecipeConfig:
    name: str = setting("", "recipe; without one they are listed", metavar="NAME", positional=True)
    root: str = setting("data", "folder of the data sets", metavar="DATA")
    model: str = setting("", "diffusion model; default: stable-diffusion-v1-4 in --root", metavar="MODEL")
    out: str = setting("", "folder of decoders, runs and figures; default: runs/NAME", metavar="OUT", output="folder")
    real: int = setting(0, "labelled images, 0 = as published", metavar="N")
    device: str = setting("auto", "cpu, cuda or cuda:N", metavar="DEVICE")
    only: tuple[str, ...] = setting((), "only these steps, comma-separated", metavar="LIST")
    quick: bool = setting(False, "three images and three steps of everything, to check that nothing is missing")
    dry_run: bool = dry_run_setting()


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
    if config.real < 0:
        raise Refused(f"--real {config.real}: expected a number of 0 or more", "Leave it out for the published number.")
    recipe = read(config.name)
    steps = steps_of(recipe, config)
    if other := [name for name in config.only if name not in [step.name for step in steps]]:
        raise Refused(
            f"--only {other[0]}: {config.name} has no such step", f"It has {', '.join(step.name for step in steps)}."
        )
    steps = [step for step in steps if not config.only or step.name in config.only]
    if config.dry_run:
        for step in steps:
            print(f"{step.name + ':':10}{step.line}")
            for path, what in step.missing:
                print(f"{'':10}missing: {path} ({what})")
        print(*told(recipe), sep="\n")
        return 0
    return _run(config, recipe, steps)


def _run(config: RecipeConfig, recipe: Mapping[str, Any], steps: Sequence[Step]) -> int:
    out = folder_of(config)
    done = read_done(out)
    left = [step for step in steps if done.get(step.name) != step.line]
    for step in left:
        if step.name in done:
            raise Refused(
                f"{out}: its step {step.name} was run with other flags: {done[step.name]}",
                "Choose another --out, or give the flags that it was started with.",
            )
        for path, what in step.missing:
            raise Missing(
                f"{path}: {what} is not there, and step {step.name} needs it",
                "Put it there, or say where data and model lie with --root and --model; --dry-run lists all.",
            )
    storage.make_folder(out)
    with locks.hold_lock(out / "recipe.lock"):
        for step in left:
            print(f"{step.name + ':':10}{step.line}", file=sys.stderr, flush=True)
            if code := import_module(f"datasetdm_fast.{step.words[0]}").main(list(step.words[1:])):
                return code
            done[step.name] = step.line
            storage.publish({out / DONE: (json.dumps(done, indent=1) + "\n").encode()})
    print(*told(recipe), sep="\n", file=sys.stderr)
    print(out)
    return 0


def read(name: str) -> dict[str, Any]:
    return documents.read_yaml(FOLDER / f"{name}.yaml")


def folder_of(config: RecipeConfig) -> Path:
    return Path(config.out or f"runs/{config.name}{'-quick' if config.quick else ''}")


def read_done(out: Path) -> dict[str, str]:
    """The lines that are finished, by the names of their steps."""
    return documents.read_object(out / DONE) if (out / DONE).exists() else {}


def steps_of(recipe: Mapping[str, Any], config: RecipeConfig) -> list[Step]:
    """The lines of a recipe for the user's folders."""
    root = Path(config.root)
    model = config.model or str(root / "stable-diffusion-v1-4")
    places = {"root": str(root), "model": model, "out": str(folder_of(config))}
    places |= {"real": str(config.real or recipe.get("real", 0)), "synthetic": str(recipe.get("synthetic", 0))}
    found = []
    for name, line in recipe["steps"].items():
        words = [word.format(**places) for word in line.split()]
        needs = {
            root / path: what for path, what in recipe["needs"].items() if f"{{root}}/{path.split('/')[0]}" in line
        }
        if model in words and not config.model:
            needs[Path(model)] = "Stable Diffusion 1.4 as a diffusers folder"
        if config.quick:
            words = quickened(words)
        if config.device != "auto" and words[0] in ("train", "generate", "evaluate", "compat.vinai"):
            words += ["--device", config.device]
        found.append(Step(name, tuple(words), needs))
    return found


def quickened(words: Sequence[str]) -> list[str]:
    """The line with the flags of QUICK in the place of its own."""
    short = shlex.split(QUICK[words[0]])
    gone = {*NOT_QUICK, *(word for word in short if word.startswith("--"))}
    kept = [word for k, word in enumerate(words) if word not in gone and (not k or words[k - 1] not in gone)]
    return [*kept, *short]


def told(recipe: Mapping[str, Any]) -> list[str]:
    """The published figures to compare with, a line each."""
    rows = recipe["published"]
    return [f"published: {row}" for row in rows] if rows else ["published: no figure to compare with"]


if __name__ == "__main__":
    sys.exit(main())
