"""The classes of an export: one number each, the same in all of its files, and how classes of a run become them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels import BACKGROUND, kind_of
from datasetdm_fast.engine.labels.pose import PERSON
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.untrusted.documents import quote

MOST_IN_A_MAP = 254  # classes beside the background and the ignored pixel in 8 bits


def parse_renaming(pairs: Sequence[str]) -> dict[str, str]:
    """Other names for classes, from texts OLD=NEW or OLD=; a class whose new name is empty, or that of the background,
    is left out.
    """
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
    return names


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


def collect_classes(document: Mapping[str, Any], labels: Mapping[str, str], renaming: Mapping[str, str]) -> Classes:
    """The classes of a run by name, of `labels` by task; those of maps come first, as they hold the things as well."""
    tables = {
        task: [name for _, name in sorted(class_names(document, labels[task]).items())]
        for task in ("semantic", "instance")
        if task in labels
    }
    people = [PERSON] if "pose" in labels else []
    known = dict.fromkeys([*tables.get("semantic", ()), *tables.get("instance", ()), *people])
    names = [name for name in known if name != BACKGROUND]
    if unknown := next((old for old in renaming if old not in names), ""):
        raise Refused(
            f"--classes: no class is called {quote(unknown)}{nearest(unknown, names)}",
            f"Classes of the labels: {', '.join(names)}.",
        )
    maps, things, people = (
        [renaming.get(name, name) for name in group]
        for group in (tables.get("semantic", ()), tables.get("instance", ()), people)
    )
    exported = dict.fromkeys([*maps, *things, *people])
    left = tuple(name for name in exported if name and name != BACKGROUND)
    if not left and known:
        raise Refused("--classes: no class is left", "Leave fewer out.")
    stuff = tuple(name for name in left if name in maps and name not in things)
    return Classes(left, tuple(name for name in left if name in things), stuff)


def number_lookup(names: Mapping[int, str], classes: Classes, renaming: Mapping[str, str]) -> np.ndarray:
    """[256] uint8: the number in the export of each value of a run's label map; classes left out are background."""
    table = np.full(256, IGNORE, np.uint8)
    numbers = classes.numbers
    for value, name in names.items():
        if value < IGNORE:
            table[value] = numbers.get(renaming.get(name, name), 0)
    return table


def one_line(name: str) -> str:
    """A class name for a file of lines: without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split()) or "_"
