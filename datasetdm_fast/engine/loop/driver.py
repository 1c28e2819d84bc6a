"""From requests to labelled samples in memory: batches, sampler loop, capture, labels, retry."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property, partial, reduce
from operator import and_
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import ATTENTION
from datasetdm_fast.data import (
    AnyCapture,
    AttentionSums,
    Batch,
    ProjectedCapture,
    Quarantined,
    Request,
    Sample,
    Text,
    join_texts,
)
from datasetdm_fast.engine.engines import in_own_precision
from datasetdm_fast.engine.labels.class_tables import spoken
from datasetdm_fast.engine.loop.calls import CapturedCalls, SpeedCalls, call_text
from datasetdm_fast.engine.loop.class_prompts import concept_places
from datasetdm_fast.engine.loop.labelling import SampledBatch, collect_results

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from datasetdm_fast.engine.engines import Engine
    from datasetdm_fast.engine.loop.recipe import Recipe


MOST_NEGATIVES = 256  # encoded negative prompts that are cached


def generate(
    batches: Iterable[Batch],
    engine: Engine,
    recipe: Recipe,
    on_unet_call: Callable[[], None] = lambda: None,
    make: Callable[..., BatchGenerator] | None = None,
) -> Iterator[tuple[Batch, list[Sample | Quarantined]]]:
    """Every batch with its samples, in order; samples with NaN or Inf are retried in fp32, then quarantined.

    `on_unet_call` is called after every U-Net call. `make` builds the generator of the run's batches, by default a
    BatchGenerator.
    """
    make, label_stream = make or BatchGenerator, None
    with ExitStack() as on_gpu:
        if engine.device.type == "cuda":
            label_stream = on_gpu.enter_context(LabelStream(engine.device))
            on_unet_call = on_gpu.enter_context(FinishedCalls(engine.device, on_unet_call)).on_queued
        generator = in_own_precision()(make)(engine, recipe, on_unet_call)
        for batch, results in sample_and_label(generator, batches, label_stream):
            if any(isinstance(result, Quarantined) for result in results):
                results = retry_in_fp32(
                    batch, results, engine, lambda fallback: make(fallback, recipe, on_unet_call), label_stream
                )
            yield batch, results


def sample_and_label(
    generator: BatchGenerator, batches: Iterable[Batch], label_stream: LabelStream | None
) -> Iterator[tuple[Batch, list[Sample | Quarantined]]]:
    """Every batch, on a GPU sampled while the previous one is labelled; where one is refused, pending results come
    first.
    """
    sample, label = in_own_precision()(generator.sample), in_own_precision()(generator.label)
    prepare = getattr(generator.engine, "prepare", None) or (lambda images: None)  # of packages' own engines, too
    if label_stream is None:
        for batch in batches:
            prepare(len(batch.padded))
            yield batch, label(batch, sample(batch))
        return
    remaining = iter(batches)
    while True:
        try:
            batch = next(remaining)
        except StopIteration:
            break
        except Exception:
            yield from label_stream.ready(most=0)
            raise
        prepare(len(batch.padded))
        label_stream.put(batch, label, batch, sample(batch))
        yield from label_stream.ready()
    yield from label_stream.ready(most=0)


class BatchGenerator:
    """Samples and labels batches of one run; caches its negative prompts and class words as the engine reads them."""

    collect = staticmethod(collect_results)  # a subclass may read more from the raw outputs of the decoders

    def __init__(
        self,
        engine: Engine,
        recipe: Recipe,
        on_unet_call: Callable[[], None],
        on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
    ):
        self.engine, self.recipe, self.on_unet_call, self.on_step = engine, recipe, on_unet_call, on_step
        has_words = recipe.words and any(decoder.config.has_text for decoder in engine.decoders.values())
        self.embeddings = engine.encode_classes(spoken(recipe.words, recipe.table)) if has_words else None
        self._negatives: dict[str, Text] = {}

    def make(self, batch: Batch) -> list[Sample | Quarantined]:
        return self.label(batch, self.sample(batch))

    def sample(self, batch: Batch) -> Any:
        """A SampledBatch from the sampler loop, with captures of some calls; a GPU's host does not wait."""
        from datasetdm_fast.engine.sampling.schedule import SamplerState

        engine, recipe, requests = self.engine, self.recipe, batch.padded
        text, class_text = self.encode_prompts(requests)
        sums = self.zero_attention_sums(len(requests))
        beginning = recipe.origin.begin(engine, recipe.schedule, requests)
        rows = len(text) if text.guidance is None else len(requests)
        state = SamplerState(recipe.schedule, recipe.guidance, beginning.latents, beginning.noise, rows)

        captures = CapturedCalls(engine, recipe.captures or {"": recipe.captured})
        others = SpeedCalls(engine, recipe.cached, recipe.fp8)
        captured_calls, averaged = recipe.captured, set(recipe.averaged)
        taken_on, raw = recipe.taken_on, recipe.raw
        for call, timestep in enumerate(recipe.schedule.timesteps):
            if call in captured_calls:
                capture = engine.denoise_and_capture_raw if call in raw else engine.denoise_and_capture
                output, captured = capture(state.latents, timestep, text)
                captures.add(call, captured)
                del captured  # of several calls, only the sum is held
            plain = None
            if sums is not None and class_text is not None and call in averaged:
                plain, sums = engine.denoise_and_average(state.latents, timestep, text, class_text, sums)
            if plain is not None or call in taken_on:
                output = output if plain is None else plain
            else:
                output = others.denoise(call, state.latents, timestep, text)
            state.latents = beginning.after(call, state.step(call, output))
            self.on_unet_call()
            self.on_step(call, state.latents[: len(batch.requests)])
        return SampledBatch(state.latents, captures.read, sums and sums.over(len(averaged)))

    def encode_prompts(self, requests: Sequence[Request]) -> tuple[Text, Text | None]:
        """The rows of a call, and those of the class prompts, if any."""
        texts, settings = list(map(self.recipe.text, requests)), self.recipe.attention
        negatives = [request.negative for request in requests]
        text = call_text(self.engine, texts, self.recipe.guidance, partial(self._encode_negatives, negatives))
        if settings is None:
            return text, None
        if self.recipe.concepts:
            return text, Text(self.concepts.expand(len(requests), -1, -1), concepts=self.concepts.shape[1])
        return text, text if settings.blocks else self.engine.encode_text(list(map(self.recipe.class_prompt, requests)))

    @cached_property
    def concepts(self) -> Tensor:
        """[1, K, D] a row of text for each concept: the mean of its tokens where it is encoded by itself."""
        import torch

        tokenizer, rows = self.engine.model.tokenizer, []
        for word in spoken(self.recipe.concepts, self.recipe.table):
            states = self.engine.encode_text([word]).context[0]
            places = concept_places(word, tokenizer)
            rows.append(states[places[0] : places[-1] + 1].mean(0))
        return torch.stack(rows)[None]

    def _encode_negatives(self, texts: Sequence[str]) -> Text:
        """A row of each negative prompt, each encoded on its own, so that no batch changes its rounding."""
        if len(self._negatives) > MOST_NEGATIVES:
            self._negatives.clear()
        for text in texts:
            if text not in self._negatives:
                self._negatives[text] = self.engine.encode_text([text])
        if len(set(texts)) == 1:
            return self._negatives[texts[0]].expand(len(texts))
        return join_texts([self._negatives[text] for text in texts])

    def zero_attention_sums(self, batch: int) -> AttentionSums | None:
        """Sums of attention before the first call, None if no label is read from them."""
        import torch

        if self.recipe.attention is None:
            return None
        cells, queries = self.recipe.attention.self_cells**2, self.recipe.attention.cross_cells**2
        tokens = len(self.recipe.concepts) or self.engine.model.levels[0].tokens
        shapes = (batch, cells, 0 if self.recipe.attention.blocks else cells), (batch, queries, tokens)
        return AttentionSums(*(torch.zeros(shape, device=self.engine.device) for shape in shapes))

    def embed_words(self, task: str, queries: Sequence[Sequence[str]]) -> Tensor | None:
        """[B, K, D] of the query words of each image, filled up by its last or the run's first; None for a decoder that
        reads none.
        """
        import torch

        from datasetdm_fast.kernels.transfer import to_device

        if self.embeddings is None or not self.engine.decoders[task].config.has_text:
            return None
        slots = max(1, *map(len, queries))
        named = [list(map(self.recipe.words.index, words)) or [0] for words in queries]
        padded = [[*places, *[places[-1]] * (slots - len(places))] for places in named]
        return self.embeddings[to_device(torch.tensor(padded), self.embeddings.device)]

    def label(self, batch: Batch, sampled: Any) -> list[Sample | Quarantined]:
        """The results of a SampledBatch, whose captures are freed as soon as its decoders have read them."""
        engine, recipe = self.engine, self.recipe
        queries = [recipe.query_words(request) for request in batch.padded]
        decoded, calls = None, []
        for task in recipe.decoded:
            calls.append(partial(engine.annotate, task, sampled.captures[task], self.embed_words(task, queries)))
        run_concurrently = getattr(engine, "side_by_side", None)
        if run_concurrently and len(queries) == 1 and sampled.pixels is None:
            # the longest first
            decoded, *outputs = run_concurrently([partial(engine.decode_and_check, sampled.latents), *calls])
        else:
            outputs = [call() for call in calls]
        del calls  # which hold the captures
        raw = dict(zip(recipe.decoded, outputs, strict=True))
        checks = {"latents": is_finite(sampled.latents)}
        captures = {id(capture): capture for capture in sampled.captures.values()}
        values = [value for capture in captures.values() for value in tensors_of(capture)]
        if captures:
            for task in recipe.decoded:  # what the domains of decoders are measured by
                if getattr(decoder := engine.decoders[task], "domain", None):
                    sampled.sketches[task] = decoder.sketch(sampled.captures[task].of(task))
            checks["features"] = reduce(and_, map(is_finite, values))
        release(values)
        del captures, values
        if sampled.averages is not None:
            checks[ATTENTION] = is_finite(sampled.averages.cells) & is_finite(sampled.averages.tokens)
            release((sampled.averages.cells, sampled.averages.tokens))
        # as large as the rest of the batch together, and the image decoder needs room
        sampled.captures = {label: sampled.captures[label] for label in recipe.labellers if label in sampled.captures}
        images = sampled.pixels
        if images is None:
            images, checks["image"] = decoded or engine.decode_and_check(sampled.latents)
        checks |= {task: reduce(and_, map(is_finite, each.values())) for task, each in raw.items()}
        return self.collect(batch, images, raw, checks, engine, recipe, sampled)


@in_own_precision()
def retry_in_fp32(
    batch: Batch,
    results: list[Sample | Quarantined],
    engine: Engine,
    make: Callable[[Engine], BatchGenerator],
    label_stream: LabelStream | None,
) -> list[Sample | Quarantined]:
    """The results with quarantined samples retried in fp32; they stay quarantined if memory runs out."""
    try:
        if (fallback := engine.fp32_fallback()) is None:
            return results
        if label_stream is not None:
            label_stream.settle()  # whose calls allow TF32, in the whole process
        retries = make(fallback).make(batch)
    except Exception as error:
        from datasetdm_fast.engine.engines.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = "there is not enough memory for another attempt in fp32"
        return [
            Quarantined(result.request, f"{result.reason}; {reason}") if isinstance(result, Quarantined) else result
            for result in results
        ]
    return [
        merge_retry(first, retry) if isinstance(first, Quarantined) else first
        for first, retry in zip(results, retries, strict=True)
    ]


def merge_retry(first: Quarantined, retry: Sample | Quarantined) -> Sample | Quarantined:
    """The retry, with the reason for it."""
    if isinstance(retry, Quarantined):
        return Quarantined(retry.request, f"{retry.reason}, in fp32 too")
    return replace(retry, provenance={**retry.provenance, "retried": f"fp32 after {first.reason}"})


def is_finite(values: Tensor) -> Tensor:
    """One flag per image, on the device."""
    return values.isfinite().flatten(1).all(1)


def release(values: Iterable[Tensor]) -> None:
    """Keeps the memory of tensors from the sampler's stream until this thread's stream, too, has read them."""
    import torch

    for value in values:
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))


def tensors_of(capture: AnyCapture) -> tuple[Tensor, ...]:
    if isinstance(capture, ProjectedCapture):
        return capture.sums
    return tuple(value for level in (*capture.features, *capture.maps) for value in level)


AHEAD = 2  # batches that wait for their labels; each holds its latents and captures on the GPU


class LabelStream(AbstractContextManager["LabelStream"]):
    """Runs calls on a stream and thread of its own while the GPU samples.

    At most two batches wait for their results, a third makes the sampler wait.
    """

    def __init__(self, device: torch.device):
        from datasetdm_fast.engine.engines.device import new_stream

        self._device, self._stream = device, new_stream(device)
        self._pool = ThreadPoolExecutor(1, "labels")
        self._waiting: deque[tuple[Any, Future[Any]]] = deque()

    def put(self, name: Any, call: Callable[..., Any], *arguments: Any) -> None:
        """Begins call(*arguments), which may read what this thread queued on the GPU; `name` comes with its result."""
        import torch

        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(self._device))
        self._waiting.append((name, self._pool.submit(self._follow, queued, call, arguments)))

    def _follow(self, queued: torch.cuda.Event, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        import torch

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(queued)
            result = call(*arguments)
            # the arguments go back to the sampler's stream, which may use their memory at once
            self._stream.synchronize()
            return result

    def settle(self) -> None:
        """Waits until all calls are done; their results stay where they are."""
        wait([result for _, result in self._waiting])

    def ready(self, most: int = AHEAD) -> Iterator[tuple[Any, Any]]:
        """The results that are done, in order; waits for the oldest if more than `most` are under way."""
        while self._waiting and (self._waiting[0][1].done() or len(self._waiting) > most):
            name, result = self._waiting.popleft()
            yield name, result.result()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


class FinishedCalls(AbstractContextManager["FinishedCalls"]):
    """Calls `on_unet_call` when a U-Net call is over: a GPU gets those of a whole batch before its first one ends."""

    def __init__(self, device: torch.device, on_unet_call: Callable[[], None]):
        self._device, self._on_unet_call, self._pool = device, on_unet_call, ThreadPoolExecutor(1, "calls")
        self._waiting: deque[Future[None]] = deque()

    def on_queued(self) -> None:
        """Lets another thread wait for the call that this thread has just queued."""
        import torch

        over = torch.cuda.Event(blocking=True)
        over.record(torch.cuda.current_stream(self._device))
        self._waiting.append(self._pool.submit(self._report, over))
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _report(self, over: torch.cuda.Event) -> None:
        over.synchronize()
        self._on_unet_call()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
