"""python -m datasetdm_fast.recipe NAME --root DATA | sh -e: the command lines of a published experiment."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.settings import setting
from datasetdm_fast.untrusted import documents

PROG = "python -m datasetdm_fast.recipe"
EXAMPLES = ("voc-semantic --root DATA", "nyu-depth --root DATA --model SD --out runs/nyu | sh -e")
FOLDER = Path(__file__).parent / "recipes"
WITH_DEVICE = ("train", "generate", "evaluate", "compat.vinai")


@dataclass(frozen=True)
class RecipeConfig:
    name: str = setting("", "recipe; without one they are listed", metavar="NAME", positional=True)
    root: str = setting("data", "folder of the data sets", metavar="DATA")
    model: str = setting("", "diffusion model; default: stable-diffusion-v1-4 in --root", metavar="MODEL")
    out: str = setting("", "folder of decoders, runs and figures; default: runs/NAME", metavar="OUT", output="folder")
    real: int = setting(0, "labelled images, 0 = as published", metavar="N", least=0)
    device: str = setting("auto", "cpu, cuda or cuda:N", metavar="DEVICE")

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")


@dataclass(frozen=True)
class Step:
    """One command line of a recipe, and the files and folders that it needs."""

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
    for step in steps_of(recipe, config):
        print(*(f"# missing: {path} ({what})" for path, what in step.missing), step.line, sep="\n")
    for figure in recipe["published"] or ["no figure to compare with"]:
        print(f"# published: {figure}")
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
    for line in recipe["steps"].values():
        words = [word.format(**values) for word in line.split()]
        needs = {
            root / path: what for path, what in recipe["needs"].items() if f"{{root}}/{path.split('/')[0]}" in line
        }
        if model in words and not config.model:
            needs[Path(model)] = "Stable Diffusion 1.4 as a diffusers folder"
        if config.device != "auto" and words[0] in WITH_DEVICE:
            words += ["--device", config.device]
        steps.append(Step(tuple(words), needs))
    return steps


if __name__ == "__main__":
    sys.exit(main())
