"""Class names: those of a data set are replaced by the names that a decoder has for them."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.class_tables import find_classes, spoken
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource, Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import list_names

AUTO = "auto"
MOST_LISTED = 8  # names of classes in a message


def parse_names(pairs: Sequence[str], sources: Iterable[LabelledSource]) -> dict[str, str]:
    """Their names and ours, from pairs theirs=ours; each of theirs is a class of one of the data sets."""
    known = sorted({name for source in sources for name in (*source.classes, *source.thing_classes)})
    names = {}
    for pair in pairs:
        theirs, equals, ours = (part.strip() for part in pair.partition("="))
        if pair == AUTO:
            continue
        if not equals or theirs not in known or not ours:
            raise Refused(
                f"--class-names {pair}: expected theirs=ours, where theirs is a class of the data ({', '.join(known)})",
                "Name one of them, or write auto.",
            )
        names[theirs] = ours
    return names


class RenamedSource:
    """Labelled images whose classes have other names; everything else is that of the source."""

    def __init__(self, source: LabelledSource, new: Mapping[str, str]):
        self.source = source
        self.classes = tuple(new.get(name, name) for name in source.classes)
        self.thing_classes = tuple(new.get(name, name) for name in source.thing_classes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Labelled]:
        return iter(self.source)

    def __getitem__(self, place: int) -> Labelled:
        return self.source[place]


def rename(
    source: LabelledSource, pairs: Mapping[str, str], known: Sequence[str], *, is_auto: bool
) -> LabelledSource | RenamedSource:
    """The source with the names of `pairs` for its classes, and with `is_auto` those of the decoder's classes `known`
    that the class tables hold for the same class; no name is then there twice. Captions that are made of its labels use
    these names.
    """
    names = tuple(dict.fromkeys((*source.classes, *source.thing_classes)))
    new = {name: pairs[name] for name in names if name in pairs}
    for name, word in zip(names, spoken(names)):
        matches = find_classes(word, tuple(known))
        if is_auto and name not in known and len(matches) == 1 and matches[0] not in (*names, *new.values()):
            new.setdefault(name, matches[0])
    called = [new.get(name, name) for name in names]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise Refused(f"--class-names: two classes of the data would be {twice}", "Give each a name of its own.")
    source.called = new
    return RenamedSource(source, new) if new else source


def classes_shown(source: LabelledSource | RenamedSource, item: Picture | Labelled) -> set[str]:
    """The classes in the label map and among the things of an image."""
    names = set[str]()
    if item.semantic is not None and source.classes:
        numbers = np.flatnonzero(np.bincount(item.semantic.ravel(), minlength=256)[:IGNORE])
        names |= {source.classes[k] for k in numbers}
    if item.mask_classes is not None:
        names |= {source.thing_classes[k] for k in item.mask_classes}
    return names


def describe_absent(classes: Sequence[str], shown: Collection[str]) -> str:
    """Which of some classes no image shows, empty where all are shown."""
    absent = [name for name in dict.fromkeys(classes) if name not in shown and not reading.is_background(name)]
    return f"no image shows {list_names(absent, MOST_LISTED)}" if absent else ""


def describe_unknown(classes: Sequence[str], known: Sequence[str]) -> str:
    """Which classes of the data a decoder does not know, empty where it knows all."""
    unknown = [name for name in classes if name not in known and not reading.is_background(name)]
    names = f"the decoder has no class {list_names(unknown, MOST_LISTED)}, so these count as missed"
    return f"{names}; --class-names THEIRS=OURS names those that it calls otherwise" if unknown else ""


def in_common(result: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The mean over the classes that decoder and data have in common, where there are figures by class."""
    shared = [value for name, value in result.get("per_class", {}).items() if name in known and name != "background"]
    return {"in_common": float(np.mean(shared)), "classes_in_common": len(shared)} if shared else {}
