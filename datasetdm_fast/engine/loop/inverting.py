"""What brings pictures back into the network and reads their labels: as one square, or tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

from datasetdm_fast.config import ATTENTION, INVERSION
from datasetdm_fast.data import Annotation, Batch, Quarantined, Request, Sample, SemanticMap
from datasetdm_fast.engine.labels.class_tables import spoken
from datasetdm_fast.engine.labels.tiles import Tiling, joined_instances, joined_map
from datasetdm_fast.engine.labels.words import find_classes
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.class_prompts import columns
from datasetdm_fast.engine.loop.prompts import PromptLine, fit_prompt
from datasetdm_fast.engine.loop.recipe import Recipe, labellers_of
from datasetdm_fast.engine.pictures import framing, reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from datasetdm_fast.engine.engines.engine import Engine

TRAINING_STEPS = 1000  # of every model
TIMESTEPS = (100, 200, 300, 400)  # noise levels at which labels are read from the attention of a picture


class PictureSource(Protocol):
    """Pictures by their index; what is read tile by tile also has `whole`."""

    def load(self, index: int, size: int) -> np.ndarray:  # [size, size, 3] uint8
        ...


class InvertingGenerator(driver.BatchGenerator):
    """Brings pictures back: noise is added at the decoders' timestep, and at several for the attention."""

    def __init__(self, *arguments: Any, pictures: PictureSource, timesteps: Sequence[int], capture: int):
        super().__init__(*arguments)
        self.pictures, self.timesteps, self.capture = pictures, timesteps, capture

    def sample(self, batch: Batch) -> driver.SampledBatch:
        import numpy as np
        import torch

        squares = [self.pictures.load(each.index, self.recipe.size) for each in batch.padded]
        return self.inverted(batch.padded, torch.from_numpy(np.stack(squares)))

    def inverted(self, requests: Sequence[Request], pixels: Tensor) -> driver.SampledBatch:
        """Captures and averages of squares [B, H, W, 3] uint8, one of each request."""
        import torch

        from datasetdm_fast.engine.sampling import times
        from datasetdm_fast.kernels.to_device import to_device

        engine, recipe = self.engine, self.recipe
        pixels = to_device(pixels, engine.device)  # where labellers of other packages read them, too
        clean = engine.encode_image(pixels)
        context, words = self.contexts(requests)
        sums = self.nothing_yet(len(requests))
        noise = to_device(
            torch.stack([times.initial_noise(each.seed, *clean.shape[1:]) for each in requests]), clean.device
        )
        captures = {}
        if recipe.captures:
            latents = times.add_noise(engine.model.scheduler, clean, noise, self.capture)
            capturing = engine.denoise_and_capture_raw if recipe.raw else engine.denoise_and_capture
            _, capture = capturing(latents, self.capture, context)
            captures = dict.fromkeys(recipe.captured, capture)
            self.on_unet_call()
        for timestep in self.timesteps if sums is not None else ():
            latents = times.add_noise(engine.model.scheduler, clean, noise, timestep)
            _, sums = engine.denoise_and_average(latents, timestep, context, words, sums)
            self.on_unet_call()
        return driver.SampledBatch(clean, captures, sums and sums.over(len(self.timesteps)), pixels)

    def label(self, batch: Batch, drawn: driver.SampledBatch) -> list[Sample | Quarantined]:
        names = self.pictures.names
        return [
            replace(one, provenance={**one.provenance, "picture": names[one.request.index]})
            if isinstance(one, Sample)
            else one
            for one in super().label(batch, drawn)
        ]


class TilingGenerator(InvertingGenerator):
    """Brings pictures back tile by tile, `together` of them at once, whatever else is in their batch."""

    def __init__(self, *arguments: Any, together: int, **chosen: Any):
        super().__init__(*arguments, **chosen)
        self.together = together

    def sample(self, batch: Batch) -> list[Sample | Quarantined]:
        """The labelled pictures: the captures of many tiles would not fit beside each other."""
        return [self._picture(request) for request in batch.requests]

    def label(self, batch: Batch, drawn: list[Sample | Quarantined]) -> list[Sample | Quarantined]:
        return drawn

    def _picture(self, request: Request) -> Sample | Quarantined:
        image, size = self.pictures.whole(request.index), self.recipe.size
        tiling = Tiling.of(image.shape[:2], size)
        picture = Picture("", image, "")
        squares = [
            framing.framed(picture, framing.Window(left, top, size / tiling.side), size).image
            for top, left in tiling.corners
        ]
        found: list[Sample] = []
        maps: list[Tensor] = []
        for start in range(0, len(squares), self.together):
            results, own = self._tiles(request, squares[start : start + self.together])
            for one in results:
                if isinstance(one, Quarantined):
                    return one
            found += results
            maps += own
        labels = {task: self._joined(task, request, tiling, found, maps) for task in self.recipe.tasks}
        provenance = {**found[0].provenance, "picture": self.pictures.names[request.index], "sides": list(tiling.sides)}
        return driver.judged(Sample(request, image, labels, provenance | {"tiles": len(squares)}), self.recipe)

    def _tiles(
        self, request: Request, squares: Sequence[np.ndarray]
    ) -> tuple[list[Sample | Quarantined], list[Tensor]]:
        """Some tiles labelled, each as a picture of its own, and their maps of attention."""
        import numpy as np
        import torch

        from datasetdm_fast.engine.tasks.attention import spread_maps

        batch = Batch(0, (request,) * len(squares), self.together - len(squares))
        padded = [*squares, *[squares[-1]] * batch.padding]
        drawn = self.inverted(batch.padded, torch.from_numpy(np.stack(padded)))
        maps: list[Tensor] = []
        if drawn.averages is not None:
            asked = self.recipe.asked(request)
            words = self.recipe.class_prompt(request)
            by_words, own = bool(self.recipe.attention.parity), self.recipe.table
            named = columns(words, asked, self.engine.model.tokenizer, by_words=by_words, own=own)
            places = [each for _, each in named]
            maps = spread_maps(drawn.averages, [places] * len(padded), self.recipe.attention.exponent)[: len(squares)]
        return driver.BatchGenerator.label(self, batch, drawn), maps

    def _joined(
        self, task: str, request: Request, tiling: Tiling, found: Sequence[Sample], maps: Sequence[Tensor]
    ) -> Annotation:
        labels = [one.annotations[task] for one in found]
        if task == ATTENTION:
            from datasetdm_fast.engine.tasks.attention import joined_label

            numbers = [1 + self.recipe.words.index(word) for word in self.recipe.asked(request)]
            limits = self.recipe.attention.threshold, self.recipe.attention.uncertainty
            return joined_label(tiling, maps, numbers, labels[0].classes, *limits)
        return (joined_map if isinstance(labels[0], SemanticMap) else joined_instances)(tiling, labels)


def inversion_recipe(recipe: Recipe, engine: Engine, timesteps: Sequence[int]) -> Recipe:
    """A recipe of generate as one of pictures that are brought back: at these timesteps where labels are read from
    attention, and at the decoders' own.
    """
    from datasetdm_fast.engine.sampling.inversion import capture_timestep

    timesteps = list(timesteps) if recipe.attention else []
    training = int(engine.model.scheduler.get("num_train_timesteps", TRAINING_STEPS))
    is_whole = all(isinstance(one, Integral) and 0 <= one < training for one in timesteps)
    if recipe.attention and not (timesteps and is_whole):
        raise Refused(
            f"timesteps: {documents.quote(timesteps)}, expected whole numbers from 0 to {training - 1}, one at least",
            "Choose some of the model's training timesteps, such as 100, 300 and 500.",
        )
    timesteps = list(map(int, timesteps))
    configs = labellers_of(engine, recipe.tasks) | {task: engine.decoders[task].config for task in recipe.decoded}
    read = {task: config for task, config in configs.items() if task in recipe.captures}
    facts = {
        **recipe.facts,
        "sampler": INVERSION,
        "steps": len(timesteps),
        "calls": len(timesteps) + bool(read),
        "capture_timestep": capture_timestep(read) if read else 0,
        "timesteps": timesteps,
    }
    return replace(recipe, facts=facts)


def inversion_generator(
    recipe: Recipe, pictures: PictureSource, together: int = 0
) -> Callable[..., InvertingGenerator]:
    """What brings these pictures back by such a recipe; with `together`, so many tiles of a picture at once."""
    facts = recipe.facts
    chosen = {"pictures": pictures, "timesteps": tuple(facts["timesteps"]), "capture": facts["capture_timestep"]}
    if together:
        return partial(TilingGenerator, together=together, **chosen)
    return partial(InvertingGenerator, **chosen)


def picture_prompt(caption: str, recipe: Recipe, words: Sequence[str], engine: Engine, name: str) -> PromptLine:
    """What a picture shows: its caption and the classes that it names, or without one all words that are looked for."""
    if caption:
        return PromptLine(
            0, fit_prompt(caption, engine.model.tokenizer, name, words), find_classes(caption, words, recipe.table)
        )
    text = reading.photo_of(spoken(recipe.words, recipe.table))
    return PromptLine(0, fit_prompt(text, engine.model.tokenizer, "--classes"), recipe.words)
