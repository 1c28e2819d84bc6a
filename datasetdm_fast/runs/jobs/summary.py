"""What a run is about to do, in lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from datasetdm_fast.disk.storage import free_bytes
from datasetdm_fast.engine.engines.hardware import device_memory
from datasetdm_fast.engine.labels.trust import undrawn_words
from datasetdm_fast.engine.labels.words import find_classes
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.run_folder.indexes.licences import licence_of

if TYPE_CHECKING:
    from datasetdm_fast.engine.loading.model import Model

GUIDANCE = {"cfg": "guidance {:g}", "embedded": "guidance {:g}, read by the model", "none": "no guidance"}
MOST_WORDS = 10  # class words that are listed
MOST_PROMPTS = 100  # that are compared with what the model can draw
DECODER_MAPS = 3  # of the image decoder's first width that an image has at once
BYTES = {"fp16": 2, "bf16": 2}
OVERHEAD = 1.15  # time of a run over that of its UNet calls: text, image decoder, labels, files


def describe_job(job: Job, call: float = 0.0) -> list[str]:
    """What a job is about to do, a line each; `call` is the seconds of one UNet call, where they were measured."""
    plan, facts, engine = job.plan, job.recipe.facts, job.engine.fingerprint()
    left, batches = job.images_left, job.batches_left
    seeds, steps = (
        f"seeds {plan.seed} to {plan.seed + plan.number - 1}" if plan.number > 1 else f"seed {plan.seed}",
        f"{facts['steps']} steps in {facts['calls']} calls",
    )
    if plan.has_seeds:
        seeds = "seeds of the prompts"
    elif plan.most > plan.number:  # how far they go is found out on the way
        seeds = f"seeds from {plan.seed} on"
    name = f"{engine.get('engine', '')} {engine.get('dtype', '')} on {engine.get('device', '')}"
    guidance = GUIDANCE[job.engine.model.guidance_at(facts["guidance"])].format(facts["guidance"])
    promised = job.half and f"{job.half} if the first samples agree with torch, else fp32"
    rows = {
        "images": f"{left} of {plan.number}, {facts['size']} x {facts['size']} pixels, {seeds}",
        "prompts": count_unnamed(job),
        "model": describe_model(job.engine.model),
        "sampler": f"{facts['sampler']}, {steps}, {guidance}",
        "labels": ", ".join(job.recipe.tasks),
        "domain": _describe_domain(job),
        "draws": _describe_undrawn(job),
        "engine": f"{name}, {count_noun(batches, 'batch', 'batches')} of {plan.batch_size}",
        "memory": describe_memory(job),
        "race": job.race,
        "precision": job.precision or promised or _warning(engine),
        "time": f"about {format_duration(call * job.calls_left * OVERHEAD)}, at {call:.3g} s a call"
        if call
        else describe_work(job),
        "disk": f"at most {job.bytes_needed / 1e6:,.0f} MB of {free_bytes(job.folder.absolute()) / 1e6:,.0f} MB free",
        "run folder": str(job.folder),
    }
    return [f"{name:<11}{value}" for name, value in rows.items() if value]


def describe_memory(job: Job) -> str:
    """What the weights take, and what a batch larger than the usual one takes at least, of what the device has."""
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
    return f"at least {work:.3g} TFLOP an image, measured before the first"


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
