"""A run before its first byte: settings checked, networks loaded, plan and recipe made, run folder compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from datasetdm_fast.config import ATTENTION, ENGINES, HALF, LABELLER_KINDS, TASK_KINDS, UNDECODED
from datasetdm_fast.data import Request
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.folders import DecoderFolders, find_decoders, parts_of
from datasetdm_fast.engine.engines import opening
from datasetdm_fast.engine.engines.engine import Engine
from datasetdm_fast.engine.labels import class_tables, kind_of
from datasetdm_fast.engine.labels.colours import CUSTOM, OURS
from datasetdm_fast.engine.labels.names import task_of_label
from datasetdm_fast.engine.labels.numbering import laid_out, number_classes, with_palette
from datasetdm_fast.engine.loop import prompts
from datasetdm_fast.engine.loop.plan import Plan, make_plan
from datasetdm_fast.engine.loop.recipe import Recipe, label_tables, make_recipe, prompt_words
from datasetdm_fast.errors import Missing, Refused, quote
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.jobs import prompt_files, racing
from datasetdm_fast.runs.jobs.result import Result, result_of
from datasetdm_fast.runs.jobs.settings import check_settings, count_images, identity
from datasetdm_fast.runs.run_folder.acceptance import check_scored
from datasetdm_fast.runs.run_folder.document import (
    FORMAT,
    GROWING,
    LEDGER,
    check_config,
    check_same,
    differences,
    grows,
    most_samples,
    read_document,
    sets_aside,
)
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.goal import counts_by_class
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, QUARANTINED, Ledger
from datasetdm_fast.runs.run_folder.score_table import add_distances
from datasetdm_fast.runs.run_folder.seal import is_indexed
from datasetdm_fast.runs.run_settings import LabelConfig, RunConfig
from datasetdm_fast.version import __version__

LEAST_MEASURED = 100  # images; comparing some with the reference would not pay in a shorter run
COMPUTING = ("engine", "dtype", "compile", "batch_size")  # settings that decide no more than how samples round
# whose versions engines name
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "onnxruntime", "openvino")
SPARE = 64 * 2**20  # bytes a run leaves free for ledger, index files and other programs


@dataclass(frozen=True)
class Job:
    """A run that has been checked in full and has written nothing yet."""

    config: RunConfig
    plan: Plan
    engine: Engine
    recipe: Recipe
    document: dict[str, Any]  # run.json
    done: int  # samples the run folder already holds
    race: str = ""  # how --engine auto chose, where it tried several
    half: str = ""  # the precision that --dtype auto tries, until it was measured
    precision: str = ""  # how it chose
    call_seconds: float = 0.0  # of a UNet call at the run's batch size, where that was measured
    generator: Callable[..., Any] | None = None  # what samples a batch, see driver.generate
    pixels: int = 0  # of an image on average, where images have sizes of their own
    calls: int = 0  # UNet calls of a batch on average, where the recipe does not tell them
    differing: tuple[str, ...] = ()  # in what the engine is none of those that made the run folder's samples
    unnamed: tuple[int, int] = (0, 0)  # prompts that name none of the class words, of how many

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def sets_aside(self) -> bool:
        """Whether samples are set aside and replaced."""
        return sets_aside(self.document["config"])

    @property
    def makes_up(self) -> bool:
        """Whether this command makes others in the place of those set aside, however many these are."""
        return self.sets_aside and not self.config.limit

    @property
    def images_left(self) -> int:
        """What this command is to make."""
        return min(self.plan.number - self.done, self.config.limit or self.plan.number)

    @property
    def batches_left(self) -> int:
        return -(-self.images_left // self.plan.batch_size)

    @property
    def bytes_needed(self) -> int:
        """An upper estimate of what is still to be written."""
        pixels = self.pixels or self.recipe.size**2
        one = pixels * (3 + sum(kind_of(task).pixel_bytes for task in self.recipe.tasks)) + 8192 * (
            2 + len(self.recipe.tasks)
        )
        return int(one * max(self.plan.number - self.done, 0)) + SPARE


def finished(config: RunConfig, *, is_alone: bool = True, source: prompts.PromptSource | None = None) -> Result | None:
    """The result of a run with nothing left to do, found without a network; other configurations are refused.

    Index files that are not up to date are rebuilt here, unless other processes may be about to do it.
    """
    check_settings(config)
    source, folder = source or prompt_files.read_source(config), Path(config.out)
    stored = read_document(folder)
    if stored is None:
        return None
    check_config(folder, stored, compared_identity(config, source, stored))
    if config.resume == "never":
        raise Refused(
            f"{folder}: the run folder exists, and --resume never asks for a new one",
            "Choose another --out, or drop --resume never.",
        )
    number = in_all(count_images(config), stored, folder)
    return settled(folder, stored, number, is_alone=is_alone, is_dry=config.dry_run)


def settled(
    folder: Path, stored: Mapping[str, Any], number: int, *, is_alone: bool = True, is_dry: bool = False
) -> Result | None:
    """The result of a run folder in which none of `number` samples is missing."""
    if not (folder / LEDGER).exists():
        return None
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        result = result_of(folder, number, ledger)
        # A process that was killed while it closed the ledger leaves SQLite's own files beside it.
        is_fresh = is_indexed(folder, stored, ledger) and not any(
            (folder / f"{LEDGER}{kind}").exists() for kind in ("-wal", "-shm")
        )
    if not result.is_complete or not (is_fresh or is_alone):
        return None
    if not is_fresh and not is_dry:
        with RunFolder(folder, stored) as opened:
            finish_run(opened)
    return result


def compared_identity(config: RunConfig, source: prompts.PromptSource, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have to be those of a run folder: what merely computes its samples may be mixed."""
    wanted = identity(config, source) | moved(config, stored)
    if config.mixed == "no":
        return wanted
    return wanted | {name: stored["config"][name] for name in COMPUTING if name in stored["config"]}


def moved(config: RunConfig | LabelConfig, stored: Mapping[str, Any]) -> dict[str, str]:
    """--model and --decoder as a run folder has them, where those of `config` name the same files in another place."""
    return _moved_model(config, stored) | _moved_decoder(config, stored)


def _moved_model(config: RunConfig | LabelConfig, stored: Mapping[str, Any]) -> dict[str, str]:
    there, path = stored["config"].get("model"), Path(config.model)
    if there is None or config.model == there or not path.exists():
        return {}
    from datasetdm_fast.engine.loading.folder import folder_digests  # which needs torch
    from datasetdm_fast.engine.loading.provenance import digest

    try:
        here = folder_digests(path) if path.is_dir() else {"file": digest([path])}
    except (Refused, Missing, OSError):  # loading tells what is wrong with it
        return {}
    return {"model": there} if here.items() <= stored["model"]["digests"].items() else {}


def _moved_decoder(config: RunConfig | LabelConfig, stored: Mapping[str, Any]) -> dict[str, str]:
    there, digests = stored["config"].get("decoder"), {name: one["digest"] for name, one in stored["decoders"].items()}
    if there is None or config.decoder == there:
        return {}
    try:
        here = opening.describe_decoders(_decoders(config), list(digests))
    except (Refused, Missing, KeyError, OSError):  # loading tells what is wrong with them
        return {}
    return {"decoder": there} if digests == {name: one["digest"] for name, one in here.items()} else {}


def _decoders(config: RunConfig | LabelConfig) -> DecoderFolders:
    """The decoders of --decoder; those of checkpoints depend on the model's levels."""
    folders = parts_of(config.decoder)
    if not all(path.is_dir() for path in folders):
        from datasetdm_fast.engine.decoders.upstream import unpack_decoders  # which needs torch, as the next does
        from datasetdm_fast.engine.loading import load_model

        folders = unpack_decoders(config.decoder, load_model(config.model, size=config.size).levels)
    return find_decoders(folders)


def _installed(name: str) -> str:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return ""


def may_differ(config: RunConfig) -> bool:
    """Whether it can be seen without loading the engine that it may be another than the run folder's."""
    stored = read_document(Path(config.out))
    if stored is None or config.mixed == "no":
        return False
    values = config.identity()
    return any(stored["config"].get(name) != values[name] for name in COMPUTING) or any(
        _installed(name) != stored["engine"][name] for name in LIBRARIES if name in stored["engine"]
    )


def refill(config: RunConfig) -> None:
    """Plans others in the place of the samples that were dropped, and sets aside the doubtful samples of a run that
    kept all, which from then on is one that keeps trusted ones alone.
    """
    check_settings(config)
    stored = read_document(Path(config.out))
    if stored is None or not (Path(config.out) / LEDGER).exists():
        if config.keep != "trusted":
            raise Refused(f"--refill: {config.out} holds no samples yet", "Drop the flag.")
        return
    wanted = compared_identity(config, prompt_files.read_source(config), stored)
    check_config(Path(config.out), stored, wanted | {"keep": stored["config"].get("keep")})
    wanted |= {name: stored["config"][name] for name in GROWING if name in stored["config"]}  # it grows afterwards
    with Ledger(Path(config.out) / LEDGER, read_only=True) as ledger:
        dropped = ledger.count_dropped()
        if not dropped and config.keep != "trusted":
            raise Refused(
                f"--refill: no sample of {config.out} was dropped, and doubtful ones are kept",
                "Drop some with python -m datasetdm_fast.drop, or add --keep trusted.",
            )
        if dropped and counts_by_class(wanted):
            raise Refused(
                f"--refill: {config.out} counts the samples of each class, so dropped ones cannot be replaced",
                f"Restore them with python -m datasetdm_fast.restore {quote(config.out)} --all, or choose another "
                "--out.",
            )
        if "seeds" in stored["plan"]:  # and nothing is written yet that would ask for others
            raise Refused(
                f"--refill: the prompts of {config.out} have seeds of their own, so that further images would repeat "
                "the first ones",
                "Add prompts at the end of the list, with a larger --number."
                if config.keep != "trusted"
                else "Drop --refill and --keep trusted: filter leaves out doubtful samples.",
            )
        if config.keep == "trusted" and any(row.trust is None for row in ledger.rows(parts=("trust",))):
            raise Refused(
                f"{config.out}: its samples were made by a version that did not record their trust",
                "Make a new run in another --out with --keep trusted.",
            )
    if config.dry_run:
        return
    number = max(stored["plan"]["number"], stored["config"]["number"] + dropped)
    document = stored | {"config": wanted, "plan": stored["plan"] | {"number": number}}
    with RunFolder(Path(config.out), document) as folder:
        if config.keep == "trusted":
            folder.set_doubtful_aside()
            add_distances(folder.ledger, since=0)


def measures(config: RunConfig) -> bool:
    """Whether `--dtype auto` compares samples before this run: of a long one that is new and has no labels of other
    packages' labellers.
    """
    kind = ENGINES["fast" if config.engine == "auto" else config.engine]
    is_usual = config.dtype == "auto" and kind.halves and not config.compile
    is_usual = is_usual and set(config.task).isdisjoint(LABELLER_KINDS.others)
    return bool(is_usual) and count_images(config) >= LEAST_MEASURED and read_document(Path(config.out)) is None


def prepare(
    config: RunConfig,
    *,
    races: bool = False,
    mixes: bool = False,
    dtype: str = "",
    source: prompts.PromptSource | None = None,
) -> Job:
    """The job of a configuration: everything is loaded and checked, nothing is written; with `races` `--engine auto`
    may take another engine than the fast one, with `mixes` the engine may be a new one for the run folder. `dtype`
    takes the place of `--dtype auto`, `source` holds prompts that no file of the configuration names.
    """
    check_settings(config)
    stored = read_document(Path(config.out))
    job = compose(config, source or prompt_files.read_source(config), stored, races=races, dtype=dtype)
    if stored is not None:
        job = replace(adopt(job, stored, mixes=mixes), done=count_rows(config))
    check_room(job)
    return job


def compose(
    config: RunConfig,
    source: prompts.PromptSource,
    stored: Mapping[str, Any] | None,
    *,
    races: bool = False,
    dtype: str = "",
) -> Job:
    """The same for checked settings, without a look at the run folder; `stored` is its description, if any."""
    engine, decoders = engine_of(config, stored, dtype)
    recipe = recipe_of(config, engine, source.classes or source.listed, table=source.table)
    words = recipe.words or prompt_words(engine, config.task, source.classes)
    # The run folder's size does not change with the memory that happens to be free; a run that grows may have had too
    # few images for a larger one.
    size = stored["plan"]["batch_size"] if stored else 0
    if stored is None or grows(stored["config"], identity(config, source)):
        size = max(size, min(engine.suggested_batch(), count_images(config)))
    size = config.batch_size or size
    plan = make_plan(
        replace(source, table=recipe.table),
        engine.model.tokenizer,
        number=config.number,
        seed=config.seed,
        batch_size=size,
        words=words,
        truncate=config.truncate_prompts,
        turns=most_samples(config.identity(), 1),
        is_by_class=counts_by_class(config.identity()),
    )
    requests = _different(source, plan) if source.lines and words else []
    unnamed = [request.prompt for request in requests if not request.classes]
    if unnamed and recipe.words and not config.allow_unnamed and not recipe.asks_all:
        raise unnamed_refusal(source, plan, unnamed, len(requests))
    if recipe.attention is not None:
        for request in _different(source, plan):
            recipe.check_request(request, engine.model.tokenizer, tokenizer_cuts=source.tokenizer_cuts)
    race = racing.Race(engine)
    is_decoded = recipe.decoded == recipe.tasks
    if races and stored is None and config.engine == "auto" and not config.compile and is_decoded:
        images = min(config.limit or plan.number, plan.number)
        race = racing.fastest(engine, size, -(-images // size) * len(recipe.schedule))
        engine = race.engine
    document = describe(identity(config, source), plan, engine, recipe, decoders)
    check_scored(document)
    facts = row_facts(document)
    precision = document["engine"].get("dtype", "")
    half = precision if dtype == HALF and precision != "fp32" else ""
    job = Job(config, plan, engine, replace(recipe, facts=facts), document, 0, race.told, half, "", race.seconds)
    return replace(job, unnamed=(len(unnamed), len(requests)))


def _different(source: prompts.PromptSource, plan: Plan) -> list[Request]:
    """The first request of every prompt that was given, or all where the run makes its own."""
    return [plan.request(index) for index in range(min(len(source.lines) or plan.number, plan.number))]


def unnamed_refusal(source: prompts.PromptSource, plan: Plan, unnamed: Sequence[str], count: int) -> Refused:
    """The refusal of prompts that name no class word: their label maps would say that nothing is there."""
    return Refused(
        f"{source.name}: {len(unnamed)} of {count} prompts name none of the class words "
        f"{', '.join(plan.words[:8])}{' ...' if len(plan.words) > 8 else ''}: "
        + "; ".join(prompts.shorten(prompt) for prompt in unnamed[:3]),
        'Write {"prompt": ..., "classes": [...]} for these, or pass --allow-unnamed: their maps then hold nothing.',
    )


def check_room(job: Job) -> None:
    """Refuses a run that would fill the disk."""
    free = storage.free_bytes(job.folder.absolute())
    if job.bytes_needed > free:
        raise Missing(
            f"{job.folder}: the run needs about {_megabytes(job.bytes_needed)} of disk, {_megabytes(free)} are free",
            "Free some space, choose another --out, or make fewer images.",
        )


def engine_of(config: RunConfig, stored: Mapping[str, Any] | None, dtype: str = "") -> tuple[Engine, dict[str, Any]]:
    """The engine and its decoders; a run folder keeps what `--engine auto` and `--dtype auto` chose for it."""
    chosen = {name: getattr(config, name) for name in ("outlines", "size", "allow_download", "lora")}
    chosen |= config.engine_choices()
    kept = stored["engine"].get("engine") if stored and config.engine == "auto" else None
    if kept in ENGINES and ENGINES[kept].races:
        chosen["engine"] = kept
    if config.dtype == "auto":
        chosen["dtype"] = (dtype or "auto") if stored is None else _kept_dtype(config, stored["engine"])
    decoded = tuple(task for task in config.task if task not in UNDECODED)
    return opening.open_engine(config.model, config.decoder if decoded else None, decoded, **chosen)


def _kept_dtype(config: RunConfig, engine: Mapping[str, Any]) -> str:
    """The precision in which a run folder was begun, where `--dtype auto` may have measured it."""
    kind, name, dtype = ENGINES.get(engine.get("engine")), config.engine, engine.get("dtype")
    is_measured = kind is not None and name in ("auto", engine["engine"]) and dtype in ("fp32", *kind.halves)
    return dtype if is_measured and kind.halves else "auto"


def recipe_of(
    config: RunConfig,
    engine: Engine,
    classes: Sequence[str],
    strength: float = 1.0,
    table: class_tables.ClassTable | None = None,
) -> Recipe:
    names = ["sampler", "steps", "guidance", "profile", "combine", "ignore", "ignore_below", "ask"]
    if ATTENTION in config.task:
        names += ["exponent", "threshold", "uncertainty", "self_cells", "cross_cells", "parity"]
    chosen = {name: getattr(config, name) for name in names}
    return make_recipe(engine, config.task, classes=classes, strength=strength, table=table, **chosen)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def adopt(job: Job, stored: Mapping[str, Any], *, mixes: bool = False) -> Job:
    """The job as the run folder's description has it, which tells of more images where the run is to grow; other
    weights are refused, and so is an engine that has no part in the run yet, unless the caller `mixes`: the job then
    tells in what it differs.

    Which of several equal GPUs continues a run folder, what its memory would hold and where the weights lie change no
    byte.
    """
    config = job.document["config"]
    if further(stored):
        # of what is asked for and not of the plan, as the job may have been adopted before
        number = in_all(config["number"], stored, job.folder)
        job = replace(
            job,
            plan=replace(job.plan, number=number, most=most_samples(config, number)),
            document=job.document | {"plan": job.document["plan"] | {"number": number}},
        )
    document = job.document | {"labels": laid_out(job.document["labels"], stored["labels"])}
    # A batch size as the run was started with stands for what its plan made of it: batches of equal size.
    mixes_sizes, given = job.config.mixed != "no", job.config.batch_size
    other = given if mixes_sizes and given != stored["config"].get("batch_size") else 0
    if grows(stored["config"], document["config"]):
        check_rows(job)
        renewed = ("number", "prompts", *(["batch_size"] if mixes_sizes and not other else []))
        stored = {
            **stored,
            "config": stored["config"] | {name: document["config"][name] for name in GROWING},
            "plan": stored["plan"] | {name: document["plan"][name] for name in renewed},
        }
    # Of the same settings; how many images are in a batch of theirs also depends on the number and on free memory.
    document = document | {"plan": document["plan"] | {"batch_size": stored["plan"].get("batch_size")}}
    parts = [part for part in ("model", "decoders", "packages", "sampling", "plan", "labels") if part in stored]
    compared = [
        {
            part: {name: value for name, value in source[part].items() if name not in ("name", "source", "licence")}
            for part in parts
        }
        for source in (stored, document)
    ]
    check_same(job.folder, *compared)
    engine, differing = engine_among(stored, job.recipe.facts["engine"])
    if differing and not (mixes and job.config.mixed == "verified"):
        alone = "Run generate once alone, in one process and with --limit 1: it compares the two engines. Then go on."
        raise Refused(
            f"{job.folder}: it holds a run with other settings ({'; '.join(differing)})",
            "Choose another --out, or give the flags that it was started with."
            if job.config.mixed == "no" or "command" in stored
            else alone,
        )
    size = other or stored["plan"]["batch_size"]
    facts = row_facts({**stored, "engine": engine, "plan": stored["plan"] | {"batch_size": size}})
    return replace(
        job,
        plan=replace(job.plan, batch_size=size),
        recipe=replace(job.recipe, facts=facts),
        document=dict(stored),
        differing=differing,
    )


def engine_among(stored: Mapping[str, Any], engine: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The engine of a run folder that is this one, which of several equal GPUs it runs on aside; else this one itself,
    and in what it differs from the first of the run.
    """
    known = [stored["engine"], *(entry["engine"] for entry in stored.get("mixed", ()))]
    plain = [{name: value for name, value in one.items() if name != "device"} for one in (*known, engine)]
    for there, one in zip(known, plain):
        if one == plain[-1]:
            return dict(there), ()
    return dict(engine), tuple(differences(plain[0], plain[-1], "engine"))


def further(stored: Mapping[str, Any]) -> int:
    """Samples that a run makes beyond those asked for, in the place of dropped ones."""
    number = stored["plan"]["number"]
    return number - stored["config"].get("number", number)


def in_all(number: int, stored: Mapping[str, Any], folder: Path) -> int:
    """Samples that a run makes where `number` are asked for: where it grows, those that were restored count again."""
    more = further(stored)
    if not more or number <= stored["config"]["number"]:
        return number + more
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        more = min(more, ledger.count_dropped())
    return max(number + more, stored["plan"]["number"])


def check_rows(job: Job) -> None:
    """Refuses a plan in which an image that the run folder holds would change."""
    if not (job.folder / LEDGER).exists():
        return
    with Ledger(job.folder / LEDGER, read_only=True) as ledger:
        for row in ledger.rows(DONE, QUARANTINED, DOUBTFUL, parts=()):
            planned = job.plan.request(row.request.index)
            if planned != row.request:
                found = differences(asdict(row.request), asdict(planned))
                raise Refused(
                    f"{job.folder}: with these settings image {row.request.id} would change ({'; '.join(found)})",
                    "Add prompts at the end of the list, which must have been at least as long as the run, or "
                    "choose another --out.",
                )


def count_rows(config: RunConfig) -> int:
    """Samples the run folder holds, those set aside among them."""
    folder = Path(config.out)
    if not (folder / LEDGER).exists():
        return 0
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return ledger.count() + ledger.count(QUARANTINED) + ledger.count_dropped()


def describe(
    config: Mapping[str, Any], plan: Plan, engine: Engine, recipe: Recipe, decoders: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of run.json."""
    model, palette = engine.model, config.get("palette", OURS)
    return {
        "format": FORMAT,
        "versions": {"datasetdm_fast": __version__},
        "config": dict(config),
        "plan": {
            "number": plan.number,
            "batch_size": plan.batch_size,
            "prompts": plan.digest,
            "words": list(plan.words),
            **({"seeds": "of the prompts"} if plan.has_seeds else {}),
        },
        "sampling": dict(recipe.facts),
        "model": {
            "name": model.name,
            "source": str(model.source),
            "licence": model.licence,
            "digests": dict(model.digests),
        },
        "decoders": dict(decoders),
        **({"packages": found} if (found := packages_of(recipe.tasks)) else {}),
        **(
            {}
            if recipe.table is None
            else {"class_table": class_tables.rows_of(recipe.table, plan.words, has_colours=palette == CUSTOM)}
        ),
        "engine": dict(engine.fingerprint()),
        **number_classes(with_palette(label_tables(engine, recipe), palette, recipe.table)),
    }


def packages_of(labels: Sequence[str]) -> dict[str, str]:
    """Label -> name and version of the package that registers its task, where that is another than this one."""
    tasks = {label: task_of_label(label) for label in labels}
    return {label: TASK_KINDS.package(task) for label, task in tasks.items() if task in TASK_KINDS.others}


def row_facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """How a sample was made, for its row: with prompt and seed enough to make it again."""
    return {
        **document["sampling"],
        "batch_size": document["plan"]["batch_size"],
        "model": {"name": document["model"]["name"], **document["model"]["digests"]},
        "decoders": {task: decoder["digest"] for task, decoder in document["decoders"].items()},
        "engine": document["engine"],
    }
