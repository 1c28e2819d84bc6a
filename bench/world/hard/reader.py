"""Scenes of the harder world as labelled images, with an address as those of the demo world have."""

from bench.world.hard import render as hard_render
from bench.world.hard import scene as hard
from datasetdm_fast.training.readers import READERS, RENDERED_KINDS
from datasetdm_fast.training.readers.demo import DemoWorld


class HardWorld(DemoWorld):
    kind = "hard"
    classes, thing_classes, max_depth = hard.CLASSES, hard.THINGS, hard.MAX_DEPTH
    render_view = staticmethod(hard_render.view)


def register() -> None:
    """Makes hard:COUNT@FIRST_SEED an address of labelled images in this process, as demo:COUNT@FIRST_SEED is."""
    READERS["hard"] = HardWorld.read
    RENDERED_KINDS.add("hard")
