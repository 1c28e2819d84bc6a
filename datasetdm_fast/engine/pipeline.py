"""The library: a Pipeline makes labelled images or the features of an image, in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count, islice, repeat
from numbers import Integral, Number
from threading import RLock
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from datasetdm_fast.config import LABELS, UNDECODED, USUAL_SAMPLER
from datasetdm_fast.data import AnyCapture, Batch, Capture, Quarantined, Request, Sample
from datasetdm_fast.engine import engines
from datasetdm_fast.engine.decoders.config import SHIPPED
from datasetdm_fast.engine.engines import in_own_precision
from datasetdm_fast.engine.labels import by_task, check_label, kind_of, task_of
from datasetdm_fast.engine.labels.class_tables import find_classes
from datasetdm_fast.engine.labels.pictures import PREVIEW_SAMPLES, preview
from datasetdm_fast.engine.loop import diffusing, driver, prompts
from datasetdm_fast.engine.loop.calls import FROM_NOISE, call_text
from datasetdm_fast.engine.loop.class_prompts import TIMESTEPS
from datasetdm_fast.engine.loop.prompts import check_classes, check_line
from datasetdm_fast.engine.loop.recipe import (
    LEAST_SETTINGS,
    Recipe,
    as_texts,
    capture_calls,
    check_batch_size,
    check_choices,
    check_iterable,
    check_numbers,
    check_seed,
    check_size,
    check_tasks,
    make_recipe,
    prompt_words,
    scale_at,
)
from datasetdm_fast.errors import GateFailed, Refused, check_choice, nearest
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import EngineSettings
from datasetdm_fast.stages import LEVELS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap
    from datasetdm_fast.engine.engines import Engine


DIFFUSERS_NAMES = {  # argument of diffusers' pipelines -> what it is called by `__call__` and `stream`
    "num_inference_steps": "steps=",
    "guidance_scale": "guidance=",
    "generator": "seeds=",
    "num_images_per_prompt": "a prompt more than once",
    "height": "size= of from_pretrained",
    "width": "size= of from_pretrained",
}
OWN_NAMES = {  # argument of `__call__` and `stream` -> what it is called by `diffuse`
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "seed": "generator",
    "seeds": "generator",
}
COMMANDS_ALONE = {  # choice of a recipe -> the commands that take it, as a call would make other images by it
    "strength": "edit and vary, which begin with an image",
    "speed": "generate, which compares its labels with exact ones first",
}
ENGINE_OPTIONS = (*EngineSettings.__dataclass_fields__, "outlines", "guidance", "tasks")


@dataclass(frozen=True, repr=False)
class Output:
    """Samples in the order of their prompts; a task that was not requested has an empty list."""

    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: SupportsIndex) -> Sample:
        return self.samples[place]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __repr__(self) -> str:
        return "\n  ".join([f"<Output of {count_noun(len(self.samples), 'sample')}>", *map(str, self.samples)])

    def _repr_html_(self) -> str:
        rows = []  # of a sample each
        for sample in self.samples[:PREVIEW_SAMPLES]:
            labels = [(kind_of(task).picture(label, sample.image), task) for task, label in sample.annotations.items()]
            rows.append(preview([(sample.image, sample.request.prompt), *labels]))
        return f"<div>{count_noun(len(self.samples), 'sample')}{''.join(rows)}</div>"

    @property
    def images(self) -> list[np.ndarray]:  # [H, W, 3] uint8
        return [sample.image for sample in self.samples]

    if TYPE_CHECKING:  # what `__getattr__` gives

        @property
        def semantic(self) -> list[SemanticMap]: ...
        @property
        def instances(self) -> list[Instances]: ...
        @property
        def depth(self) -> list[DepthMap]: ...
        @property
        def keypoints(self) -> list[Keypoints]: ...
        @property
        def open_vocabulary(self) -> list[SemanticMap]: ...
        @property
        def attention(self) -> list[SemanticMap]: ...

    def __getattr__(self, name: str) -> list[Any]:
        """`semantic`, `instances`, `depth`, `keypoints`, `open_vocabulary`: the labels of every sample."""
        if name.startswith("save"):
            raise AttributeError(
                "an Output is in memory: PIL.Image.fromarray(out.images[0]).save(FILE) writes an image, "
                "and the command generate a run folder with all labels"
            )
        return self.labels(task_of(name))

    def labels(self, label: str) -> list[Any]:
        """The labels TASK or TASK:NAME of every sample; an empty list where they were not requested."""
        check_label(label)
        return [sample.annotations[label] for sample in self.samples if label in sample.annotations]

    @property
    def meta(self) -> list[dict[str, Any]]:
        """Prompt, seed, classes and how it was made, of each sample."""
        return [
            {
                "prompt": sample.request.prompt,
                "seed": sample.request.seed,
                "classes": sample.request.classes,
                "negative_prompt": sample.request.negative,
                **sample.provenance,
            }
            for sample in self.samples
        ]


@dataclass(frozen=True, repr=False)
class DiffusionOutput(Output):
    """Samples, and their images in the requested form."""

    converted: Any

    @property
    def images(self) -> Any:
        """A list of PIL images, [N, H, W, 3] or [N, 3, H, W] float32 in 0 .. 1, or latents [N, C, h, w]."""
        return self.converted


class Pipeline:
    """An engine with its decoders, which turns prompts into labelled images as the generate command does."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._turn = RLock()  # of the threads that call it: an engine makes one batch at a time

    @classmethod
    @in_own_precision()
    def from_pretrained(
        cls,
        model: str = "demo",
        *,
        decoder: str | None = None,
        size: int = 0,
        allow_download: bool = False,
        lora: Sequence[str] = (),
        **options: Any,
    ) -> Pipeline:
        """A model (demo, a folder, a file) and the folder of its decoders; None means their own for the demo
        models, and no labels for others.

        `lora` are adapters FILE or FILE:SCALE, which are fused into the model. The options are those of `generate` for
        engines (engine, dtype, device, threads, compile, provider and streams), outlines, and the guidance of calls
        that name none.
        """
        _check_options(size, options)
        adapters = tuple(map(str, _several("lora", lora, "files", (str, os.PathLike))))
        decoder = model if decoder is None and model in SHIPPED else decoder
        engine, _ = engines.open_engine(
            str(model), decoder, size=size, allow_download=allow_download, lora=adapters, **options
        )
        return cls(engine)

    @classmethod
    @in_own_precision()
    def from_diffusers(cls, pipe: Any, *, decoder: str | None = None, size: int = 0, **options: Any) -> Pipeline:
        """The model of a pipeline of diffusers in memory, copied with its adapters; options as in from_pretrained."""
        from datasetdm_fast.engine.loading.in_memory import model_of

        _check_options(size, options)
        engine, _ = engines.open_engine("", decoder, loaded=model_of(pipe, size), **options)
        return cls(engine)

    def __repr__(self) -> str:
        model = self.engine.model
        labels = ", ".join(self.tasks) or "none"
        return f"<Pipeline of {model.name}: {model.size} x {model.size}, engine {self.engine.name}, labels {labels}>"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The labels that its decoders can make."""
        return tuple(by_task(self.engine.decoders))

    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        seed: int = 0,
        batch_size: int = 0,
        **choices: Any,
    ) -> Output:
        """Images and labels of all prompts; image k has seeds[k], or seed + k. Other choices are those of `stream`."""
        texts = _CheckedFirst(as_texts("prompts", prompts))
        for name, values in (("seeds", seeds), ("negative_prompt", choices.get("negative_prompt"))):
            if isinstance(values, Sized) and not isinstance(values, str) and len(values) != len(texts):
                raise Refused(
                    f"{name}: {len(values)} given for {count_noun(len(texts), 'prompt')}", "Give one per prompt."
                )
        size = self._batch_size(batch_size, len(texts))
        return Output(list(self.stream(texts, seed=seed, seeds=seeds, batch_size=size, **choices)))

    def stream(
        self,
        prompts: str | Iterable[str],
        seed: int = 0,
        *,
        seeds: Iterable[int] | None = None,
        tasks: Sequence[str] | None = None,
        classes: Sequence[str] = (),
        combine: Sequence[str] = (),
        steps: int = 0,
        guidance: float = 0.0,
        sampler: str = USUAL_SAMPLER,
        profile: str = "0.3.0",
        batch_size: int = 0,
        truncate: bool = False,
        negative_prompt: str | Iterable[str] | None = "",
        ask: str = "named",
        callback: Callable[[int, Tensor], None] | None = None,
        **attention: Any,
    ) -> Iterator[Sample]:
        """Samples one by one, in order, with at most one batch in memory; prompts may come from an endless generator.
        Where a prompt is refused, the samples of those before it come first.

        With `tasks` None, every label with a decoder is made; 0 means what the model was made for. `combine` holds
        masks of labels, each as "LABEL within LABEL:CLASS". `negative_prompt` is one text for all, or one per
        prompt. `callback` is called at every step of a batch with the step number and the latents [B, C, h, w]; it
        must not change them, and must copy them to keep them. The task "attention" also takes exponent,
        threshold, uncertainty, self_cells and cross_cells of the generate command.
        """
        if isinstance(seeds, Number):
            raise Refused(f"seeds: {seeds} is one number, expected one per prompt", f"Write seed={seeds}.")
        check_numbers(seed=seed)
        known = 1 if isinstance(prompts, str) else len(prompts) if isinstance(prompts, Sized) else None
        size = self._batch_size(batch_size, known)
        each_seed = count(seed) if seeds is None else check_iterable("seeds", seeds, "one per prompt")
        recipe, requests = self.prepare(
            as_texts("prompts", prompts),
            each_seed,
            negative_prompt=negative_prompt,
            truncate=truncate,
            tasks=tasks,
            classes=classes,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            profile=profile,
            combine=combine,
            ask=ask,
            **attention,
        )
        if isinstance(prompts, _CheckedFirst):
            requests = iter(list(requests))
        make = None if callback is None else partial(driver.BatchGenerator, on_step=callback)
        return self._samples(_batches(requests, size), recipe, make)

    def prepare(
        self,
        prompts: Iterable[str],
        seeds: Iterable[int],
        *,
        negative_prompt: str | Iterable[str] | None = "",
        truncate: bool = False,
        tasks: Sequence[str] | None = None,
        classes: Sequence[str] = (),
        **choices: Any,
    ) -> tuple[Recipe, Iterator[Request]]:
        """The recipe of choices as in `stream`, and requests checked when read: what `generate_batches` takes."""
        if choices.get("guidance", 0) == 0:
            choices["guidance"] = self.engine.model.scale
        recipe, words = self._recipe(tasks, classes, **choices)
        requests = self._requests(prompts, seeds, words, truncate, _negatives(negative_prompt), recipe)
        return recipe, map(partial(recipe.check_request, tokenizer=self.engine.model.tokenizer), requests)

    def diffuse(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: Callable[[Pipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        output_type: str = "pil",
        tasks: Sequence[str] | None = None,
        classes: Sequence[str] = (),
        sampler: str = "",
        batch_size: int = 0,
        truncate: bool = False,
        **choices: Any,
    ) -> DiffusionOutput:
        """Images and labels, with arguments of diffusers' text-to-image pipelines; with the same generators, the images
        are the ones that it makes.

        One generator (or None, for PyTorch's own) draws the noise of all images; of several, each draws the noise of
        one image. The noise does not depend on the batch size. `callback_on_step_end` is called once per step of a
        batch with this pipeline, the step, its timestep and {"latents": [B, C, h, w]}, and returns such a dict with the
        latents to continue with. `output_type` is "pil", "np", "pt" or "latent". Without `num_inference_steps` or
        `guidance_scale`, they are those of the family's pipeline, or what the model was made for. An empty `sampler`
        means that of the model's family, or of its scheduler. `height` and `width` can only be those of the model.
        Other choices are those of `stream`.
        """
        for name in OWN_NAMES.keys() & choices.keys():
            raise TypeError(f"{name!r} is no choice here; write {OWN_NAMES[name]}=")
        check_choice("output_type", output_type, diffusing.OUTPUT_TYPES)
        side = self.engine.model.size
        for name, value in (("height", height), ("width", width)):
            if value not in (None, side):
                raise Refused(
                    f"{name}: {value!r} was given, and the model was loaded for images of {side} x {side} pixels",
                    f"Drop it, or load the model with size={value!r} for square images.",
                )
        texts, negatives = diffusing.repeat_prompts(prompt, negative_prompt, num_images_per_prompt)
        steps, guidance = diffusing.fill_sampling(self.engine.model, num_inference_steps, guidance_scale)
        usual = self.engine.model.defaults.sampler
        size = self._batch_size(batch_size, len(texts))
        recipe, words = self._recipe(
            tasks,
            classes,
            sampler=sampler or ("auto" if usual == USUAL_SAMPLER else usual),
            steps=steps,
            guidance=guidance,
            **{"profile": diffusing.PROFILE, **choices},
        )
        fitting = [
            recipe.check_request(request, self.engine.model.tokenizer)
            for request in self._requests(texts, [0] * len(texts), words, truncate, negatives, recipe, as_given=True)
        ]
        if negative_prompt is not None:
            with self._turn:
                fitting = diffusing.mark_empty(self.engine, fitting)
        draws = 1 + recipe.schedule.noisy_calls
        noise, seeds = diffusing.draw_noise(generator, len(texts), self.engine.model.latent_shape(), draws)
        on_step_end = None if callback_on_step_end is None else partial(callback_on_step_end, self)
        facts = {**recipe.facts, "noise": "of the caller's generators"}
        recipe = replace(recipe, facts=facts, origin=diffusing.NoiseOfCaller(noise, on_step_end))
        requests = (replace(each, seed=seed) for each, seed in zip(fitting, seeds, strict=True))
        latents: dict[int, Tensor] = {}
        make = partial(diffusing.LatentGenerator, latents=latents) if output_type == "latent" else None
        samples = list(self._samples(_batches(requests, size), recipe, make))
        return DiffusionOutput(samples, diffusing.convert_images(samples, output_type, latents))

    def label(
        self,
        images: np.ndarray | Image | Sequence[np.ndarray | Image],
        prompts: str | Sequence[str] = "",
        *,
        tasks: Sequence[str] | None = None,
        classes: Sequence[str] = (),
        timesteps: Sequence[int] = TIMESTEPS,
        seed: int = 0,
        batch_size: int = 0,
        **choices: Any,
    ) -> Output:
        """Labels of existing pictures, as `label` makes them; an image of any size, turned as its EXIF data says, is
        cropped to the square in its centre, and its noise has the seed `seed` + its index.

        `prompts` describe the images, one text each; without them every word of `classes` is looked for. Other
        choices are those of `stream` that concern labels.
        """
        from datasetdm_fast.engine.loop.inverting import inversion_generator, inversion_recipe, picture_prompt
        from datasetdm_fast.engine.pictures.framing import pictures_in_memory  # which runs that sample do not need

        for name in ("sampler", "profile", "steps", "guidance"):
            if name in choices:
                raise TypeError(f"{name!r} is no choice here, as no image is sampled")
        is_one = isinstance(images, (np.ndarray, str)) or hasattr(images, "getbands")
        sources = [images] if is_one else list(check_iterable("images", images, "an image or several images"))
        pictures = pictures_in_memory(sources)
        texts = [prompts] * len(sources) if isinstance(prompts, str) else list(as_texts("prompts", prompts))
        if len(texts) != len(sources):
            raise Refused(
                f"prompts: {len(texts)} given for {count_noun(len(sources), 'image')}", "Give one prompt per image."
            )
        check_numbers(seed=seed)
        size = self._batch_size(batch_size, len(sources))
        recipe, words = self._recipe(tasks, classes, **choices)
        recipe = inversion_recipe(recipe, self.engine, timesteps)
        requests = []
        for place, text in enumerate(texts):
            line = picture_prompt(_line(text, f"prompt {place}"), recipe, words, self.engine, f"prompt {place}")
            request = Request(place, line.text, check_seed(seed + place), line.classes or ())
            requests.append(recipe.check_request(request, self.engine.model.tokenizer))
        make = inversion_generator(pictures)
        return Output(list(self._samples(_batches(iter(requests), size), recipe, make)))

    def _batch_size(self, batch_size: int, images: int | None) -> int:
        """Images per batch, by default what suits the engine; at most so many `images`, if their number is known."""
        check_batch_size(batch_size)
        size = batch_size or self.engine.suggested_batch()
        return size if images is None else max(min(size, images), 1)

    @in_own_precision()
    def _recipe(
        self, names: Sequence[str] | None, classes: Sequence[str], **choices: Any
    ) -> tuple[Recipe, tuple[str, ...]]:
        """The recipe of these labels, by default all that have a decoder, and the words looked for."""
        tasks = self.tasks if names is None else _several("tasks", names, "labels")
        if tasks:
            check_tasks(tasks, LABELS)
        if missing := [task for task in tasks if task not in UNDECODED and task not in self.engine.decoders]:
            raise Refused(
                f"tasks: this pipeline has no decoder for {missing[0]!r}, it has {', '.join(self.tasks) or 'none'}"
                f"{nearest(missing[0], self.tasks)}",
                "Name a folder with one: decoder=DIR.",
            )
        if names is None and not tasks:
            warnings.warn("this pipeline has no decoder, so its outputs have no labels; give decoder=DIR", stacklevel=4)
        for name in DIFFUSERS_NAMES.keys() & choices.keys():
            raise TypeError(f"{name!r} is no choice here; write {DIFFUSERS_NAMES[name]}, or call diffuse({name}=...)")
        for name in COMMANDS_ALONE.keys() & choices.keys():
            raise TypeError(f"{name!r} is no choice here, but of {COMMANDS_ALONE[name]}")
        words = check_classes(_several("classes", classes, "words"))
        if "combine" in choices:
            choices["combine"] = _several("combine", choices["combine"], "combinations")
        check_choices(**{name: choices[name] for name in ("ask", "ignore", "parity") if name in choices})
        choices |= check_numbers(**{name: choices[name] for name in LEAST_SETTINGS if name in choices})
        recipe = make_recipe(self.engine, tasks, classes=words, **choices)
        words = recipe.words or prompt_words(self.engine, tasks, words)
        facts = {**recipe.facts, "engine": dict(self.engine.fingerprint()), "model": self.engine.model.name}
        return replace(recipe, facts=facts), words

    def _requests(
        self,
        texts: Iterable[str],
        seeds: Iterable[int],
        words: tuple[str, ...],
        truncate: bool,
        negative: Iterable[str],
        recipe: Recipe,
        *,
        as_given: bool = False,  # with the ends of lines and the blanks around them, which some text encoders read
    ) -> Iterator[Request]:
        model, tokenizer = self.engine.model, self.engine.model.tokenizer

        @lru_cache(1024)
        def fit_negative(text: str, where: str) -> str:
            line = _line(text, where)
            return prompts.fit_negative(text if as_given else line, tokenizer, where, truncate=truncate)

        is_one, remaining, negatives = isinstance(negative, repeat), iter(seeds), iter(negative)
        for index, prompt in enumerate(texts):
            where = f"prompt {index}"
            if (seed := next(remaining, None)) is None:
                raise Refused(f"seeds: there is none for {where}", "Give one per prompt.")
            if (unwanted := next(negatives, None)) is None:
                raise Refused(f"negative_prompt: there is none for {where}", "Give one, or one per prompt.")
            _check_text(prompt, where)
            (line,) = prompts.split_prompts(" ".join(prompt.splitlines()), where, truncate=truncate)
            text = prompt if as_given else line.text
            text = prompts.fit_prompt(text, tokenizer, where, words, truncate=truncate, table=recipe.table)
            prompts.check_negative([unwanted], recipe.has_negative, model.backbone.title)
            unwanted = fit_negative(unwanted, "negative_prompt" if is_one else f"negative_prompt of {where}")
            yield Request(index, text, check_seed(seed), find_classes(text, words, recipe.table), unwanted)

    def _samples(
        self, batches: Iterator[Batch], recipe: Recipe, make: Callable[..., driver.BatchGenerator] | None
    ) -> Iterator[Sample]:
        for results in self.generate_batches(batches, recipe, make):
            for result in results:
                if isinstance(result, Quarantined):
                    raise GateFailed(f"prompt {result.request.index}: {result.reason}", "Try another dtype.")
                yield result

    def generate_batches(
        self, batches: Iterable[Batch], recipe: Recipe, make: Callable[..., driver.BatchGenerator] | None = None
    ) -> Iterator[list[Sample | Quarantined]]:
        """The results of every batch, in order; a GPU samples a batch while the one before is labelled."""
        made = driver.generate(self._between_turns(iter(batches)), self.engine, recipe, make=make)
        while True:
            try:
                self._turn.acquire()
                _, results = next(made, (None, None))
            finally:
                with suppress(RuntimeError):  # it has no turn where an interrupt came while it waited for one
                    self._turn.release()
            if results is None:
                return
            yield results

    def _between_turns(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, for whose prompts no other thread has to wait."""
        while True:
            self._turn.release()
            try:
                batch = next(batches, None)
            finally:
                self._turn.acquire()
            if batch is None:
                return
            yield batch

    @in_own_precision()
    def features(
        self,
        image: np.ndarray | Image | None = None,
        prompt: str = "",
        *,
        timestep: int | None = None,
        seed: int = 0,
        steps: int = 0,
        guidance: float = 0.0,
        projected: bool = False,
    ) -> dict[str, Any]:  # of tensors, or with `projected` of such dicts
        """The levels low, mid, high and highest [1, C, h, w] of a real image or, without one, of the image that a
        prompt gives: features, then maps by head and token. With `projected`, the projections of each decoder by label.

        A real image of any size is cropped to the square in its centre, as by `label`, encoded, noised to `timestep`
        (None: the one the decoders were trained at) with the seed's noise, and passed through one call. The image of a
        prompt is sampled, in `steps` with this `guidance`, up to the call nearest to `timestep`.
        """
        import torch

        from datasetdm_fast.engine.loop.inversion import capture_timestep, invert_at
        from datasetdm_fast.engine.pictures.framing import crop_square, pictures_in_memory
        from datasetdm_fast.kernels import pyramid

        size, training = self.engine.model.size, int(self.engine.model.scheduler.get("num_train_timesteps", 1000))
        if image is None and not prompt:
            raise Refused("features: neither an image nor a prompt was given", "Give one of them.")
        if projected and not self.engine.decoders:
            raise Refused("projected: this pipeline has no decoders", "Name a folder with some: decoder=DIR.")
        if timestep is None:
            configs = {label: decoder.config for label, decoder in self.engine.decoders.items()}
            timestep = capture_timestep(configs) if configs else 0
        if not (isinstance(timestep, Integral) and 0 <= timestep < training):
            raise Refused(
                f"timestep: {timestep} is no whole number within 0 .. {training - 1}",
                "Choose one of the model's training timesteps.",
            )
        text, seed = _line(prompt, "prompt"), check_seed(seed)
        words = prompts.fit_prompt(text, self.engine.model.tokenizer, "prompt")
        if image is None:
            check_numbers(steps=steps, guidance=guidance)
            with self._turn:
                capture = self._sampled_capture(words, timestep, seed, steps, guidance, is_raw=not projected)
        else:
            shown = torch.from_numpy(crop_square(pictures_in_memory([image]).whole(0), size))[None]
            with self._turn:
                (capture,) = invert_at(self.engine, shown, [words], [timestep], [seed], is_raw=not projected)
        if not projected:
            assert isinstance(capture, Capture)  # as it was requested raw
            levels = zip(LEVELS, capture.features, capture.maps)  # maps by layer, head and token
            return {name: torch.cat([*parts, *map(pyramid.planes, maps)], 1) for name, parts, maps in levels}
        decoders, levels = self.engine.decoders, self.engine.model.levels
        # inference tensors, which nothing can be trained on; copies can
        sums = {label: decoders[label].level_sums(capture.of(label), levels) for label in self.tasks}
        return {label: {name: total.clone() for name, total in levels.items()} for label, levels in sums.items()}

    def _sampled_capture(
        self, prompt: str, timestep: int, seed: int, steps: int, guidance: float, *, is_raw: bool
    ) -> AnyCapture:
        """The capture of one image on its way from noise."""
        from datasetdm_fast.engine.sampling.schedule import SamplerState, make_schedule

        engine = self.engine
        model = engine.model
        sampler, count = model.defaults.sampler, steps or model.defaults.steps
        schedule = make_schedule(model.scheduler, sampler, count, "0.3.0", **model.flow)
        (last,) = capture_calls(schedule, {"": (timestep,)})[""]
        guidance = guidance or model.scale or model.defaults.guidance
        text = call_text(engine, [prompt], guidance)
        beginning = FROM_NOISE.begin(engine, schedule, [Request(0, prompt, seed)])
        scale = scale_at(model, guidance)
        state = SamplerState(schedule, scale, beginning.latents, beginning.noise)
        for call, time in enumerate(schedule.timesteps[:last]):
            state.step(call, engine.denoise(state.latents, time, text))
        capturing = engine.denoise_and_capture_raw if is_raw else engine.denoise_and_capture
        return capturing(state.latents, schedule.timesteps[last], text)[1]


def _negatives(negative: str | Iterable[str] | None) -> Iterable[str]:
    """The negative prompt of each image."""
    if isinstance(negative, str | None):
        return repeat(negative or "")
    return as_texts("negative_prompt", negative)


class _CheckedFirst(list[str]):
    """Prompts that are all checked before the first image is made."""


def _check_options(size: int, options: dict[str, Any]) -> None:
    """Refuses a size and options of engines that are none, before anything is read."""
    if unknown := [name for name in options if name not in ENGINE_OPTIONS]:
        alike = nearest(unknown[0].removeprefix("torch_"), ENGINE_OPTIONS)
        raise TypeError(f"{unknown[0]!r} is no option here{alike}, expected {', '.join(ENGINE_OPTIONS)}")
    check_size(size)
    check_choices(**{name: options[name] for name in ("outlines", "provider") if name in options})
    check_numbers(**{name: options[name] for name in ("threads", "streams") if name in options})


def _several(name: str, values: Iterable[Any], expected: str, kinds: type | tuple[type, ...] = str) -> tuple[Any, ...]:
    """Texts of a caller as a tuple; one text in the place of several is refused, and what is no text."""
    if isinstance(values, kinds):
        text = str(values)
        raise Refused(f"{name}: {text!r} is one string, expected a sequence of {expected}", f"Write ({text!r},).")
    items = tuple(check_iterable(name, values, f"a sequence of {expected}"))
    for item in items:
        if not isinstance(item, kinds):
            raise Refused(f"{name}: {item!r} is not a text", f"Give a sequence of {expected}.")
    return items


def _check_text(text: object, where: str) -> None:
    if not isinstance(text, str):
        raise Refused(f"{where}: {text!r} is not a text", "Give a text for every image.")


def _line(text: str, where: str) -> str:
    """A text of a caller on one line, checked."""
    _check_text(text, where)
    return check_line(text, where)


def _batches(requests: Iterator[Request], size: int) -> Iterator[Batch]:
    """Batches of `size`; where a request is refused, a batch of those before it comes first."""
    for index in count():
        members: list[Request] = []
        refusal = None
        try:
            for request in islice(requests, size):
                members.append(request)
        except Exception as error:
            refusal = error
        if members:
            yield Batch(index, tuple(members), size - len(members))
        if refusal is not None:
            raise refusal
        if not members:
            return
