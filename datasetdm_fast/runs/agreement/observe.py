"""How far one engine is from another, stage by stage: the same requests through both, image by image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.config import ATTENTION
from datasetdm_fast.data import Annotation, AnyCapture, AttentionSums, Capture, ProjectedCapture, Request, Text
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.labels import kind_of, with_outlines
from datasetdm_fast.engine.loop.calls import CapturedCalls, SpeedCalls
from datasetdm_fast.engine.loop.class_prompts import attention_recipe
from datasetdm_fast.engine.loop.driver import BatchGenerator
from datasetdm_fast.engine.loop.labelling import attention_labels, postprocess
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.engine.models.packed import copy_in_dtype
from datasetdm_fast.engine.sampling.schedule import ImageNoise, ReferenceSampler, SamplerState
from datasetdm_fast.stages import LEVELS

ROUNDING = 1e-5  # relative change of what a decoder reads: as much as the limit of `level` allows in fp32
PERTURBATIONS = 4  # times that it is changed


@dataclass(frozen=True)
class Observation:
    """All outputs of one engine for a batch, on the CPU."""

    text: Text  # the rows of a call
    seen: tuple[Tensor, ...]  # the latents of each call
    outputs: tuple[Tensor, ...]  # [R, C, h, w] of each call
    sampler_latents: tuple[Tensor, ...]  # the latents after each call, as the sampler makes them of the outputs
    latents: Tensor  # after the last call
    levels: dict[str, list[Tensor]]  # level -> what the decoders read of it, [B, F, h, w] each
    decoder_outputs: dict[str, dict[str, Tensor]]  # raw outputs of each task's decoder
    labels: dict[str, list[Annotation]]
    images: np.ndarray  # [B, H, W, 3] uint8
    # where labels are read from attention: the class prompts, a row an image, and the averages over all calls
    class_text: Text | None = None
    averages: AttentionSums | None = None
    perturbed: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)  # raw outputs of perturbed captures


def observe(
    engine,
    requests: Sequence[Request],
    recipe: Recipe,
    truth: Observation | None = None,
    on_unet_call: Callable[[], None] = lambda: None,
    sampler: type[ReferenceSampler] | type[SamplerState] = ReferenceSampler,
    perturbations: int = 0,
) -> Observation:
    """One batch, free-running or with every input from `truth`; `perturbations` are captures changed by rounding."""
    generator = BatchGenerator(engine, recipe, on_unet_call)
    noise = ImageNoise([request.seed for request in requests], engine.model.latent_shape(), engine.device)
    latents = noise.draw() * recipe.schedule.noise_scale
    copy_here = partial(torch.Tensor.to, device=engine.device, copy=True)
    if truth is None:
        text, class_text = generator.encode_prompts(requests)
    else:
        text, latents = truth.text.map(copy_here), truth.seen[0].to(engine.device)
        class_text = truth.class_text and truth.class_text.map(copy_here)
    sums = generator.zero_attention_sums(len(requests))
    state = sampler(recipe.schedule, recipe.guidance, latents, noise.draw)
    seen, outputs, sampler_latents, captures = [], [], [], []
    read, others = CapturedCalls(engine, recipe.captures), SpeedCalls(engine, recipe.cached, recipe.fp8)
    for call, timestep in enumerate(recipe.schedule.timesteps):
        latents = state.latents if truth is None else truth.seen[call].to(engine.device)
        if call in recipe.captured:
            output, capture = engine.denoise_and_capture(latents, timestep, text)
            captures.append(capture)
            read.add(call, capture)
        if sums is not None:
            averaged, sums = engine.denoise_and_average(latents, timestep, text, class_text, sums)
        if call not in recipe.taken_on:
            output = averaged if sums is not None else others.denoise(call, latents, timestep, text)
        seen.append(latents.cpu())
        outputs.append(output.float().cpu())
        sampler_latents.append(
            state.step(call, output if truth is None else truth.outputs[call].to(engine.device)).cpu()
        )
        on_unet_call()

    queries = [recipe.query_words(request) for request in requests]

    def decode(task: str, capture: AnyCapture) -> dict[str, Tensor]:
        return engine.annotate(task, capture, generator.embed_words(task, queries))

    raw = {task: decode(task, read.read[task]) for task in recipe.decoded}
    decoder_outputs = {task: _to_host(value) for task, value in raw.items()}
    perturbed = {
        task: [_to_host(decode(task, perturb_capture(capture, seed))) for seed in range(perturbations)]
        for task, capture in read.read.items()
    }
    latents = state.latents if truth is None else truth.latents.to(engine.device)
    images = engine.decode_image(latents).cpu().numpy()
    labels = {
        task: with_outlines(postprocess(requests, answer, config, recipe, engine.model.tokenizer), images, config)
        for task, answer in raw.items()
        for config in [engine.decoders[task].config]
    }
    averages = sums and sums.over(len(recipe.schedule))
    if averages is not None:
        labels[ATTENTION] = attention_labels(requests, averages, engine, recipe)
    return Observation(
        text.to("cpu"),
        tuple(seen),
        tuple(outputs),
        tuple(sampler_latents),
        latents.cpu(),
        level_tensors(engine, captures),
        decoder_outputs,
        labels,
        images,
        class_text and class_text.to("cpu"),
        averages and averages.to("cpu"),
        perturbed,
    )


def _to_host(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float().cpu() for name, value in outputs.items()}


def perturb_capture(capture: AnyCapture, seed: int) -> AnyCapture:
    """What decoders read, every number of it changed by about ROUNDING."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(values: Iterable[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            value * (1 + ROUNDING * torch.randn(value.shape, generator=generator).to(value.device)) for value in values
        )

    if isinstance(capture, ProjectedCapture):
        return replace(capture, sums=perturb(capture.sums))
    return Capture(*(tuple(map(perturb, kind)) for kind in (capture.features, capture.maps)))


def level_tensors(engine, captures: Iterable[AnyCapture]) -> dict[str, list[Tensor]]:
    """Per level the projected sums of every decoder, or without decoders the features and maps themselves."""
    levels: dict[str, list[Tensor]] = {name: [] for name in LEVELS}
    for capture in captures:
        if not engine.decoders:
            for name, features, maps in zip(LEVELS, capture.features, capture.maps):
                levels[name] += [value.float().cpu() for value in (*features, *maps)]
        for task, decoder in engine.decoders.items():
            for name, total in decoder.level_sums(capture.of(task), engine.model.levels).items():
                levels[name].append(total.float().cpu())
    return levels


class Rounded(TorchEngine):
    """The reference engine with its UNet and autoencoder stored in fewer bits: what that precision alone costs."""

    name = "rounded"

    def __init__(self, engine: TorchEngine, dtype: torch.dtype):
        model, self.dtype = engine.model, dtype
        names = [model.backbone.denoiser, *model.backbone.of_kind("vae")]
        if "fp16" not in model.backbone.halves:  # then the fast engine stores all parts so
            names += [name for name in model.backbone.of_kind("text_encoder") if name in model.networks]
        parts = {name: copy_in_dtype(model.networks[name].module, engine.device, dtype) for name in names}
        super().__init__(model.with_modules(**parts), engine.decoders, device=str(engine.device))

    def encode_text(self, prompts: Sequence[str]) -> Text:
        return super().encode_text(prompts).cast(torch.float32)

    def denoise(self, latents: Tensor, timestep: float, text: Text) -> Tensor:
        return super().denoise(latents.to(self.dtype), timestep, text.cast(self.dtype)).float()

    def denoise_and_keep(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Tensor]:
        noise, deep = super().denoise_and_keep(latents.to(self.dtype), timestep, text.cast(self.dtype))
        return noise.float(), deep

    def denoise_from(self, deep: Tensor, latents: Tensor, timestep: float, text: Text) -> Tensor:
        return super().denoise_from(deep, latents.to(self.dtype), timestep, text.cast(self.dtype)).float()

    def denoise_and_capture(self, latents: Tensor, timestep: float, text: Text) -> tuple[Tensor, Capture]:
        noise, capture = super().denoise_and_capture(latents.to(self.dtype), timestep, text.cast(self.dtype))
        return noise.float(), capture.to(torch.float32)

    def denoise_and_average(
        self, latents: Tensor, timestep: float, text: Text, class_text: Text, sums: AttentionSums
    ) -> tuple[Tensor, AttentionSums]:
        rounded, class_rounded = text.cast(self.dtype), class_text.cast(self.dtype)
        noise, sums = super().denoise_and_average(latents.to(self.dtype), timestep, rounded, class_rounded, sums)
        return noise.float(), sums

    def decode_and_check(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return super().decode_and_check(latents.to(self.dtype))


TINY = 1e-30
AVERAGES = "averages of attention"
CONCEPTS = 4  # tokens of a prompt that stand for concepts


def relative(value: Tensor, truth: Tensor) -> np.ndarray:
    """Relative L2 of each image [B]; a value that is no number counts as infinitely far."""
    difference = (value.double() - truth.double()).flatten(1).norm(dim=1) / truth.double().flatten(1).norm(dim=1).clamp(
        min=TINY
    )
    return difference.nan_to_num(nan=float("inf")).numpy()


def by_image(rows: Tensor, images: int) -> Tensor:
    """The rows of a call [R, ...] as [B, R / B, ...]."""
    return rows.unflatten(0, (-1, images)).transpose(0, 1)


def image_distance(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root mean square difference over the range: 0.01 is a PSNR of 40 dB."""
    return np.sqrt(((images.astype(np.float64) - truth) ** 2).mean((1, 2, 3))) / 255


def teacher_forced_distances(observed: Observation, truth: Observation) -> dict[str, np.ndarray]:
    """Stage by stage, every stage with the same input: name -> one number an image, or one an image and call."""
    calls = [
        relative(by_image(value, len(truth.latents)), by_image(expected, len(truth.latents)))
        for value, expected in zip(observed.outputs, truth.outputs, strict=True)
    ]
    steps = [
        relative(value, expected)
        for value, expected in zip(observed.sampler_latents, truth.sampler_latents, strict=True)
    ]
    levels = {
        f"level {name}": np.max(
            [relative(value, expected) for value, expected in zip(observed.levels[name], tensors, strict=True)], 0
        )
        for name, tensors in truth.levels.items()
        if tensors
    }
    outputs = {
        f"outputs {task}": _farthest(observed.decoder_outputs[task], outputs)
        for task, outputs in truth.decoder_outputs.items()
    }
    averages = {} if truth.averages is None else {AVERAGES: averages_distance(observed.averages, truth.averages)}
    image = {"image": image_distance(observed.images, truth.images)}
    return {
        "call": np.concatenate(calls),
        "sampler": np.concatenate(steps),
        **levels,
        **outputs,
        **averages,
        **_label_distances("", observed, truth),
        **image,
    }


def free_running_distances(observed: Observation, truth: Observation) -> dict[str, np.ndarray]:
    """Each engine on its own from the same noise and prompt."""
    images = len(truth.latents)
    texts = [relative(by_image(observed.text.context, images), by_image(truth.text.context, images))]
    if observed.class_text and truth.class_text:
        texts.append(relative(observed.class_text.context, truth.class_text.context))
    distances = {"text": np.max(texts, 0), "free latents": relative(observed.latents, truth.latents)}
    return distances | {
        "free image": image_distance(observed.images, truth.images),
        **_label_distances("free ", observed, truth),
    }


def encoded_distance(engine, reference, images: np.ndarray) -> dict[str, np.ndarray]:
    """Of the latents that both make of the same images [B, H, W, 3]."""
    pixels = torch.from_numpy(images)
    latents = [each.encode_image(pixels).float().cpu() for each in (engine, reference)]
    return {"encoded image": relative(*latents)}


def rounding_distances(truth: Observation) -> dict[str, np.ndarray]:
    """How far decoders' outputs move by rounding of what they read: a flipped cell of a mask moves a whole answer."""
    return {
        f"outputs {task}": np.concatenate([_farthest(outputs, truth.decoder_outputs[task]) for outputs in runs])
        for task, runs in truth.perturbed.items()
        if runs
    }


def _farthest(observed: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> np.ndarray:
    """Of each image, the distance of the output that is farthest."""
    return np.max([relative(observed[name], value) for name, value in truth.items()], 0)


def averages_distance(observed: AttentionSums, truth: AttentionSums) -> np.ndarray:
    return np.maximum(relative(observed.cells, truth.cells), relative(observed.tokens, truth.tokens))


def averaged_distance(engine, reference, truth: Observation, recipe: Recipe) -> dict[str, np.ndarray]:
    """Of the averages of attention in the last call; the prompts stand for the class prompts, and where labels are read
    from the attention of one call their first tokens for concepts, too.
    """
    model, few = reference.model, slice(CONCEPTS)
    has_text_maps = model.backbone.has_text_maps
    settings = attention_recipe(model.defaults.attention, model.levels[0 if has_text_maps else -1].side)
    wordless = replace(recipe, attention=settings, words=())  # the class words are not asked for

    def averages(compared, is_concept: bool) -> AttentionSums:
        generator = BatchGenerator(compared, wordless, lambda: None)
        latents, text = truth.seen[-1].to(compared.device), truth.text.to(compared.device)
        nothing, words = generator.zero_attention_sums(len(latents)), text[-len(latents) :].map(torch.clone)
        if is_concept:
            nothing = AttentionSums(nothing.cells, nothing.tokens[..., few])
            words = Text(words.context[:, few], concepts=CONCEPTS)
        _, sums = compared.denoise_and_average(latents, recipe.schedule.timesteps[-1], text, words, nothing)
        return sums.to("cpu")

    kinds = (False, True) if model.defaults.attention.concept_blocks else (False,)
    distances = [averages_distance(averages(engine, kind), averages(reference, kind)) for kind in kinds]
    return {AVERAGES: np.max(distances, 0)}


def _label_distances(prefix: str, observed: Observation, truth: Observation) -> dict[str, np.ndarray]:
    return {
        f"{prefix}{task}": np.array(
            [
                kind_of(task).distance(value, expected)
                for value, expected in zip(observed.labels[task], labels, strict=True)
            ]
        )
        for task, labels in truth.labels.items()
    }
