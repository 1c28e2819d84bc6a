"""The settings of a run, checked without loading anything."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from operator import index
from typing import Any

from datasetdm_fast.config import (
    ATTENTION,
    DECODER,
    ENGINE_NAMES,
    FLAVOURS,
    LABELS,
    OUTLINES,
    PARITIES,
    PROFILES,
    PROVIDERS,
    SAMPLERS,
    SEEDS,
    TASKS,
    UNDECODED,
    RunConfig,
    listed,
)
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs import prompts
from datasetdm_fast.engine.loop.combining import parse_combinations
from datasetdm_fast.engine.labels import class_tables, kind_of
from datasetdm_fast.engine.labels.names import LabelName
from datasetdm_fast.engine.labels.semantic import BACKGROUND
from datasetdm_fast.runs.run_folder.acceptance import check_accept
from datasetdm_fast.runs.run_folder.document import most_samples, sets_aside
from datasetdm_fast.engine.labels.class_file import listed_words

LEAST_SETTINGS = {
    "number": 1,
    "per_class": 0,
    "most_tries": 1,
    "seed": 0,
    "steps": 0,
    "guidance": 0,
    "batch_size": 0,
    "limit": 0,
    "verify": 0,
    "verify_every": 0,
    "threads": 0,
    "streams": 0,
    "ranks": 0,
    "exponent": -1,
    "threshold": 0,
    "uncertainty": 0,
    "self_cells": 0,
    "cross_cells": 0,
}
LARGEST_SIDE = 4096  # pixels
LARGEST_BATCH = 4096
MOST_MINUTES = 1_000_000  # of a setting; two years


CHOICES: dict[str, Sequence[str]] = {
    "engine": ENGINE_NAMES,
    "sampler": SAMPLERS.names,
    "profile": PROFILES,
    "image_format": ("png", "jpg"),
    "resume": ("auto", "never"),
    "mixed": ("verified", "no"),
    "keep": ("all", "trusted"),
    "ignore": ("nothing", "disagreeing"),
    "ask": ("named", "all"),
    "parity": ("", *PARITIES),
    "outlines": ("auto", *OUTLINES),
    "provider": PROVIDERS,
    "trt_flavour": FLAVOURS,
}


def check_settings(config: RunConfig) -> None:
    """Refuses what can be seen to be wrong before anything is loaded."""
    check_choices(**{name: getattr(config, name) for name in CHOICES})
    check_tasks(config.task, LABELS)
    check_files(config.task)
    check_attention(config)
    parse_combinations(config.combine, config.task)
    check_accept(config.accept)
    if config.most_tries != RunConfig.most_tries and not sets_aside(config.identity()):
        raise Refused(
            f"--most-tries {config.most_tries}: it has no effect, as no sample is set aside",
            "Add --accept COND or --keep trusted.",
        )
    check_size(config.size)
    check_numbers(**{name: getattr(config, name) for name in LEAST_SETTINGS})
    check_batch_size(config.batch_size)
    check_seed(config.seed, most_samples(config.identity(), count_images(config)))
    if not 0 <= config.ignore_below <= 1:
        raise Refused(f"--ignore-below {config.ignore_below}: expected a number from 0 to 1", "Choose another number.")
    if not 0 <= config.page_every <= MOST_MINUTES:
        raise Refused(
            f"--page-every {config.page_every}: expected minutes from 0 to {MOST_MINUTES}", "Choose another number."
        )
    if config.verify_anyway and not config.verify:
        raise Refused("--verify-anyway: nothing is compared", "Add --verify N, or drop it.")


def each_of(name: str, given: Any, expected: str) -> Iterable[Any]:
    """What a caller of the library gave where several are expected; refused where it cannot be iterated over."""
    try:
        iter(given)
    except TypeError:
        is_several = False
    else:
        is_several = not isinstance(given, bytes)
    if not is_several:
        raise Refused(f"{name}: {given!r} was given, expected {expected}", f"Give {expected}.")
    return given


def texts_of(name: str, given: str | Iterable[str]) -> Iterable[str]:
    """The texts of such a caller, who may also give one alone."""
    return [given] if isinstance(given, str) else each_of(name, given, "a text or several texts")


def check_size(size: int) -> None:
    is_whole = isinstance(size, Integral)
    if not is_whole or size % 64 or not 0 <= size <= LARGEST_SIDE:
        near = min(max(round(size / 64), 1) * 64, LARGEST_SIDE) if is_whole else 512
        raise Refused(
            f"--size {_shown(size)}: expected a multiple of 64 up to {LARGEST_SIDE}",
            f"Try --size {near}; 0 takes what the model was made for.",
        )


def check_choices(**values: str) -> None:
    """Refuses a setting that is none of its CHOICES."""
    for name, value in values.items():
        if value not in CHOICES[name]:
            raise Refused(f"{_flag(name)} {value}: not one of {', '.join(CHOICES[name])}", "Choose one of these.")


def check_numbers(**values: float) -> None:
    """Refuses a setting that is no number, or below its least value in LEAST_SETTINGS."""
    for name, value in values.items():
        kind, form = (Integral, "whole number") if isinstance(getattr(RunConfig, name), int) else (Real, "number")
        if not (isinstance(value, kind) and math.isfinite(value) and value >= LEAST_SETTINGS[name]):
            raise Refused(
                f"{_flag(name)} {_shown(value)}: expected a {form} of {LEAST_SETTINGS[name]} or more",
                "Choose another number.",
            )


def check_batch_size(batch_size: int) -> None:
    check_numbers(batch_size=batch_size)
    if batch_size > LARGEST_BATCH:
        raise Refused(f"--batch-size {batch_size}: expected at most {LARGEST_BATCH}", "Choose what fits into memory.")


def check_seed(seed: int, number: int = 1) -> int:
    """The seed as a plain number, where a generator and the ledger can hold it and those of the images after it."""
    try:
        whole = index(seed)  # also of numpy and torch
    except TypeError:
        whole = -1
    if not 0 <= whole <= SEEDS - number:
        raise Refused(
            f"--seed {_shown(seed)}: expected a whole number from 0 to {SEEDS - number}",
            "Choose another seed.",
        )
    return whole


def spelled_out(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The settings with what --classes, --labeller and --parity stand for, where `given` does not name it."""
    if config.class_table:
        config = replace(config, classes=listed_words(config.class_table, config.classes))
    elif len(config.classes) == 1 and config.classes[0] in class_tables.TABLES:
        names = class_tables.table(config.classes[0]).names
        config = replace(config, classes=tuple(name for name in names if name != BACKGROUND))
    if config.labeller:
        named = ",".join(config.labeller)
        decoded = tuple(task for task in config.task if task not in UNDECODED)
        if DECODER not in config.labeller:
            if decoded and "task" in given:
                raise Refused(
                    f"--labeller {named}: {decoded[0]} needs a decoder",
                    f"Write --labeller decoder,{named} for both, or drop --task.",
                )
            decoded = ()
        config = replace(config, task=(*decoded, *(name for name in config.labeller if name != DECODER)))
    preset = PARITIES.get(config.parity, {})
    return replace(config, **{name: value for name, value in preset.items() if name not in given})


def check_attention(config: RunConfig) -> None:
    """Refuses labels from attention without words to look for, and settings of labels that the run does not make."""
    if config.outlines != RunConfig.outlines and set(config.task) <= set(UNDECODED):
        raise Refused(f"--outlines {config.outlines}: no label of this run is made by a decoder", "Drop it.")
    if ATTENTION not in config.task:
        for name in ("exponent", "threshold", "uncertainty", "self_cells", "cross_cells", "parity"):
            if getattr(config, name) != getattr(RunConfig, name):
                raise Refused(
                    f"{_flag(name)}: no label of this run is read from attention", "Add --labeller attention."
                )
        return
    if not config.classes and not config.prompts:
        raise Refused("--labeller attention: there are no class words to look for", "Name them: --classes ball,cube")


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


def check_files(labels: Sequence[str]) -> None:
    """Refuses labels that would write the same files; code of another package that does not load is named here, before
    networks are loaded.
    """
    writing: dict[str, str] = {}
    for label in labels:
        for role in kind_of(label).roles:
            if (other := writing.setdefault(role, label)) != label:
                raise Refused(f"--task: {other} and {label} both write {role}/ID.png", "Make a run of each.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: object) -> str:
    """A value that is no number, such as the text '3', as its caller wrote it."""
    return repr(value) if isinstance(value, str) else str(value)


def count_images(config: RunConfig) -> int:
    return config.per_class * len(config.classes) or config.number


def identity(config: RunConfig, source: prompts.PromptSource) -> dict[str, Any]:
    """The settings that decide the data set's bytes; prompts by their digest, so that the file may move."""
    values = listed(config.identity())
    if source.table is not None:
        values["class_table"] = class_tables.digest_of(source.table, config.classes)
    return values | {"prompts": f"sha256:{source.digest}", "number": count_images(config)}
