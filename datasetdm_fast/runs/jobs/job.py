"""A run before its first byte: networks opened, plan and recipe made, run.json composed; nothing is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasetdm_fast.config import ATTENTION, ENGINES, HALF, SHARD_BYTES, SHARD_SIZE, TASK_KINDS, UNDECODED
from datasetdm_fast.data import Request, Trust
from datasetdm_fast.disk import storage
from datasetdm_fast.engine import engines
from datasetdm_fast.engine.engines import Engine
from datasetdm_fast.engine.labels import class_tables, kind_of, number_classes, task_of_label, with_palette
from datasetdm_fast.engine.labels.class_tables import CUSTOM, OURS
from datasetdm_fast.engine.labels.trust import with_undrawn
from datasetdm_fast.engine.loop import prompts
from datasetdm_fast.engine.loop.prompts import Plan, make_plan
from datasetdm_fast.engine.loop.recipe import Recipe, label_tables, make_recipe, prompt_words
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.document import FORMAT, grows, is_sharded, most_samples, row_facts, shard_size
from datasetdm_fast.runs.run_folder.goal import check_scored, counts_by_class
from datasetdm_fast.runs.run_settings import LabelSettings, RunSpec
from datasetdm_fast.settings import EngineSettings, ModelSettings, SamplingSettings
from datasetdm_fast.version import __version__

SPARE = 64 * 2**20  # bytes a run leaves free for ledger, index files and other programs
RACED = ("openvino", "ort")  # engines that --engine auto chose for some runs of earlier versions
ATTENTION_SETTINGS = ("exponent", "threshold", "uncertainty", "self_cells", "cross_cells", "parity")


@dataclass(frozen=True)
class Job:
    """A run that has been checked in full and has written nothing yet."""

    folder: Path
    plan: Plan
    engine: Engine
    recipe: Recipe
    document: dict[str, Any]  # run.json
    done: int = 0  # samples the run folder already holds
    limit: int = 0  # samples that this command makes; 0: all
    batch_size: int = 0  # requested; 0: as many as fit into memory
    may_mix: bool = True  # whether another engine may continue the run
    half: str = ""  # the precision that --dtype auto tries, until it was measured
    generator: Callable[..., Any] | None = None  # what samples a batch, see driver.generate
    pixels: int = 0  # of an image on average, where images have sizes of their own
    calls: int = 0  # UNet calls of a batch on average, where the recipe does not state them
    differing: tuple[str, ...] = ()  # in what the engine is none of those that made the run folder's samples
    stops_outside: bool = False  # whether the run stops if the first batch is out of the domain of the decoders
    unnamed: tuple[int, int] = (0, 0)  # prompts that name none of the class words, of how many
    url: str = ""  # of a run in an object store

    @property
    def place(self) -> str:
        """Its folder or URL."""
        return self.url or str(self.folder)

    @property
    def images_left(self) -> int:
        """Images that this command is to make."""
        return min(self.plan.number - self.done, self.limit or self.plan.number)

    @property
    def sample_bytes(self) -> int:
        """An upper estimate of what the files of a sample take."""
        return _sample_bytes(self.pixels or self.recipe.size**2, self.recipe.tasks)

    @property
    def bytes_needed(self) -> int:
        """An upper estimate of what is still to be written."""
        return self.sample_bytes * max(self.plan.number - self.done, 0) + SPARE


def _sample_bytes(pixels: int, labels: Sequence[str]) -> int:
    return int(pixels * (3 + sum(kind_of(task).pixel_bytes for task in labels))) + 8192 * (2 + len(labels))


def default_shard_size(sample: int, batch: int) -> int:
    """Samples of a shard, of which each takes so many bytes at most and a batch has so many."""
    fitting = max(SHARD_BYTES // sample, 1)
    return min(SHARD_SIZE, fitting - fitting % min(batch, fitting))


def build_job(spec: RunSpec, stored: Mapping[str, Any] | None, dtype: str = "") -> Job:
    """The job as the settings describe it, not yet merged with the run folder; `stored` is its run.json, if any."""
    source, labels = spec.source, spec.labels
    if not spec.url:
        check_least_room(spec.folder, 0 if stored else spec.number, spec.model.size, labels.task)
    engine, decoders = open_engine(spec.model, spec.engine, labels.task, stored, dtype, spec.sampling.guidance)
    recipe = recipe_of(spec.sampling, labels, engine, source.classes or source.listed, table=source.table)
    words = recipe.words or prompt_words(engine, labels.task, source.classes)
    # The run folder's size does not change with the memory that happens to be free; a run that grows may have had too
    # few images for a larger one.
    size = spec.batch_size or (stored["plan"]["batch_size"] if stored else 1)
    may_be_larger = not spec.batch_size and (stored is None or grows(stored["config"], spec.identity))
    if may_be_larger and size < spec.number:  # a GPU probes its memory for it
        size = max(size, min(engine.suggested_batch(), spec.number))
    plan = make_plan(
        replace(source, table=recipe.table),
        engine.model.tokenizer,
        number=spec.prompts.number,
        seed=spec.prompts.seed,
        batch_size=size,
        words=words,
        truncate=spec.prompts.truncate_prompts,
        turns=most_samples(spec.identity, 1),
        is_by_class=counts_by_class(spec.identity),
    )
    negatives = [plan.negative, *(line.negative or "" for line in source.lines)]
    prompts.check_negative(negatives, recipe.has_negative, engine.model.backbone.title)
    requests = list(_first_requests(source, plan)) if source.lines and words else []
    unnamed = [request.prompt for request in requests if not request.classes]
    if unnamed and recipe.words and not spec.prompts.allow_unnamed and not recipe.asks_all:
        raise Refused(
            f"{source.name}: {len(unnamed)} of {len(requests)} prompts name none of the class words "
            f"{', '.join(plan.words[:8])}{' ...' if len(plan.words) > 8 else ''}: "
            + "; ".join(prompts.shorten(prompt) for prompt in unnamed[:3]),
            'Write {"prompt": ..., "classes": [...]} for these, or pass --allow-unnamed: their maps then hold nothing.',
        )
    if spec.identity.get("keep") == "trusted" and recipe.draws:
        _check_drawn(source, plan, recipe.draws)
    if recipe.attention is not None:
        for request in _first_requests(source, plan):
            recipe.check_request(request, engine.model.tokenizer, tokenizer_cuts=source.tokenizer_cuts)
    document = describe_run(spec.identity, plan, engine, recipe, decoders)
    if spec.identity.get("accept"):
        check_scored(document)
    precision = document["engine"].get("dtype", "")
    job = Job(
        spec.folder,
        plan,
        engine,
        replace(recipe, facts=row_facts(document)),
        document,
        limit=spec.limit,
        stops_outside=not spec.force_domain,
        batch_size=spec.batch_size,
        may_mix=spec.may_mix,
        half=precision if dtype == HALF and precision != "fp32" else "",
        unnamed=(len(unnamed), len(requests)),
        url=spec.url,
    )
    if is_sharded(document):
        size = default_shard_size(job.sample_bytes, plan.batch_size)
        config = stored["config"] if stored else {"shard_size": size, **spec.identity}
        document["config"]["shard_size"] = shard_size(config)
    return job


def _first_requests(source: prompts.PromptSource, plan: Plan) -> Iterator[Request]:
    """The first request of every prompt of the source, or all requests where the run makes its own prompts."""
    return map(plan.request, range(min(len(source.lines) or plan.number, plan.number)))


def _check_drawn(source: prompts.PromptSource, plan: Plan, draws: Sequence[str]) -> None:
    """Refuses prompts of which every sample would be doubtful, by what the model's card says that it can draw."""
    reasons = set[str]()
    for request in _first_requests(source, plan):
        trust = with_undrawn(Trust(), request.classes, request.prompt, draws)
        if trust.is_trusted:
            return
        reasons.update(trust.reasons)
    raise Refused(
        f"--keep trusted: no sample of {source.name} can be trusted: {min(reasons)}",
        "Write prompts of what the model draws, name another --model, or keep doubtful samples, too.",
    )


def check_least_room(folder: Path, number: int, size: int, labels: Sequence[str]) -> None:
    """Refuses a run that would fill the disk as far as it can be seen before networks are loaded: size 0 is theirs."""
    check_room(folder, _sample_bytes(size**2, labels) * number + SPARE)


def check_room(folder: Path, needed: int) -> None:
    """Refuses a run that needs more bytes of disk than are free."""
    free = storage.free_bytes(folder.absolute())
    if needed > free:
        raise Missing(
            f"{folder}: the run needs up to {_format_bytes(needed)} of disk, {_format_bytes(free)} are free",
            "Free some space, choose another --out, or make fewer images.",
        )


def _format_bytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def open_engine(
    model: ModelSettings,
    engine: EngineSettings,
    labels: Sequence[str],
    stored: Mapping[str, Any] | None,
    dtype: str = "",
    guidance: float = 0.0,
) -> tuple[Engine, dict[str, Any]]:
    """The engine and its decoders; a run folder keeps what `--engine auto` and `--dtype auto` chose for it."""
    options = {name: getattr(model, name) for name in ("outlines", "size", "allow_download", "lora")}
    options |= {"guidance": guidance, **engine.engine_choices()}
    before = stored["engine"].get("engine") if stored and engine.engine == "auto" else None
    if before in RACED:
        options["engine"] = before
    if engine.dtype == "auto":
        options["dtype"] = dtype or "auto"
        if stored is not None:  # in which it may have been measured
            kind, begun = ENGINES.get(stored["engine"].get("engine")), stored["engine"].get("dtype")
            is_its = kind is not None and engine.engine in ("auto", stored["engine"]["engine"])
            options["dtype"] = begun if is_its and kind.halves and begun in ("fp32", *kind.halves) else "auto"
    decoded = tuple(task for task in labels if task not in UNDECODED)
    return engines.open_engine(model.model, model.decoder if decoded else None, decoded, **options)


def recipe_of(
    sampling: SamplingSettings,
    labels: LabelSettings,
    engine: Engine,
    classes: Sequence[str],
    strength: float = 1.0,
    table: class_tables.ClassTable | None = None,
) -> Recipe:
    names = ["combine", "ignore", "ignore_below", "ask", *(ATTENTION_SETTINGS if ATTENTION in labels.task else ())]
    options = {name: getattr(labels, name) for name in names} | asdict(sampling)
    return make_recipe(engine, labels.task, classes=classes, strength=strength, table=table, **options)


def describe_run(
    config: Mapping[str, Any], plan: Plan, engine: Engine, recipe: Recipe, decoders: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of run.json."""
    model, palette = engine.model, config.get("palette", OURS)
    document: dict[str, Any] = {
        "format": FORMAT,
        "versions": {"datasetdm_fast": __version__},
        "config": dict(config),
        "plan": {
            "number": plan.number,
            "batch_size": plan.batch_size,
            "prompts": plan.digest,
            "words": list(plan.words),
        },
        "sampling": dict(recipe.facts),
        "model": {
            "name": model.name,
            "source": str(model.source),
            "licence": model.licence,
            "digests": dict(model.digests),
        },
        "decoders": dict(decoders),
        "engine": dict(engine.fingerprint()),
        "processor": engines.name_processor(),
        **number_classes(with_palette(label_tables(engine, recipe), palette, recipe.table)),
    }
    if plan.has_seeds:
        document["plan"]["seeds"] = "of the prompts"
    if model.backbone.package:
        document["model"]["package"] = model.backbone.package
    if packages := packages_of(recipe.tasks):
        document["packages"] = packages
    if recipe.table is not None:
        document["class_table"] = class_tables.rows_of(recipe.table, plan.words, has_colours=palette == CUSTOM)
    return document


def packages_of(labels: Sequence[str]) -> dict[str, str]:
    """Label -> name and version of the package that registers its task, where that is another than this one."""
    tasks = {label: task_of_label(label) for label in labels}
    return {label: TASK_KINDS.package(task) for label, task in tasks.items() if task in TASK_KINDS.others}
