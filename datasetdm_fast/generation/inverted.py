"""Labels for pictures that exist: a job whose samples are pictures brought back into the network, not drawn by it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import LabelConfig
from datasetdm_fast.data import Batch, Sample, SetAside
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.foreign import documents
from datasetdm_fast.generation import driver, prompts
from datasetdm_fast.generation.class_prompts import check_class_prompt
from datasetdm_fast.generation.job import (
    Job,
    adopt,
    check_room,
    class_words,
    count_rows,
    describe,
    engine_of,
    recipe_of,
    row_facts,
)
from datasetdm_fast.generation.plan import Plan
from datasetdm_fast.generation.prompts import GivenPrompt, fit
from datasetdm_fast.generation.run import facts_of
from datasetdm_fast.labels.class_tables import spoken
from datasetdm_fast.labels.words import find_classes
from datasetdm_fast.run_folder.document import check_same, read_document
from datasetdm_fast.run_folder.folder import RunFolder
from datasetdm_fast.truth import framing, reading
from datasetdm_fast.truth.labelled import Picture

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from datasetdm_fast.engines.engine import Engine
    from datasetdm_fast.generation.recipe import Recipe

TRAINING_STEPS = 1000  # of every model
LARGEST_CAPTIONS = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder, by name, and what is said of them."""

    folder: Path
    paths: tuple[Path, ...]
    captions: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.paths]

    def load(self, index: int, size: int) -> np.ndarray:  # [size, size, 3] uint8
        """The largest square in the middle of a picture."""
        return square(reading.colour_image(self.paths[index], reading.as_shown), size)

    def digest(self) -> str:
        """Of the names and bytes of all pictures and of their captions."""
        whole = hashlib.sha256()
        for name, path in zip(self.names, self.paths):
            whole.update(f"{name}\n{storage.sha256_of(path)}\n{self.captions.get(name, '')}\n".encode())
        return f"sha256:{whole.hexdigest()}"


@dataclass(frozen=True)
class GivenPictures:
    """Pictures in memory, whose names are their places."""

    images: Sequence[np.ndarray]  # each [H, W, 3] uint8

    @property
    def names(self) -> list[str]:
        return [str(place) for place in range(len(self.images))]

    def load(self, index: int, size: int) -> np.ndarray:  # [size, size, 3] uint8
        return square(self.images[index], size)


def in_memory(images: Sequence[np.ndarray | Image]) -> GivenPictures:
    """Images of a caller, checked."""
    return GivenPictures([_pixels(image, place) for place, image in enumerate(images)])


def _pixels(image: np.ndarray | Image, place: int) -> np.ndarray:
    """The pixels of an image of a caller, checked."""
    import numpy as np

    pixels = np.array(image.convert("RGB") if hasattr(image, "convert") else image)
    is_picture = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    if not is_picture or min(pixels.shape[:2]) < reading.LEAST_SIDE:
        raise Refused(
            f"image {place}: {pixels.dtype} of shape {list(pixels.shape)}, expected uint8 of shape [H, W, 3], sides of "
            f"at least {reading.LEAST_SIDE}",
            "Convert it to RGB first.",
        )
    return pixels


def square(image: np.ndarray, size: int) -> np.ndarray:  # [size, size, 3] uint8
    """The largest square in the middle of an image [H, W, 3] uint8."""
    return framing.framed(Picture("", image, ""), framing.fitted(*image.shape[:2], size), size).image


def open_pictures(folder: str, captions: str) -> Pictures:
    """The pictures of a folder and its sub-folders; `captions` is a JSON object, name or file name -> what it shows."""
    root = Path(folder)
    if not folder or not root.is_dir():
        raise Refused(f"IMAGES: {documents.quoted(folder)} is no folder", "Name a folder of PNG or JPEG files.")
    paths = tuple(reading.listing(root, *reading.PICTURES))
    said: dict[str, str] = {}
    if captions:
        given = documents.read_object(Path(captions), most=LARGEST_CAPTIONS)
        for path in paths:
            name = path.relative_to(root).as_posix()
            text = given.get(name, given.get(Path(name).with_suffix("").as_posix(), ""))
            if not isinstance(text, str):
                raise Refused(f"{captions}: the caption of {name} is no text", 'Write {"a.jpg": "a dog on a sofa"}.')
            said[name] = prompts.check_line(text, f"{captions}: {name}")
    return Pictures(root, paths, said)


class InvertingGenerator(driver.BatchGenerator):
    """Brings pictures back: noise is added at the decoders' timestep, and at several for the attention."""

    def __init__(self, *arguments: Any, pictures: Pictures | GivenPictures, timesteps: Sequence[int], capture: int):
        super().__init__(*arguments)
        self.pictures, self.timesteps, self.capture = pictures, timesteps, capture

    def sample(self, batch: Batch) -> driver.SampledBatch:
        import numpy as np
        import torch

        from datasetdm_fast.engines.device import to_device
        from datasetdm_fast.sampling import times

        engine, recipe, requests = self.engine, self.recipe, batch.padded
        pixels = torch.from_numpy(np.stack([self.pictures.load(each.index, recipe.size) for each in requests]))
        clean = engine.encode_image(pixels)
        context, words = self.contexts(requests)
        sums = self.nothing_yet(len(requests))
        noise = to_device(
            torch.stack([times.initial_noise(each.seed, *clean.shape[1:]) for each in requests]), clean.device
        )
        captures = {}
        if recipe.decoded:
            latents = times.add_noise(engine.model.scheduler, clean, noise, self.capture)
            _, capture = engine.denoise_and_capture(latents, self.capture, context)
            captures = dict.fromkeys(recipe.captured, capture)
            self.on_unet_call()
        for timestep in self.timesteps if sums is not None else ():
            latents = times.add_noise(engine.model.scheduler, clean, noise, timestep)
            _, sums = engine.denoise_and_average(latents, timestep, context, words, sums)
            self.on_unet_call()
        return driver.SampledBatch(clean, captures, sums and sums.over(len(self.timesteps)), pixels)

    def label(self, batch: Batch, drawn: driver.SampledBatch) -> list[Sample | SetAside]:
        names = self.pictures.names
        return [
            replace(one, provenance={**one.provenance, "picture": names[one.request.index]})
            if isinstance(one, Sample)
            else one
            for one in super().label(batch, drawn)
        ]


def as_stored(config: LabelConfig) -> LabelConfig:
    """The settings a run folder was started with; its pictures and captions may have been moved."""
    stored = read_document(Path(config.out))
    if stored is None or stored.get("command") != "label":
        raise Refused(f"--only {config.only}: {config.out} was not made by label", "Name the folder with --out.")
    source = stored["composition"]["source"]
    kept = {name: value for name, value in stored["config"].items() if name in config.identity()}
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    moved = {"images": config.images or source["path"], "captions": config.captions or source.get("captions", "")}
    return replace(config, **kept, **moved)


def prepare(config: LabelConfig) -> Job:
    """The job of labelling a folder of pictures, checked in full; nothing is written."""
    timesteps = _timesteps(config.timesteps)
    pictures = open_pictures(config.images, config.captions)
    stored = read_document(Path(config.out))
    engine, decoders = engine_of(config, stored)
    recipe = recipe_of(config, engine, prompts.check_classes(config.classes))
    words = recipe.words or class_words(engine, recipe.decoded, prompts.check_classes(config.classes))
    recipe = inverting(recipe, engine, timesteps)
    number, names = len(pictures.paths), pictures.names
    lines = [said(pictures.captions.get(name, ""), recipe, words, engine, name) for name in names]
    size = config.batch_size or (stored["plan"]["batch_size"] if stored else min(engine.suggested_batch(), number))
    plan = Plan(lines.__getitem__, words, number, config.seed, size, pictures.digest(), number)
    if recipe.attention is not None:
        for request in plan:
            check_class_prompt(request, recipe.asked(request), recipe.attention, engine.model.tokenizer)
    identity = {name: list(value) if isinstance(value, tuple) else value for name, value in config.identity().items()}
    document = describe({**identity, "sampler": "inversion"}, plan, engine, recipe, decoders)
    document |= {
        "command": "label",
        "composition": {
            "told": f"Labels of {number} pictures from the folder {pictures.folder.resolve().name}",
            "sides": f"{recipe.size} × {recipe.size} pixels",
            "source": {
                "path": str(pictures.folder),
                "captions": config.captions,
                "digests": {"pictures": pictures.digest()},
            },
        },
    }
    generator = generator_of(recipe, pictures)
    job = Job(config, plan, engine, replace(recipe, facts=row_facts(document)), document, 0, generator=generator)
    if stored is not None:
        check_same(job.folder, *({"config": one["config"]} for one in (stored, document)))
        job = replace(adopt(job, stored), done=count_rows(config))
    check_room(job)
    return job


def inverting(recipe: Recipe, engine: Engine, timesteps: Sequence[int]) -> Recipe:
    """A recipe of generate as one of pictures that are brought back: at these timesteps where labels are read from
    attention, and at the decoders' own.
    """
    from datasetdm_fast.sampling.inversion import capture_timestep

    timesteps = list(timesteps) if recipe.attention else []
    configs = {task: engine.decoders[task].config for task in recipe.decoded}
    facts = {
        **recipe.facts,
        "sampler": "inversion",
        "steps": len(timesteps),
        "calls": len(timesteps) + bool(recipe.decoded),
        "capture_timestep": capture_timestep(configs) if configs else 0,
        "timesteps": timesteps,
    }
    return replace(recipe, facts=facts)


def generator_of(recipe: Recipe, pictures: Pictures | GivenPictures) -> Callable[..., InvertingGenerator]:
    """What brings these pictures back by such a recipe."""
    facts = recipe.facts
    return partial(
        InvertingGenerator,
        pictures=pictures,
        timesteps=tuple(facts["timesteps"]),
        capture=facts["capture_timestep"],
    )


def _timesteps(given: Sequence[str]) -> tuple[int, ...]:
    """Noise levels of the attention."""
    for text in given:
        if not (text.isdecimal() and int(text) < TRAINING_STEPS):
            raise Refused(
                f"--timesteps: {documents.quoted(text)} is no whole number from 0 to {TRAINING_STEPS - 1}",
                "Write --timesteps 100,300,500.",
            )
    if not given:
        raise Refused("--timesteps: there are none", "Write --timesteps 100,300,500.")
    return tuple(map(int, given))


def said(caption: str, recipe: Recipe, words: Sequence[str], engine: Engine, name: str) -> GivenPrompt:
    """What a picture shows: its caption and the classes that it names, or without one all words that are looked for."""
    if caption:
        return GivenPrompt(0, fit(caption, engine.model.tokenizer, name, words), find_classes(caption, words))
    text = reading.photo_of(spoken(recipe.words))
    return GivenPrompt(0, fit(text, engine.model.tokenizer, "--classes"), recipe.words)


def remake(job: Job, id: str) -> list[str]:
    """Labels one picture of a run folder again; the files that were missing or damaged."""
    with RunFolder(job.folder, job.document) as folder:
        row = folder.ledger.row(int(id)) if id.isdecimal() and len(id) <= 18 else None
        if row is None:
            raise Refused(
                f"--only {id}: no sample of {job.folder} has this id",
                "Ids are those of samples.jsonl, for example 00000003.",
            )
        batch = job.plan.batch(row.request.index // job.plan.batch_size)
        ((_, results),) = driver.generate([batch], job.engine, job.recipe, make=job.generator)
        result = next(one for one in results if one.request.index == row.request.index)
        if isinstance(result, SetAside):
            raise GateFailed(
                f"sample {result.request.id}: {result.reason}; nothing was written", "Try another --dtype."
            )
        recorded = replace(result, provenance={**result.provenance, **facts_of(job.recipe, batch)})
        return folder.renew(row, recorded)
