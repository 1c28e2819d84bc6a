"""Labels for pictures that exist: a job whose samples are pictures brought back into the network, not drawn by it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.config import INVERSION
from datasetdm_fast.cores import count_cores
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.tiles import Tiling
from datasetdm_fast.engine.loop import prompts
from datasetdm_fast.engine.loop.inverting import TRAINING_STEPS, inversion_generator, inversion_recipe, picture_prompt
from datasetdm_fast.engine.loop.prompts import Plan
from datasetdm_fast.engine.loop.recipe import prompt_words
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.jobs.job import Job, check_least_room, describe_run, open_engine, recipe_of
from datasetdm_fast.runs.jobs.run import continue_job, relocated_paths
from datasetdm_fast.runs.run_folder.document import LEDGER, check_same, made_by, row_facts
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.untrusted import documents, images

LARGEST_CAPTIONS = 64 * 2**20  # bytes
MOST_NAMED = 5  # of the pictures that cannot be read
NAME_PICTURES = "Name a folder of PNG or JPEG files."


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder by name, and their captions."""

    folder: Path
    paths: tuple[Path, ...]
    captions: dict[str, str]
    captions_file: str = ""

    @property
    def names(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.paths]

    def whole(self, index: int) -> np.ndarray:  # [H, W, 3] uint8
        with _to_be_mended():
            return reading.colour_image(self.paths[index], reading.as_shown)

    def passed_over(self) -> list[Path]:
        """The pictures of the folder in formats that are not read."""
        listed = reading.listing(self.folder, *reading.PICTURES, *reading.OTHER_PICTURES)
        return [path for path in listed if path.suffix.lower() in reading.OTHER_PICTURES]

    def check_apart(self, out: Path) -> None:
        """Refuses a run folder inside the folder of the pictures."""
        if out.resolve().is_relative_to(self.folder.resolve()):
            raise Refused(
                f"--out {out}: it lies inside {self.folder}, so its files would count as pictures",
                "Choose another --out.",
            )

    def check(self) -> None:
        """Refuses a picture that cannot be read, before any is labelled: without it the run would be another."""
        pool = ThreadPoolExecutor(count_cores())
        try:
            faults = {name: fault for name, fault in zip(self.names, pool.map(_find_fault, self.paths)) if fault}
        finally:
            pool.shutdown(cancel_futures=True)
        if faults:
            first, *others = faults
            more = f"; nor can be read: {', '.join(others[:MOST_NAMED])}" if others else ""
            more += f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
            raise Refused(f"{faults[first].cause}{more}", faults[first].remedy)

    def sides(self) -> list[tuple[int, int]]:
        """Width and height of every picture, which is to be stored at its own size."""
        sides = []
        for path in self.paths:
            with _to_be_mended():
                width, height = images.sides_of(path)
                reading.check_sides(path, (width, height))
            sides.append((width, height))
            if width * height > images.MOST_PIXELS:
                raise Refused(
                    f"{path}: {width} x {height} pixels, with --tiles at most {images.MOST_PIXELS:,}",
                    "Make it smaller, or drop --tiles.",
                )
        return sides

    def digest(self) -> str:
        """Of the names and bytes of all pictures and of their captions."""
        whole = hashlib.sha256()
        for name, path in zip(self.names, self.paths):
            whole.update(f"{name}\n{storage.sha256_of(path)}\n{self.captions.get(name, '')}\n".encode())
        return f"sha256:{whole.hexdigest()}"


def _find_fault(path: Path) -> Refused | None:
    """What keeps a file from being labelled; of a large JPEG only a smaller image is decoded."""
    try:
        with _to_be_mended():
            data, most = storage.read(path, images.LARGEST_IMAGE_FILE), reading.MOST_PIXELS
            image = images.decode_image(data, str(path), most_pixels=most, least_side=reading.LEAST_SIDE)
            reading.check_sides(path, images.sides_of(path))
            reading.colours(path, image, reading.as_shown)
    except Refused as fault:
        return fault
    return None


@contextmanager
def _to_be_mended() -> Iterator[None]:
    """Within the block, what is refused of a picture has the remedy that a folder of pictures has."""
    try:
        yield
    except Refused as stop:
        raise Refused(stop.cause, "Repair it, or take it out of the folder.") from stop


def open_pictures(folder: str, captions: str) -> Pictures:
    """The pictures of a folder and its sub-folders; `captions` is a JSON object, name or file name -> what it shows."""
    root = Path(folder)
    if not root.is_dir():
        alike = storage.named_alike(root) if not root.exists() else ""
        raise Refused(f"IMAGES: '{folder}' is not a folder{alike}", NAME_PICTURES)
    if (root / LEDGER).exists():
        raise Refused(f"IMAGES: {folder} is a run folder", f"Name the folder of its pictures, {root / 'images'}.")
    paths = tuple(reading.listing(root, *reading.PICTURES, remedy=NAME_PICTURES))
    for path in paths:
        if not documents.is_unicode(str(path)):
            raise Refused(
                f"IMAGES: the path of {documents.quote(path.name)} is not valid UTF-8",
                "Rename it, or the folder that holds it.",
            )
    texts: dict[str, str] = {}
    if captions:
        stored_captions = documents.read_object(Path(captions), most=LARGEST_CAPTIONS, remedy=reading.CAPTIONS)
        names = (path.relative_to(root) for path in paths)
        stems = {name.as_posix(): name.with_suffix("").as_posix() for name in names}
        for name, stem in stems.items():
            text = stored_captions.get(name, stored_captions.get(stem, ""))
            if not isinstance(text, str):
                raise Refused(f"{captions}: the caption of {name} is not a text", reading.CAPTIONS)
            texts[name] = prompts.check_line(text, f"{captions}: {name}")
        if stored_captions and stored_captions.keys().isdisjoint([*stems, *stems.values()]):
            raise Refused(f"{captions}: names none of the pictures in {root}", reading.CAPTIONS)
    return Pictures(root, paths, texts, captions)


def prepare_labelling(
    spec: RunSpec, stored: Mapping[str, Any] | None, pictures: Pictures, timesteps: Sequence[int], *, has_tiles: bool
) -> Job:
    """The job of labelling a folder of pictures, checked in full; nothing is written."""
    size = 0 if has_tiles else spec.model.size  # labels of tiles have the sides of their pictures
    check_least_room(spec.folder, 0 if stored else len(pictures.paths), size, spec.labels.task)
    if stored is None:
        pictures.check()
    sides = pictures.sides() if has_tiles else []
    table, classes = spec.source.table, spec.source.classes
    engine, decoders = open_engine(spec.model, spec.engine, spec.labels.task, stored)
    recipe = recipe_of(spec.sampling, spec.labels, engine, classes, table=table)
    words = recipe.words or prompt_words(engine, recipe.decoded, classes)
    recipe = inversion_recipe(recipe, engine, timesteps)
    number, names = len(pictures.paths), pictures.names
    lines = [picture_prompt(pictures.captions.get(name, ""), recipe, words, engine, name) for name in names]
    tiles = [len(Tiling.of(each, recipe.size).corners) for each in sides]
    before = (stored["composition"].get("together") if tiles else stored["plan"]["batch_size"]) if stored else 0
    together = spec.batch_size or before or min(engine.suggested_batch(), sum(tiles) or number)
    # a picture in tiles is a batch of its own, so that each is committed when it is done
    size = 1 if tiles else together
    digest = pictures.digest()
    plan = Plan(lines.__getitem__, words, number, spec.prompts.seed, size, digest, number, table=table)
    for request in plan if recipe.attention else ():
        recipe.check_request(request, engine.model.tokenizer)
    document = describe_run({**spec.identity, "sampler": INVERSION}, plan, engine, recipe, decoders)
    document |= {
        "command": "label",
        "composition": {
            "told": f"Labels of {count_noun(number, 'picture')} from the folder {pictures.folder.resolve().name}",
            "sides": "their own sizes" if tiles else f"{recipe.size} × {recipe.size} pixels",
            "source": {
                "path": str(pictures.folder),
                "captions": pictures.captions_file,
                "digests": {"pictures": digest},
            },
        },
    }
    if tiles:
        document["composition"]["together"] = together  # tiles that are read as one batch
    job = Job(
        spec.folder,
        plan,
        engine,
        replace(recipe, facts=row_facts(document)),
        document,
        limit=spec.limit,
        batch_size=spec.batch_size,
        generator=inversion_generator(pictures, together if tiles else 0),
    )
    if words and not recipe.asks_all:
        unnamed = [name for name, line in zip(names, lines) if pictures.captions.get(name) and not line.classes]
        job = replace(job, unnamed=(len(unnamed), number))
    if tiles:
        calls = sum(ceil(count / together) for count in tiles) / number * recipe.facts["calls"]
        job = replace(job, pixels=sum(width * height for width, height in sides) // number, calls=ceil(calls))
    if stored is not None:
        relocated = relocated_paths(spec.model.model, spec.model.decoder, spec.model.size, stored)
        _check_stored(job, relocated, stored, pictures.folder)
    return continue_job(job, stored)


def _check_stored(job: Job, relocated: Mapping[str, str], stored: Mapping[str, Any], folder: Path) -> None:
    """Refuses to resume a run folder of other settings, pictures or captions."""
    settings = {**job.document["config"], **relocated}
    before = {"command": made_by(stored), "config": stored["config"]}
    check_same(job.folder, before, {"command": made_by(job.document), "config": settings})
    if stored["composition"]["source"]["digests"] != job.document["composition"]["source"]["digests"]:
        raise Refused(
            f"{job.folder}: it holds labels of other pictures or captions than {folder} has now",
            "Restore them, or choose another --out: pictures that were added need one of their own.",
        )


def parse_timesteps(texts: Sequence[str]) -> tuple[int, ...]:
    """Noise levels of the attention, from the flag."""
    for text in texts:
        if not (text.isdecimal() and int(text) < TRAINING_STEPS):
            raise Refused(
                f"--timesteps: {documents.quote(text)} is not a whole number from 0 to {TRAINING_STEPS - 1}",
                "Write --timesteps 100,300,500.",
            )
    if not texts:
        raise Refused("--timesteps: there are none", "Write --timesteps 100,300,500.")
    return tuple(map(int, texts))
