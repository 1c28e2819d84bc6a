"""A run before its first byte: settings checked, networks loaded, plan and recipe made, run folder compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast import __version__, prompts
from datasetdm_fast.config import ENGINES, PROFILES, SAMPLERS, TASKS, RunConfig
from datasetdm_fast.data import Batch
from datasetdm_fast.disk import storage
from datasetdm_fast.driver import Recipe, Result, result_of
from datasetdm_fast.engines.opening import open_engine
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.run_folder.document import FORMAT, LEDGER, check_same, differences, read_document
from datasetdm_fast.run_folder.folder import RunFolder
from datasetdm_fast.run_folder.ledger import SET_ASIDE, Ledger, Row
from datasetdm_fast.run_folder.seal import is_indexed

if TYPE_CHECKING:
    from datasetdm_fast.engines.engine import Engine
    from datasetdm_fast.sampling.schedule import Schedule

LEAST = {"number": 1, "per_class": 0, "seed": 0, "steps": 0, "guidance": 0, "batch_size": 0, "limit": 0, "threads": 0, "ranks": 0}
LARGEST_SIDE = 4096  # pixels
LARGEST_BATCH = 4096
SPARE = 64 * 2**20  # bytes a run leaves free for ledger, index files and other programs
_NO_PROMPTS = prompts.Source((), "", (), 0)
PIXEL_BYTES = {"semantic": 2, "instance": 0.5, "depth": 3, "pose": 0, "open-vocabulary": 1}  # files of one task, worst case seen


def check_settings(config: RunConfig) -> None:
    """Refuses what can be seen to be wrong before anything is loaded."""
    for name, known in (("engine", ENGINES), ("sampler", SAMPLERS), ("profile", PROFILES), ("image_format", ("png", "jpg")), ("resume", ("auto", "never"))):
        if getattr(config, name) not in known:
            raise Refused(f"{_flag(name)} {getattr(config, name)}: not one of {', '.join(known)}", "Choose one of these.")
    check_tasks(config.task)
    check_size(config.size)
    check_numbers(**{name: getattr(config, name) for name in LEAST})
    if config.batch_size > LARGEST_BATCH:
        raise Refused(f"--batch-size {config.batch_size}: expected at most {LARGEST_BATCH}", "Choose what fits into memory.")
    check_seed(config.seed + count_images(config) - 1)


def check_size(size: int) -> None:
    if size % 64 or not 0 <= size <= LARGEST_SIDE:
        near = min(max(round(size / 64), 1) * 64, LARGEST_SIDE)
        raise Refused(f"--size {size}: expected a multiple of 64 up to {LARGEST_SIDE}", f"Try --size {near}; 0 takes what the model was made for.")


def check_numbers(**values: float) -> None:
    """Refuses a setting below its least value in LEAST."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= LEAST[name]):
            raise Refused(f"{_flag(name)} {value}: expected a number of {LEAST[name]} or more", "Choose another number.")


def check_seed(seed: int) -> int:
    """The seed itself, where a generator and the ledger can hold it."""
    if not 0 <= seed < 2**63:
        raise Refused(f"--seed {seed}: expected 0 to {2**63 - 1}, that of the last image included", "Choose another seed.")
    return seed


def check_tasks(tasks: Sequence[str]) -> None:
    if not tasks:
        raise Refused("--task: names no task", f"Choose from {', '.join(TASKS)}.")
    for task in tasks:
        if task not in TASKS:
            raise Refused(f"--task {task}: not one of {', '.join(TASKS)}", "Choose from these.")
    if len(set(tasks)) < len(tasks):
        raise Refused(f"--task {','.join(tasks)}: a task is named twice", "Name each task once.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def count_images(config: RunConfig) -> int:
    return config.per_class * len(config.classes) or config.number


def identity(config: RunConfig, source: prompts.Source) -> dict[str, Any]:
    """The settings that decide the data set's bytes; prompts by their digest, so that the file may move."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in config.identity().items()}
    return values | {"prompts": f"sha256:{source.digest}", "number": count_images(config)}


def make_recipe(
    engine: Engine, tasks: Sequence[str], *, sampler: str = "pndm", steps: int = 0, guidance: float = 0.0, profile: str = "0.3.0", classes: Sequence[str] = ()
) -> Recipe:
    """The recipe of a run; zeros stand for what the model was made for."""
    from datasetdm_fast.sampling import make_schedule

    model = engine.model
    schedule = make_schedule(model.scheduler, sampler, steps or model.defaults.steps, profile)
    words = open_vocabulary_words(engine, classes) if "open-vocabulary" in tasks else ()
    call = capture_call(schedule, {task: engine.decoders[task].config.capture_timestep for task in tasks})
    facts = {
        "sampler": sampler,
        "profile": profile,
        "steps": steps or model.defaults.steps,
        "calls": len(schedule),
        "guidance": guidance or model.defaults.guidance,
        "size": model.size,
        "capture_timestep": schedule.timesteps[call],
    }
    return Recipe(schedule, facts["guidance"], model.size, tuple(tasks), call, words, facts)


def open_vocabulary_words(engine: Engine, classes: Sequence[str]) -> tuple[str, ...]:
    words = tuple(classes) or tuple(engine.decoders["open-vocabulary"].config.classes)
    if not words:
        raise Refused("--task open-vocabulary: no class words were given, and its decoder names none", "Add --classes ball,cube.")
    if len(words) > 254:
        raise Refused(f"--classes: {len(words)} words, an 8-bit label map holds 254", "Make several runs.")
    prompts.check_class_lengths(words, engine.model.tokenizer)
    return words


def capture_call(schedule: Schedule, wanted: Mapping[str, int | None]) -> int:
    """The call every decoder of the run reads: the last, or the one nearest the timestep they were trained at."""
    last = len(schedule) - 1
    calls = {
        task: last if timestep is None else min(range(last + 1), key=lambda k: (abs(schedule.timesteps[k] - timestep), -k)) for task, timestep in wanted.items()
    }
    if len(set(calls.values())) > 1:
        told = ", ".join(f"{task} at timestep {schedule.timesteps[call]}" for task, call in calls.items())
        raise Refused(f"--task: the decoders read different sampler calls ({told}), and one run has one capture", "Make one run for each.")
    return next(iter(calls.values()), last)


def label_tables(engine: Engine, recipe: Recipe) -> dict[str, Any]:
    """Names and ranges a reader of the labels needs."""
    tables: dict[str, Any] = {}
    for task in recipe.tasks:
        config = engine.decoders[task].config
        tables[task] = {
            "semantic": lambda c=config: {"classes": list(c.classes), "ignore": 255},
            "instance": lambda c=config: {"classes": list(c.classes), "size": [recipe.size, recipe.size]},
            "depth": lambda c=config: {"max_depth": c.max_depth, "unit": "millimetre"},
            "pose": lambda c=config: {"joints": list(c.joints), "limbs": [list(limb) for limb in c.limbs]},
            "open-vocabulary": lambda: {"classes": ["background", *recipe.words]},
        }[task]()
    return tables


def class_words(engine: Engine, tasks: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """The words looked for in prompts: those given, else the names the decoders know."""
    known = dict.fromkeys(name for task in tasks for name in engine.decoders[task].config.classes)
    if classes and known and "open-vocabulary" not in tasks:
        for word in classes:
            if word not in known:
                raise Refused(
                    f"--classes: no decoder of this run knows {word!r}, they know {', '.join(known)}",
                    "Choose from these, or add --task open-vocabulary, which takes any word.",
                )
    return tuple(classes) or tuple(known)


@dataclass(frozen=True)
class Job:
    """A run that has been checked in full and has written nothing yet."""

    config: RunConfig
    plan: prompts.Plan
    engine: Engine
    recipe: Recipe
    document: dict[str, Any]  # run.json
    done: int  # samples the run folder already holds

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def bytes_needed(self) -> int:
        """An upper estimate of what is still to be written."""
        pixels = self.recipe.size**2
        one = pixels * (3 + sum(PIXEL_BYTES[task] for task in self.recipe.tasks)) + 8192 * (2 + len(self.recipe.tasks))
        return int(one * (self.plan.number - self.done)) + SPARE


def finished(config: RunConfig, *, is_alone: bool = True) -> Result | None:
    """The result of a run that has nothing left to do, found without loading any network; refuses a folder of another configuration.

    Index files that are not up to date are rebuilt here, unless other processes may be about to do it.
    """
    check_settings(config)
    source, folder = prompts.read_source(config), Path(config.out)
    stored = read_document(folder)
    if stored is None:
        return None
    check_same(folder, stored, {"config": identity(config, source)})
    if config.resume == "never":
        raise Refused(f"{folder}: the run folder exists, and --resume never asks for a new one", "Choose another --out, or drop --resume never.")
    if not (folder / LEDGER).exists():
        return None
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        result = result_of(folder, count_images(config), ledger)
        # A process that was killed while it closed the ledger leaves SQLite's own files beside it.
        is_fresh = is_indexed(folder, stored, ledger) and not any((folder / f"{LEDGER}{kind}").exists() for kind in ("-wal", "-shm"))
    if not result.is_complete:
        return None
    if not is_fresh and not is_alone:
        return None
    if not is_fresh and not config.dry_run:
        with RunFolder(folder, stored) as opened:
            opened.rebuild()
    return result


def prepare(config: RunConfig) -> Job:
    """The job of a configuration: everything is loaded and checked, nothing is written."""
    check_settings(config)
    stored = read_document(Path(config.out))
    job = compose(config, prompts.read_source(config), stored)
    if stored is not None:
        job = replace(adopt(job, stored), done=count_rows(config))
    check_room(job)
    return job


def compose(config: RunConfig, source: prompts.Source, stored: Mapping[str, Any] | None) -> Job:
    """The same for settings that were checked, without a look at the run folder, whose description is `stored` where there is one."""
    engine, decoders = _engine_of(config)
    recipe = _recipe_of(config, engine, source.classes)
    words = recipe.words or class_words(engine, config.task, source.classes)
    # The run folder's size does not change with the memory that happens to be free.
    size = config.batch_size or (stored["plan"]["batch_size"] if stored else min(engine.suggested_batch(), count_images(config)))
    plan = prompts.make_plan(
        source, engine.model.tokenizer, number=config.number, seed=config.seed, batch_size=size, words=words, truncate=config.truncate_prompts
    )
    document = describe(identity(config, source), plan, engine, recipe, decoders)
    return Job(config, plan, engine, replace(recipe, facts=row_facts(document)), document, 0)


def check_room(job: Job) -> None:
    """Refuses a run that would fill the disk."""
    free = storage.free_bytes(job.folder.absolute())
    if job.bytes_needed > free:
        raise Missing(
            f"{job.folder}: the run needs about {_megabytes(job.bytes_needed)} of disk, {_megabytes(free)} are free",
            "Make room, choose another --out, or make fewer images.",
        )


def _engine_of(config: RunConfig) -> tuple[Engine, dict[str, Any]]:
    names = ("engine", "dtype", "device", "size", "allow_download", "threads", "engines", "trt_flavour", "provider", "compile")
    return open_engine(config.model, config.decoder, config.task, **{name: getattr(config, name) for name in names})


def _recipe_of(config: RunConfig, engine: Engine, classes: Sequence[str]) -> Recipe:
    names = ("sampler", "steps", "guidance", "profile")
    return make_recipe(engine, config.task, classes=classes, **{name: getattr(config, name) for name in names})


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def adopt(job: Job, stored: Mapping[str, Any]) -> Job:
    """The job as the run folder's description has it; refuses a folder that was begun with other weights or another engine.

    Where a run folder is there it decides: which of several equal GPUs goes on with it, and what its memory would hold, changes no byte.
    """
    document = job.document
    if not job.config.batch_size:
        document = document | {"plan": document["plan"] | {"batch_size": stored["plan"].get("batch_size")}}
    parts = ("model", "decoders", "engine", "sampling", "plan", "labels")
    check_same(job.folder, *({part: _comparable(source, part) for part in parts} for source in (stored, document)))
    plan = replace(job.plan, batch_size=stored["plan"]["batch_size"])
    return replace(job, plan=plan, recipe=replace(job.recipe, facts=row_facts(stored)), document=dict(stored))


def count_rows(config: RunConfig) -> int:
    """Samples the run folder holds, those set aside among them."""
    folder = Path(config.out)
    if not (folder / LEDGER).exists():
        return 0
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return ledger.count() + ledger.count(SET_ASIDE)


def _comparable(document: Mapping[str, Any], part: str) -> Any:
    # Where the weights lie and which of several equal GPUs is used change no byte.
    return {name: value for name, value in document[part].items() if name not in ("source", "device", "licence")}


def describe(config: Mapping[str, Any], plan: prompts.Plan, engine: Engine, recipe: Recipe, decoders: Mapping[str, Any]) -> dict[str, Any]:
    """The content of run.json."""
    model = engine.model
    return {
        "format": FORMAT,
        "versions": {"datasetdm_fast": __version__},
        "config": dict(config),
        "plan": {"number": plan.number, "batch_size": plan.batch_size, "prompts": plan.digest, "words": list(plan.words)},
        "sampling": dict(recipe.facts),
        "model": {"name": model.name, "source": str(model.source), "licence": model.licence, "digests": dict(model.digests)},
        "decoders": dict(decoders),
        "engine": dict(engine.fingerprint()),
        "labels": label_tables(engine, recipe),
    }


def row_facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """How a sample was made, for its row: with prompt and seed enough to make it again."""
    return {
        **document["sampling"],
        "batch_size": document["plan"]["batch_size"],
        "model": {"name": document["model"]["name"], **document["model"]["digests"]},
        "decoders": {task: decoder["digest"] for task, decoder in document["decoders"].items()},
        "engine": document["engine"],
    }


@dataclass(frozen=True)
class Remake:
    """One sample of a run folder to be made again.

    Its batch has the shape it had, and the sample its old place in it, so the arithmetic is the same; the other places repeat it.
    """

    folder: Path
    document: dict[str, Any]
    row: Row
    engine: Engine
    recipe: Recipe
    batch: Batch
    place: int


def prepare_remake(config: RunConfig, given: Iterable[str] = ()) -> Remake:
    """The sample `config.only` from its row; `given` names the settings that the user set and that must agree with the run folder's."""
    folder = Path(config.out)
    stored = read_document(folder)
    if stored is None or not (folder / LEDGER).exists():
        raise Refused(f"--only {config.only}: {folder} is no run folder", "Name the folder with --out.")
    settings = replace(config, **{name: tuple(value) if isinstance(value, list) else value for name, value in stored["config"].items() if name != "prompts"})
    changed = {name for name in config.identity() if name in set(given) - {"prompts"} and getattr(config, name) != getattr(settings, name)}
    if changed:
        told = "; ".join(line for name in sorted(changed) for line in differences(stored["config"][name], identity(config, _NO_PROMPTS)[name], name))
        raise Refused(f"{folder}: holds a run of another configuration ({told})", "Drop these flags: --only takes them from the run folder.")
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        row = ledger.row(int(config.only)) if config.only.isdecimal() and len(config.only) <= 18 else None
    if row is None:
        raise Refused(f"--only {config.only}: no sample of {folder} has this id", "Ids are those of samples.jsonl, for example 00000003.")
    engine, decoders = _engine_of(settings)
    weights = {"model": {"digests": dict(engine.model.digests)}, "decoders": decoders}
    check_same(folder, {"model": {"digests": stored["model"]["digests"]}, "decoders": stored["decoders"]}, weights)
    recipe = _recipe_of(settings, engine, settings.classes)
    size, place = row.recipe["batch_size"], row.request.index % row.recipe["batch_size"]
    filler = replace(row.request, classes=recipe.words[: row.recipe["word_slots"]] or row.request.classes)
    batch = Batch(row.request.index // size, tuple(row.request if k == place else filler for k in range(size)))
    return Remake(folder, stored, row, engine, recipe, batch, place)
