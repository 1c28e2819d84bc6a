"""The data of the claims: real scenes by seed, labellers trained on them, and images generated from captions."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from bench.decoders import load_decoders
from bench.proof.decoders import train_decoder
from bench.proof.students.student_data import StudentData, Vocabulary
from bench.runs import prepare
from datasetdm_fast.config import DEMO_DEFAULTS
from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap, Trust
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.checkpoint import save_decoder
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.engine.labels.trust import trust_of
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.inversion import invert_for
from datasetdm_fast.engine.loop.prompts import DEMO_SCENES
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.tasks import read_labels
from datasetdm_fast.engine.tasks.captions import held_to
from datasetdm_fast.runs.compositions.composition import SquareSource
from datasetdm_fast.runs.compositions.redraw import find_result
from datasetdm_fast.runs.compositions.redraw import prepare as prepare_redrawing
from datasetdm_fast.runs.compositions.settings import VarySettings
from datasetdm_fast.runs.compositions.vary import Variants
from datasetdm_fast.runs.jobs.run import count_rows
from datasetdm_fast.runs.jobs.writing import write_missing as generate
from datasetdm_fast.runs.run_folder.reader import Run, StoredSample, open_run
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.training.readers.demo import DemoWorld
from datasetdm_fast.training.settings import CacheSettings, RecipeSettings, ViewSettings

LABELLED = 1000  # first seed of the scenes that labellers and students are trained on
VALIDATION = 700_000  # first seed of the scenes that settings are chosen on
TEST = 8_000_000  # first seed of the scenes that judge, looked at once
REPETITIONS, APART = 20, 10_000  # tables that may be made, and the seeds between two of their scenes
SEARCHED = 100_000  # seeds gone through at most for scenes of a kind
UNSEEN = ("cone", "tree")
SEEN = tuple(name for name in world.THINGS if name not in UNSEEN)
ELSEWHERE = tuple(name for name in world.DOMAINS if name != "day")
POOL = 1200  # prompts of the generated pool; a smaller scale makes the first of them
POOL_SEED = 20_000
SAMPLING = {"sampler": "ddim", "steps": 25, "batch_size": 8, "threads": 1}
READ_TOGETHER = 8
RARE = ("ring", "star")  # what the demo world draws least
MODEL_SIDE = DEMO_DEFAULTS.size


def is_seen(scene: world.Scene) -> bool:
    return all(thing.kind in SEEN for thing in scene.things)


def is_day(scene: world.Scene) -> bool:
    return scene.domain == "day"


def is_elsewhere(scene: world.Scene) -> bool:
    return scene.domain in ELSEWHERE


def named_things(sample: StoredSample) -> list[str]:
    return [name for name in sample.classes if name in world.THINGS]


def names_one(sample: StoredSample) -> bool:
    return len(named_things(sample)) == 1


def says_elsewhere(sample: StoredSample) -> bool:
    """Whether the prompt asks for another hour or weather than day."""
    return any(sample.prompt.endswith(world.WHERE[domain]) for domain in ELSEWHERE)


def is_any(scene_or_sample: object) -> bool:
    return True


def scenes(first: int, count: int, size: int, fits: Callable[[world.Scene], bool] = is_any) -> DemoWorld:
    """The first `count` rendered scenes from a seed on that fit."""
    found: list[int] = []
    for index in range(SEARCHED):
        if len(found) == count:
            break
        if fits(world.sample_scene(first + index)):
            found.append(index)
    return DemoWorld(SEARCHED, first, size).subset(found)


def seeds(source: DemoWorld) -> set[int]:
    return {source.first + record for record in source.order}


@dataclass(frozen=True)
class Scale:
    """How large everything is, and which of it; by default, as the published rows have it."""

    seeds: int = 3
    steps: int = 1600  # of a student
    short: int = 1600  # of a student where the row has a labeller of its own
    real: int = 100
    fewer: tuple[int, ...] = (25, 50)  # real scenes of the instance row; depth and pose have the first of them
    synthetic: int = 1000  # images generated with every label
    parity: int = 96  # images generated a second time by the reference
    varied: int = 200  # day images of which variants are made in every other domain; 0 = no such arm
    test: int = 1000
    labeller_steps: int = 0  # 0 = as many as `train` takes
    labeller_draws: int = 12
    sizes: tuple[str, ...] = ("small", "large")  # of the students of the instance row
    free: int = 300  # images of the row on labels from attention
    free_steps: int = 2000  # of its students
    repetition: int = 0  # of everything but the labelled scenes, and the decoders that learn from them

    def first(self, seed: int) -> int:
        """The first seed of some scenes or images in this repetition."""
        return seed + APART * self.repetition

    def place(self, folder: Path) -> Path:
        """Where images of this repetition are."""
        return folder / f"repetition-{self.repetition}" if self.repetition else folder

    @property
    def students(self) -> range:
        """The seeds of the students of an arm."""
        return range(self.repetition * self.seeds, (self.repetition + 1) * self.seeds)


FULL = Scale()
QUICK = Scale(
    seeds=2,
    steps=1000,
    short=500,
    fewer=(25,),
    synthetic=240,
    parity=32,
    varied=48,
    test=300,
    labeller_steps=120,
    labeller_draws=1,
    sizes=("small",),
    free=96,
    free_steps=500,
)


def pool(folder: Path, count: int, seed: int, engine: str, say: Callable[[str], None]) -> Run:
    """The run folder with the first `count` images of the pool; what is there already stays."""
    config = RunConfig(number=POOL, seed=seed, engine=engine, out=str(folder), quiet=True, **SAMPLING)
    there = count_rows(Path(config.out))
    if there < count:
        say(f"{folder}: generating {count - there} images with engine {engine}")
        generate(prepare(replace(config, limit=count - there)))
    return open_run(folder)


def day_and_variants(folder: Path, count: int, seed: int, say: Callable[[str], None]) -> tuple[Run, Run]:
    """Images generated from captions of day scenes, and each of them moved to every other domain."""
    captions = [world.sample_scene(DEMO_SCENES + seed + k, domain="day").caption for k in range(count)]
    day = RunConfig(number=count, seed=seed, engine="fast", out=str(folder / "day"), quiet=True, **SAMPLING)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "day.txt").write_text("\n".join(captions))
    job = prepare(replace(day, prompts=str(folder / "day.txt")))
    if job.done < count:
        say(f"{day.out}: generating {count} images by day, and {len(ELSEWHERE)} variants of each")
        generate(job)
    settings = VarySettings(domain=ELSEWHERE, engine="fast", batch_size=SAMPLING["batch_size"], threads=1, quiet=True)
    variants = Variants(SquareSource(folder / "day"), settings)
    if find_result(variants, folder / "varied") is None:
        generate(prepare_redrawing(variants, folder / "varied"))
    return open_run(folder / "day"), open_run(folder / "varied")


@dataclass(frozen=True)
class RelabelledSample:
    """A generated sample with the labels of other labellers in place of its own."""

    id: str
    image: np.ndarray
    classes: tuple[str, ...]
    semantic: SemanticMap
    instances: Instances | None = None
    depth: DepthMap | None = None
    keypoints: Keypoints | None = None
    prompt: str = ""
    class_table = None  # the words of its classes are the usual ones

    @property
    def trust(self) -> Trust:
        found = {"semantic": self.semantic, "instance": self.instances}
        return trust_of(self.classes, {task: label for task, label in found.items() if label is not None})


Pictured = StoredSample | RelabelledSample


def train_labeller(source: DemoWorld, task: str, scale: Scale, captures: Path, folder: Path) -> None:
    """A decoder trained on these scenes alone, in a folder; one that is there already stays."""
    if not (folder / "config.json").exists():
        engine = build_engine("fast", load_model("demo"), {})
        settings = {
            "view_settings": ViewSettings(draws=scale.labeller_draws),
            "recipe_settings": RecipeSettings(steps=scale.labeller_steps),
            "cache_settings": CacheSettings(cache_dir=str(captures)),
        }
        save_decoder(train_decoder(engine, source, task, len(source), **settings), folder)


def relabelled(
    run: Run, positions: Sequence[int], decoders: Path, rename: Callable[[StoredSample, SemanticMap], SemanticMap]
) -> Iterator[RelabelledSample]:
    """Generated images labelled by other labellers, which read them as they read real ones."""
    loaded = {task: decoder for task, decoder in load_decoders(decoders).items() if not decoder.config.has_text}
    engine = build_engine("fast", load_model("demo"), loaded)
    configs = {task: decoder.config for task, decoder in loaded.items()}
    for start in range(0, len(positions), READ_TOGETHER):
        samples = [run[position] for position in positions[start : start + READ_TOGETHER]]
        prompts = [sample.prompt for sample in samples]
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        captures = invert_for(engine, list(configs), images, prompts, [sample.seed for sample in samples])
        labels = {}
        for task, config in configs.items():
            raw = held_to(
                engine.annotate(task, captures[task], None), config, prompts, tokenizer=engine.model.tokenizer
            )
            labels[LABEL_KINDS[task].attribute] = read_labels(raw, images.numpy(), config, engine.model.size)
        for k, sample in enumerate(samples):
            found = {name: label[k] for name, label in labels.items()}
            found["semantic"] = rename(sample, found["semantic"])
            yield RelabelledSample(sample.id, sample.image, sample.classes, **found)


def moved(labelled: Iterable[RelabelledSample], variants: Run) -> Iterator[RelabelledSample]:
    """Every variant with the labels that its source was given."""
    found = {sample.id: sample for sample in labelled}
    for variant in variants:
        yield replace(found[variant.meta["source"]], id=variant.id, image=variant.image)


def unchanged(sample: StoredSample, label: SemanticMap) -> SemanticMap:
    return label


def by_its_prompt(sample: StoredSample, label: SemanticMap) -> SemanticMap:
    """Whatever the labeller takes for a thing gets the one class that the prompt names."""
    things = [k for k, name in enumerate(label.classes) if name in world.THINGS]
    named = label.classes.index(named_things(sample)[0])
    return replace(label, labels=np.where(np.isin(label.labels, things), named, label.labels).astype(np.uint8))


def stored(path: Path, vocabulary: Vocabulary, make: Callable[[], StudentData]) -> StudentData:
    """A set that was made once and is read from its file since, which is whole or not there."""
    if path.exists():
        return StudentData(vocabulary, **torch.load(path, weights_only=True))
    data, content = make(), io.BytesIO()
    names = [field.name for field in fields(StudentData) if field.name != "vocabulary"]
    torch.save({name: getattr(data, name) for name in names}, content)
    storage.publish({path: content.getvalue()})
    return data
