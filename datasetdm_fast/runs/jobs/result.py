"""What a run is about to do, in lines for a person, and what it has made: samples, quarantined samples, speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.disk.storage import free_bytes
from datasetdm_fast.engine.labels.trust import undrawn_words
from datasetdm_fast.engine.labels.words import find_classes
from datasetdm_fast.engine.loop.prompts import count_tokens
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.gallery.closing import finish_run
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.run_folder.document import (
    LEDGER,
    MANIFEST,
    QUARANTINE,
    is_sharded,
    quarantines,
    read_document,
    shard_size,
)
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.goal import Goal, goal_of
from datasetdm_fast.runs.run_folder.indexes.licences import licence_of
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger

if TYPE_CHECKING:
    from datasetdm_fast.engine.engines.engine import Engine
    from datasetdm_fast.engine.loading.model import Model
    from datasetdm_fast.runs.run_folder.shards import ShardLedger


LOOK = "Look at the others in its gallery; other prompts or decoders may help."
MOST_REASONS = 3  # of quarantined samples that a message has


@dataclass(frozen=True)
class Result:
    path: Path | str  # of its folder, or the URL of one
    number: int  # samples of the plan
    done: int
    made: int  # of these, by this process
    quarantined: int  # without finite numbers
    seconds: float = 0.0  # of this process's work, its closing included
    closing_seconds: float = 0.0  # of these, for the index files and the gallery
    doubtful: int = 0  # of those done, or where they are quarantined, of those beside them
    outside: int = 0  # of these, out of the domain of the decoders
    goal: Goal | None = None  # None before there is a run folder
    is_complete: bool = False  # whether nothing more is to be made
    missing: Mapping[str, int] = field(default_factory=dict)  # class -> samples it has, where it can have no more
    accept: str = ""  # the condition on the samples of the data set
    reasons: Sequence[str] = ()  # why samples were quarantined
    is_sharded: bool = False  # then no sample beside the data set is kept

    def facts(self) -> dict[str, Any]:
        """Counts and speed, as --json prints them."""
        return {
            "number": self.number,
            "done": self.done,
            "made": self.made,
            "set_aside": self.quarantined,
            "complete": self.is_complete,
            "doubtful": self.doubtful,
            "images_per_second": round(self.rate, 4),
            "closing_seconds": round(self.closing_seconds, 3),
        }

    @property
    def rate(self) -> float:
        """Samples that this process made in a second."""
        return self.made / self.seconds if self.made else 0.0

    @property
    def trust_message(self) -> str:
        """How many samples are doubtful or not accepted; empty if none."""
        if not self.doubtful:
            return ""
        done = count_noun(self.done, "sample")
        place = "in whose place others were made" if self.is_sharded else f"in {self.path}/{QUARANTINE}"
        if self.accept:
            return f"accepted: {done}; not accepted, {place}: {self.doubtful}"
        if self.goal and self.goal.most > self.goal.number:
            return f"trusted: {done}; doubtful, {place}: {self.doubtful}{self._foreign}"
        return f"{self.doubts}: filter --where 'trust == 1' leaves {'it' if self.doubtful == 1 else 'them'} out"

    @property
    def doubts(self) -> str:
        """How many samples are doubtful, of a run that keeps them all."""
        verb = "is" if self.doubtful == 1 else "are"
        return f"{self.doubtful} of {self.done} samples {verb} doubtful{self._foreign}"

    @property
    def _foreign(self) -> str:
        return f" ({self.outside} out of the domain of the decoders)" if self.outside else ""

    def check(self) -> None:
        """Raises GateFailed where samples were quarantined, or too few can be trusted."""
        if self.goal and self.missing:
            number, most = self.goal.number, self.goal.most
            if len(self.goal.names) > 1:
                counts = ", ".join(f"{name} ({count})" for name, count in self.missing.items())
                cause = f"fewer than {number} of {most} samples with {self.accept} of these classes: {counts}"
                raise GateFailed(f"{self.path}: {cause}", LOOK)
            is_what = "accepted" if self.accept else "trusted"
            raise GateFailed(f"{self.path}: {self.done} of {most} samples are {is_what}, {number} were requested", LOOK)
        if self.quarantined:
            of_folder = f"{LEDGER} has the reason of each; --only ID makes one again"
            where = f"{MANIFEST}/ has the reason of each" if self.is_sharded else of_folder
            raise GateFailed(
                f"{self.path}: {self.quarantined} of {self.number} samples were quarantined "
                f"({'; '.join(self.reasons[:MOST_REASONS])})",
                f"{where}. Values that are NaN or infinite may need another --dtype.",
            )


def result_of(
    folder: Path | str,
    document: Mapping[str, Any],
    number: int,
    ledger: Ledger | ShardLedger,
    made: int = 0,
    **seconds: float,
) -> Result:
    number = max(number, document["plan"]["number"])  # more where others take the place of dropped ones
    config, goal = document["config"], goal_of(document["config"], number)
    tally, accept = goal.tally(ledger), config.get("accept", "")
    quarantined = ledger.quarantined_by_reason()
    return Result(
        folder,
        number,
        ledger.count(),
        made,
        sum(map(len, quarantined.values())),
        doubtful=ledger.count(DOUBTFUL) if accept else ledger.count_doubtful(),
        outside=ledger.count_out_of_domain()[0],
        goal=goal,
        is_complete=goal.is_reached(tally),
        missing=goal.missing(tally) if quarantines(config) else {},
        accept=accept,
        reasons=tuple(quarantined),
        is_sharded=is_sharded(document),
        **seconds,
    )


def close_run(folder: RunFolder, number: int, made: int, begin: float) -> Result:
    """The result of a run that no process works on any more, its index files rebuilt; `begin` is by perf_counter."""
    closing = time.perf_counter()
    finish_run(folder)
    end = time.perf_counter()
    seconds = {"seconds": end - begin, "closing_seconds": end - closing}
    return result_of(folder.path, folder.document, number, folder.ledger, made, **seconds)


def close_folder(folder: Path, number: int, made: int, begin: float) -> Result:
    """The result where this process holds the folder and has not opened it yet."""
    document = read_document(folder)
    if document is None:
        return Result(folder, number, 0, 0, 0)
    with RunFolder(folder, document, is_member=True) as opened:
        return close_run(opened, number, made, begin)


def read_result(folder: Path, number: int, made: int, begin: float) -> Result:
    """The result of a run that others may still be busy with."""
    seconds, document = time.perf_counter() - begin, read_document(folder)
    if document is None or not (folder / LEDGER).exists():
        return Result(folder, number, 0, 0, 0, seconds)
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        return result_of(folder, document, number, ledger, made, seconds=seconds)


GUIDANCE = {"cfg": "guidance {:g}", "embedded": "guidance {:g}, read by the model", "none": "no guidance"}
MOST_WORDS = 10  # class words that are listed
MOST_PROMPTS = 100  # that are compared with what the model can draw
DECODER_MAPS = 3  # of the image decoder's first width that an image has at once
BYTES = {"fp16": 2, "bf16": 2}


def name_engine(engine: Engine) -> str:
    """The engine, its precision and its device, in words."""
    facts = engine.fingerprint()
    return f"{facts.get('engine', '')} {facts.get('dtype', '')} on {facts.get('device', '')}"


def describe_start(job: Job) -> list[str]:
    """What a job is about to make, in two lines, and what its user should know before the first image."""
    size, model = job.recipe.size, describe_model(job.engine.model)
    rows = {
        "images": f"{job.images_left} of {job.plan.number}, {size} x {size} pixels, {model}",
        **_warnings(job),
        "engine": f"{name_engine(job.engine)}; run folder {job.place}",
    }
    return _lines(rows)


def _lines(rows: Mapping[str, str]) -> list[str]:
    return [f"{name:<11}{value}" for name, value in rows.items() if value]


def _warnings(job: Job) -> dict[str, str]:
    """What a run may be spoiled by: prompts, words and precision, each empty where it is fine."""
    return {
        "prompts": count_unnamed(job),
        "draws": _describe_undrawn(job),
        "text": describe_cut(job),
        "precision": _warning(job.engine.fingerprint()),
    }


def describe_job(job: Job) -> list[str]:
    """What a job would do, a line each."""
    plan, facts = job.plan, job.recipe.facts
    left, batches = job.images_left, job.batches_left
    seeds, steps = (
        f"seeds {plan.seed} to {plan.seed + plan.number - 1}" if plan.number > 1 else f"seed {plan.seed}",
        f"{facts['steps']} steps in {facts['calls']} calls",
    )
    if plan.has_seeds:
        seeds = "seeds of the prompts"
    elif plan.most > plan.number:  # how far they go is found out on the way
        seeds = f"seeds from {plan.seed} on"
    guidance = GUIDANCE[job.engine.model.guidance_at(facts["guidance"])].format(facts["guidance"])
    promised = {"precision": f"{job.half} if the first samples agree with torch, else fp32"} if job.half else {}
    rows = {
        "images": f"{left} of {plan.number}, {facts['size']} x {facts['size']} pixels, {seeds}",
        "model": describe_model(job.engine.model),
        "sampler": f"{facts['sampler']}, {steps}, {guidance}",
        "labels": ", ".join(job.recipe.tasks),
        "domain": _describe_domain(job),
        **_warnings(job),
        **promised,
        "engine": f"{name_engine(job.engine)}, {count_noun(batches, 'batch', 'batches')} of {plan.batch_size}",
        "shards": _describe_shards(job),
        "memory": describe_memory(job),
        "time": describe_work(job),
        "disk": f"at most {job.bytes_needed / 1e6:,.0f} MB of {free_bytes(job.folder.absolute()) / 1e6:,.0f} MB free",
        "run folder": job.place,
    }
    return _lines(rows)


def _describe_shards(job: Job) -> str:
    """How many there are, and how large, in words; empty of a run folder."""
    if not is_sharded(job.document):
        return ""
    size = shard_size(job.document["config"])
    shards, most = count_noun(-(-job.plan.number // size), "shard"), size * job.sample_bytes / 1e6
    return f"{shards} of {count_noun(size, 'sample')}, at most {most:,.0f} MB each"


def describe_memory(job: Job) -> str:
    """What the weights take, and what a batch larger than the usual one takes at least, of what the device has."""
    from datasetdm_fast.engine.engines.device import device_memory  # which needs torch

    engine, size, model = job.engine, job.plan.batch_size, job.engine.model
    dtype = engine.fingerprint()["dtype"]
    wide = model.backbone.of_kind("text_encoder") if model.backbone.text_network else ()  # which ours keep in fp32
    held = {part: 4 if part in wide else BYTES.get(dtype, 4) for part in model.networks}
    what = [f"{sum(network.numel() * held[part] for part, network in model.networks.items()) / 1e9:.2g} GB of weights"]
    if size > engine.suggested_batch():
        width = model.networks["vae"].config.block_out_channels[0]
        needed = size * DECODER_MAPS * width * job.recipe.facts["size"] ** 2 * BYTES.get(dtype, 4)
        what.append(f"at least {needed / 1e9:.2g} GB for {size} images")
    return f"{' and '.join(what)}, of {device_memory(engine.device) / 1e9:.3g} GB in all"


def describe_work(job: Job) -> str:
    """The products of an image's calls of a transformer, every weight of which meets every token; else empty."""
    model, facts = job.engine.model, job.recipe.facts
    if model.backbone.flow is None:
        return ""
    rows = 2 if model.guidance_at(facts["guidance"]) == "cfg" else 1
    tokens = model.image_tokens + model.backbone.text(model.configs)[0]
    work = 2e-12 * model.denoiser.numel() * tokens * rows * facts["calls"]
    return f"at least {work:.3g} TFLOP an image"


def describe_model(model: Model) -> str:
    """Its name and family, and that its licence forbids commercial use where it does."""
    licence = licence_of(model.licence)
    terms = "" if licence is None or licence.is_commercial else f"; NOT FOR COMMERCIAL USE ({licence.name})"
    return f"{model.name}, {model.backbone.title}{terms}"


def count_unnamed(job: Job) -> str:
    """How many prompts or captions name no class of the labels, in words; empty where none."""
    count, total = job.unnamed
    if not count:
        return ""
    words = ", ".join(job.plan.words[:MOST_WORDS]) + (" ..." if len(job.plan.words) > MOST_WORDS else "")
    return f"{count} of {total} {'names' if count == 1 else 'name'} none of the classes of the labels: {words}"


def describe_cut(job: Job) -> str:
    """How many prompts the shorter of two text encoders reads in part, in words; empty where none."""
    tokenizer, count = job.engine.model.tokenizer, min(job.plan.number, MOST_PROMPTS)
    if getattr(tokenizer, "longer", None) is None:
        return ""
    most, texts = tokenizer.model_max_length, [job.plan.request(index).prompt for index in range(count)]
    cut = sum(count_tokens(text, tokenizer) > most for text in texts)
    return f"of {cut} of the first {count} prompts CLIP reads {most} tokens, and T5 all" if cut else ""


def _describe_undrawn(job: Job) -> str:
    """Which classes and how many prompts the model cannot draw, where its card lists what it can, in words."""
    if not (draws := job.recipe.draws):
        return ""
    words = undrawn_words(job.plan.words, draws)
    requests = [job.plan.request(index) for index in range(min(job.plan.number, MOST_PROMPTS))]
    count = sum(not find_classes(request.prompt, draws) for request in requests)
    what = [f"not {', '.join(words[:MOST_WORDS])}{' ...' if len(words) > MOST_WORDS else ''}"] if words else []
    what += [f"and {count} of the first {len(requests)} prompts name none of these"] if count else []
    return f"{', '.join(draws)} alone, {', '.join(what)}" if what else ""


def _describe_domain(job: Job) -> str:
    """With which decoders' training pictures samples are compared, in words."""
    decoders = {task: getattr(job.engine.decoders[task], "domain", None) for task in job.recipe.decoded}
    known = [task for task, domain in decoders.items() if domain]
    others = [task for task, domain in decoders.items() if not domain]
    if not decoders:
        return ""
    unknown = f"{', '.join(others)}: unknown, as fewer than 8 images or 0.2.0 trained it" if others else ""
    compared = f"samples are compared with what {', '.join(known)} learned from" if known else ""
    return "; ".join(filter(None, (compared, unknown)))


def _warning(engine: Mapping[str, object]) -> str:
    if engine.get("device") != "cpu" or engine.get("dtype") != "bf16":
        return ""
    import torch

    from datasetdm_fast.engine.engines import device

    is_fast = device.half_of(torch.device("cpu"))
    return "" if is_fast else "this processor has no bf16 and emulates it; fp32 is faster"
