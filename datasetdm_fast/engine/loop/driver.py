"""From requests to labelled samples: batches, sampler loop, capture, tasks, writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from datasetdm_fast.config import ATTENTION
from datasetdm_fast.data import (
    Annotation,
    AttentionSums,
    Batch,
    Capture,
    Instances,
    ProjectedCapture,
    Quarantined,
    Request,
    Sample,
    SemanticMap,
)
from datasetdm_fast.engine.engines.start import in_own_precision
from datasetdm_fast.engine.labels.class_tables import spoken
from datasetdm_fast.engine.labels.trust import trust_of, without_doubtful, without_unsure
from datasetdm_fast.engine.labels.words import mentioned
from datasetdm_fast.engine.loop.class_prompts import columns
from datasetdm_fast.engine.loop.combining import combined
from datasetdm_fast.engine.loop.label_stream import FinishedCalls, LabelStream

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from datasetdm_fast.engine.decoders.config import DecoderConfig
    from datasetdm_fast.engine.engines.engine import Engine
    from datasetdm_fast.engine.engines.lanes import Lanes
    from datasetdm_fast.engine.labels.class_tables import ClassTable
    from datasetdm_fast.engine.loop.prompts import Tokenizer
    from datasetdm_fast.engine.loop.recipe import Recipe

# Of the images whose raw outputs are read at once: each query has a mask of their size.
READ_PIXELS = {"cpu": 512**2, "cuda": 8 * 512**2}
MOST_NEGATIVES = 256  # encoded negative prompts that are kept


def generate(
    batches: Iterable[Batch],
    engine: Engine,
    recipe: Recipe,
    on_unet_call: Callable[[], None] = lambda: None,
    make: Callable[..., BatchGenerator] | None = None,
) -> Iterator[tuple[Batch, list[Sample | Quarantined]]]:
    """Every batch with its samples, in order; what did not come out finite is made once more in fp32, then set aside.
    `on_unet_call` hears of every UNet call that is over; `make` builds what samples a batch, a BatchGenerator where
    nobody says.
    """
    make = make or BatchGenerator
    with LabelStream(engine.device) as label_stream, FinishedCalls(engine.device, on_unet_call) as calls:
        generator = in_own_precision()(make)(engine, recipe, calls.on_queued)
        for batch, results in side_by_side(generator, batches, label_stream):
            if any(isinstance(result, Quarantined) for result in results):
                results = retried(
                    batch, results, engine, lambda wide: make(wide, recipe, calls.on_queued), label_stream
                )
            yield batch, results


@in_own_precision()
def retried(
    batch: Batch,
    results: list[Sample | Quarantined],
    engine: Engine,
    make: Callable[[Engine], BatchGenerator],
    label_stream: LabelStream,
) -> list[Sample | Quarantined]:
    """The results with those that are set aside made once more in fp32, as far as there is memory for that."""
    try:
        if (wide := engine.fp32_fallback()) is None:
            return results
        label_stream.settle()  # what a new engine records on a GPU must not be disturbed
        second = make(wide).make(batch)
    except Exception as error:
        from datasetdm_fast.engine.engines.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        lacking = "there is not enough memory for another attempt in fp32"
        return [
            Quarantined(one.request, f"{one.reason}; {lacking}") if isinstance(one, Quarantined) else one
            for one in results
        ]
    return [again(*both) if isinstance(both[0], Quarantined) else both[0] for both in zip(results, second, strict=True)]


def side_by_side(
    generator: BatchGenerator, batches: Iterable[Batch], label_stream: LabelStream
) -> Iterator[tuple[Batch, list[Sample | Quarantined]]]:
    """Every batch, sampled while `label_stream` makes the labels and images of the one before; where the next batch is
    refused, those before it come first.
    """
    sample, label = in_own_precision()(generator.sample), in_own_precision()(generator.label)
    remaining = iter(batches)
    while True:
        try:
            batch = next(remaining, None)
        except Exception:
            yield from label_stream.rest()
            raise
        if batch is None:
            break
        label_stream.put(batch, label, batch, sample(batch))
        yield from label_stream.ready()
    yield from label_stream.rest()


def again(first: Quarantined, second: Sample | Quarantined) -> Sample | Quarantined:
    """The second attempt, which says that it is one."""
    if isinstance(second, Quarantined):
        return Quarantined(second.request, f"{second.reason}, in fp32 too")
    return replace(second, provenance={**second.provenance, "retried": f"fp32 after {first.reason}"})


@dataclass
class SampledBatch:
    """A sampled batch, and what its labels will be read from."""

    latents: Tensor
    captures: dict[int, Capture | ProjectedCapture]  # by the call they were taken at
    averages: AttentionSums | None = None
    pixels: Tensor | None = None  # of pictures that need not be decoded


class BatchGenerator:
    """What one run keeps between batches: negative prompts and class words as the engine reads them."""

    def __init__(
        self,
        engine: Engine,
        recipe: Recipe,
        on_unet_call: Callable[[], None],
        on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
    ):
        self.engine, self.recipe, self.on_unet_call, self.on_step = engine, recipe, on_unet_call, on_step
        self.words = WordTable(engine, recipe.words, recipe.asks_all, recipe.table)
        self._negatives: dict[str, Tensor] = {}

    def make(self, batch: Batch) -> list[Sample | Quarantined]:
        return self.label(batch, self.sample(batch))

    def sample(self, batch: Batch) -> SampledBatch:
        """The sampler loop, with captures at some of its calls; on a GPU the host queues it without waiting.

        Of several captured calls only the last one's output is taken on, as it alone is that of a run of its decoders:
        the output of a captured call differs from that of a plain one by rounding.
        """
        from datasetdm_fast.engine.sampling.walk import SamplerState

        engine, recipe, requests = self.engine, self.recipe, batch.padded
        context, class_context = self.contexts(requests)
        sums = self.nothing_yet(len(requests))
        beginning = recipe.origin.begin(engine, recipe.schedule, requests)
        state = SamplerState(recipe.schedule, recipe.guidance, beginning.latents)

        captures = {}
        for call, timestep in enumerate(recipe.schedule.timesteps):
            if call in recipe.captured:
                capturing = engine.denoise_and_capture_raw if call in recipe.raw else engine.denoise_and_capture
                output, captures[call] = capturing(state.latents, timestep, context)
            if sums is not None:
                averaged, sums = engine.denoise_and_average(state.latents, timestep, context, class_context, sums)
            if call not in recipe.captured[-1:]:
                output = averaged if sums is not None else engine.denoise(state.latents, timestep, context)
            state.latents = beginning.after(call, state.step(call, output))
            self.on_unet_call()
            self.on_step(call, state.latents[: len(batch.requests)])
        return SampledBatch(state.latents, captures, sums and sums.over(len(recipe.schedule)))

    def contexts(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor | None]:
        """[2B, T, D] of the negative prompts and the prompts, and [B, T, D] of the class prompts, if any."""
        import torch

        texts, settings = [request.prompt for request in requests], self.recipe.attention
        words = [self.recipe.class_prompt(request) for request in requests]
        if settings:
            texts = list(map(settings.text, requests, words))
        context = torch.cat([self.unconditional(requests), self.engine.encode_text(texts)])
        return context, self.engine.encode_text(words) if settings else None

    def nothing_yet(self, batch: int) -> AttentionSums | None:
        """Sums of attention before the first call, None where no label is read from them."""
        import torch

        if self.recipe.attention is None:
            return None
        cells, queries = self.recipe.attention.self_cells**2, self.recipe.attention.cross_cells**2
        tokens = self.engine.model.levels[0].tokens
        shapes = (batch, cells, cells), (batch, queries, tokens)
        return AttentionSums(*(torch.zeros(shape, device=self.engine.device) for shape in shapes))

    def unconditional(self, requests: Sequence[Request]) -> Tensor:
        """[B, T, D] of the negative prompts, each encoded on its own, so that no batch changes its rounding."""
        import torch

        wanted = dict.fromkeys(request.negative for request in requests)
        if len(self._negatives) > MOST_NEGATIVES:
            self._negatives.clear()
        for text in wanted:
            if text not in self._negatives:
                self._negatives[text] = self.engine.encode_text([text])
        if len(wanted) == 1:
            return self._negatives[requests[0].negative].expand(len(requests), -1, -1)
        return torch.cat([self._negatives[request.negative] for request in requests])

    def label(self, batch: Batch, drawn: SampledBatch) -> list[Sample | Quarantined]:
        """Annotations, image and post-processing; `drawn` loses its captures on the way, but for those of labellers."""
        engine, recipe, requests = self.engine, self.recipe, batch.padded
        works, decoded = [self._annotating(task, drawn, requests) for task in recipe.decoded], None
        at_once = getattr(engine, "side_by_side", None) if len(requests) == 1 and drawn.pixels is None else None
        if at_once:
            decoded, *answers = at_once([partial(engine.decode_and_check, drawn.latents), *works])  # the longest first
        else:
            answers = [work() for work in works]
        del works  # which hold the captures
        raw = dict(zip(recipe.decoded, answers, strict=True))
        checks = {"latents": is_finite(drawn.latents)}
        if drawn.captures:
            checks["features"] = all_of(capture_is_finite(capture) for capture in drawn.captures.values())
        release(value for capture in drawn.captures.values() for value in tensors_of(capture))
        if drawn.averages is not None:
            checks[ATTENTION] = is_finite(drawn.averages.cells) & is_finite(drawn.averages.tokens)
            release((drawn.averages.cells, drawn.averages.tokens))
        # as large as the rest of the batch together, and the image decoder needs room
        drawn.captures = {call: capture for call, capture in drawn.captures.items() if call in recipe.raw}
        images = drawn.pixels
        if images is None:
            images, checks["image"] = decoded or engine.decode_and_check(drawn.latents)
        checks |= {task: all_of(is_finite(value) for value in outputs.values()) for task, outputs in raw.items()}
        return self.collected(batch, images, raw, checks, drawn)

    def _annotating(
        self, task: str, drawn: SampledBatch, requests: Sequence[Request]
    ) -> Callable[[], dict[str, Tensor]]:
        """The call that gives a task's raw outputs."""
        asked = self.words.asked(task, requests)
        return partial(self.engine.annotate, task, drawn.captures[self.recipe.captures[task]], asked)

    def collected(
        self,
        batch: Batch,
        images: Tensor,
        raw: dict[str, dict[str, Tensor]],
        checks: dict[str, Tensor],
        drawn: SampledBatch,
    ) -> list[Sample | Quarantined]:
        """The results of a batch, from what its decoders answered; other generators may take more from that."""
        return collect(batch, images, raw, checks, self.engine, self.recipe, drawn)


@cache
def readers() -> Lanes:
    """Threads that read raw outputs on a CPU, an image each, so that no number of threads changes a label."""
    from datasetdm_fast.engine.engines.lanes import Lanes

    return Lanes(is_single=True)


def collect(
    batch: Batch,
    images: Tensor,
    raw: dict[str, dict[str, Tensor]],
    checks: dict[str, Tensor],
    engine: Engine,
    recipe: Recipe,
    drawn: SampledBatch,
) -> list[Sample | Quarantined]:
    """Post-processing: one result per request of the batch, the padding left out."""
    import torch

    from datasetdm_fast.engine.tasks.to_host import to_host

    count = len(batch.requests)
    passed, pixels = to_host(torch.stack(list(checks.values()))[:, :count], images[:count])

    def read(task: str, part: slice) -> list[Annotation]:
        outputs = {name: value[part].nan_to_num() for name, value in raw[task].items()}
        return postprocess(asked[part], outputs, engine.decoders[task].config, recipe, engine.model.tokenizer)

    is_host = engine.device.type == "cpu"
    most = max(READ_PIXELS["cpu" if is_host else "cuda"] // recipe.size**2, 1)  # images at once
    # A GPU reads the padding, too: products of other shapes may round otherwise.
    asked, together = (batch.requests, 1) if is_host else (batch.padded, most)
    parts = [slice(b, b + together) for b in range(0, len(asked), together)]
    works = [(task, part) for task in recipe.decoded for part in parts]
    answers = iter(readers().map(read, works, most) if is_host else [read(*one) for one in works])
    labels: dict[str, list[Annotation]] = {
        task: [label for _ in parts for label in next(answers)] for task in recipe.decoded
    }
    labels = with_outlines(labels, pixels, engine, most)
    if drawn.averages is not None:
        labels[ATTENTION] = attention_labels(batch.requests, drawn.averages, engine, recipe)
    if recipe.foreign:
        labels |= foreign_labels(batch, images, drawn, engine, recipe)
    results: list[Sample | Quarantined] = []
    for b, request in enumerate(batch.requests):
        where = [name for name, flags in zip(checks, passed) if not flags[b]]
        if where:
            results.append(Quarantined(request, f"NaN or infinite values in {', '.join(where)}"))
        else:
            found = combined({task: labels[task][b] for task in recipe.tasks}, recipe.combinations)
            made = Sample(request, pixels[b], found, {**recipe.facts, **engine.adjustments})
            results.append(judged(recipe.origin.finish(made), recipe))
    return results


def with_outlines(
    labels: dict[str, list[Annotation]], pixels: np.ndarray, engine: Engine, most: int
) -> dict[str, list[Annotation]]:
    """The labels of decoders with the outlines that their configurations ask for, of so many images at once."""
    from datasetdm_fast.engine.tasks.outlines import outlined

    def follow(task: str, place: int) -> Annotation:
        return outlined([labels[task][place]], [pixels[place]], engine.decoders[task].config)[0]

    found = iter(readers().map(follow, [(task, b) for task in labels for b in range(len(pixels))], most))
    return {task: [next(found) for _ in pixels] for task in labels}


def judged(sample: Sample, recipe: Recipe) -> Sample:
    """A sample with what speaks for and against its labels, and 255 where the run ignores pixels."""
    said = (sample.request.classes, sample.annotations, sample.request.prompt, recipe.table)
    kept = without_doubtful(*said) if recipe.ignores_doubtful else sample.annotations
    kept = without_unsure(kept, recipe.least_confidence) if recipe.least_confidence else kept
    return replace(sample, annotations=kept, trust=trust_of(*said))


def is_finite(values: Tensor) -> Tensor:
    """One flag per image, on the device."""
    return values.isfinite().flatten(1).all(1)


def all_of(flags: Iterable[Tensor]) -> Tensor:
    first, *others = flags
    for other in others:
        first = first & other
    return first


def capture_is_finite(capture: Capture | ProjectedCapture) -> Tensor:
    return all_of(is_finite(value) for value in tensors_of(capture))


def release(values: Iterable[Tensor]) -> None:
    """Keeps the memory of tensors from the sampler's stream until this thread's stream, too, has read them."""
    import torch

    for value in values:
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))


def tensors_of(capture: Capture | ProjectedCapture) -> tuple[Tensor, ...]:
    if isinstance(capture, ProjectedCapture):
        return capture.sums
    return tuple(value for level in (*capture.features, *capture.maps) for value in level)


def postprocess(
    requests: Sequence[Request],
    raw: dict[str, Tensor],
    config: DecoderConfig,
    recipe: Recipe,
    tokenizer: Tokenizer | None = None,
) -> list[Annotation]:
    """The labels of one decoder, one a request; the tokenizer is for answers with the attention to tokens."""
    from datasetdm_fast.engine.tasks import TASKS, captions

    if not config.has_text:  # a decoder of words was asked only for those its prompt names
        named = [request.classes for request in requests]
        prompts = [request.prompt for request in requests]
        raw = captions.held_to(raw, config, prompts, named=named, tokenizer=tokenizer)
    found = TASKS[config.task].postprocess(raw, config, recipe.size)
    if not config.is_open:
        return found
    if not config.has_text:
        return [of_prompt(label, request, recipe) for label, request in zip(found, requests, strict=True)]
    return [
        renumber(label, recipe.asked(request), recipe.words) for label, request in zip(found, requests, strict=True)
    ]


def outlined_labels(
    requests: Sequence[Request],
    raw: dict[str, Tensor],
    images: Sequence[np.ndarray],
    config: DecoderConfig,
    recipe: Recipe,
    tokenizer: Tokenizer | None = None,
) -> list[Annotation]:
    """The same with the outlines that the decoder's configuration asks for, one a request and its image."""
    from datasetdm_fast.engine.tasks.outlines import outlined

    return outlined(postprocess(requests, raw, config, recipe, tokenizer), images, config)


def attention_labels(
    requests: Sequence[Request], averages: AttentionSums, engine: Engine, recipe: Recipe
) -> list[Annotation]:
    """The labels read from attention, one a request; numbers of an image that is not finite say nothing."""
    from datasetdm_fast.engine.tasks.attention import class_maps, label_maps

    asked, count = [recipe.asked(request) for request in requests], len(requests)
    own = AttentionSums(averages.cells[:count].nan_to_num(), averages.tokens[:count].nan_to_num())
    named = [
        columns(
            recipe.class_prompt(request),
            words,
            engine.model.tokenizer,
            by_words=bool(recipe.attention.parity),
            own=recipe.table,
        )
        for request, words in zip(requests, asked)
    ]
    maps = class_maps(own, [[places for _, places in one] for one in named], recipe.attention.exponent)
    numbers = [[1 + recipe.words.index(word) for word, _ in one] for one in named]
    limits = recipe.attention.threshold, recipe.attention.uncertainty
    return label_maps(maps, numbers, ("background", *recipe.words), recipe.size, *limits)


def foreign_labels(
    batch: Batch, images: Tensor, drawn: SampledBatch, engine: Engine, recipe: Recipe
) -> dict[str, list[Annotation]]:
    """What the labellers of other packages answer, one label an image of the padded batch."""
    from datasetdm_fast.engine.tasks.labeller import LabellerInput, labels_of

    words = tuple(recipe.asked(request) for request in batch.padded)
    found = {}
    for task in recipe.foreign:
        capture = drawn.captures.get(recipe.captures.get(task, -1))
        given = LabellerInput(batch.padded, words, recipe.words, images, drawn.latents, capture)
        found[task] = labels_of(task, engine.device, given)
    return found


class WordTable:
    """Class embeddings of a run's words, computed once."""

    def __init__(self, engine: Engine, words: Sequence[str], asks_all: bool = False, table: ClassTable | None = None):
        self.asks_all = asks_all
        self.decoders, self.places = engine.decoders, {word: k for k, word in enumerate(words)}
        is_read = any(decoder.config.has_text for decoder in engine.decoders.values())
        self.embeddings = engine.encode_classes(spoken(words, table)) if words and is_read else None

    def asked(self, task: str, requests: Sequence[Request]) -> Tensor | None:
        """What the decoder of a task reads beside its capture."""
        return self.of(requests) if self.decoders[task].config.has_text else None

    def of(self, requests: Sequence[Request]) -> Tensor:
        """[B, K, D]: the words asked of each image, its last repeated up to the longest's K; the first where none."""
        import torch

        from datasetdm_fast.kernels.to_device import to_device

        asked = [tuple(self.places) if self.asks_all else request.classes for request in requests]
        slots = max(word_slots(asked), 1)
        named = [[self.places[word] for word in words] or [0] for words in asked]
        padded = [[*places, *[places[-1]] * (slots - len(places))] for places in named]
        return self.embeddings[to_device(torch.tensor(padded), self.embeddings.device)]


def word_slots(asked: Sequence[Sequence[str]]) -> int:
    """Words the open-vocabulary decoder is asked for each image of a batch."""
    return max(map(len, asked))


def of_prompt(label: Instances, request: Request, recipe: Recipe) -> Instances:
    """The instances as those of the class that the prompt names first; none where it names no class."""
    import numpy as np

    words = recipe.words
    named = mentioned(request.prompt, request.classes, recipe.table) or request.classes
    count = len(label.masks) if named else 0
    number = words.index(named[0]) if named else 0
    return Instances(label.masks[:count], np.full(count, number, np.int64), label.scores[:count], words)


def renumber(label: SemanticMap, named: tuple[str, ...], words: tuple[str, ...]) -> SemanticMap:
    """A label map over the words of one prompt as one over the words of the run: 0 = none of them, 1 + k = word k."""
    import numpy as np

    numbers = np.zeros(256, np.uint8)
    for place in range(len(label.classes) - 1):
        numbers[place + 1] = 1 + words.index(named[min(place, len(named) - 1)]) if named else 0
    return SemanticMap(numbers[label.labels], label.confidence, ("background", *words))
