"""Several data sets on one line, and the classes of one under the names that a decoder has for them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from datasetdm_fast.engine.labels.class_tables import spoken
from datasetdm_fast.engine.labels.words import find_classes
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.errors import Refused

AUTO = "auto"


def addresses(data: str) -> list[str]:
    """The data sets that are named: a comma parts them where a kind and a colon follow."""
    return re.split(r",\s*(?=[a-z0-9-]+:)", data)


def pairs(given: Sequence[str], sources: Iterable[LabelledSource]) -> dict[str, str]:
    """Their names and ours, from pairs theirs=ours; each of theirs is a class of one of the data sets."""
    names = sorted({name for source in sources for name in (*source.classes, *source.thing_classes)})
    found = {}
    for pair in given:
        theirs, equals, ours = (part.strip() for part in pair.partition("="))
        if pair == AUTO:
            continue
        if not equals or theirs not in names or not ours:
            raise Refused(
                f"--class-names {pair}: expected theirs=ours, where theirs is a class of the data ({', '.join(names)})",
                "Name one of them, or write auto.",
            )
        found[theirs] = ours
    return found


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


def renamed(
    source: LabelledSource, pairs: Mapping[str, str], known: Sequence[str], *, finds: bool
) -> LabelledSource | RenamedSource:
    """The source with the names for its classes that `pairs` says, and where it `finds` names itself, those of the
    decoder's classes `known` that the class tables hold for the same; no name is then there twice. Captions that are
    made of its labels say these names.
    """
    names = tuple(dict.fromkeys((*source.classes, *source.thing_classes)))
    new = {name: pairs[name] for name in names if name in pairs}
    for name, said in zip(names, spoken(names)):
        found = find_classes(said, tuple(known))
        if finds and name not in known and len(found) == 1 and found[0] not in (*names, *new.values()):
            new.setdefault(name, found[0])
    called = [new.get(name, name) for name in names]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise Refused(f"--class-names: two classes of the data would be {twice}", "Give each a name of its own.")
    source.called = new
    return RenamedSource(source, new) if new else source


def in_common(result: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The figures with the mean over the classes that decoder and data have in common, where they are told by class."""
    shared = [value for name, value in result.get("per_class", {}).items() if name in known and name != "background"]
    return result | ({"in_common": float(np.mean(shared)), "classes_in_common": len(shared)} if shared else {})
