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
from datasetdm_fast.stages import FACTOR

TINY = 1e-30
AVERAGES = "averages of attention"


def relative(value: Tensor, truth: Tensor) -> np.ndarray:
    """Relative L2 of each image [B]; a value that is no number counts as infinitely far."""
    difference = (value.double() - truth.double()).flatten(1).norm(dim=1) / truth.double().flatten(1).norm(dim=1).clamp(
        min=TINY
    )
    return difference.nan_to_num(nan=float("inf")).numpy()


def by_image(noise: Tensor) -> Tensor:
    """A CFG batch [2B, ...] as [B, 2, ...]."""
    return noise.unflatten(0, (2, -1)).transpose(0, 1)


def image_distance(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root mean square difference over the range: 0.01 is a PSNR of 40 dB."""
    return np.sqrt(((images.astype(np.float64) - truth) ** 2).mean((1, 2, 3))) / 255


def teacher_forced_distances(found: Observation, truth: Observation) -> dict[str, np.ndarray]:
    """Stage by stage, every stage given the same input: name -> one number an image, or one an image and call."""
    calls = [
        relative(by_image(value), by_image(right)) for value, right in zip(found.outputs, truth.outputs, strict=True)
    ]
    steps = [relative(value, right) for value, right in zip(found.walked, truth.walked, strict=True)]
    levels = {
        f"level {name}": np.max(
            [relative(value, right) for value, right in zip(found.levels[name], tensors, strict=True)], 0
        )
        for name, tensors in truth.levels.items()
        if tensors
    }
    outputs = {f"outputs {task}": _farthest(found.answers[task], answer) for task, answer in truth.answers.items()}
    averages = {} if truth.averages is None else {AVERAGES: averages_distance(found.averages, truth.averages)}
    image = {"image": image_distance(found.images, truth.images)}
    return {
        "call": np.concatenate(calls),
        "sampler": np.concatenate(steps),
        **levels,
        **outputs,
        **averages,
        **_label_distances("", found, truth),
        **image,
    }


def free_running_distances(found: Observation, truth: Observation) -> dict[str, np.ndarray]:
    """Each engine on its own from the same noise and prompt."""
    texts = [relative(by_image(found.context), by_image(truth.context))]
    if truth.class_context is not None:
        texts.append(relative(found.class_context, truth.class_context))
    distances = {
        "text": np.max(texts, 0),
        "free latents": relative(found.latents, truth.latents),
    }
    return distances | {
        "free image": image_distance(found.images, truth.images),
        **_label_distances("free ", found, truth),
    }


def encoded_distance(engine, reference, images: np.ndarray) -> dict[str, np.ndarray]:
    """Of the latents that both make of the same images [B, H, W, 3]."""
    given = torch.from_numpy(images)
    return {"encoded image": relative(*(one.encode_image(given).float().cpu() for one in (engine, reference)))}


def rounding_distances(truth: Observation) -> dict[str, np.ndarray]:
    """How far the decoders' own answers move where what they read is changed by rounding alone: a mask that flips one
    cell of what a query may see moves its whole answer.
    """
    return {
        f"outputs {task}": np.concatenate([_farthest(answer, truth.answers[task]) for answer in answers])
        for task, answers in truth.shaken.items()
        if answers
    }


def _farthest(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> np.ndarray:
    """Of each image, the distance of the output that is farthest."""
    return np.max([relative(found[name], value) for name, value in truth.items()], 0)


def averages_distance(found: AttentionSums, truth: AttentionSums) -> np.ndarray:
    return np.maximum(relative(found.cells, truth.cells), relative(found.tokens, truth.tokens))


def averaged_distance(engine, reference, truth: Observation, recipe: Recipe) -> dict[str, np.ndarray]:
    """Of the averages that both make of the attention in the last call, as labels without decoders need them; the
    prompts stand for the class prompts.
    """
    settings = attention_recipe(reference.model.defaults.attention, recipe.size // FACTOR)
    wordless = replace(recipe, attention=settings, words=())  # the class words are not asked for

    def averages(one) -> AttentionSums:
        generator = BatchGenerator(one, wordless, lambda: None)
        latents, context = truth.seen[-1].to(one.device), truth.context.to(one.device)
        nothing, words = generator.zero_attention_sums(len(latents)), context.chunk(2)[1].clone()
        _, found = one.denoise_and_average(latents, recipe.schedule.timesteps[-1], context, words, nothing)
        return found.to("cpu")

    return {AVERAGES: averages_distance(averages(engine), averages(reference))}


def _label_distances(prefix: str, found: Observation, truth: Observation) -> dict[str, np.ndarray]:
    return {
        f"{prefix}{task}": np.array(
            [kind_of(task).distance(value, right) for value, right in zip(found.labels[task], labels, strict=True)]
        )
        for task, labels in truth.labels.items()
    }
