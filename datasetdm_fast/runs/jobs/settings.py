"""The settings of a run, checked without loading anything."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from datasetdm_fast.config import ATTENTION, DECODER, LABELS, PARITIES, UNDECODED
from datasetdm_fast.engine.labels import class_tables, kind_of
from datasetdm_fast.engine.labels.semantic import BACKGROUND
from datasetdm_fast.engine.loop import prompts
from datasetdm_fast.engine.loop.checks import (
    CHOICES,
    LEAST_SETTINGS,
    check_batch_size,
    check_choices,
    check_numbers,
    check_seed,
    check_size,
    check_tasks,
)
from datasetdm_fast.engine.loop.combining import parse_combinations
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.class_file import listed_words
from datasetdm_fast.runs.run_folder.acceptance import check_accept
from datasetdm_fast.runs.run_folder.document import most_samples, sets_aside
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.settings import json_values

MOST_MINUTES = 1_000_000  # of a setting; two years


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


def spelled_out(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The settings with what --classes, --labeller and --parity stand for, where `given` does not name it."""
    if config.class_table:
        config = replace(config, classes=listed_words(config.class_table, config.classes))
    elif len(config.classes) == 1 and config.classes[0] in class_tables.TABLES:
        names = class_tables.builtin_table(config.classes[0]).names
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
                    f"--{name.replace('_', '-')}: no label of this run is read from attention",
                    "Add --labeller attention.",
                )
        return
    if not config.classes and not config.prompts:
        raise Refused("--labeller attention: there are no class words to look for", "Name them: --classes ball,cube")


def check_files(labels: Sequence[str]) -> None:
    """Refuses labels that would write the same files; code of another package that does not load is named here, before
    networks are loaded.
    """
    writing: dict[str, str] = {}
    for label in labels:
        for role in kind_of(label).roles:
            if (other := writing.setdefault(role, label)) != label:
                raise Refused(f"--task: {other} and {label} both write {role}/ID.png", "Make a run of each.")


def count_images(config: RunConfig) -> int:
    return config.per_class * len(config.classes) or config.number


def identity(config: RunConfig, source: prompts.PromptSource) -> dict[str, Any]:
    """The settings that decide the data set's bytes; prompts by their digest, so that the file may move."""
    values = json_values(config.identity())
    if source.table is not None:
        values["class_table"] = class_tables.digest_of(source.table, config.classes)
    return values | {"prompts": f"sha256:{source.digest}", "number": count_images(config)}
