"""Labels of existing pictures: noise is added to them, and the U-Net reads them, as one square or tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from datasetdm_fast.config import ATTENTION, INVERSION
from datasetdm_fast.data import Annotation, Batch, Quarantined, Request, Sample, SemanticMap
from datasetdm_fast.engine.labels.class_tables import find_classes, photo_of, spoken
from datasetdm_fast.engine.labels.tiles import Tiling, joined_instances, joined_map
from datasetdm_fast.engine.loop import driver, labelling
from datasetdm_fast.engine.loop.calls import CapturedCalls, trained_calls
from datasetdm_fast.engine.loop.prompts import PromptLine, fit_prompt
from datasetdm_fast.engine.loop.recipe import Recipe, check_iterable, labellers_of, name_timesteps
from datasetdm_fast.engine.pictures import framing
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.engines import Engine

TRAINING_STEPS = 1000  # of every model
UNCAPTIONED = photo_of(())


class InvertedPictures(Protocol):
    """Pictures by their index."""

    @property
    def names(self) -> Sequence[str]: ...

    def whole(self, index: int) -> np.ndarray: ...  # [H, W, 3] uint8


class InvertingGenerator(driver.BatchGenerator):
    """Adds noise to pictures at the timesteps of the decoders, and at several for labels from attention."""

    def __init__(self, *arguments: Any, pictures: InvertedPictures):
        super().__init__(*arguments)
        self.pictures, self.timesteps = pictures, self.recipe.facts["timesteps"]

    def sample(self, batch: Batch) -> Any:
        import torch

        pictures = (self.pictures.whole(request.index) for request in batch.padded)
        squares = [framing.crop_square(picture, self.recipe.size) for picture in pictures]
        return self.invert(batch.padded, torch.from_numpy(np.stack(squares)))

    def invert(self, requests: Sequence[Request], pixels: Tensor) -> labelling.SampledBatch:
        """Captures and averages of squares [B, H, W, 3] uint8, one of each request."""
        from datasetdm_fast.engine.sampling.schedule import ImageNoise, add_noise
        from datasetdm_fast.kernels.transfer import to_device

        engine, recipe = self.engine, self.recipe
        pixels = to_device(pixels, engine.device)  # where labellers of other packages read them, too
        clean = engine.encode_image(pixels)
        text, words = self.encode_prompts(requests)
        sums = self.zero_attention_sums(len(requests))
        noise = ImageNoise([request.seed for request in requests], clean.shape[1:], clean.device).draw()
        captures = CapturedCalls(engine, recipe.captures)
        for call, timestep in enumerate(recipe.inverted):
            latents = add_noise(engine.model.scheduler, clean, noise, timestep)
            denoise = engine.denoise_and_capture_raw if call in recipe.raw else engine.denoise_and_capture
            captures.add(call, denoise(latents, timestep, text)[1])
            self.on_unet_call()
        for timestep in self.timesteps:
            if sums is None or words is None:
                break
            latents = add_noise(engine.model.scheduler, clean, noise, timestep)
            _, sums = engine.denoise_and_average(latents, timestep, text, words, sums)
            self.on_unet_call()
        return labelling.SampledBatch(clean, captures.read, sums and sums.over(len(self.timesteps)), pixels=pixels)

    def label(self, batch: Batch, sampled: Any) -> list[Sample | Quarantined]:
        names = self.pictures.names
        return [
            replace(result, provenance={**result.provenance, "picture": names[result.request.index]})
            if isinstance(result, Sample)
            else result
            for result in super().label(batch, sampled)
        ]


class TilingGenerator(InvertingGenerator):
    """Labels pictures tile by tile, `together` tiles of a picture at a time."""

    def __init__(self, *arguments: Any, together: int, **options: Any):
        super().__init__(*arguments, **options)
        self.together = together

    def sample(self, batch: Batch) -> Any:
        """The labelled pictures: the captures of many tiles would not fit beside each other."""
        return [self._label_picture(request) for request in batch.requests]

    def label(self, batch: Batch, sampled: Any) -> list[Sample | Quarantined]:
        return [*sampled]

    def _label_picture(self, request: Request) -> Sample | Quarantined:
        image, size = self.pictures.whole(request.index), self.recipe.size
        tiling = Tiling.of(image.shape[:2], size)
        picture = Picture("", image, "")
        squares = [
            framing.frame_picture(picture, framing.Window(left, top, size / tiling.side), size).image
            for top, left in tiling.corners
        ]
        samples: list[Sample] = []
        maps: list[Tensor] = []
        for start in range(0, len(squares), self.together):
            results, maps_of_tiles = self._label_tiles(request, squares[start : start + self.together])
            for result in results:
                if isinstance(result, Quarantined):
                    return result
                samples.append(result)
            maps += maps_of_tiles
        labels = {task: self._join(task, request, tiling, samples, maps) for task in self.recipe.tasks}
        facts = {"picture": self.pictures.names[request.index], "sides": list(tiling.sides), "tiles": len(squares)}
        sample = Sample(request, image, labels, {**samples[0].provenance, **facts})
        return labelling.with_trust(sample, self.recipe)

    def _label_tiles(
        self, request: Request, squares: Sequence[np.ndarray]
    ) -> tuple[list[Sample | Quarantined], list[Tensor]]:
        """Some tiles labelled, each as a picture of its own, and their maps of attention."""
        import torch

        from datasetdm_fast.engine.tasks.attention import spread_maps

        batch = Batch(0, (request,) * len(squares), self.together - len(squares))
        padded = [*squares, *[squares[-1]] * batch.padding]
        sampled = self.invert(batch.padded, torch.from_numpy(np.stack(padded)))
        maps: list[Tensor] = []
        if sampled.averages is not None and self.recipe.attention:
            columns = [places for _, places in self.recipe.class_columns(request, self.engine.model.tokenizer)]
            maps = spread_maps(sampled.averages, [columns] * len(padded), self.recipe.attention.exponent)
        return driver.BatchGenerator.label(self, batch, sampled), maps[: len(squares)]

    def _join(
        self, task: str, request: Request, tiling: Tiling, samples: Sequence[Sample], maps: Sequence[Tensor]
    ) -> Annotation:
        labels: list[Any] = [sample.annotations[task] for sample in samples]
        if task == ATTENTION and self.recipe.attention:
            from datasetdm_fast.engine.tasks.attention import joined_label

            numbers = [1 + self.recipe.words.index(word) for word in self.recipe.query_words(request)]
            limits = self.recipe.attention.threshold, self.recipe.attention.uncertainty
            return joined_label(tiling, maps, numbers, labels[0].classes, *limits)
        return (joined_map if isinstance(labels[0], SemanticMap) else joined_instances)(tiling, labels)


def inversion_recipe(recipe: Recipe, engine: Engine, timesteps: Sequence[int]) -> Recipe:
    """The recipe for existing pictures: attention is read at `timesteps`, others at those of their decoders."""
    expected = "several of the model's training timesteps"
    timesteps = list(check_iterable("timesteps", timesteps, expected)) if recipe.attention else []
    training = int(engine.model.scheduler.get("num_train_timesteps", TRAINING_STEPS))
    is_whole = all(isinstance(time, Integral) and 0 <= time < training for time in timesteps)
    if recipe.attention and not (timesteps and is_whole):
        raise Refused(
            f"timesteps: {documents.quote(timesteps)}, expected whole numbers from 0 to {training - 1}, one at least",
            "Choose some of the model's training timesteps, such as 100, 300 and 500.",
        )
    timesteps = list(map(int, timesteps))
    configs = labellers_of(engine, recipe.tasks) | {task: engine.decoders[task].config for task in recipe.decoded}
    inverted, captures = trained_calls({task: configs[task] for task in recipe.captures})
    facts = {
        **recipe.facts,
        "sampler": INVERSION,
        "steps": len(timesteps),
        "calls": len(timesteps) + len(inverted),
        "capture_timestep": name_timesteps(captures, inverted, 0),
        "timesteps": timesteps,
    }
    return replace(recipe, facts=facts, draws=(), captures=captures, inverted=inverted, uncaptioned=UNCAPTIONED)


def inversion_generator(pictures: InvertedPictures, together: int = 0) -> Callable[..., InvertingGenerator]:
    """The generator of these pictures' labels; with `together`, so many tiles of a picture at a time."""
    kind = partial(TilingGenerator, together=together) if together else InvertingGenerator
    return partial(kind, pictures=pictures)


def picture_prompt(caption: str, recipe: Recipe, words: Sequence[str], engine: Engine, name: str) -> PromptLine:
    """The caption of a picture and the classes it names; without a caption a text that names none, as decoders look at
    the words of a text, unless attention to these words themselves is read.
    """
    if caption:
        return PromptLine(
            0, fit_prompt(caption, engine.model.tokenizer, name, words), find_classes(caption, words, recipe.table)
        )
    if recipe.attention is None or not recipe.attention.blocks:
        return PromptLine(0, UNCAPTIONED, ())
    text = photo_of(spoken(recipe.words, recipe.table))
    return PromptLine(0, fit_prompt(text, engine.model.tokenizer, "--classes"), recipe.words)
