"""Which classes a caption names, and what that rules out in a decoder's answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from datasetdm_fast.decoders.config import DecoderConfig
from datasetdm_fast.tasks.open_vocabulary import OBJECT

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


def held_to(
    raw: dict[str, Tensor], config: DecoderConfig, prompts: Sequence[str], words: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The raw answers with the classes of `config.named` that prompt b does not name ruled out for image b; of `words`,
    all it does not name.

    A prompt that names none of them says nothing about what is to be seen, and rules nothing out.
    """
    if not config.named:
        return raw
    logits = raw["pred_logits"]
    is_open = config.kind == "open-vocabulary"
    ruled_out = torch.zeros(len(prompts), len(words) if is_open else len(config.classes), dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        asked = words if is_open else config.named
        if there := find_classes(prompt, asked):
            absent = set(asked) - set(there)
            ruled_out[b] = torch.tensor([name in absent for name in (words if is_open else config.classes)])
    ruled_out = ruled_out.to(logits.device)
    if is_open:
        held = logits.clone()
        held[..., OBJECT].masked_fill_(ruled_out[:, :, None], float("-inf"))
    else:
        held = torch.cat([logits[..., :-1].masked_fill(ruled_out[:, None], float("-inf")), logits[..., -1:]], -1)
    return {**raw, "pred_logits": held}


def always_named(classes: Sequence[str], seen: Sequence[tuple[Sequence[str], str]]) -> tuple[str, ...]:
    """Of `classes`, those that the captions of all pictures that show them name; `seen` is what each picture shows, and
    its caption.
    """
    unsaid = {name for shown, caption in seen for name in set(shown) - set(find_classes(caption, shown))}
    return tuple(name for name in classes if name not in unsaid)
