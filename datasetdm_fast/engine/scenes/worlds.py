"""The worlds by name, and which scene seeds are whose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.scenes.hard import render as hard_render
from datasetdm_fast.engine.scenes.hard import scene as hard
from datasetdm_fast.engine.scenes.world import TableTop, View

JUDGES = range(2_000_000, 5_000_000)  # of the nets that judge generated images, and of what they ask for
LEARN, HELD_OUT, ASKED = 2_000_000, 3_000_000, 4_000_000  # first of these: to learn from, be tested on, ask for
TRAIN_SEEDS = 10_000_000  # scenes from here on teach a diffusion model; below are those of decoders and evaluation
TAUGHT = range(TRAIN_SEEDS, 100_000_000)
OWNERS = {"the nets of bench.world.judge": JUDGES, "the diffusion model": TAUGHT}


@dataclass(frozen=True)
class World:
    """A procedural world: what there is in it, and its scenes by seed."""

    name: str
    classes: tuple[str, ...]
    things: tuple[str, ...]
    colours: Mapping[str, object]
    tables: Mapping[str, object]
    domains: Mapping[str, str]  # name -> what a caption ends with
    max_depth: float
    sample_scene: Callable[..., TableTop]
    view: Callable[[int, int], View]  # of a seed, at so many pixels
    render: Callable[..., View]  # of a scene
    words: tuple[str, ...] = ()  # of its captions, beside the names above
    joints: tuple[str, ...] = world.JOINTS
    limbs: tuple[tuple[int, int], ...] = world.LIMBS


WORLDS = {
    "demo": World(
        "demo", world.CLASSES, world.THINGS, world.COLOURS, world.TABLES, world.WHERE, world.MAX_DEPTH,
        world.sample_scene, world.view, world.render,
    ),
    "hard": World(
        "hard", hard.CLASSES, hard.THINGS, hard.COLOURS, hard.TABLES, hard.WHERE, hard.MAX_DEPTH,
        hard.sample_scene, hard_render.view, hard_render.render, (*filter(None, hard.LOOKS), "rain", "snow"),
    ),
}  # fmt: skip


def owner_of(seeds: range) -> str | None:
    """Who learns from, or is judged by, scenes of these seeds: None where it is nobody."""
    return next((name for name, own in OWNERS.items() if seeds.start < own.stop and own.start < seeds.stop), None)
