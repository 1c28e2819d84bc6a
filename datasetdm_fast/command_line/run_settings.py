"""Settings of generate and label: those that follow from others, checks before anything is loaded, their run, and the
processes that make its samples.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.command_line.output import remake_sample
from datasetdm_fast.config import ATTENTION, DECODER, EXACT, LABELLER_KINDS, LABELS, PARITIES, UNDECODED
from datasetdm_fast.engine.backbones import check_source
from datasetdm_fast.engine.decoders.config import SHIPPED, find_decoders, parts_of
from datasetdm_fast.engine.labels import BACKGROUND, by_task, class_tables, kind_of
from datasetdm_fast.engine.loop.combining import parse_combinations
from datasetdm_fast.engine.loop.prompts import PromptSource, check_classes
from datasetdm_fast.engine.loop.recipe import check_numbers, check_seed, check_size, check_tasks
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.job import ATTENTION_SETTINGS
from datasetdm_fast.runs.jobs.prompt_files import listed_words, own_table, read_source
from datasetdm_fast.runs.run_folder.document import DOCUMENT, GROWING, SHARDS, most_samples, quarantines
from datasetdm_fast.runs.run_folder.goal import FLAG
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.scores import SCORERS, parse_where
from datasetdm_fast.runs.run_settings import (
    LabelConfig,
    LabelSettings,
    PromptSettings,
    RunConfig,
    RunSpec,
    WorkerSettings,
)
from datasetdm_fast.runs.workers.devices import LaunchedProcess, find_places, take_share
from datasetdm_fast.settings import EngineSettings, ModelSettings, SamplingSettings, flags_of

if TYPE_CHECKING:
    from datasetdm_fast.runs.jobs.writing import Result
    from datasetdm_fast.runs.workers.worker import Callbacks


LONGEST_NAME = 48  # letters of the readable part of a run folder's name
FIRST_WORDS = 8  # of a prompt, in that part
MOST_IN_FOLDER = 100_000  # samples of a run that is not in shards by default


def complete_settings(config: RunConfig, provided: Collection[str]) -> RunConfig:
    """The settings with the labels and the run folder that follow from others, where `provided` does not name them."""
    for name in ("prompts", "classes", "accept"):
        if name in provided and not getattr(config, name):
            raise Refused(f"--{name}: no value was given", "Drop the flag, or see --help.")
    if (config.cluster or config.store) and "layout" not in provided:
        config = replace(config, layout=SHARDS)
    config = expand_names(config, provided)
    config = config if "out" in provided else replace(config, out=name_folder(config))
    if "layout" in provided:
        return config
    if (Path(config.out) / DOCUMENT).exists():  # a run that is begun keeps its layout
        from datasetdm_fast.runs.run_folder.audit import find_sharded

        return config if find_sharded(config.out) is None else replace(config, layout=SHARDS)
    return replace(config, layout=SHARDS) if count_images(config) > MOST_IN_FOLDER else config


def expand_names(config: RunConfig, provided: Collection[str]) -> RunConfig:
    """The settings that decoders, --classes, --labeller and --parity stand for where `provided` does not name it."""
    folders = parts_of(config.decoder)
    if "task" not in provided and config.decoder not in SHIPPED and all(path.is_dir() for path in folders):
        config = replace(config, task=tuple(by_task(find_decoders(folders).labels)))
    if config.class_table:
        config = replace(config, classes=listed_words(config.class_table, config.classes))
    elif len(config.classes) == 1 and config.classes[0] in class_tables.TABLES:
        names = class_tables.builtin_table(config.classes[0]).names
        config = replace(config, classes=tuple(name for name in names if name != BACKGROUND))
    if config.labeller:
        named = ",".join(config.labeller)
        decoded = tuple(task for task in config.task if task not in UNDECODED)
        if DECODER not in config.labeller:
            if decoded and "task" in provided:
                raise Refused(
                    f"--labeller {named}: {decoded[0]} needs a decoder",
                    f"Write --labeller decoder,{named} for both, or drop --task.",
                )
            decoded = ()
        config = replace(config, task=(*decoded, *(name for name in config.labeller if name != DECODER)))
    preset = PARITIES.get(config.parity, {})
    return replace(config, **{name: value for name, value in preset.items() if name not in provided})


def name_folder(config: RunConfig) -> str:
    """A run folder named after what differs from the demo run.

    Settings that a finished run can grow by are left out, so that the longer line finds it again; of prompts, the file
    counts and not its content.
    """
    decisive = {flag.name: flag.default for flag in flags_of(RunConfig) if flag.metadata["identity"]}
    changed = {name: getattr(config, name) for name in decisive if name not in GROWING or name == "prompts"}
    changed = {name: value for name, value in changed.items() if value != decisive[name]}
    if not changed:
        return config.out
    words = config.prompts.split()
    named = [Path(config.prompts).stem] if len(words) == 1 else words[:FIRST_WORDS]
    named += config.classes[:FIRST_WORDS]
    named += [Path(value).stem for value in (config.model, *config.decoder.split(",")) if value != "demo"]
    readable = re.sub(r"[^a-z0-9]+", "-", " ".join(named or changed).lower())[:LONGEST_NAME].strip("-")
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6]
    return f"runs/{readable or 'run'}-{digest}"


def check_settings(config: RunConfig) -> None:
    """Refuses what can be seen to be wrong before anything is loaded."""
    if config.layout != SHARDS:
        if config.store:
            raise Refused(f"--store {config.store}: only a run in shards is written there", "Drop --layout folder.")
        if config.shard_size != RunConfig.shard_size:
            raise Refused(f"--shard-size {config.shard_size}: the run is not in shards", "Add --layout shards.")
        if config.cluster:
            raise Refused(f"--cluster {config.cluster}: a cluster makes runs in shards", "Drop --layout folder.")
    check_tasks(config.task, LABELS)
    writing: dict[str, str] = {}  # a file, or a layer of the gallery -> the label that writes it
    for label in config.task:
        kind = kind_of(label)
        files = [*(f"{role}/ID.png" for role in kind.roles), *filter(None, [kind.coco_file])]
        for name in (*files, *(f"the gallery's layer {layer.name}" for layer in kind.layers)):
            if (other := writing.setdefault(name.lower(), label)) != label:  # some file systems know no capitals
                raise Refused(f"--task: {other} and {label} both write {name}", "Make a run of each.")
    if config.outlines != RunConfig.outlines and set(config.task) <= set(UNDECODED):
        raise Refused(f"--outlines {config.outlines}: no label of this run is made by a decoder", "Drop it.")
    if ATTENTION in config.task and not config.classes and not config.prompts:
        raise Refused("--labeller attention: there are no class words to look for", "Name them: --classes ball,cube")
    for name in () if ATTENTION in config.task else ATTENTION_SETTINGS:
        if getattr(config, name) != getattr(RunConfig, name):
            flag = name.replace("_", "-")
            raise Refused(f"--{flag}: no label of this run is read from attention", "Add --labeller attention.")
    if config.combine:
        parse_combinations(config.combine, config.task)
    if config.accept:
        parse_where(config.accept, tuple(SCORERS), FLAG)
    if config.most_tries != RunConfig.most_tries and not quarantines(config.identity()):
        raise Refused(
            f"--most-tries {config.most_tries}: it has no effect, as no sample is quarantined",
            "Add --accept COND or --keep trusted.",
        )
    check_size(config.size)
    names = ("guidance", "steps", "streams", *(name for name in ATTENTION_SETTINGS if name != "parity"))
    check_numbers(**{name: getattr(config, name) for name in (*names, "threads")})
    check_seed(config.seed, most_samples(config.identity(), count_images(config)))


def count_images(config: RunConfig) -> int:
    return config.per_class * len(config.classes) or config.number


def read_spec(config: RunConfig, source: PromptSource | None = None) -> RunSpec:
    """The run that the settings describe, checked, its prompts read; `source` has prompts that no file has."""
    check_settings(config)
    prompts = config.group(PromptSettings)
    try:
        source = source or read_source(prompts, has_captions=config.model in SHIPPED)
    except Refused:  # unless the model is not there, for which prompts are made
        if not config.cluster:
            check_source(config.model, config.allow_download)
        raise
    # of prompts there is the digest, so that their file may move
    return _spec(config, source, prompts=f"sha256:{source.digest}", number=count_images(config))


def label_spec(config: LabelConfig) -> RunSpec:
    """The run of label that the settings describe, checked; its prompts are made of captions later."""
    check_settings(config)
    table = own_table(config.class_table) if config.class_table else None
    return _spec(config, PromptSource((), "--classes", check_classes(config.classes), 0, table=table))


def _spec(config: RunConfig, source: PromptSource, **stored: Any) -> RunSpec:
    """The run of these settings; `stored` is what run.json holds in place of some of them."""
    identity = config.identity() | stored
    if source.table is not None:
        identity["class_table"] = class_tables.digest_of(source.table, config.classes)
    return RunSpec(
        Path(config.out),
        identity,
        count_images(config),
        source,
        config.group(PromptSettings),
        config.group(ModelSettings),
        config.group(EngineSettings),
        config.group(SamplingSettings),
        config.group(LabelSettings),
        config.batch_size,
        config.limit,
        config.mixed != "no",
        force_domain=config.force_domain,
    )


def check_judged(config: RunConfig, is_begun: bool) -> None:
    """Refuses flags that have one process judge samples first."""
    several = "several machines or processes that were started together make this run"
    if config.verify:
        raise Refused(
            f"--verify {config.verify}: {several}",
            "Run the command once alone with --limit 1, then start them without --verify: run.json keeps the verdict.",
        )
    if config.speed != EXACT and not is_begun:
        raise Refused(
            f"--speed {config.speed}: {several}, and one must judge its labels first",
            "Run the command once alone with --limit 1: run.json keeps the verdict.",
        )


def remake_from(config: RunConfig, provided: Collection[str]) -> int:
    """The exit code of `generate --only`, which makes one sample of the run again."""
    from datasetdm_fast.runs.jobs.remake import find_remake_row, prepare_remake

    place = config.store or config.out
    run, row = find_remake_row(place, config.only)
    check_settings(config)
    restored = restore_settings(config, provided, run.document, row)
    groups = map(restored.group, (ModelSettings, EngineSettings, SamplingSettings, LabelSettings))
    return remake_sample(config, place, config.only, prepare_remake(run, row, *groups, restored.classes))


def restore_settings(config: RunConfig, provided: Collection[str], stored: Mapping[str, Any], row: Row) -> RunConfig:
    """The settings that a run folder was started with, for a sample to be made again; `provided` ones must agree."""
    from datasetdm_fast.runs.jobs.remake import check_provided

    relocated = {"model", "decoder"} & set(provided)  # their digests decide whether they are equal
    settings = {name: value for name, value in stored["config"].items() if name not in {"prompts", *relocated}}
    restored = replace(config, **{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
    engine = row.recipe.get("engine")
    if engine is not None and engine in [entry["engine"] for entry in stored.get("mixed", ())]:
        restored = replace(restored, engine=engine["engine"], dtype=engine["dtype"], compile="compiled" in engine)
    changed = {
        name: value
        for name, value in config.identity().items()
        if name in set(provided) - {"prompts"} and getattr(config, name) != getattr(restored, name)
    }
    check_provided(config.store or config.out, stored["config"], changed)
    return restored


def without_whole_labels(config: LabelConfig, provided: Collection[str]) -> LabelConfig:
    """The settings with only the labels that can be read from tiles, where `provided` names none."""
    if not config.tiles:
        return config
    whole = [task for task in config.task if task in LABELLER_KINDS.others or not kind_of(task).can_be_tiled]
    if not whole:
        return config
    if "task" in provided or whole[0] in LABELLER_KINDS.others:
        raise Refused(
            f"--tiles: {whole[0]} needs the whole picture, and a tile shows only a part of it",
            "Leave it out of --task and --labeller, or drop --tiles.",
        )
    return replace(config, task=tuple(task for task in config.task if task not in whole))


def choose_launch(
    spec: RunSpec, workers: WorkerSettings, peer: LaunchedProcess | None
) -> tuple[RunSpec, Callable[[RunSpec, Callbacks], Result] | None]:
    """The run with the threads that each process has, and what makes its samples in several processes, as flags and
    environment ask for; None where this one makes them.
    """
    device, threads = spec.engine.device, spec.engine.threads
    if peer:
        from datasetdm_fast.runs.workers.launched import run_launched

        threads = take_share(peer, workers, device, threads)
        spec = replace(spec, engine=replace(spec.engine, threads=threads))
        return spec, partial(run_launched, peer)
    if places := find_places(workers, device, threads):
        from datasetdm_fast.runs.workers.spawn import run_spawned

        return spec, partial(run_spawned, places)
    return spec, None
