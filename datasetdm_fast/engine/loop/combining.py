"""Labels of a sample masked by another of them: `--combine "deepfashion within open-vocabulary:person"`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasetdm_fast.data import Annotation
from datasetdm_fast.engine.labels import LabelName, kind_of
from datasetdm_fast.errors import Refused, nearest

FORM = re.compile(r"(?P<label>\S+) within (?P<mask>\S+?):(?P<word>[^:]+)")
EXAMPLE = 'Write for example --combine "semantic within instance:person".'


@dataclass(frozen=True)
class Combination:
    """A label that holds only where another label shows a class."""

    label: str
    mask: str
    word: str


def parse_combinations(texts: Iterable[str], labels: Sequence[str]) -> tuple[Combination, ...]:
    """The combinations of --combine; a label of the run is named as in --task, or by the name of its decoder alone."""
    combinations: list[Combination] = []
    for text in texts:
        parts = FORM.fullmatch(text)
        if parts is None:
            raise Refused(f"--combine {text!r}: expected LABEL within LABEL:CLASS", EXAMPLE)
        label, mask = (_label(text, parts[name], labels) for name in ("label", "mask"))
        if not kind_of(label).can_be_masked or not kind_of(mask).can_mask:
            other = mask if kind_of(label).can_be_masked else label
            raise Refused(f"--combine {text!r}: {other} has no classes", EXAMPLE)
        if label in (each.label for each in combinations):
            raise Refused(f"--combine: {label} is combined twice", "Combine each label once.")
        combinations.append(Combination(label, mask, parts["word"].strip()))
    return tuple(combinations)


def _label(text: str, name: str, labels: Sequence[str]) -> str:
    if name in labels:
        return name
    decoders = [LabelName.parse(label).decoder for label in labels]
    if decoders.count(name) == 1:
        return labels[decoders.index(name)]
    known = [*labels, *filter(None, decoders)]
    raise Refused(
        f"--combine {text!r}: {name} is not a label of this run{nearest(name, known)}", f"It makes {', '.join(labels)}."
    )


def check_mask_words(combinations: Iterable[Combination], tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses classes that their labels cannot show; `tables` are those of run.json."""
    for each in combinations:
        if each.word not in (known := tables[each.mask]["classes"]):
            raise Refused(
                f"--combine: {each.mask} has no class {each.word!r}{nearest(each.word, known)}",
                f"It has {', '.join(known)}.",
            )


def apply_combinations(labels: Mapping[str, Annotation], combinations: Iterable[Combination]) -> dict[str, Annotation]:
    """The labels of a sample, each masked by what the others were before."""
    masked = {
        each.label: kind_of(each.label).within(
            labels[each.label], *kind_of(each.mask).mask_of(labels[each.mask], each.word)
        )
        for each in combinations
    }
    return {**labels, **masked}
