"""Which class words a text names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

IRREGULAR = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "knife": "knives",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "woman": "women",
}


def find_classes(prompt: str, classes: Sequence[str]) -> tuple[str, ...]:
    """The classes a prompt names as whole words, in the order of `classes`; simple plurals count."""
    return tuple(word for word in classes if _pattern(word).search(prompt))


@cache
def _pattern(word: str) -> re.Pattern[str]:
    *before, last = word.split()
    forms = {last, last + "s", last + "es", IRREGULAR.get(last.lower(), last)}
    if re.search(r"[^aeiou]y$", last):
        forms.add(last[:-1] + "ies")
    start = "".join(re.escape(part) + r"[\s_-]+" for part in before)
    ending = "|".join(re.escape(form) for form in sorted(forms))
    return re.compile(rf"(?<!\w){start}(?:{ending})(?!\w)", re.IGNORECASE)


def always_named(classes: Sequence[str], seen: Sequence[tuple[Sequence[str], str]]) -> tuple[str, ...]:
    """Of `classes`, those named by the caption of every picture that shows them; `seen` pairs classes and captions."""
    unsaid = {name for shown, caption in seen for name in set(shown) - set(find_classes(caption, shown))}
    return tuple(name for name in classes if name not in unsaid)
