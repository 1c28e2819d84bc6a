"""The demo world and the harder one by name, and the seeds that models learn from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.world.hard import render as hard_render
from bench.world.hard import scene as hard
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.scenes.world import TableTop, View

LEARN, HELD_OUT, ASKED = 2_000_000, 3_000_000, 4_000_000  # first seeds: of what a judge learns, its test, its requests
TRAIN_SEEDS = 10_000_000  # first seed of the scenes that a diffusion model learns from


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
