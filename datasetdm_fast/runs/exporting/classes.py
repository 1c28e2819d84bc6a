"""The classes of an export: one number each, the same in all of its files, and how classes of a run become them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.untrusted.documents import quote

BACKGROUND, IGNORED, PERSON = "background", 255, "person"
MOST_IN_A_MAP = 254  # classes beside the background and the ignored pixel in 8 bits


@dataclass(frozen=True)
class Renaming:
    """Other names for classes; a class whose new name is empty, or that of the background, is left out."""

    names: Mapping[str, str]

    @classmethod
    def parse(cls, pairs: Sequence[str]) -> "Renaming":
        """From texts OLD=NEW or OLD=."""
        names: dict[str, str] = {}
        for pair in pairs:
            old, sign, new = (part.strip() for part in pair.partition("="))
            if not sign or not old:
                raise Refused(
                    f"--classes {quote(pair)}: expected OLD=NEW, or OLD= to leave a class out",
                    "For example --classes sofa=couch,wall=",
                )
            new = "" if new == BACKGROUND else new
            if names.setdefault(old, new) != new:
                raise Refused(f"--classes: {quote(old)} is given two names", "Give it one.")
        return cls(names)

    def __call__(self, name: str) -> str:
        return self.names.get(name, name)

    def check(self, known: Sequence[str]) -> None:
        """Refuses a name that the run lacks."""
        for old in self.names:
            if old not in known:
                raise Refused(
                    f"--classes: no class is called {quote(old)}{nearest(old, known)}",
                    f"Classes of the labels: {', '.join(known)}.",
                )


@dataclass(frozen=True)
class Classes:
    """The classes of an export but the background, each with its number from 1 on; 0 is the background."""

    names: tuple[str, ...]
    things: tuple[str, ...]  # those that instances have
    stuff: tuple[str, ...]  # those that only maps show

    @property
    def numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names, 1)}


def class_names(document: Mapping[str, Any], label: str) -> dict[int, str]:
    """The classes of a label by their numbers in the files of the run, the background among them."""
    return kind_of(label).names(document["labels"][label])


def collect_classes(document: Mapping[str, Any], labels: Mapping[str, str], renamed: Renaming) -> Classes:
    """The classes of a run by name, of `labels` by task; those of maps come first, as they hold the things as well."""
    tables = {
        task: [name for _, name in sorted(class_names(document, labels[task]).items())]
        for task in ("semantic", "instance")
        if task in labels
    }
    people = [PERSON] if "pose" in labels else []
    known = dict.fromkeys([*tables.get("semantic", ()), *tables.get("instance", ()), *people])
    renamed.check([name for name in known if name != BACKGROUND])
    maps, things = (list(map(renamed, tables.get(task, ()))) for task in ("semantic", "instance"))
    exported = dict.fromkeys([*maps, *things, *map(renamed, people)])
    names = tuple(name for name in exported if name and name != BACKGROUND)
    if not names and known:
        raise Refused("--classes: no class is left", "Leave fewer out.")
    stuff = tuple(name for name in names if name in maps and name not in things)
    return Classes(names, tuple(name for name in names if name in things), stuff)


def number_lookup(names: Mapping[int, str], classes: Classes, renamed: Renaming) -> np.ndarray:
    """[256] uint8: the number in the export of each value of a run's label map; classes left out are background."""
    table = np.full(256, IGNORED, np.uint8)
    numbers = classes.numbers
    for value, name in names.items():
        if value < IGNORED:
            table[value] = numbers.get(renamed(name), 0)
    return table


def one_line(name: str) -> str:
    """A class name for a file of lines: without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split()) or "_"
