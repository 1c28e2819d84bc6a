"""What generate and label print about a run: its plan, what may spoil it, and what was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from textwrap import shorten
from typing import TYPE_CHECKING

from datasetdm_fast.command_line.output import NOTHING_WRITTEN, print_lines, print_result, print_unfinished
from datasetdm_fast.disk.storage import free_bytes
from datasetdm_fast.engine.labels import BACKGROUND
from datasetdm_fast.engine.labels.class_tables import find_classes
from datasetdm_fast.engine.loop.prompts import count_tokens
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.writing import Result
from datasetdm_fast.runs.run_folder.document import is_sharded, shard_size
from datasetdm_fast.runs.run_folder.indexes.licences import licence_of
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.settings import OutputSettings

if TYPE_CHECKING:
    from datasetdm_fast.engine.engines import Engine
    from datasetdm_fast.engine.loading.model import Model

MOST_REQUESTS = 40  # that a plan for the eye lists


def print_run_plan(config: RunConfig, job: Job) -> int:
    """The exit code of a dry run, which prints what a run would make."""
    print_lines(config, *describe_job(job))
    if config.json:
        facts = {"path": job.place, **job.recipe.facts, "batch_size": job.plan.batch_size}
        names = ("id", "seed", "prompt", "classes")
        requests = [{name: getattr(request, name) for name in names} for request in job.plan]
        print(json.dumps({**facts, "bytes": job.bytes_needed, "requests": requests}))
    else:
        for request in islice(job.plan, MOST_REQUESTS):
            print(f"{request.id}  seed {request.seed}  {request.prompt!r}")
        if (rest := job.plan.number - MOST_REQUESTS) > 0:
            print(f"and {rest:,} more, which --json lists")
    print_lines(config, NOTHING_WRITTEN)
    return 0


def print_finished_run(settings: OutputSettings, result: Result) -> int:
    """The exit code of a run with nothing left to do."""
    print_lines(settings, f"{result.path}: complete with {count_noun(result.done, 'sample')}, nothing to do")
    print_run(settings, result, "")
    return 0


def print_run(settings: OutputSettings, result: Result, resume_with: str, by: str = "", noun: str = "image") -> None:
    """Prints the result of a run, and the line to resume it with; fails where samples were quarantined."""
    print_result(settings, {"path": str(result.path), **result.facts()}, str(result.path))
    if result.made:
        speed = f"{count_noun(result.made, noun)}{by} in {format_duration(result.seconds)}"
        page = ""
        if result.closing_seconds:  # a run in shards has none
            speed += f" ({format_duration(result.closing_seconds)} of it for index files and gallery)"
            page = f"; look at {result.path}/gallery/index.html"
        print_lines(settings, f"{speed}, {result.rate:.3g} {noun}s per second{page}")
    if result.trust_message:
        print_lines(settings, result.trust_message)
    result.check()
    if not result.is_complete:
        print_unfinished(result.done, result.number, resume_with, "samples" if noun == "image" else f"{noun}s")


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
        "images": f"{_describe_count(job)}, {size} x {size} pixels, {model}",
        **_warnings(job),
        "engine": f"{name_engine(job.engine)}; run folder {job.place}",
    }
    return _lines(rows)


def _describe_count(job: Job) -> str:
    """How many images are missing of those requested, and how many are made for them where some are set aside."""
    most = f", for which at most {job.plan.most} are made" if job.plan.most > job.plan.number else ""
    return f"{job.images_left} of {job.plan.number}{most}"


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
    batches = -(-job.images_left // job.plan.batch_size)
    seeds, steps = (
        f"seeds {plan.seed} to {plan.seed + plan.number - 1}" if plan.number > 1 else f"seed {plan.seed}",
        f"{count_noun(facts['steps'], 'step')} in {count_noun(facts['calls'], 'call')}",
    )
    if plan.has_seeds:
        seeds = "seeds of the prompts"
    elif plan.most > plan.number:  # how far they go is found out on the way
        seeds = f"seeds from {plan.seed} on"
    guidance = GUIDANCE[job.engine.model.guidance_at(facts["guidance"])].format(facts["guidance"])
    promised = {"precision": f"{job.half} if the first samples agree with torch, else fp32"} if job.half else {}
    rows = {
        "images": f"{_describe_count(job)}, {facts['size']} x {facts['size']} pixels, {seeds}",
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
        what.append(f"at least {needed / 1e9:.2g} GB for {count_noun(size, 'image')}")
    return f"{' and '.join(what)}, of {device_memory(engine.device) / 1e9:.3g} GB in all"


def describe_work(job: Job) -> str:
    """The products of an image's calls of a transformer, of which no weight meets more than every token; else empty."""
    model, facts = job.engine.model, job.recipe.facts
    if model.backbone.flow is None:
        return ""
    rows = 2 if model.guidance_at(facts["guidance"]) == "cfg" else 1
    tokens = model.image_tokens + model.backbone.text(model.configs)[0]
    work = 2e-12 * model.denoiser.numel() * tokens * rows * facts["calls"]
    return f"at most {work:.3g} TFLOP an image, without attention and decoding"


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
    words = [word for word in job.plan.words if word != BACKGROUND and not find_classes(word, draws)]
    requests = [job.plan.request(index) for index in range(min(job.plan.number, MOST_PROMPTS))]
    count = sum(not find_classes(request.prompt, draws) for request in requests)
    what = [f"it cannot draw {shorten(', '.join(words), 45, placeholder=' ...')}"] if words else []
    verb = "names" if count == 1 else "name"
    what += [f"{count} of the first {len(requests)} prompts {verb} none of these"] if count else []
    known = shorten(", ".join(draws), 67, placeholder=" ...")
    return f"the model's card lists {known} and nothing else:\n{'':<11}{'; '.join(what)}" if what else ""


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
