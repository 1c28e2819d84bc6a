"""From the raw outputs of a batch's decoders to its samples: post-processing, labels from attention, trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.config import ATTENTION, FROM_IMAGE
from datasetdm_fast.data import (
    Annotation,
    AnyCapture,
    AttentionSums,
    Batch,
    DomainDistance,
    Instances,
    Quarantined,
    Request,
    Sample,
    SemanticMap,
)
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.engine.labels.class_tables import classes_in_order
from datasetdm_fast.engine.labels.trust import (
    trust_of,
    with_domain,
    with_undrawn,
    with_unprompted,
    without_doubtful,
    without_unsure,
)
from datasetdm_fast.engine.loop.combining import apply_combinations

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.decoders.config import DecoderConfig
    from datasetdm_fast.engine.engines import Engine
    from datasetdm_fast.engine.engines.device import Lanes
    from datasetdm_fast.engine.loop.prompts import Tokenizer
    from datasetdm_fast.engine.loop.recipe import Recipe

CHUNK_PIXELS = {"cpu": 512**2, "cuda": 8 * 512**2}  # post-processed per chunk (memory: one mask per query)
UNPROMPTED_SIDE = 32  # pixels of labels that only tell how much of a picture is not in its prompt


@dataclass
class SampledBatch:
    """The latents of a batch after the last U-Net call, and what its labels are read from."""

    latents: Tensor
    captures: dict[str, AnyCapture]  # label -> what it reads; under an empty name what no label reads
    averages: AttentionSums | None = None
    sketches: dict[str, Tensor] = field(default_factory=dict)  # task -> what its decoder's domain is measured by
    pixels: Tensor | None = None  # of pictures that need not be decoded


@cache
def reader_lanes() -> Lanes:
    """Threads that post-process on a CPU, an image each, so that no number of threads changes a label."""
    from datasetdm_fast.engine.engines.device import Lanes

    return Lanes(is_single=True)


def collect_results(
    batch: Batch,
    images: Tensor,
    raw: dict[str, dict[str, Tensor]],
    checks: dict[str, Tensor],
    engine: Engine,
    recipe: Recipe,
    sampled: SampledBatch,
) -> list[Sample | Quarantined]:
    """Post-processing: one result per request of the batch, without its padding."""
    import torch

    from datasetdm_fast.engine.tasks import TASKS
    from datasetdm_fast.kernels.transfer import to_host

    count = len(batch.requests)
    passed, pixels, *arrays = to_host(
        torch.stack(list(checks.values()))[:, :count], images[:count], *(x[:count] for x in sampled.sketches.values())
    )
    sketches = dict(zip(sampled.sketches, arrays, strict=True))

    def read(task: str, part: slice, is_free: bool) -> list[Annotation]:
        outputs, config = {name: value[part].nan_to_num() for name, value in raw[task].items()}, configs[task]
        if is_free:
            outputs = {name: outputs[name] for name in ("pred_logits", "pred_masks")}
            return list(TASKS[config.task].postprocess(outputs, config, UNPROMPTED_SIDE))
        return postprocess(requests[part], outputs, config, recipe, engine.model.tokenizer)

    is_host = engine.device.type == "cpu"
    most = max(CHUNK_PIXELS["cpu" if is_host else "cuda"] // recipe.size**2, 1)  # images of a chunk
    # A GPU reads the padding, too: products of other shapes may round otherwise.
    requests, together = (batch.requests, 1) if is_host else (batch.padded, most)
    parts = [slice(b, b + together) for b in range(0, len(requests), together)]
    configs = {task: engine.decoders[task].config for task in recipe.decoded}
    free = read_unprompted(configs)
    chunks = [(task, part, False) for task in recipe.decoded for part in parts]
    chunks += [(task, part, True) for task in free for part in parts]
    results_of = iter(reader_lanes().map(read, chunks, most) if is_host else [read(*chunk) for chunk in chunks])
    labels: dict[str, list[Annotation]] = {
        task: [label for _ in parts for label in next(results_of)] for task in recipe.decoded
    }
    unprompted = {task: [label for _ in parts for label in next(results_of)] for task in free}
    labels = follow_outlines(labels, pixels, engine, most)
    if sampled.averages is not None:
        labels[ATTENTION] = attention_labels(batch.requests, sampled.averages, engine, recipe)
    if recipe.labellers:
        labels |= labeller_labels(batch, images, sampled, engine, recipe)
    results: list[Sample | Quarantined] = []
    for b, request in enumerate(batch.requests):
        where = [name for name, flags in zip(checks, passed) if not flags[b]]
        if where:
            results.append(Quarantined(request, f"NaN or infinite values in {', '.join(where)}"))
        else:
            annotations = {task: labels[task][b] for task in recipe.tasks}
            if recipe.combinations:
                annotations = apply_combinations(annotations, recipe.combinations)
            sample = Sample(request, pixels[b], annotations, {**recipe.facts, **engine.adjustments})
            is_drawn = not recipe.inverted
            distances = {
                task: engine.decoders[task].domain.measure(sketches[task][b], labels[task][b], is_drawn)
                for task in sketches
            }
            seen = {task: unprompted[task][b] for task in free}
            results.append(with_trust(recipe.origin.finish(sample), recipe, distances, seen))
    return results


def read_unprompted(configs: Mapping[str, DecoderConfig]) -> list[str]:
    """The decoders that are read without the prompt, too: of label maps and instances, where there are both."""
    named = [task for task, config in configs.items() if config.named and not config.is_open]
    return named if {configs[task].task for task in named} == {"semantic", "instance"} else []


def with_trust(
    sample: Sample,
    recipe: Recipe,
    distances: Mapping[str, DomainDistance] | None = None,
    unprompted: Mapping[str, Annotation] | None = None,
) -> Sample:
    """A sample with the reasons to doubt its labels, its `distances` and its `unprompted` labels, and 255 where the run
    ignores pixels.
    """
    evidence = (sample.request.classes, sample.annotations, sample.request.prompt, recipe.table)
    labels = without_doubtful(*evidence) if recipe.ignores_doubtful else sample.annotations
    labels = without_unsure(labels, recipe.least_confidence) if recipe.least_confidence else labels
    trust = trust_of(*evidence)
    if unprompted:
        trust = with_unprompted(trust, sample.request.classes, unprompted, sample.request.prompt, recipe.table)
    if recipe.draws:
        trust = with_undrawn(trust, sample.request.classes, sample.request.prompt, recipe.draws)
    return replace(sample, annotations=labels, trust=with_domain(trust, distances) if distances else trust)


def postprocess(
    requests: Sequence[Request],
    raw: dict[str, Tensor],
    config: DecoderConfig,
    recipe: Recipe,
    tokenizer: Tokenizer | None = None,
) -> list[Annotation]:
    """The labels of one decoder, one a request; the tokenizer is for outputs with the attention to tokens."""
    from datasetdm_fast.engine.tasks import TASKS, captions

    if not config.has_text:  # a decoder of words gets only those that the prompt names
        named = [request.classes for request in requests]
        prompts = [request.prompt for request in requests]
        raw = captions.held_to(raw, config, prompts, named=named, tokenizer=tokenizer)
    labels: list[Annotation] = TASKS[config.task].postprocess(raw, config, recipe.size)
    if not config.is_open:
        return labels
    if not config.has_text:
        return [with_prompt_class(label, request, recipe) for label, request in zip(labels, requests, strict=True)]
    return [
        renumber(label, recipe.query_words(request), recipe.words)
        for label, request in zip(labels, requests, strict=True)
    ]


def follow_outlines(
    labels: dict[str, list[Annotation]], pixels: np.ndarray, engine: Engine, most: int
) -> dict[str, list[Annotation]]:
    """The labels of decoders with the outlines that their configurations ask for, `most` images at a time."""
    followed = [task for task in labels if engine.decoders[task].config.outlines == FROM_IMAGE]

    def follow(task: str, place: int) -> Any:
        kind = LABEL_KINDS[engine.decoders[task].config.task]
        return kind.follow_colours(labels[task][place], np.ascontiguousarray(pixels[place]))

    results = iter(reader_lanes().map(follow, [(task, b) for task in followed for b in range(len(pixels))], most))
    return labels | {task: [next(results) for _ in pixels] for task in followed}


def attention_labels(
    requests: Sequence[Request], averages: AttentionSums, engine: Engine, recipe: Recipe
) -> list[Annotation]:
    """The labels read from attention, one a request; those of an image with NaN or Inf are meaningless."""
    from datasetdm_fast.engine.tasks.attention import class_maps, concept_maps, label_maps

    settings, count = recipe.attention, len(requests)
    assert settings is not None
    finite = AttentionSums(averages.cells[:count].nan_to_num(), averages.tokens[:count].nan_to_num())
    named = [recipe.class_columns(request, engine.model.tokenizer) for request in requests]
    if recipe.concepts:
        maps = concept_maps(finite)
    else:
        maps = class_maps(finite, [[places for _, places in classes] for classes in named], settings.exponent)
    numbers = [[1 + recipe.words.index(word) for word, _ in classes] for classes in named]
    limits = settings.threshold, settings.uncertainty
    return [*label_maps(maps, numbers, ("background", *recipe.words), recipe.size, *limits)]


def labeller_labels(
    batch: Batch, images: Tensor, sampled: SampledBatch, engine: Engine, recipe: Recipe
) -> dict[str, list[Annotation]]:
    """The labels of other packages' labellers, one an image of the padded batch."""
    from datasetdm_fast.engine.tasks.labeller import LabellerInput, labels_of

    words = tuple(recipe.query_words(request) for request in batch.padded)
    labels = {}
    for task in recipe.labellers:
        capture: Any = sampled.captures.get(task)
        inputs = LabellerInput(batch.padded, words, recipe.words, images, sampled.latents, capture)
        labels[task] = labels_of(task, engine.device, inputs)
    return labels


def with_prompt_class(label: Any, request: Request, recipe: Recipe) -> Instances:
    """The instances as those of the class that the prompt names first; none if it names no class."""
    words, requested = recipe.words, recipe.requested_words(request)
    named = classes_in_order(request.prompt, requested, recipe.table) or requested
    count = len(label.masks) if named else 0
    number = words.index(named[0]) if named else 0
    return Instances(label.masks[:count], np.full(count, number, np.int64), label.scores[:count], words)


def renumber(label: Any, named: tuple[str, ...], words: tuple[str, ...]) -> SemanticMap:
    """A label map over the words of one prompt as one over the words of the run: 0 = none of them, 1 + k = word k."""
    numbers = np.zeros(256, np.uint8)
    for place in range(len(label.classes) - 1):
        numbers[place + 1] = 1 + words.index(named[min(place, len(named) - 1)]) if named else 0
    return SemanticMap(numbers[label.labels], label.confidence, ("background", *words))
