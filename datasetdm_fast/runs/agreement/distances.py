"""Distances between tensors, images and labels of two engines."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from datasetdm_fast.data import AttentionSums
from datasetdm_fast.engine.labels import kind_of
from datasetdm_fast.engine.loop.class_prompts import attention_recipe
from datasetdm_fast.engine.loop.driver import BatchGenerator
from datasetdm_fast.engine.loop.recipe import Recipe
from datasetdm_fast.runs.agreement.observe import Observation

TINY = 1e-30
AVERAGES = "averages of attention"


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
    distances = {
        "text": np.max(texts, 0),
        "free latents": relative(observed.latents, truth.latents),
    }
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
    """How far the decoders' outputs move where what they read is changed by rounding alone: a mask that flips one
    cell of what a query may see moves its whole answer.
    """
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
    """Of the averages that both make of the attention in the last call, as labels without decoders need them; the
    prompts stand for the class prompts.
    """
    settings = attention_recipe(reference.model.defaults.attention, reference.model.levels[-1].side)
    wordless = replace(recipe, attention=settings, words=())  # the class words are not asked for

    def averages(compared) -> AttentionSums:
        generator = BatchGenerator(compared, wordless, lambda: None)
        latents, text = truth.seen[-1].to(compared.device), truth.text.to(compared.device)
        nothing, words = generator.zero_attention_sums(len(latents)), text[-len(latents) :].map(torch.clone)
        _, sums = compared.denoise_and_average(latents, recipe.schedule.timesteps[-1], text, words, nothing)
        return sums.to("cpu")

    return {AVERAGES: averages_distance(averages(engine), averages(reference))}


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
