"""Settings of an engine, a sampler and its labels, checked without loading anything."""

import sys
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from operator import index
from typing import Any

from datasetdm_fast.config import OUTLINES, PARITIES, PROVIDERS, SEEDS, TASKS
from datasetdm_fast.engine.labels import LabelName
from datasetdm_fast.errors import Refused

LEAST_SETTINGS: dict[str, float] = {  # a whole number where the least value is one
    **dict.fromkeys(("seed", "steps", "batch_size", "threads", "streams", "self_cells", "cross_cells"), 0),
    **dict.fromkeys(("guidance", "threshold", "uncertainty"), 0.0),
    "exponent": -1,
}
LARGEST_GUIDANCE = 1000  # far above any that is of use; numbers of an image would leave fp16, at last fp32
LARGEST_SIDE = 4096  # pixels
LARGEST_BATCH = 4096
CHOICES: dict[str, Sequence[str]] = {
    "ignore": ("nothing", "disagreeing"),
    "ask": ("named", "all"),
    "parity": ("", *PARITIES),
    "outlines": ("auto", *OUTLINES),
    "provider": PROVIDERS,
}


def check_iterable(name: str, value: Any, expected: str) -> Any:
    """An argument of the library that must be iterable; refused if it is not."""
    try:
        iter(value)
    except TypeError:
        is_several = False
    else:
        is_several = not isinstance(value, bytes)
    if not is_several:
        raise Refused(f"{name}: {value!r} was given, expected {expected}", f"Give {expected}.")
    return value


def as_texts(name: str, texts: str | Iterable[str]) -> Iterable[str]:
    """Texts of a caller of the library, who may also pass one alone."""
    return [texts] if isinstance(texts, str) else check_iterable(name, texts, "a text or several texts")


def check_size(size: int) -> None:
    is_whole = isinstance(size, Integral)
    if not is_whole or size % 64 or not 0 <= size <= LARGEST_SIDE:
        near = min(max(round(size / 64), 1) * 64, LARGEST_SIDE) if is_whole else 512
        raise Refused(
            f"--size {_quote(size)}: expected a multiple of 64 up to {LARGEST_SIDE}",
            f"Try --size {near}; 0 takes what the model was made for.",
        )


def check_choices(**values: str) -> None:
    """Refuses a setting that is none of its CHOICES."""
    for name, value in values.items():
        if value not in CHOICES[name]:
            raise Refused(f"{_flag(name)} {value}: not one of {', '.join(CHOICES[name])}", "Choose one of these.")


def check_numbers(**values: float) -> None:
    """Refuses a setting that is no number, below its least value in LEAST_SETTINGS, or too large."""
    for name, value in values.items():
        kind, form = (Integral, "whole number") if isinstance(LEAST_SETTINGS[name], int) else (Real, "number")
        least, most = LEAST_SETTINGS[name], LARGEST_GUIDANCE if name == "guidance" else sys.float_info.max
        if not (isinstance(value, kind) and least <= value <= most):
            bounds = f"from {least:g} to {most}" if name == "guidance" else f"of {least} or more"
            raise Refused(f"{_flag(name)} {_quote(value)}: expected a {form} {bounds}", "Choose another number.")


def check_batch_size(batch_size: int) -> None:
    check_numbers(batch_size=batch_size)
    if batch_size > LARGEST_BATCH:
        raise Refused(f"--batch-size {batch_size}: expected at most {LARGEST_BATCH}", "Choose what fits into memory.")


def check_seed(seed: int, number: int = 1) -> int:
    """The seed as a plain number, where a generator and the ledger can hold it and those of the images after it."""
    if number > SEEDS:
        raise Refused(f"--number {number}: there are {SEEDS} seeds", "Choose another number.")
    try:
        whole = index(seed)  # also of numpy and torch
    except TypeError:
        whole = -1
    if not 0 <= whole <= SEEDS - number:
        raise Refused(
            f"--seed {_quote(seed)}: expected a whole number from 0 to {SEEDS - number}", "Choose another seed."
        )
    return whole


def check_tasks(tasks: Sequence[str], known: Sequence[str] = TASKS) -> None:
    """Refuses what is no list of labels, each TASK or TASK:NAME."""
    if not tasks:
        raise Refused("--task: names no task", f"Choose from {', '.join(known)}.")
    for task in tasks:
        try:
            if LabelName.parse(task).task not in known:
                raise ValueError(f"not one of {', '.join(known)}")
        except ValueError as error:
            raise Refused(f"--task {task}: {error}", f"Choose from {', '.join(known)}, or TASK:NAME.") from error
    if len({task.lower() for task in tasks}) < len(tasks):  # some file systems know no capitals
        raise Refused(f"--task {','.join(tasks)}: a label is named twice", "Name each label once.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _quote(value: object) -> str:
    """A value that is no number, such as the text '3', as its caller wrote it."""
    return repr(value) if isinstance(value, str) else str(value)
